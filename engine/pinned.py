"""Pinned host memory for copies between host and device: reusable buffers (``PinnedRing``), or memory that exists
already, pinned in place (``pin``).

A copy from or to pageable memory blocks the thread that starts it; but pinning memory is slow and stalls the whole
device, so a buffer is pinned once and reused throughout a run. It may be refilled only when nothing reads its content
any more. For an upload, the copy's event says when that is. For a download, it is when the last tensor, view or array
in the buffer is freed, which only Python knows: so buffers are lent, and a loan ends by reference counting.
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

# Tensors are lent in their final shape, strides and, for these, dtype: each view that torch makes releases the GIL.
_NUMPY = {torch.uint8: "|u1", torch.int16: "<i2", torch.int32: "<i4", torch.int64: "<i8", torch.float32: "<f4"}


class PinnedRing:
    """Buffers that are lent, and returned when the last tensor, view or array in them is freed.

    The ring grows to the largest number ever lent at once, which the pipeline's channels bound; after that it allocates
    nothing. Only one thread takes buffers; any thread may free them.
    """

    def __init__(self, pinned: Callable[[int], Tensor]) -> None:
        """Args: pinned: allocates pinned memory of a given number of bytes, as (bytes,) uint8."""
        self.buffers = 0  # allocated so far
        self._pinned = pinned
        self._free: list[Tensor] = []

    def take(self, like: Tensor) -> Tensor:
        """A tensor like this one in shape, dtype and order of dimensions, in memory not otherwise in use. Its content
        is undefined."""
        size = like.numel() * like.element_size()
        fitting = [(buffer.numel(), place) for place, buffer in enumerate(self._free) if buffer.numel() >= size]
        if fitting:
            buffer = self._free.pop(min(fitting)[1])  # other threads only append, so the index is still right
        else:
            buffer = self._pinned(max(size, 1))
            self.buffers += 1
        lent = torch.from_numpy(np.asarray(_Loan(buffer, like, self._free)))
        return lent if lent.dtype == like.dtype else lent.view(like.dtype)


class _Loan:
    """The object that NumPy keeps alive as long as any array, and so any tensor, uses the buffer."""

    def __init__(self, buffer: Tensor, like: Tensor, back_to: list[Tensor]) -> None:
        strides, step = [0] * like.ndim, like.element_size()  # bytes
        for dim in sorted(range(like.ndim - 1, -1, -1), key=like.stride):  # from the innermost one outwards
            strides[dim], step = step, step * like.shape[dim]
        self.__array_interface__ = {
            "shape": tuple(like.shape),
            "strides": tuple(strides),
            "typestr": _NUMPY.get(like.dtype, f"<i{like.element_size()}"),
            "data": (buffer.data_ptr(), False),
            "version": 3,
        }
        self._buffer = buffer
        self._back_to = back_to

    def __del__(self) -> None:
        self._back_to.append(self._buffer)


def pin(memory: Bytes, device: torch.device) -> Callable[[], None]:
    """Pins memory that exists already, so that a device can write to it directly.

    Returns a function that unpins it and keeps the memory alive until it is called: if the memory were freed while the
    driver takes it for pinned, copies would write into whatever is allocated there next. Memory that cannot be pinned
    stays as it is: copies to it take longer and block the thread that starts them.
    """
    if kernels_on(device) != "cuda":
        return lambda: None
    from cupy.cuda import runtime  # a failure of torch's own call would surface as the next kernel's error

    try:
        with torch.cuda.device(device):
            runtime.hostRegister(memory.ctypes.data, memory.nbytes, 0)
    except RuntimeError:  # CuPy's errors are RuntimeErrors too
        return lambda: None

    def undo() -> None:
        with suppress(RuntimeError), torch.cuda.device(device):
            runtime.hostUnregister(memory.ctypes.data)

    return undo
