"""Medians, intervals, ratios and the order of timings, with known numbers and a fake clock."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import measure
from benchmarks.measure import Effort, Sample, alternated, median_interval, ratio, settled


class Clock:
    """A fake clock that advances only by work."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.worked: list[str] = []

    def work(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        def action() -> None:
            self.now_s += seconds(self.worked.count(name))
            self.worked.append(name)

        return action


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: made.now_s)
    return made


def test_a_sample_is_median_and_quartiles() -> None:
    sample = Sample.of([4.0, 1.0, 2.0, 5.0, 3.0])
    assert sample == Sample(3.0, 2.0, 4.0, 5)
    assert sample.cell() == {"median": 3.0, "low": 2.0, "high": 4.0, "n": 5}
    assert sample.times(10) == Sample(30.0, 20.0, 40.0, 5)
    assert Sample.of([7.0]) == Sample(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="at least one"):
        Sample.of([])


def test_a_rate_has_its_slow_end_low() -> None:
    assert Sample(2.0, 1.0, 4.0, 9).rate(8) == Sample(4.0, 2.0, 8.0, 9)


# From published tables of the sign test at 95 %: n, first value inside the interval (counted from 1).
@pytest.mark.parametrize(
    ("count", "first"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (12, 3), (15, 4), (20, 6), (25, 8)]
)
def test_interval_of_the_median(count: int, first: int) -> None:
    assert median_interval(range(1, count + 1)) == (first, count + 1 - first)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_the_interval_holds_the_median(values: list[float]) -> None:
    low, high = median_interval(values)
    assert low <= Sample.of(values).median <= high


def test_settled_needs_values_that_agree() -> None:
    assert not settled([1.0] * 5, 0.01)  # they agree, but five are too few
    assert settled([1.0] * 6, 0.01)
    assert not settled([1.0, 1.0, 1.0, 1.1, 1.1, 1.1], 0.01)


def test_ratio_of_rounds_that_share_their_noise() -> None:
    noise = [1.0, 3.0, 1.5, 2.0, 1.2, 2.6, 1.1]
    found = ratio([2 * n for n in noise], noise)
    assert found == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 7}
    with pytest.raises(ValueError, match="same rounds"):
        ratio([1.0], [1.0, 2.0])


@given(st.lists(st.tuples(st.floats(0.5, 2), st.floats(0.5, 2)), min_size=2, max_size=12))
def test_ratio_lies_in_its_interval(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    found, turned = ratio(a, b), ratio(b, a)
    assert found["low"] <= found["median"] <= found["high"]
    assert found["median"] * turned["median"] == pytest.approx(1)


def test_things_are_timed_in_turn_and_in_both_orders(clock: Clock) -> None:
    actions = {name: clock.work(name, lambda _, s=seconds: s) for name, seconds in (("a", 1.0), ("b", 2.0))}
    found = alternated(actions, Effort(least=4, most=4, cap_s=math.inf, warm_up=1))
    assert found == {"a": [1.0] * 4, "b": [2.0] * 4}
    assert "".join(clock.worked) == "aabb" + "abbaabba"  # each warms up and is timed once for its length, then ABBA


def test_the_warm_up_is_not_counted(clock: Clock) -> None:
    action = clock.work("a", lambda before: 9.0 if before < 3 else 1.0)
    assert Sample.of(alternated({"a": action}, Effort(least=6, most=6, warm_up=3))["a"]).high == 1.0


def test_timing_stops_when_the_median_is_known(clock: Clock) -> None:
    assert len(alternated({"a": clock.work("a", lambda _: 1.0)}, Effort(most=50, cap_s=1e6))["a"]) == 6


def test_timing_stops_when_its_time_is_up(clock: Clock) -> None:
    uneven = clock.work("a", lambda before: 1.0 + before % 2)
    assert sum(alternated({"a": uneven}, Effort(least=2, most=50, cap_s=10.0))["a"]) in (10.0, 11.0)


def test_slow_things_are_still_timed_twice(clock: Clock) -> None:
    assert alternated({"a": clock.work("a", lambda _: 1000.0)}, Effort(cap_s=1.0))["a"] == [1000.0] * 2


def test_quick_calls_are_timed_many_at_once(clock: Clock) -> None:
    found = alternated({"a": clock.work("a", lambda _: 0.001)}, Effort(least=3, most=3, warm_up=0))
    assert found["a"] == pytest.approx([0.001] * 3)
    assert len(clock.worked) == 1 + 3 * 5  # 5 ms is the shortest time that is trusted


def test_the_device_is_waited_for(clock: Clock) -> None:
    """Work that was started but is not done must not count as done."""
    pending = []

    def start() -> None:
        pending.append(1.0)

    def sync() -> None:
        clock.now_s += sum(pending)
        pending.clear()

    assert alternated({"a": start}, Effort(least=3, most=3), sync)["a"] == [1.0] * 3
