"""Makes shards in a worker process: told where quantised flow lies, it compresses it and writes the shard's files.

The parent's side, and the reason for it, is in ``shard_processes.py``. torch is not imported here, so that such a
process starts quickly and takes little memory.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from flowreel.engine.errors import SentError
from flowreel.sinks.shared_memory import SharedView
from flowreel.sinks.store_target import LocalTarget
from flowreel.sinks.store_writer import prepare_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flowreel.engine.data import Bytes
    from flowreel.sinks.codecs import FlowCodec

THREADS = 2  # that compress: one takes long to free a shard's steps, more than two wait for each other's blocks


class Setting(NamedTuple):
    """What all shards of a store have in common."""

    path: str  # of the finished store
    codec: FlowCodec
    shard_length: int


class Request(NamedTuple):
    """A shard to be made."""

    setting: Setting
    number: int
    place: int  # byte offset in the shared memory of its steps, which are contiguous
    flows: int
    times: Mapping[str, Sequence[Any]]  # keyed by the names in ``COORDINATES``


def make(request: Request, steps: Bytes, compressed: Callable[[], None]) -> tuple[list[str], int]:
    """See ``prepare_shard``.

    steps: (flows x bytes per flow,) uint8, as ``FlowCodec.encode_prepared`` takes them. compressed: called as soon as
    they are no longer needed.
    """
    path, codec, length = request.setting
    chunks = codec.encode_prepared(steps.reshape(request.flows, -1), THREADS)
    compressed()
    return prepare_shard(LocalTarget(path), request.number, length, chunks, request.times)


def serve(connection: int, memory: int) -> None:
    """Makes shards on request until the parent closes the connection. Both arguments are file descriptors.

    It sends None when it is ready. For each shard it sends None when the steps are no longer needed, then what ``make``
    returns; an error takes the place of either.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to whole process groups; the parent ends this one
        signal.signal(number, signal.SIG_IGN)
    # The parent may be gone by the time there is an answer, or halfway through a request: then this process ends, too.
    gone = suppress(EOFError, OSError, pickle.UnpicklingError)
    with gone, socket.socket(fileno=connection) as ours, ours.makefile("rwb") as stream:
        view = SharedView(memory)
        _tell(None, stream)
        while True:
            request: Request = pickle.load(stream)
            try:
                steps = view.at(request.place, request.flows * request.setting.codec.flow_bytes)
                answer: object = make(request, steps, lambda: _tell(None, stream))
            except Exception as error:
                answer = SentError.of(error)
            _tell(answer, stream)
    os._exit(0)  # the parent waits for the exit, and there is nothing to clean up


def _tell(what: object, stream: Any) -> None:
    pickle.dump(what, stream)
    stream.flush()
