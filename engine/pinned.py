"""Pinned host memory, lent and taken back: what copies between host and device pass through. Others' memory is pinned
where it lies.

A copy from or to other memory holds up the thread that asks for it; but pinning memory is slow and holds up the whole
device, so a buffer is pinned once and used for all of a run. It may be filled again only when nobody reads what it
holds. On the way to the device that is when the copy's event says so. On the way back it is when the last tensor, view
or array that lies in it has gone, which only Python knows: so buffers are lent, and a loan ends by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flowreel.kernels.launch import kernels_on

if TYPE_CHECKING:
    from flowreel.engine.data import Bytes

# What NumPy has a word for is lent in its shape at once: each of torch's views lets go of the GIL.
_NUMPY = {torch.uint8: "|u1", torch.int16: "<i2", torch.int32: "<i4", torch.int64: "<i8", torch.float32: "<f4"}


class PinnedRing:
    """Buffers that are lent and come back with the last tensor, view or array that lies in them.

    There are as many as were ever lent at once, which the pipeline's channels bound; after that nothing is allocated.
    One thread takes; any thread may be the one that lets go.
    """

    def __init__(self, pinned: Callable[[int], Tensor]) -> None:
        """Args: pinned: gives new memory of so many bytes, (bytes,) uint8."""
        self.buffers = 0  # made so far
        self._pinned = pinned
        self._free: list[Tensor] = []

    def take(self, like: Tensor) -> Tensor:
        """Memory of this shape, dtype and order of dimensions, which nobody else holds. Its content is arbitrary."""
        size = like.numel() * like.element_size()
        fitting = [(buffer.numel(), place) for place, buffer in enumerate(self._free) if buffer.numel() >= size]
        if fitting:
            buffer = self._free.pop(min(fitting)[1])  # others only append meanwhile, so the place still holds it
        else:
            buffer = self._pinned(max(size, 1))
            self.buffers += 1
        if like.is_contiguous() and like.dtype in _NUMPY:
            return torch.from_numpy(np.asarray(_Loan(buffer, like.shape, _NUMPY[like.dtype], self._free)))
        lent = torch.from_numpy(np.asarray(_Loan(buffer, (size,), "|u1", self._free))).view(like.dtype)
        return lent.as_strided(like.shape, torch.empty_like(like, device="meta").stride())


class _Loan:
    """What NumPy keeps alive for as long as any array, and so any tensor, uses the buffer."""

    def __init__(self, buffer: Tensor, shape: tuple[int, ...], kind: str, back_to: list[Tensor]) -> None:
        """kind: of the numbers, as NumPy's ``typestr`` says it. They begin with the buffer and lie together."""
        self.__array_interface__ = {"shape": shape, "typestr": kind, "data": (buffer.data_ptr(), False), "version": 3}
        self._buffer = buffer
        self._back_to = back_to

    def __del__(self) -> None:
        self._back_to.append(self._buffer)


def pin(memory: Bytes, device: torch.device) -> Callable[[], None]:
    """Pins memory that somebody has already, so that a device may write to it by itself.

    What is returned undoes that, and keeps the memory until it is called: a driver that takes for pinned what has gone
    writes into whatever comes to lie there. Memory that cannot be pinned stays as it is: copies there take longer, and
    hold up the thread that asks for them.
    """
    if kernels_on(device) != "cuda":
        return lambda: None
    from cupy.cuda import runtime  # torch's own call would leave a refusal behind as the error of the next kernel

    try:
        with torch.cuda.device(device):
            runtime.hostRegister(memory.ctypes.data, memory.nbytes, 0)
    except RuntimeError:  # CuPy's are, too
        return lambda: None

    def undo() -> None:
        with suppress(RuntimeError), torch.cuda.device(device):
            runtime.hostUnregister(memory.ctypes.data)

    return undo
