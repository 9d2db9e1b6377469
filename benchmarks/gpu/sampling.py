"""A sampling profiler: where each thread is, how much CPU time it gets, and how long a thread waits for the GIL.

Python's usual samplers are not available on a rented machine. This one is a thread like the others and needs the GIL
to take a sample. So the delay of its samples shows how long any thread waits for the GIL, and a thread that computes
in C while holding the GIL is seen only after it has released it.
"""

from __future__ import annotations

import linecache
import resource
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

OURS = ("engine", "kernels", "sinks")  # folders of flowreel's own code
EVERY_S = 0.002
RESTING = 100  # sleeps before the run, when no other thread needs the GIL
LINE = 70  # characters of a line of code that are shown
LOOKS_A_READING = 20  # samples between two readings of CPU time
TASKS = Path("/proc/self/task")  # Linux only; elsewhere no CPU time is reported


class Spent(NamedTuple):
    """CPU time of one thread so far, as counted by the operating system."""

    name: str  # the operating system's, at most 15 characters
    on_s: float  # on a core
    ready_s: float  # ready to run, with no core free
    switches: int  # voluntary context switches: it gave up its core to wait for something


class Watch:
    """``with Watch() as watch: ...`` samples until the block ends."""

    def __init__(self, every_s: float = EVERY_S, resting: int = RESTING) -> None:
        self.names: dict[int, str] = {}  # of Python's threads, by the system's thread ID
        self.places: dict[str, Counter[str]] = defaultdict(Counter)  # by thread name: samples per place
        self.late_s: list[float] = []  # each sample's delay after its due time
        self.resting_s: list[float] = []  # the same, measured before the run
        self.seconds = 0.0
        self._every_s = every_s
        self._resting = resting
        self._paid: list[float] = []
        self._first: dict[int, Spent] = {}
        self._last: dict[int, Spent] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self.resting_s = [self._slept_late() for _ in range(self._resting)]
        self._first = spent()
        self._paid = _paid()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._paid = [after - before for before, after in zip(self._paid, _paid(), strict=True)]

    def _slept_late(self) -> float:
        before_s = time.perf_counter()
        time.sleep(self._every_s)
        return time.perf_counter() - before_s - self._every_s

    def _look(self) -> None:
        began_s, looks = time.perf_counter(), 0
        while not self._over.is_set():
            self.late_s.append(self._slept_late())
            self._see()
            if looks % LOOKS_A_READING == 0:
                self._last |= spent()
            looks += 1
        self._last |= spent()
        self.seconds = time.perf_counter() - began_s

    def _see(self) -> None:
        frames = sys._current_frames()
        for thread in threading.enumerate():
            if thread is self._thread or thread.ident is None or thread.native_id is None:
                continue
            self.names[thread.native_id] = thread.name
            if (frame := frames.get(thread.ident)) is not None:
                self.places[thread.name][place(frame)] += 1

    def stood(self, most: int) -> list[dict[str, object]]:
        """One row for each of the places where a thread was most often, thread by thread."""
        return [
            {"thread": name, "share": count / seen.total(), "of": seen.total(), "place": where}
            for name, seen in self.places.items()
            for where, count in seen.most_common(most)
        ]

    def processors(self) -> list[dict[str, Any]]:
        """One row for each thread that used CPU time; threads that Python does not know are grouped by name."""
        groups: dict[str, list[Spent]] = defaultdict(list)
        for number, now in self._last.items():
            before = self._first.get(number, Spent("", 0.0, 0.0, 0))
            more = (now.on_s - before.on_s, now.ready_s - before.ready_s, now.switches - before.switches)
            groups[self.names.get(number) or f"not Python's: {now.name}"].append(Spent(now.name, *more))
        rows: list[dict[str, Any]] = [
            {
                "processor of": name,
                "threads": len(some),
                "on it": sum(one.on_s for one in some) / self.seconds,
                "waits for one": sum(one.ready_s for one in some) / self.seconds,
                "sleeps a s": sum(one.switches for one in some) / self.seconds,
            }
            for name, some in groups.items()
        ]
        return sorted(rows, key=lambda row: -row["on it"])

    def paid(self) -> dict[str, float]:
        """What the whole process used in the block: minor page faults, seconds of CPU time."""
        return dict(zip(("page_faults", "user_s", "system_s"), self._paid, strict=True))

    def gil_waits(self) -> dict[str, float]:
        """How much later samples come than when nothing runs, ms."""
        rest_s = statistics.median(self.resting_s)
        waits_ms = sorted(1e3 * (late_s - rest_s) for late_s in self.late_s)
        return {
            "median_ms": waits_ms[len(waits_ms) // 2],
            "nine_of_10_ms": waits_ms[len(waits_ms) * 9 // 10],
            "longest_ms": waits_ms[-1],
            "resting_nine_of_10_ms": 1e3 * (sorted(self.resting_s)[len(self.resting_s) * 9 // 10] - rest_s),
        }


def _paid() -> list[float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return [used.ru_minflt, used.ru_utime, used.ru_stime]


def place(frame: FrameType) -> str:
    """The innermost line of flowreel's own code and its text, and the Python code it called into, if any."""
    inner: FrameType | None = frame
    while inner is not None and (own := _ours(inner.f_code.co_filename)) is None:
        inner = inner.f_back
    called = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
    if inner is None or own is None:
        return called
    said = linecache.getline(inner.f_code.co_filename, inner.f_lineno).strip()[:LINE]
    where = f"{own}:{inner.f_lineno} {inner.f_code.co_name}: {said}"
    return where if inner is frame else f"{where} > {called}"


@cache
def _ours(path: str) -> str | None:
    """A flowreel file's path from its subpackage on, wherever flowreel is installed; None: not flowreel's."""
    for folder in OURS:
        for root in import_module(f"flowreel.{folder}").__path__:
            if path.startswith(f"{root}/"):
                return f"{folder}{path.removeprefix(root)}"
    return None


def spent() -> dict[int, Spent]:
    """CPU time of every thread of this process, by the system's thread ID; empty where it is not reported."""
    found: dict[int, Spent] = {}
    for task in TASKS.iterdir() if TASKS.is_dir() else ():
        try:
            on_ns, ready_ns, _ = map(int, (task / "schedstat").read_text().split())
            status = (task / "status").read_text()
            switches = int(status.partition("\nvoluntary_ctxt_switches:")[2].split(maxsplit=1)[0])
            found[int(task.name)] = Spent((task / "comm").read_text().strip(), on_ns / 1e9, ready_ns / 1e9, switches)
        except (OSError, ValueError, IndexError):  # the thread has just ended, or the system's format differs
            continue
    return found
