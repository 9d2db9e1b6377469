"""Checks and grids for kernels that store whole pixels of dense channels-last maps (``cuda/pixels.cuh``).

Such an output, with channels of zeros behind its values, is called a *room*.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowreel.kernels.launch import SUFFIXES, Size, parts

_TILE = 32, 32  # rows and columns of pixels per block, as in pixels.cuh
_PIECE = 16  # bytes per store


def tiles_for(batch: int, height: int, width: int, rows: int = _TILE[0]) -> Size:
    """The grid: a block for each tile of each picture. A GPU takes at most 65535 pictures."""
    return parts(width, _TILE[1]), parts(height, rows), batch


def check_room(out: Tensor, channels: int, batch: int, height: int, width: int) -> None:
    """Checks that ``out`` is a dense channels-last map of that size.

    Raises:
        ValueError: it is not.
    """
    if out.shape != (batch, channels, height, width):
        raise ValueError(f"expected room for {(batch, channels, height, width)}, got {tuple(out.shape)}")
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("room for whole pixels is channels-last without gaps")


def aligned(out: Tensor | None) -> bool:
    """Whether its memory begins at a multiple of 16 bytes, as 16-byte loads and stores require: some views do not."""
    return out is None or out.data_ptr() % _PIECE == 0


def fill(out: Tensor, *values: Tensor) -> None:
    """Stores all values side by side in the channels, then zeros, as the definitions do."""
    start = 0
    for value in values:
        out[:, start : start + value.shape[1]].copy_(value)
        start += value.shape[1]
    out[:, start:].zero_()


def check_frames(frames: Tensor, *flows: Tensor) -> tuple[int, int, int]:
    """Batch, height and width of two normalised frames. Checks that the flows are a quarter of that size.

    Raises:
        ValueError: they do not fit together.
    """
    if frames.ndim != 4 or frames.shape[1] != 6 or frames.numel() == 0:
        raise ValueError(f"two frames are (B, 6, H, W) and hold something, got {tuple(frames.shape)}")
    batch, _, height, width = frames.shape
    if not frames.is_contiguous() or height % 4 or width % 4:
        raise ValueError(f"frames are contiguous, their sides multiples of 4, got {tuple(frames.shape)}")
    for flow in flows:
        if flow.shape != (batch, 2, height // 4, width // 4):
            raise ValueError(f"flow for {tuple(frames.shape)} is a quarter of that size, got {tuple(flow.shape)}")
    return batch, height, width


def check_types(room: Tensor, *others: Tensor) -> None:
    """Checks that ``room`` has a dtype that kernels store, all others are float32, and all are on one device.

    Raises:
        TypeError, ValueError: they are not.
    """
    if not all(x.dtype == torch.float32 for x in others) or room.dtype not in SUFFIXES:
        raise TypeError(
            "what is read is float32, and what is written float32, bfloat16 or float16, "
            f"got {[x.dtype for x in others]} into {room.dtype}"
        )
    if not all(x.device == room.device for x in others):
        raise ValueError(f"all on one device, got {[x.device for x in (room, *others)]}")
