"""What makes shards in a process of its own: told where steps lie, it compresses them and writes the shard's files.

Whoever asks, and why, is in ``shard_processes.py``. Here nothing of torch is imported: such a process starts quickly
and takes little memory.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from flowreel.engine.errors import OutputWriteError
from flowreel.sinks.shared_memory import SharedView
from flowreel.sinks.store_target import LocalTarget
from flowreel.sinks.store_writer import shard_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flowreel.sinks.codecs import FlowCodec

THREADS = 2  # that compress: one alone leaves a shard's steps in memory for long, more wait for each other's blocks


class Setting(NamedTuple):
    """What is the same for all shards of a store."""

    path: str  # of the finished store
    codec: FlowCodec
    shard_length: int


class Request(NamedTuple):
    """A shard to be made."""

    setting: Setting
    number: int
    places: list[tuple[int, int]]  # in the shared memory, and how many flows lie there one after another
    times: Mapping[str, Sequence[Any]]  # by the names of ``COORDINATES``


def serve(connection: int, memory: int) -> None:
    """Makes shards as they are asked for, until nobody can ask any more.

    An answer is None when the steps are not needed any more, then the keys of the files that are prepared, and their
    bytes; or the error in place of either. Args: descriptors of the socket and of the shared memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whoever asked may have gone by the time there is an answer: then this ends without a word, too.
    with suppress(EOFError, OSError), socket.socket(fileno=connection) as ours, ours.makefile("rwb") as stream:
        view = SharedView(memory)
        while True:
            request: Request = pickle.load(stream)
            setting = request.setting
            try:
                chunks = []
                for place, count in request.places:
                    steps = view.at(place, count * setting.codec.flow_bytes).reshape(count, -1)
                    chunks += setting.codec.encode_prepared(steps, THREADS)
                _tell(None, stream)
                files = shard_files(request.number, setting.shard_length, chunks, request.times)
                answer: object = list(files), LocalTarget(setting.path).prepare(files)
            except Exception as error:
                answer = _as_sent(error)
            _tell(answer, stream)
    os._exit(0)  # whoever asked waits for it, and there is nothing to tidy up


def _tell(what: object, stream: Any) -> None:
    pickle.dump(what, stream)
    stream.flush()


def _as_sent(error: Exception) -> Exception:
    """The error itself where it goes through a pickle, else what it says."""
    try:
        return pickle.loads(pickle.dumps(error))  # type: ignore[no-any-return]
    except Exception:
        return OutputWriteError(f"{type(error).__name__}: {error}")
