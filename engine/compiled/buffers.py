"""Large tensors in reused memory: memory fresh from the system costs a page fault every 4 KiB."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# By layer, its input's size and the rows of padding: the layout of its weights that oneDNN chose. Kept by a program, so
# that those for one size of frames are freed with it.
Layouts = dict[tuple[object, ...], Tensor]

SMALLEST = 8 << 20  # bytes; smaller blocks are reused by the C library itself


def apart(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in a memory mapping of their own, returned to the system as soon as the last view of them is gone.

    For large tensors that are freed while later ones live on: the C library would keep such memory for itself.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < mmap.PAGESIZE:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    if hasattr(mmap, "MAP_PRIVATE"):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, size)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Buffers:
    """A program's memory: channels-last tensors whose memory returns here when the last view of it is gone.

    It is kept for the next tensor of the same size in bytes. Any number of threads may allocate at once; no two tensors
    share memory.
    """

    def __init__(self) -> None:
        self.layouts: Layouts = {}
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """(B, C, H, W), channels last, uninitialised."""
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
    """Memory lent to a tensor, which holds it for as long as any view of the tensor exists."""

    memory: np.ndarray | None = None
    home: list[np.ndarray]

    def __del__(self) -> None:
        if self.memory is not None:
            self.home.append(self.memory)
