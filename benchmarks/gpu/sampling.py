"""Where each thread stands, looked at every so often; what processor time it gets; how long the looking has to wait.

Python's own samplers are not there on a rented machine. This one is a thread like the others: to look, it needs the
interpreter's lock. So how late it wakes says how long whoever needs the lock has to wait for it, and a thread that
computes in C without letting go of the lock is seen only once it has.
"""

from __future__ import annotations

import linecache
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
RESTING = 100  # sleeps before the run, when nobody else wants the lock
LINE = 70  # letters of a line of code
LOOKS_A_READING = 20  # looks between two readings of the processor time
TASKS = Path("/proc/self/task")  # of Linux; elsewhere there is no processor time to tell


class Spent(NamedTuple):
    """Processor time of one thread so far, as the system counts it."""

    name: str  # the system's own, of at most 15 letters
    on_s: float  # on a processor
    ready_s: float  # ready to run, and no processor free
    switches: int  # times that it gave its processor away to wait for something


class Watch:
    """``with Watch() as watch: ...`` looks until the block ends."""

    def __init__(self, every_s: float = EVERY_S, resting: int = RESTING) -> None:
        self.names: dict[int, str] = {}  # of Python's threads, by the system's number and by pthread's
        self.places: dict[str, Counter[str]] = defaultdict(Counter)  # by name of the thread: where it stood how often
        self.late_s: list[float] = []  # how much later than asked for each look came
        self.resting_s: list[float] = []  # the same when nothing ran
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
            self.names[thread.ident] = self.names[thread.native_id] = thread.name
            if (frame := frames.get(thread.ident)) is not None:
                self.places[thread.name][place(frame)] += 1

    def stood(self, most: int) -> list[dict[str, object]]:
        """A line for each of the places where a thread stood most often, thread by thread."""
        return [
            {"thread": name, "share": count / seen.total(), "of": seen.total(), "place": where}
            for name, seen in self.places.items()
            for where, count in seen.most_common(most)
        ]

    def processors(self) -> list[dict[str, Any]]:
        """A line for each thread that took processor time, those that Python does not know together by their name."""
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
        """What the whole process took meanwhile: pages that it touched first, seconds of processors. Of Unix."""
        return dict(zip(("page_faults", "user_s", "system_s"), self._paid, strict=False))

    def lock_waits(self) -> dict[str, float]:
        """How much later a look comes than when nothing runs, ms."""
        rest_s = statistics.median(self.resting_s)
        waits_ms = sorted(1e3 * (late_s - rest_s) for late_s in self.late_s)
        return {
            "median_ms": waits_ms[len(waits_ms) // 2],
            "nine_of_10_ms": waits_ms[len(waits_ms) * 9 // 10],
            "longest_ms": waits_ms[-1],
            "resting_nine_of_10_ms": 1e3 * (sorted(self.resting_s)[len(self.resting_s) * 9 // 10] - rest_s),
        }


def _paid() -> list[float]:
    try:
        import resource
    except ImportError:
        return []
    used = resource.getrusage(resource.RUSAGE_SELF)
    return [used.ru_minflt, used.ru_utime, used.ru_stime]


def place(frame: FrameType) -> str:
    """Innermost line of flowreel's own code with what stands there, and whom it has called, where that is Python."""
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
    """Where a file of flowreel's lies, from the package on, wherever that is; None: it is not of flowreel's."""
    for folder in OURS:
        for root in import_module(f"flowreel.{folder}").__path__:
            if path.startswith(f"{root}/"):
                return f"{folder}{path.removeprefix(root)}"
    return None


def spent() -> dict[int, Spent]:
    """Processor time of every thread of this process, by the system's number; of none where it does not tell."""
    found: dict[int, Spent] = {}
    for task in TASKS.iterdir() if TASKS.is_dir() else ():
        try:
            on_ns, ready_ns, _ = map(int, (task / "schedstat").read_text().split())
            status = (task / "status").read_text()
            switches = int(status.partition("\nvoluntary_ctxt_switches:")[2].split(maxsplit=1)[0])
            found[int(task.name)] = Spent((task / "comm").read_text().strip(), on_ns / 1e9, ready_ns / 1e9, switches)
        except (OSError, ValueError, IndexError):  # it has just ended, or this system counts otherwise
            continue
    return found
