"""Pairs and batches of plain lists of frames: none lost, none twice, none across the end of a clip or a shard."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowreel.engine.data import Frame, FramePair
from flowreel.engine.errors import UsageError
from flowreel.engine.pairing import batches, pairs


def frame(index: int, clip: int = 0) -> Frame:
    return Frame(torch.zeros(3, 1, 1, dtype=torch.uint8), index, index / 25, clip)


def frames(count: int) -> Iterator[Frame]:
    return (frame(index) for index in range(count))


def places(made: Iterator[FramePair]) -> list[tuple[int, int]]:
    return [(pair.first.index, pair.second.index) for pair in made]


def test_neighbours_are_paired() -> None:
    assert places(pairs(frames(4))) == [(0, 1), (1, 2), (2, 3)]


def test_backward_starts_at_the_later_frame() -> None:
    assert places(pairs(frames(3), "backward")) == [(1, 0), (2, 1)]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_frames_give_no_pair(count: int) -> None:
    assert list(pairs(frames(count))) == []


def test_clips_are_never_mixed() -> None:
    mixed = [frame(0, 0), frame(1, 0), frame(0, 1), frame(0, 2), frame(1, 2), frame(2, 2)]
    assert places(pairs(iter(mixed))) == [(0, 1), (0, 1), (1, 2)]


def test_each_frame_is_asked_for_once_and_shared() -> None:
    taken = 0

    def counting() -> Iterator[Frame]:
        nonlocal taken
        for one in frames(10):
            taken += 1
            yield one

    made = pairs(counting())
    first = next(made)
    assert taken == 2  # a pair leaves as soon as its second frame is there
    assert next(made).first is first.second
    assert len(list(made)) == 7
    assert taken == 10


def sizes(count: int, batch: int, shard: int, first_index: int = 0) -> list[tuple[int, int]]:
    stage = batches(batch, shard, first_index)
    return [(made.index, len(made)) for made in stage(pairs(frames(count + 1)))]


def test_batches_respect_shards() -> None:
    assert sizes(10, batch=4, shard=6) == [(0, 4), (4, 2), (6, 4)]
    assert sizes(9, batch=4, shard=100) == [(0, 4), (4, 4), (8, 1)]
    assert sizes(5, batch=8, shard=2) == [(0, 2), (2, 2), (4, 1)]
    assert sizes(3, batch=1, shard=1) == [(0, 1), (1, 1), (2, 1)]
    assert sizes(0, batch=4, shard=6) == []


@given(count=st.integers(0, 60), batch=st.integers(1, 9), shard=st.integers(1, 25), resumed_shards=st.integers(0, 3))
def test_resumed_batches_are_those_of_the_first_run(count: int, batch: int, shard: int, resumed_shards: int) -> None:
    whole = sizes(count, batch, shard)
    assert sum(size for _, size in whole) == count
    for index, size in whole:
        assert index % shard % batch == 0
        assert 1 <= size <= batch
        assert index // shard == (index + size - 1) // shard
    start = resumed_shards * shard
    assert sizes(max(count - start, 0), batch, shard, start) == [made for made in whole if made[0] >= start]


def test_a_batch_leaves_with_its_last_pair() -> None:
    """It does not wait for another frame, which may come much later (a camera) or never (a decoder that fails)."""
    taken: list[int] = []

    def noted() -> Iterator[FramePair]:
        for number, pair in enumerate(pairs(frames(9))):
            taken.append(number)
            yield pair

    assert [(len(batch), len(taken)) for batch in batches(3, 5)(noted())] == [(3, 3), (2, 5), (3, 8)]


def test_order_is_kept() -> None:
    made = batches(3, 7)(pairs(frames(12)))
    assert places(pair for batch in made for pair in batch.pairs) == [(n, n + 1) for n in range(11)]


@pytest.mark.parametrize(("batch", "shard", "first_index"), [(0, 4, 0), (4, 0, 0), (4, 4, -1)])
def test_impossible_sizes(batch: int, shard: int, first_index: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        batches(batch, shard, first_index)
