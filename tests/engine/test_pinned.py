"""Buffers that are lent: nobody's numbers change under him, and nothing is allocated twice for nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from flowreel.engine.pinned import PinnedRing

HOLDS: dict[str, Callable[[torch.Tensor], object]] = {
    "itself": lambda tensor: tensor,
    "a view": lambda tensor: tensor[1, 0, 2:],
    "an array": lambda tensor: tensor.numpy()[0],
    "a view of an array's tensor": lambda tensor: torch.from_numpy(tensor.numpy()[:1])[0],
}


@pytest.fixture
def ring() -> PinnedRing:
    """Of memory that cannot be pinned here."""
    return PinnedRing(lambda size: torch.empty(size, dtype=torch.uint8))


@pytest.mark.parametrize("how", HOLDS)
def test_nothing_is_filled_again_while_it_is_held(ring: PinnedRing, how: str) -> None:
    like = torch.zeros(2, 2, 4, 6)
    held = HOLDS[how](ring.take(like).fill_(7))
    for _ in range(3):
        ring.take(like).fill_(8)
    assert ring.buffers == 2
    assert np.all(np.asarray(held) == 7)
    del held
    gc.collect()
    taken = [ring.take(like) for _ in range(2)]
    assert ring.buffers == len(taken) == 2


def test_short_batches_and_small_ones_find_room(ring: PinnedRing) -> None:
    full, short, small = torch.zeros(4, 2, 8, 8), torch.zeros(1, 2, 8, 8), torch.zeros(4, 2, 2, 2)
    for _ in range(3):
        large, little = ring.take(full), ring.take(small)
        assert (large.shape, little.shape) == (full.shape, small.shape)
        del large, little
    assert ring.take(short).shape == short.shape
    assert ring.buffers == 2


@pytest.mark.parametrize(
    "like",
    [
        torch.zeros(3, 5, dtype=torch.float16),
        torch.zeros(4, 6, 3, dtype=torch.uint8).permute(2, 0, 1),
        torch.zeros(2, 3, 4, 6).to(memory_format=torch.channels_last),
    ],
)
def test_type_and_order_of_dimensions_are_kept(ring: PinnedRing, like: torch.Tensor) -> None:
    taken = ring.take(like)
    assert (taken.dtype, taken.shape, taken.stride()) == (like.dtype, like.shape, like.stride())


def test_gaps_are_not_kept(ring: PinnedRing) -> None:
    taken = ring.take(torch.zeros(2, 2, 8, 8)[..., 1:5, 2:6])
    assert (taken.shape, taken.is_contiguous()) == ((2, 2, 4, 4), True)
