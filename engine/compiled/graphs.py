"""Repeated work: captured once as a CUDA graph, and run by callers in turns, since its memory is fixed.

On a CPU the work is simply run again, so that the code around it can be tested there.
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

_WARM_UPS = 3  # in the first, kernels load and cuDNN chooses and allocates; the third is like all later ones
PRIORITY = -1  # of captured work, used by nobody else: of each priority torch has 32 streams and hands them out in turn
_capturing = OneAtATime()  # in any thread: torch synchronises the device before a capture, which breaks any other


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same work as a CUDA graph: one launch instead of one for each kernel.

    ``work`` does the same in the same memory each time and never waits for the device. What it allocates belongs to
    the graph. It runs a few times before this returns; on a CPU once, and ``work`` itself is returned.

    The graph is launched on the current stream; two launches must not overlap (``Turns``). When the capture fails, a
    warning gives the reason and ``work`` is returned uncaptured. That also happens when a thread of the caller's
    synchronises the device during the capture (``torch.cuda.synchronize``), which CUDA forbids.

    Raises torch.OutOfMemoryError when device memory runs out, whether torch, cuDNN or CUDA reports it.
    """
    if device.type != "cuda":
        work()
        return work
    with _capturing, torch.cuda.device(device):
        current = torch.cuda.current_stream(device)
        side = torch.cuda.Stream(device, priority=PRIORITY)  # type: ignore[no-untyped-call]
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
    """Work that runs without a capture could not be captured."""


def graph_of(work: Callable[[], object], device: torch.device, side: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Captures ``work`` once, on the stream ``side``. Raises CaptureError, with all state restored."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # A failed capture leaves its stream current; the outer block restores the caller's. Other stages keep running
        # in their threads meanwhile: what they allocate or pin must not break the capture.
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
        ):
            work()
    except RuntimeError as error:
        # It also leaves torch's allocator waiting for the capture to end, which would hold back all memory freed on
        # other streams.
        for end in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):  # since torch 2.8, and before
            with suppress(Exception):
                getattr(torch._C, end)(device.index, pool)
                torch._C._cuda_releasePool(device.index, pool)
        raise CaptureError(str(error)) from error
    return graph


def beside(work: Callable[[], Thing], device: torch.device) -> Callable[[], Thing]:
    """Starts ``work`` on a side stream, concurrent with what is captured next; the function returned joins the two.

    For work that is independent of what is captured until then: each uses the parts of the device that the other leaves
    idle. Outside a capture, and on a CPU, it is done at once.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        result = work()
        return lambda: result
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device, priority=PRIORITY)  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = work()

    def awaited() -> Thing:
        current.wait_stream(side)
        return result

    return awaited


class Turns(Generic[Thing]):
    """A resource that one call at a time may use, from any thread and stream.

    A call uses it on its current stream; the next call's stream waits for the work that the last one launched. A thread
    waits for another only while that one launches its work, not while the device executes it.
    """

    def __init__(self, device: torch.device, thing: Thing) -> None:
        """``thing``: made on the stream that is current."""
        self._used: torch.cuda.Event | None = None
        self._device, self._thing = device, thing
        self._free = OneAtATime()
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
        """Waits for work in flight before its memory is freed: the allocator knows only the stream it was made on."""
        if self._used is not None:
            self._used.synchronize()
