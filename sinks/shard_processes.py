"""From flows to full shards in processes of their own, so that a fast run keeps Python's lock to itself.

    a GPU's steps -> memory that both sides see -> a full shard's place in it -> a process (``shard_maker.py``) -> names

On a GPU a light network's run is bound by how often its few threads come by the lock, for which those that compress and
write would queue as well. So the steps of a shard stay where the GPU has copied them until the shard is full; then one
of the processes is told where they lie, and brings the shard's files to the disk under unfinished names. In this
process a thread sleeps until that is done, and gives them their names.

A process ends when its socket does, and so with whoever started it, however that ended. Meanwhile it holds the same
claim on the unfinished store. Ctrl-C reaches it by what this process makes of it, not by itself.
"""

from __future__ import annotations

import json
import math
import pickle
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

from flowreel.engine.errors import FlowreelError, OutputWriteError
from flowreel.sinks.shard_maker import THREADS, Request, Setting
from flowreel.sinks.shared_memory import SharedMemory
from flowreel.sinks.store_layout import COORDINATES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from flowreel.sinks.codecs import FlowCodec
    from flowreel.sinks.shards import Times
    from flowreel.sinks.store_target import LocalTarget
    from flowreel.sinks.store_writer import StoreWriter

MOST_PROCESSES = 8  # each has a shard's steps in memory
MOST_SHARD_BYTES = 128 << 20  # of steps; a larger one would wait in memory for too long
FEW_SHARDS = 4  # which threads have made by the time a process is up
GRACE_S = 30.0  # to finish a shard nobody waits for any more, before a process is killed
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from flowreel.sinks.shard_maker import serve; serve(*map(int, sys.argv[2:]))"
)


def are_worth_it(shards: float) -> bool:
    """Whether so many, infinity where nobody knows, take longer than to start and to end processes for them."""
    return shards > FEW_SHARDS


def are_possible(codec: FlowCodec, shard_length: int) -> bool:
    """Whether shards of such flows may be made in processes of their own, on this system."""
    system = sys.platform == "linux" and bool(sys.executable) and not getattr(sys, "frozen", False)
    return system and codec.shuffles and shard_length * codec.flow_bytes <= MOST_SHARD_BYTES


def how_many(workers: int) -> int:
    """Processes for a machine that has cores for so many threads."""
    return min(MOST_PROCESSES, max(1, workers // THREADS))


class ShardsInProcesses:
    """See ``Shards``."""

    def __init__(
        self,
        files: StoreWriter,
        target: LocalTarget,
        setting: Setting,
        count: int,
        processes: int,
        shards: float = math.inf,
    ) -> None:
        """count: flows that are there already. shards: that will come, as far as anybody knows.

        Raises OSError where the system gives no process or memory.
        """
        self.count = count
        self.memory = SharedMemory()
        self._files = files
        self._setting = setting
        self._steps: list[npt.NDArray[Any]] = []  # of the shard that is filling up
        self._times: dict[str, list[Any]] = {name: [] for name in COORDINATES}  # of the same
        self._copies: dict[int, npt.NDArray[np.uint8]] = {}  # buffers filled here, by address
        self._spare: list[npt.NDArray[np.uint8]] = []  # of these those whose steps are not needed any more
        self._all: list[_Process] = []
        self._idle: deque[_Process] = deque()
        try:
            for _ in range(processes):
                self._all.append(_Process(target.name, self.memory.descriptor, target.held))
                self._idle.append(self._all[-1])
            at_once = min(processes + 1, math.ceil(shards) if shards < math.inf else processes + 1)
            self.memory.reserve(at_once * setting.shard_length * setting.codec.flow_bytes)
        except BaseException:
            self.close()
            raise

    def add_steps(self, steps: npt.NDArray[np.uint8], times: Times) -> None:
        length, first = self._setting.shard_length, 0
        while first < len(steps):
            part = slice(first, first + length - self.count % length)  # in one shard: mostly, all of it
            first = part.stop
            self._gather(steps[part])
            for name, values in times.items():
                self._times[name].extend(values[part])
            if self.count % length == 0:
                self._is_full()

    def _gather(self, steps: npt.NDArray[np.uint8]) -> None:
        self._steps.append(steps if self.memory.holds(steps) else self._copied(steps))
        self.count += len(steps)

    def _copied(self, steps: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Where the processes see them: no GPU has copied them there."""
        fitting = (place for place, buffer in enumerate(self._spare) if buffer.size >= steps.nbytes)
        place = next(fitting, None)
        buffer = self.memory.take(steps.nbytes) if place is None else self._spare.pop(place)
        self._copies[buffer.ctypes.data] = buffer
        there = buffer[: steps.nbytes].reshape(steps.shape)
        there[:] = steps
        return there

    def finish(self) -> None:
        if self._steps:
            self._is_full()

    def stop(self) -> None:
        self._steps = []

    def close(self) -> None:
        for process in self._all:
            process.let_go()  # all of them, before the first is waited for
        for process in self._all:
            process.wait()
        self._steps = []
        self.memory.close()

    def _is_full(self) -> None:
        """Hands the waiting flows over."""
        steps, times = self._steps, self._times
        self._steps, self._times = [], {name: [] for name in COORDINATES}
        number, nbytes = (self.count - 1) // self._setting.shard_length, sum(part.nbytes for part in steps)
        self._files.submit_made(number, len(times["frame"]), times, partial(self._made, number, steps, times), nbytes)

    def _made(self, number: int, steps: list[npt.NDArray[Any]], times: Times) -> tuple[list[str], int]:
        """The shard's files by their keys, prepared, and their bytes."""
        places = [(self.memory.place_of(part), len(part)) for part in steps]
        copies = [buffer for part in steps if (buffer := self._copies.get(part.ctypes.data)) is not None]

        def compressed() -> None:
            steps.clear()
            self._spare.extend(copies)

        process = self._idle.pop()  # there is one: as many calls are made at once
        try:
            return process.make(Request(self._setting, number, places, times), compressed)
        finally:
            self._idle.append(process)


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
                [sys.executable, "-c", _CODE, paths, *numbers],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory, *held),
                start_new_session=True,  # where a terminal's Ctrl-C does not reach it
            )
            undone.pop_all()
        self._socket = ours
        self._stream: BinaryIO = ours.makefile("rwb")  # type: ignore[assignment]  # unbuffered it would be raw

    def make(self, request: Request, compressed: Callable[[], None]) -> tuple[list[str], int]:
        """Calls ``compressed`` when the steps are not needed any more."""
        try:
            self._send(request)
            self._answer()
            compressed()
            made: tuple[list[str], int] = self._answer()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            if isinstance(error, FlowreelError):
                raise
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
            raise OutputWriteError(
                f"cannot write {self._name}: the process that made shard {request.number} ended early "
                f"(exit code {self._process.returncode})"
            ) from error
        return made

    def let_go(self) -> None:
        """It ends when it has done what it does."""
        with suppress(OSError):
            self._stream.close()
        self._socket.close()

    def wait(self) -> None:
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, what: object) -> None:
        pickle.dump(what, self._stream)
        self._stream.flush()

    def _answer(self) -> Any:
        answer = pickle.load(self._stream)
        if isinstance(answer, BaseException):
            raise answer
        return answer
