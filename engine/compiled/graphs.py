"""Work that repeats: captured once as a CUDA graph, and the turns that callers take at memory that is settled.

On a CPU work is simply done again, so that what surrounds it is tested there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

Thing = TypeVar("Thing")

_WARM_UPS = 3  # cuDNN measures its algorithms in the first, kernels load; the third is as all later ones will be


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same work as one thing to start: a CUDA graph, which spares a launch for each of its kernels.

    ``work`` does the same in the same memory each time and waits for nothing. What it allocates on the way belongs to
    the graph. It runs a few times before this returns; on a CPU once, and what is given back is ``work`` itself.

    The graph is started on the current stream; two starts must not overlap (``Turns``). When it cannot be captured, a
    warning says why and the work stays as it is.
    """
    if device.type != "cuda":
        work()
        return work
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                work()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other stages go on meanwhile in their threads: what they allocate or pin must not break the capture.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"running without a CUDA graph, which could not be captured: {error}", stacklevel=2)
            current.wait_stream(side)
            return work
        current.wait_stream(side)
    return graph.replay


class Turns(Generic[Thing]):
    """Things that one call at a time may use, whatever thread and stream it is on.

    A call takes one, uses it on its current stream and gives it back; the next call's stream waits for what the last
    one started. When all are taken, by threads that call at the very same time, one more is made. Taking and giving
    back are ``list.pop`` and ``list.append``, which threads may call at once.
    """

    def __init__(self, device: torch.device, make: Callable[[], Thing]) -> None:
        self._device = device
        self._make = make
        self._free: list[tuple[Thing, torch.cuda.Event | None]] = [self._made()]

    @contextmanager
    def taken(self) -> Iterator[Thing]:
        try:
            thing, used = self._free.pop()
        except IndexError:
            thing, used = self._made()
        try:
            if used is not None:
                torch.cuda.current_stream(self._device).wait_event(used)
            yield thing
        finally:
            if used is not None:
                used.record(torch.cuda.current_stream(self._device))
            self._free.append((thing, used))

    def __del__(self) -> None:
        """What still runs keeps the memory it uses: the allocator knows only the stream that asked for it."""
        for _, used in getattr(self, "_free", ()):
            if used is not None:
                used.synchronize()

    def _made(self) -> tuple[Thing, torch.cuda.Event | None]:
        if self._device.type != "cuda":
            return self._make(), None
        thing, used = self._make(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        used.record(torch.cuda.current_stream(self._device))
        return thing, used
