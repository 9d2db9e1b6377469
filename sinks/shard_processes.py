"""From flows to full shards in worker processes, so that a fast run keeps the GIL to itself.

    steps -> shared memory -> where in it a full shard lies -> a process (``shard_maker.py``) -> names

On a GPU, a light network's run is bound by how often its few threads get the GIL, for which threads that compress and
write would compete. So the steps of a shard come from the GPU directly into memory shared with worker processes. It is
pinned, so that no thread copies them; a thread was seen to copy 2 GB a second during a run. When the shard is
full, a process is told where the steps lie and writes the shard's files to the disk under unfinished names. In this
process a thread sleeps until that is done, and renames them. Shards that fill up before the processes are ready are
made in this process.

A process ends when its socket is closed, and so with its parent, however the parent ended. Until then it shares the
parent's lock on the unfinished store. Ctrl-C does not reach it; the parent, which it does reach, ends it.
"""

from __future__ import annotations

import json
import pickle
import select
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from flowreel.engine import publish
from flowreel.engine.errors import OutputWriteError, SentError
from flowreel.sinks.shard_maker import THREADS, Request, Setting, make
from flowreel.sinks.shared_memory import Buffer, SharedMemory
from flowreel.sinks.store_layout import COORDINATES

if TYPE_CHECKING:
    import numpy.typing as npt

    from flowreel.engine.data import Bytes, Pin
    from flowreel.sinks.codecs import FlowCodec
    from flowreel.sinks.shards import Times
    from flowreel.sinks.store_target import LocalTarget
    from flowreel.sinks.store_writer import StoreWriter

MOST_PROCESSES = 8  # each holds a shard's steps in memory
MOST_SHARD_BYTES = 128 << 20  # of one shard's steps; larger shards would stay in memory for too long
# On 16 cores processes, once ready, stored 1.7 times as many flows of a light network as threads; counting the time to
# start and end them, they were faster from about 72 shards on, and from more for slower networks. So threads of this
# process make the shards of shorter runs, and all shards where there are few cores. Measure before you lower either.
FEW_SHARDS = 128
FEW_WORKERS = 7
LEAST_FLOWS = 16  # per shard: at 1920x1080, 8 per shard, 56 shards, threads stored 479 a second, processes 329
GRACE_S = 30.0  # for a process to finish a shard nobody waits for any more, before it is killed
_GONE = (EOFError, OSError, pickle.UnpicklingError)  # raised by reading and writing when the other end is gone
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from flowreel.sinks.shard_maker import serve; serve(*map(int, sys.argv[2:]))"
)


def are_worth_it(shards: float, shard_length: int, workers: int) -> bool:
    """Whether processes make so many shards faster than so many threads."""
    return shards > FEW_SHARDS and shard_length >= LEAST_FLOWS and workers > FEW_WORKERS


def are_possible(codec: FlowCodec, shard_length: int) -> bool:
    """Whether worker processes can make shards of such flows on this system."""
    system = sys.platform == "linux" and bool(sys.executable) and not getattr(sys, "frozen", False)
    return system and codec.shuffles and shard_length * codec.flow_bytes <= MOST_SHARD_BYTES


