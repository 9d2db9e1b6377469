"""The pixel correlation on tensor cores, for half-precision maps on a GPU, preferably channels last.

What a block computes, and how, is explained in ``cuda/correlation_products.cu``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flowreel.kernels.launch import MOST_DEEP, SUFFIXES, launch, multiprocessors, on_tensor_cores, parts, sizes, view

RADII = (10, 4)  # one kernel each: 21 x 21 displacements, and 9 x 9
_TYPES = (torch.float16, torch.bfloat16)
_COLUMNS, _ROWS, _BLOCK = 32, 4, 128  # pixels and rows that a block computes, and its threads: as in the source
_MOST_CHANNELS = 256  # that a block's registers hold
_WORDS = 8  # elements in 16 bytes: the maps are read 16 bytes at a time
_AT_ONCE = 2  # blocks that a multiprocessor has registers for
_START = 2  # a block's work before its first row of b, in rows


def fits(a: Tensor, radius: int) -> bool:
    """Whether the kernel takes such maps: half precision, few enough channels, one of its radii, a GPU that runs it."""
    few = a.shape[1] <= _MOST_CHANNELS and a.shape[1] % _WORDS == 0
    return a.dtype in _TYPES and radius in RADII and few and on_tensor_cores(a.device)


def pixel_correlation_into(
    out: Tensor, a: Tensor, b: Tensor, radius: int, stride: int, scale: float, slope: float
) -> None:
    """Two maps (B, C, H, W) that fit -> out: (B, (2 radius + 1)^2, H, W). Any strides: maps are copied where needed."""
    batch, channels, height, width = a.shape
    a, b = _read_in_words(a), _read_in_words(b)
    across = stride * parts(parts(width, stride), _COLUMNS)
    down = stride * parts(parts(height, stride), _ROWS)
    at_once = _AT_ONCE * multiprocessors(a.device)
    shares = _shares(across * down * batch, _ROWS + 2 * radius, at_once)
    entry = f"correlation_products_{radius}_{SUFFIXES[a.dtype]}"
    for first in range(0, batch, MOST_DEEP // shares):
        some = slice(first, first + MOST_DEEP // shares)
        count = len(range(batch)[some])
        views = (*view(a[some]), *view(b[some]), *view(out[some]))
        arguments = (*views, *sizes(channels, height, width, stride, shares), np.float32(scale), np.float32(slope))
        launch("correlation_products", entry, (across, down, shares * count), arguments, (_BLOCK,))


def _read_in_words(x: Tensor) -> Tensor:
    """The map, or a copy where a pixel's channels cannot be read 16 bytes at a time: cheap beside the products."""
    pitches = (x.stride(axis) for axis in (0, 2, 3))
    if x.stride(1) == 1 and x.data_ptr() % 16 == 0 and all(pitch % _WORDS == 0 for pitch in pitches):
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).copy_(x)


def _shares(tiles: int, rows: int, at_once: int) -> int:
    """How many blocks share a tile's rows of b: the fastest number, a round lasting as long as its longest block."""
    return min(range(1, rows // 4 + 1), key=lambda n: parts(tiles * n, at_once) * (_START + parts(rows, n)))
