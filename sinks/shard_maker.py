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
    from collections.abc import Callable, Mapping, Sequence

    from flowreel.engine.data import Bytes
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
    place: int  # bytes, where in the shared memory its steps lie one after another
    flows: int
    times: Mapping[str, Sequence[Any]]  # by the names of ``COORDINATES``


def make(request: Request, steps: Bytes, compressed: Callable[[], None]) -> tuple[list[str], int]:
    """Prepares the shard's files. Returns their keys, in the order in which they get their names, and their bytes.

    steps: (flows x bytes of one,) uint8, as ``FlowCodec.encode_prepared`` wants them. compressed: called when nobody
    needs them any more.
    """
    path, codec, length = request.setting
    chunks = codec.encode_prepared(steps.reshape(request.flows, -1), THREADS)
    compressed()
    files = shard_files(request.number, length, chunks, request.times)
    return list(files), LocalTarget(path).prepare(files)


def serve(connection: int, memory: int) -> None:
    """Makes shards as they are asked for, until nobody can ask any more. Args: descriptors.

    What it says: None when it is ready; of each shard None when the steps are not needed any more, then what ``make``
    returns; or the error in place of either.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # what stops a whole group: whoever asked ends this in good order
        signal.signal(number, signal.SIG_IGN)
    # Whoever asked may have gone by the time there is an answer: then this ends without a word, too.
    with suppress(EOFError, OSError), socket.socket(fileno=connection) as ours, ours.makefile("rwb") as stream:
        view = SharedView(memory)
        _tell(None, stream)
        while True:
            request: Request = pickle.load(stream)
            try:
                steps = view.at(request.place, request.flows * request.setting.codec.flow_bytes)
                answer: object = make(request, steps, lambda: _tell(None, stream))
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
