"""Timing that can be trusted: warm-up, repeats until the median has settled, alternation, and honest intervals.

A figure in a result is a *sample*: ``{"median": m, "low": q1, "high": q3, "n": count}`` with the quartiles of the
measured values. For a ratio, two things are timed alternately in one run; its ``low`` and ``high`` are a 95 % bootstrap
interval over the rounds. ``benchmarks.tables`` prints both kinds, ``benchmarks.compare`` judges by their intervals.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from flowreel.engine.config import Precision

Action = Callable[[], object]
Cell = dict[str, float]  # a sample in the form it has in a result

SHORTEST_S = 0.005  # shorter timings are mostly overhead of clock and call: such actions are called several times each
RESAMPLES = 2000


class Skipped(Exception):
    """A case, or a part of one, cannot run on this machine. The message gives the reason, for the result."""


@dataclass(frozen=True)
class Effort:
    """How long to measure one thing."""

    least: int = 5  # timings, unless they take three times ``cap_s``
    most: int = 60
    settled: float = 0.01  # stop once the median's 95 % interval lies within this fraction of the median on either side
    cap_s: float = 10.0  # or once this much time has been spent
    warm_up: int = 1  # calls before the first timing

    @classmethod
    def of(cls, short: bool) -> Effort:
        """The default of a case."""
        return cls(least=3, most=20, settled=0.02, cap_s=1.5) if short else cls()


ONCE = Effort(least=1, most=1, warm_up=0)  # for dry runs


@dataclass(frozen=True)
class Sample:
    """Summary of several timings of one thing."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        if not values:
            raise ValueError("a sample needs at least one value")
        low, median, high = quartiles(values)
        return cls(median, low, high, len(values))

    def times(self, factor: float) -> Sample:
        """The same in another unit; ``factor`` is positive."""
        return Sample(self.median * factor, self.low * factor, self.high * factor, self.count)

    def rate(self, work: float) -> Sample:
        """Turns seconds for some work into work per second. The slow quartile becomes the low one."""
        return Sample(work / self.median, work / self.high, work / self.low, self.count)

    def cell(self) -> Cell:
        """The form it has in a result."""
        return {"median": self.median, "low": self.low, "high": self.high, "n": self.count}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile, interpolated linearly as in NumPy's default."""
    if len(values) == 1:
        return (values[0],) * 3
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that contains the true median with at least 95 % confidence, for any distribution: the sign test's.

    With fewer than 6 values, too few for that, it is from the smallest to the largest one.
    """
    ordered, count = sorted(values), len(values)
    tail, drop = 0.0, 0
    while True:
        tail += math.comb(count, drop) / 2**count  # the chance that at most ``drop`` values lie below the median
        if 2 * tail > 0.05 or drop >= count // 2:
            break
        drop += 1
    drop = max(drop - 1, 0)
    return ordered[drop], ordered[count - 1 - drop]


def settled(values: Sequence[float], within: float) -> bool:
    """Whether the median's interval lies within a fraction ``within`` of the median on either side."""
    low, high = median_interval(values)
    middle = statistics.median(values)
    return len(values) > 5 and max(high - middle, middle - low) <= within * middle


def seconds_of(action: Action, sync: Action, calls: int = 1) -> float:
    """Wall time of one call, as the mean of ``calls`` in a row. ``sync`` waits until the device's work is done."""
    sync()
    began_s = time.perf_counter()
    for _ in range(calls):
        action()
    sync()
    return (time.perf_counter() - began_s) / calls


def timed(action: Action, effort: Effort, sync: Action = lambda: None) -> Sample:
    """Seconds per call of one action."""
    return Sample.of(alternated({"": action}, effort, sync)[""])


def alternated(actions: Mapping[str, Action], effort: Effort, sync: Action = lambda: None) -> dict[str, list[float]]:
    """Seconds per call of several actions, timed in turn, so that whatever slows the machine affects them all alike.

    Each round times every action once, every second round in reverse order. ``effort`` counts rounds, and its time cap
    is for all actions together. The least number of rounds may take up to three times the cap; at least two rounds are
    made in any case.
    """
    calls = {name: _calls_per_timing(action, effort, sync) for name, action in actions.items()}
    found: dict[str, list[float]] = {name: [] for name in actions}
    began_s = time.perf_counter()
    for round_number in range(effort.most):
        for name in reversed(list(actions)) if round_number % 2 else list(actions):
            found[name].append(seconds_of(actions[name], sync, calls[name]))
        rounds, spent_s = round_number + 1, time.perf_counter() - began_s
        if rounds >= effort.least and all(settled(values, effort.settled) for values in found.values()):
            break
        if rounds >= 2 and spent_s >= effort.cap_s * (1 if rounds >= effort.least else 3):
            break
    return found


def _calls_per_timing(action: Action, effort: Effort, sync: Action) -> int:
    """Warms up, and returns how many calls make one timing long enough for the clock."""
    for _ in range(effort.warm_up):
        action()
    once_s = seconds_of(action, sync)
    return 1 if once_s >= SHORTEST_S else max(1, math.ceil(SHORTEST_S / max(once_s, 1e-9)))


def ratio(over: Sequence[float], under: Sequence[float]) -> Cell:
    """Median of ``over`` divided by median of ``under``, two series from the same rounds, with a 95 % interval.

    The interval is a bootstrap over rounds: whole rounds are resampled, so what slowed both series stays shared.
    """
    a, b = np.asarray(over, float), np.asarray(under, float)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"a ratio needs two series of the same rounds, got {a.size} and {b.size} values")
    drawn = np.random.default_rng(0).integers(0, a.size, (RESAMPLES, a.size))
    ratios = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return {"median": float(np.median(a) / np.median(b)), "low": float(low), "high": float(high), "n": int(a.size)}


def device_sync(device: str) -> Action:
    """A function that waits until all work submitted to the device is done; on a CPU it does nothing."""
    if device != "cuda":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def devices() -> tuple[str, ...]:
    """``cpu``, and ``cuda`` if available."""
    import torch

    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def cpu_precisions() -> tuple[Precision, ...]:
    """fp32, and bf16 where the compiled networks support it on this processor: else they take tens of times as long."""
    import torch

    from flowreel.engine.compiled.onednn import available

    return ("fp32", "bf16") if available(torch.bfloat16) else ("fp32",)


def cell_value(cell: Any) -> float | None:
    """The measured number in a table cell: a sample's median or a float; None for names, counts and blanks."""
    if isinstance(cell, Mapping) and "median" in cell:
        return float(cell["median"])
    return cell if isinstance(cell, float) else None
