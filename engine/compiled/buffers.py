"""Large tensors from memory that is kept: what the system hands out afresh costs a page fault every 4 KiB."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SMALLEST = 8 << 20  # bytes; below it the C library keeps memory by itself


def apart(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in memory of their own, which the system has back as soon as the last view of them is gone.

    For what is large and goes while later things stay: what the C library frees in between, it keeps.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < mmap.PAGESIZE:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=dtype).view(shape)


class Buffers:
    """Channels-last tensors whose memory comes back by itself when the last view of it is gone.

    It is kept for the next tensor of that size. Any number of threads may ask at once; each gets memory of its own.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """(B, C, H, W), channels last, its values whatever was there."""
        shape = (batch, height, width, channels)
        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(shape, dtype=dtype, device="cpu").permute(0, 3, 1, 2)
        blocks = self._free.setdefault(size, [])
        try:
            memory = blocks.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        lent = memory.view(_Lent)
        lent.memory, lent.home = memory, blocks
        return torch.from_numpy(lent).view(dtype).view(shape).permute(0, 3, 1, 2)


class _Lent(np.ndarray):
    """Memory on loan to a tensor, which holds it for as long as it has views."""

    memory: np.ndarray | None = None
    home: list[np.ndarray]

    def __del__(self) -> None:
        if self.memory is not None:
            self.home.append(self.memory)
