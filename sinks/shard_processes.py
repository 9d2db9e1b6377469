"""From flows to full shards in processes of their own, so that a fast run keeps the GIL to itself.

    steps -> memory that all of them see -> where in it a full shard lies -> a process (``shard_maker.py``) -> names

On a GPU a light network's run is bound by how often its few threads come by the lock, for which those that compress
and write would queue as well. So the steps of a shard come from the GPU to where other processes see them: pinned, so
that no thread copies them, which one was seen to do at 2 GB a second in a run. When the shard is full, one of these
processes is told where they lie, and brings the shard's files to the disk under unfinished names. In this process a
thread sleeps until that is done, and gives them their names. What is full before they are up, it makes itself.

A process ends when its socket does, and so with whoever started it, however that ended. Meanwhile it holds the same
claim on the unfinished store. Ctrl-C reaches it by what this process makes of it, not by itself.
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
from flowreel.engine.errors import OutputWriteError
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

MOST_PROCESSES = 8  # each has a shard's steps in memory
MOST_SHARD_BYTES = 128 << 20  # of steps; a larger one would wait in memory for too long
# On 16 cores processes brought 1.7 times as many flows of a light network to a store once they were up; with what it
# takes to start and end them, they were sooner done from about 72 shards on, and later for networks that take their
# time. So few shards are left to threads of this process, and all of them where there are few cores. Measure before
# you lower either.
FEW_SHARDS = 128
FEW_WORKERS = 7
LEAST_FLOWS = 16  # of a shard: of 1920x1080, 8 each, threads brought 479 a second to 56 shards, processes 329
GRACE_S = 30.0  # to finish a shard nobody waits for any more, before a process is killed
_GONE = (EOFError, OSError, pickle.UnpicklingError)  # what reading and writing raise when there is nobody any more
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from flowreel.sinks.shard_maker import serve; serve(*map(int, sys.argv[2:]))"
)


def are_worth_it(shards: float, shard_length: int, workers: int) -> bool:
    """Whether processes are sooner done with so many shards than so many threads."""
    return shards > FEW_SHARDS and shard_length >= LEAST_FLOWS and workers > FEW_WORKERS


def are_possible(codec: FlowCodec, shard_length: int) -> bool:
    """Whether shards of such flows may be made in processes of their own, on this system."""
    system = sys.platform == "linux" and bool(sys.executable) and not getattr(sys, "frozen", False)
    return system and codec.shuffles and shard_length * codec.flow_bytes <= MOST_SHARD_BYTES


def how_many(workers: int) -> int:
    """Processes for a machine that has cores for so many threads."""
    return min(MOST_PROCESSES, max(1, workers // THREADS))


class ShardsInProcesses:
    """See ``Shards``."""

    def __init__(self, files: StoreWriter, target: LocalTarget, setting: Setting, count: int, processes: int) -> None:
        """count: flows that are there already. Raises OSError where the system gives no process or memory."""
        self.count = count
        self._memory = SharedMemory()
        self._files = files
        self._setting = setting
        self._shard_bytes = setting.shard_length * setting.codec.flow_bytes
        self._spare: list[Buffer] = []  # of shards whose steps are not needed any more
        self._filling: Buffer | None = None  # where the next flow goes, if that is known yet
        self._unpin: list[Callable[[], None]] = []  # to be called for each buffer that was pinned
        self._times: dict[str, list[Any]] = {name: [] for name in COORDINATES}  # of the shard that fills up
        self._all: list[_Process] = []
        self._idle: deque[_Process] = deque()
        try:
            for _ in range(processes):
                self._all.append(_Process(target.name, self._memory.descriptor, target.held))
                self._idle.append(self._all[-1])
            self._memory.reserve((processes + 1) * self._shard_bytes)  # one fills up
        except BaseException:
            self.close()
            raise

    def room(self, flows: int, pin: Pin) -> Bytes | None:
        """Where the steps of the next so many are to lie, (flows, bytes of one) uint8; None: not in one piece.

        ``add_steps`` of what lies there copies nothing.
        """
        if self.count % self._setting.shard_length + flows > self._setting.shard_length:
            return None
        return self._place(flows, pin).reshape(flows, self._setting.codec.flow_bytes)

    def add_steps(self, steps: npt.NDArray[np.uint8], times: Times) -> None:
        length, first = self._setting.shard_length, 0
        while first < len(steps):
            part = slice(first, first + length - self.count % length)  # in one shard: mostly, all of it
            first = part.stop
            self._add(steps[part], {name: values[part] for name, values in times.items()})

    def _add(self, steps: npt.NDArray[np.uint8], times: Times) -> None:
        """Flows of one shard."""
        place = self._place(len(steps))
        if place.ctypes.data != steps.ctypes.data:
            np.copyto(place, steps.reshape(-1))
        for name, values in times.items():
            self._times[name].extend(values)
        self.count += len(steps)
        if self.count % self._setting.shard_length == 0:
            self._is_full()

    def _place(self, flows: int, pin: Pin | None = None) -> Bytes:
        """Of the steps of the next flows of the shard that fills up. Memory that is first asked for without ``pin`` is
        never pinned: it is of batches that do not come from a device, or do not lie in one shard."""
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
        """Nothing waits that is full."""

    def close(self) -> None:
        while self._unpin:  # first: to wait for the processes may be cut short
            self._unpin.pop()()
        for process in self._all:
            process.let_go()  # all of them, before the first is waited for
        for process in self._all:
            process.wait()
        self._filling, self._spare = None, []
        self._memory.close()

    def _is_full(self) -> None:
        """Hands the waiting flows over."""
        buffer, times = self._filling, self._times
        assert buffer is not None, "a flow is in it"
        self._filling, self._times = None, {name: [] for name in COORDINATES}
        number, flows = (self.count - 1) // self._setting.shard_length, len(times["frame"])
        made = partial(self._made, Request(self._setting, number, buffer.place, flows, times), buffer)
        self._files.submit_made(number, flows, times, made, flows * self._setting.codec.flow_bytes)

    def _made(self, request: Request, buffer: Buffer) -> tuple[list[str], int]:
        """The shard's files by their keys, prepared, and their bytes."""

        def compressed() -> None:
            self._spare.append(buffer)

        process = self._idle.pop()  # there is one: as many calls are made at once
        ready = False
        try:
            ready = process.is_ready()
            if ready:
                return process.make(request, compressed)
            return make(request, buffer.bytes[: request.flows * self._setting.codec.flow_bytes], compressed)
        finally:  # to the end that is taken from, or behind all the others, of which one may be up
            (self._idle.append if ready else self._idle.appendleft)(process)


class _Process:
    """One of them, as seen from here."""

    def __init__(self, name: str, memory: int, held: Sequence[int]) -> None:
        """name: of the store. held: descriptors that it is to keep open."""
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
        self._ready: bool | None = None  # None: it has not said anything yet
        self._socket = ours
        self._stream: BinaryIO = ours.makefile("rwb")  # type: ignore[assignment]  # unbuffered it would be raw

    def is_ready(self) -> bool:
        """Whether it has said so by now. Never, where this Python starts no other that finds flowreel."""
        if self._ready is None and self._has_said_something():
            try:
                self._ready = self._answer() is None
            except _GONE:
                self._ready = False
        return self._ready is True

    def _has_said_something(self) -> bool:
        """Or has gone."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def make(self, request: Request, compressed: Callable[[], None]) -> tuple[list[str], int]:
        """As ``shard_maker.make``, there."""
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
        if isinstance(answer, Exception):
            raise answer
        made: tuple[list[str], int] = answer
        return made

    def let_go(self) -> None:
        """It ends when it has done what it does. Also where a process that was forked meanwhile holds the socket."""
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
