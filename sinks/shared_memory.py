"""Memory shared with other processes: one anonymous file, of which each buffer is a part."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flowreel.sinks.parallel import OrderedPool

if TYPE_CHECKING:
    from flowreel.engine.data import Bytes

AT_ONCE = 16 << 20  # bytes allocated ahead of time in one call; between calls ``close`` can stop it


class Buffer(NamedTuple):
    """A part of the shared memory."""

    place: int  # byte offset in the file
    bytes: Bytes  # (N,) uint8


class SharedMemory:
    """Grows by a buffer at a time; freed when the last process that has its descriptor or a buffer lets go of it.

    A process that inherits ``descriptor`` finds a buffer there by its place. Linux only.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("flowreel", os.MFD_CLOEXEC)
        self._taken = self._size = 0  # bytes of the buffers, and of the file
        self._closed = False
        self._ahead: OrderedPool[None] = OrderedPool(lambda _: None, 1)

    def reserve(self, nbytes: int) -> None:
        """Allocates memory for future buffers in the background, before anybody waits for it.

        The system finds and clears memory when it is first touched. That takes longer than copying data into it, in
        some virtual machines ten times as long.
        """
        self._grow(nbytes)
        self._ahead.submit(self._find, nbytes)

    def take(self, nbytes: int) -> Buffer:
        """A new buffer, aligned to a page. It stays valid as long as it is referenced."""
        place, size = self._taken, -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._grow(place + size)
        self._taken += size
        return Buffer(place, np.frombuffer(mmap.mmap(self.descriptor, size, offset=place), np.uint8)[:nbytes])

    def close(self) -> None:
        """No more buffers can be taken; those taken stay valid."""
        self._closed = True
        self._ahead.close()  # waits, as its thread might use the descriptor once that is another file's
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _grow(self, size: int) -> None:
        if size > self._size:
            os.ftruncate(self.descriptor, size)
            self._size = size

    def _find(self, nbytes: int) -> None:
        for place in range(0, nbytes, AT_ONCE):
            if self._closed:
                return
            # Nobody asks the pool for an error: too little memory shows when it is touched.
            os.posix_fallocate(self.descriptor, place, min(AT_ONCE, nbytes - place))


class SharedView:
    """The same memory in a process that has inherited its descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffers: dict[int, Bytes] = {}  # mapped so far, by place

    def at(self, place: int, nbytes: int) -> Bytes:
        """(nbytes,) uint8, read-only: the beginning of the buffer at that place."""
        buffer = self._buffers.get(place)
        if buffer is None or buffer.size < nbytes:
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # all pages now, not each when first touched
            mapped = mmap.mmap(self._descriptor, nbytes, flags=flags, prot=mmap.PROT_READ, offset=place)
            buffer = self._buffers[place] = np.frombuffer(mapped, np.uint8)
        return buffer[:nbytes]