def how_many(workers: int) -> int:
    """The number of processes for a machine with cores for so many threads."""
    return min(MOST_PROCESSES, max(1, workers // THREADS))


class ShardsInProcesses:
    """See ``Shards``."""

    def __init__(self, files: StoreWriter, target: LocalTarget, setting: Setting, count: int, processes: int) -> None:
        """count: flows stored already. Raises OSError when the system has no process or memory to give."""
        self.count = count
        self._memory = SharedMemory()
        self._files = files
        self._setting = setting
        self._shard_bytes = setting.shard_length * setting.codec.flow_bytes
        self._spare: list[Buffer] = []  # whose steps are no longer needed
        self._filling: Buffer | None = None  # of the shard being filled, once it is needed
        self._unpin: list[Callable[[], None]] = []  # one for each pinned buffer
        self._times: dict[str, list[Any]] = {name: [] for name in COORDINATES}  # of the shard being filled
        self._all: list[_Process] = []
        self._idle: deque[_Process] = deque()
        try:
            for _ in range(processes):
                self._all.append(_Process(target.name, self._memory.descriptor, target.held))
                self._idle.append(self._all[-1])
            self._memory.reserve((processes + 1) * self._shard_bytes)  # one is being filled
        except BaseException:
            self.close()
            raise

    def room(self, flows: int, pin: Pin) -> Bytes | None:
        """Memory for the steps of the next flows, (flows, bytes per flow) uint8; None: they do not fit into one shard.

        ``add_steps`` then copies nothing.
        """
        if self.count % self._setting.shard_length + flows > self._setting.shard_length:
            return None
        return self._place(flows, pin).reshape(flows, self._setting.codec.flow_bytes)

    def add_steps(self, steps: npt.NDArray[np.uint8], times: Times) -> None:
        length, first = self._setting.shard_length, 0
        while first < len(steps):
            part = slice(first, first + length - self.count % length)  # the part in one shard, usually all of it
            first = part.stop
            self._add(steps[part], {name: values[part] for name, values in times.items()})

    def _add(self, steps: npt.NDArray[np.uint8], times: Times) -> None:
        """Adds flows that lie in one shard."""
        place = self._place(len(steps))
        if place.ctypes.data != steps.ctypes.data:
            np.copyto(place, steps.reshape(-1))
        for name, values in times.items():
            self._times[name].extend(values)
        self.count += len(steps)
        if self.count % self._setting.shard_length == 0:
            self._is_full()

    def _place(self, flows: int, pin: Pin | None = None) -> Bytes:
        """Memory for the steps of the next flows of the shard being filled. A buffer first requested without ``pin`` is
        never pinned: it serves batches that do not come from a device, or that cross into another shard."""
        if self._filling is None:
            with publish.write_errors(self._setting.path):
                self._filling = self._spare.pop() if self._spare else self._new(pin)
        flow_bytes = self._setting.codec.flow_bytes
        begin = self.count % self._setting.shard_length * flow_bytes
        return self._filling.bytes[begin : begin + flows * flow_bytes]

    def _new(self, pin: Pin | None) -> Buffer:
        buffer = self._memory.take(self._shard_bytes)
        if pin is not None:
            self._unpin.append(pin(buffer.bytes))
        return buffer

    def finish(self) -> None:
        if self._times["frame"]:
            self._is_full()

    def stop(self) -> None:
        """Nothing to do: full shards have been handed over already."""

    def close(self) -> None:
        while self._unpin:  # first, as waiting for the processes may be interrupted
            self._unpin.pop()()
        for process in self._all:
            process.let_go()  # all of them, before waiting for the first
        for process in self._all:
            process.wait()
        self._filling, self._spare = None, []
        self._memory.close()

    def _is_full(self) -> None:
        """Hands over the shard being filled."""
        buffer, times = self._filling, self._times
        assert buffer is not None, "a flow is in it"
        self._filling, self._times = None, {name: [] for name in COORDINATES}
        number, flows = (self.count - 1) // self._setting.shard_length, len(times["frame"])
        made = partial(self._made, Request(self._setting, number, buffer.place, flows, times), buffer)
        self._files.submit_made(number, flows, times, made, flows * self._setting.codec.flow_bytes)

    def _made(self, request: Request, buffer: Buffer) -> tuple[list[str], int]:
        """Prepares the shard's files. Returns their keys and their size in bytes."""

        def compressed() -> None:
            self._spare.append(buffer)

        process = self._idle.pop()  # never empty: at most one call at once for each process
        ready = False
        try:
            ready = process.is_ready()
            if ready:
                return process.make(request, compressed)
            return make(request, buffer.bytes[: request.flows * self._setting.codec.flow_bytes], compressed)
        finally:  # a ready process is used next; another goes behind the rest, of which one may be ready
            (self._idle.append if ready else self._idle.appendleft)(process)


class _Process:
    """The parent's side of one worker process."""

    def __init__(self, name: str, memory: int, held: Sequence[int]) -> None:
        """name: of the store. held: file descriptors of the lock, which the process inherits."""
        self._name = name
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as undone:
            undone.callback(ours.close)
            paths = json.dumps([path for path in sys.path if isinstance(path, str)])
            numbers = [str(number) for number in (theirs.fileno(), memory)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE, paths, *numbers],  # -P: no module of the working folder comes first
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory, *held),
                start_new_session=True,  # where a terminal's Ctrl-C does not reach it
            )
            undone.pop_all()
        self._ready: bool | None = None  # None: it has not reported yet
        self._socket = ours
        self._stream: BinaryIO = ours.makefile("rwb")  # type: ignore[assignment]  # unbuffered it would be raw

    def is_ready(self) -> bool:
        """Whether it has reported that it is. It never does where a Python started like this cannot import flowreel."""
        if self._ready is None and self._has_said_something():
            try:
                self._ready = self._answer() is None
            except _GONE:
                self._ready = False
        return self._ready is True

    def _has_said_something(self) -> bool:
        """Whether there is an answer to read, or the process is gone."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def make(self, request: Request, compressed: Callable[[], None]) -> tuple[list[str], int]:
        """Runs ``shard_maker.make`` in the process."""
        try:
            pickle.dump(request, self._stream)
            self._stream.flush()
            answer = self._answer()
            if answer is None:
                compressed()
                answer = self._answer()
        except _GONE as error:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
            raise OutputWriteError(
                f"cannot write {self._name}: the process that made shard {request.number} ended early "
                f"(exit code {self._process.returncode})"
            ) from error
        if isinstance(answer, SentError):
            answer.arise()
        made: tuple[list[str], int] = answer
        return made

    def let_go(self) -> None:
        """Lets it end after its current shard, even where a process forked meanwhile holds the socket, too."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self._stream.close()
        self._socket.close()

    def wait(self) -> None:
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> Any:
        return pickle.load(self._stream)
