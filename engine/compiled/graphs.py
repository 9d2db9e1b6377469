"""Work that repeats: captured once as a CUDA graph, and the turns that callers take at memory that is settled.

On a CPU work is simply done again, so that what surrounds it is tested there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

import torch

from flowreel.engine.device import ran_out_of_memory
from flowreel.engine.pipeline import OneAtATime

Thing = TypeVar("Thing")

_WARM_UPS = 3  # kernels load in the first, cuDNN chooses and allocates; the third is as all later ones will be
_capturing = OneAtATime()  # of all threads: to begin a capture torch waits for the device, which ends all others there


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same work as one thing to start: a CUDA graph, which spares a launch for each of its kernels.

    ``work`` does the same in the same memory each time and waits for nothing. What it allocates on the way belongs to
    the graph. It runs a few times before this returns; on a CPU once, and what is given back is ``work`` itself.

    The graph is started on the current stream; two starts must not overlap (``Turns``). When it cannot be captured, a
    warning says why and the work stays as it is: so too where a caller's own thread waits for the whole device
    (``torch.cuda.synchronize``) just then, which CUDA forbids.

    Raises torch.OutOfMemoryError when the device's memory ends, whoever of torch, cuDNN and CUDA says so.
    """
    if device.type != "cuda":
        work()
        return work
    with _capturing, torch.cuda.device(device):
        current = torch.cuda.current_stream(device)
        # Of a priority that nobody else asks for: torch has 32 streams of each and gives them out in turn.
        side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    work()
            return graph_of(work, device, side).replay
        except RuntimeError as error:
            if ran_out_of_memory(error):
                raise torch.OutOfMemoryError(str(error)) from error
            if isinstance(error, CaptureError):
                warnings.warn(f"running without a CUDA graph, which could not be captured: {error}", stacklevel=2)
                return work
            raise
        finally:
            current.wait_stream(side)


class CaptureError(RuntimeError):
    """Work that went well by itself could not be captured."""


def graph_of(work: Callable[[], object], device: torch.device, side: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """One capture, on a stream of its own. Raises CaptureError; then all is as it was before."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # A capture that fails leaves its stream current, and the outer block puts the caller's back. Other stages go on
        # meanwhile in their threads: what they allocate or pin must not break the capture.
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
        ):
            work()
    except RuntimeError as error:
        # And it leaves torch's allocator waiting for its end, which would keep all that is freed on other streams.
        for end in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):  # since torch 2.8, and before
            with suppress(Exception):
                getattr(torch._C, end)(device.index, pool)
                torch._C._cuda_releasePool(device.index, pool)
        raise CaptureError(str(error)) from error
    return graph


class Turns(Generic[Thing]):
    """A thing that one call at a time may use, whatever thread and stream it is on.

    A call uses it on its current stream; the next call's stream waits for what the last one started. A thread waits for
    another only while that one gives the device its work, not while the device does it.
    """

    def __init__(self, device: torch.device, make: Callable[[], Thing]) -> None:
        self._device = device
        self._free = OneAtATime()
        self._used: torch.cuda.Event | None = None
        self._thing = make()
        if device.type == "cuda":
            self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._used.record(torch.cuda.current_stream(device))

    @contextmanager
    def taken(self) -> Iterator[Thing]:
        with self._free:
            if self._used is not None:
                torch.cuda.current_stream(self._device).wait_event(self._used)
            try:
                yield self._thing
            finally:
                if self._used is not None:
                    self._used.record(torch.cuda.current_stream(self._device))

    def __del__(self) -> None:
        """What still runs keeps the memory it uses: the allocator knows only the stream that asked for it."""
        used = getattr(self, "_used", None)
        if used is not None:
            used.synchronize()
