"""Integers to bit planes, which compress better: the ``bitshuffle`` filter of Blosc, on a GPU.

Neighbouring flow values share their upper bits, so the planes of those are long runs of equal bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowreel.kernels.launch import blocks_for, launch, parts, sizes
from flowreel.kernels.operation import operation

if TYPE_CHECKING:
    from collections.abc import Callable

TOGETHER = 8  # values whose bits make one byte of each plane
_TYPES = (torch.int16, torch.int32)

# --- the definition: any device ---------------------------------------------------------------------------------------


def bitshuffle_definition(values: Tensor, block: int) -> Tensor:
    """What ``bitshuffle`` means."""
    flat = values.flatten(1)
    starts = range(0, flat.shape[1], block)
    return torch.cat([_planes(flat[:, start : start + block].contiguous()) for start in starts], 1)


def _planes(values: Tensor) -> Tensor:
    """One block: (N, n) to (N, bytes)."""
    if values.shape[1] % TOGETHER:
        return values.view(torch.uint8)
    bits = 8 * values.element_size()
    place = torch.arange(bits, dtype=values.dtype, device=values.device)
    planes = values.view(len(values), 1, -1, TOGETHER).bitwise_right_shift(place.view(1, bits, 1, 1)).bitwise_and(1)
    weights = torch.tensor([1 << place for place in range(TOGETHER)], dtype=torch.uint8, device=values.device)
    return (planes.to(torch.uint8) * weights).sum(3, dtype=torch.uint8).flatten(1)


# --- the CUDA version -------------------------------------------------------------------------------------------------


def _bitshuffle_cuda(values: Tensor, block: int) -> Tensor:
    values = values.contiguous()
    batch, count = values.shape[0], values.shape[1:].numel()
    out = torch.empty(batch, count * values.element_size(), dtype=torch.uint8, device=values.device)
    grid = blocks_for(batch * parts(count, TOGETHER))
    launch("bitshuffle", f"bitshuffle_{8 * values.element_size()}", grid, (values, out, *sizes(batch, count, block)))
    return out


# --- registration -----------------------------------------------------------------------------------------------------


def _shape(values: Tensor, block: int) -> Tensor:
    count = values[0].numel() * values.element_size()
    return torch.empty((values.shape[0], count), dtype=torch.uint8, device=values.device)


_bitshuffle: Callable[[Tensor, int], Tensor] = operation(
    "bitshuffle(Tensor values, int block) -> Tensor", bitshuffle_definition, on_cuda=_bitshuffle_cuda, shape=_shape
)

# --- the public function ----------------------------------------------------------------------------------------------


def bitshuffle(values: Tensor, block: int) -> Tensor:
    """The bit planes of each row's values, block by block, the lowest bits first.

    Args:
        values: (N, ...) int16 or int32, any strides, none of the sizes zero. Each of the N rows is shuffled by itself.
        block: values that are shuffled together, a multiple of 8; the last block may be short.

    Returns:
        (N, bytes) uint8, as many bytes as the values have. Plane b of a block of n values holds bit b of value 8i + k
        as bit k of its byte i. A block whose length is no multiple of 8 stays as it is, in little-endian order, as in
        version 2 of Blosc's format. On a GPU: equal to the definition.

    Raises:
        TypeError: the values have another dtype.
        ValueError: the values are empty or not (N, ...), or the block is not a positive multiple of 8.
    """
    if values.dtype not in _TYPES:
        raise TypeError(f"int16 or int32 can be shuffled, got {values.dtype}")
    if values.ndim < 2 or values.numel() == 0:
        raise ValueError(f"values are (N, ...) and there are some, got {tuple(values.shape)}")
    if block <= 0 or block % TOGETHER:
        raise ValueError(f"a block is a multiple of {TOGETHER} values, got {block}")
    return _bitshuffle(values, block)
