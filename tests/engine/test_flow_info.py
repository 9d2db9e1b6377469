"""``FlowInfo`` decides how many flows a shard holds."""

from __future__ import annotations

from typing import Any

import pytest

from flowreel.engine.data import MOST_FLOWS_A_SHARD, FlowInfo, SourceId


def info(height: int, width: int, **settled: Any) -> FlowInfo:
    return FlowInfo(height, width, None, None, SourceId("clip.mp4"), **settled)


@pytest.mark.parametrize(
    ("size", "batch", "length"),
    [
        ((436, 1024), None, 37),  # 128 MiB
        ((436, 1024), 8, 32),
        ((436, 1024), 2, 36),
        ((436, 1024), 1, 37),
        ((1080, 1920), 8, 8),
        ((1080, 1920), 9, 8),  # not even one batch
        ((64, 64), 7, 511),
        ((64, 64), None, MOST_FLOWS_A_SHARD),
        ((20_000, 20_000), 4, 1),
    ],
)
def test_shards_are_of_whole_batches(size: tuple[int, int], batch: int | None, length: int) -> None:
    assert info(*size, batch=batch).shard_length(None) == length


def test_unless_their_size_was_asked_for() -> None:
    assert info(10, 10, batch=4).shard_length(7 * 800) == 7
    assert info(10, 10, batch=4).shard_length(1) == 1


def test_a_store_that_is_gone_on_with_keeps_its_own() -> None:
    assert info(436, 1024, batch=8, shard=37).shard_length(None) == 37
    assert info(436, 1024, batch=8, shard=37).shard_length(8 * 436 * 1024) == 1  # refused by the store
