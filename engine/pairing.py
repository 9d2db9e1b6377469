"""Frames into pairs, and pairs into the batches that go through the model together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice

from flowreel.engine.config import Direction
from flowreel.engine.data import Frame, FramePair, PairBatch
from flowreel.engine.errors import UsageError


def pairs(frames: Iterator[Frame], direction: Direction = "forward") -> Iterator[FramePair]:
    """Pair each frame with its predecessor in the same clip: N frames of one clip give N-1 pairs.

    Each frame is taken from ``frames`` once and serves both its pairs. Forward flow goes from the earlier frame to
    the later one; backward flow from the later to the earlier, so there ``first`` is the later frame.
    """
    previous: Frame | None = None
    for frame in frames:
        if previous is not None and previous.clip == frame.clip:
            if direction == "forward":
                yield FramePair(previous, frame)
            else:
                yield FramePair(frame, previous)
        previous = frame


def batches(batch: int, shard: int, first_index: int = 0) -> Callable[[Iterator[FramePair]], Iterator[PairBatch]]:
    """A stage that gathers up to ``batch`` pairs whose flows belong to one shard of ``shard`` flows.

    Batches start at multiples of ``batch`` within each shard, wherever the run itself starts, so that a resumed run
    makes exactly the batches of an uninterrupted one. The last batch of a shard or of the input may be short.

    Args:
        batch: pairs in a full batch.
        shard: flows in a full shard of the output.
        first_index: place in the output of the first pair's flow; not 0 when a run is resumed.
    """
    if batch < 1 or shard < 1 or first_index < 0:
        raise UsageError(f"batch and shard must be at least 1, the first index 0: got {batch}, {shard}, {first_index}")

    def gather(pairs: Iterator[FramePair]) -> Iterator[PairBatch]:
        waiting: list[FramePair] = []
        for index, pair in enumerate(pairs, first_index):
            waiting.append(pair)
            following = (index + 1) % shard
            if following % batch == 0:  # also true of place 0, the start of the next shard
                yield PairBatch(tuple(waiting), index + 1 - len(waiting))
                waiting.clear()
        if waiting:
            yield PairBatch(tuple(waiting), index + 1 - len(waiting))

    return gather


def planned(numbers: Sequence[int], batch: int, shard: int, count: int) -> list[list[int]]:
    """Which flows go through the model together when only some are wanted: where possible, a run's own batches.

    A run's batch that is wanted whole is kept, so that its flows are equal bit for bit. Neighbouring batches wanted
    only in part are merged while they fit into one batch.

    Args:
        numbers: of the wanted flows, ascending.
        batch, shard: as in ``batches``.
        count: total number of flows.
    """

    def start(number: int) -> int:
        place = number % shard
        return number - place % batch

    plan: list[list[int]] = []
    open_end = False  # whether the last batch consists of parts, and may take more
    for first, group in groupby(numbers, start):
        part = list(group)
        end = min(first + batch, first // shard * shard + shard, count)
        whole = len(part) == end - first
        if open_end and not whole and len(plan[-1]) + len(part) <= batch:
            plan[-1] += part
        else:
            plan.append(part)
        open_end = not whole
    return plan


def batches_of(plan: Sequence[Sequence[int]]) -> Callable[[Iterator[FramePair]], Iterator[PairBatch]]:
    """A stage that gathers incoming pairs into batches of the planned lengths."""

    def gather(pairs: Iterator[FramePair]) -> Iterator[PairBatch]:
        for numbers in plan:
            yield PairBatch(tuple(islice(pairs, len(numbers))), numbers[0])

    return gather
