"""Devices: which one, on which stream, and every copy between host and device. Nothing else moves data.

On a GPU each stage works on its own CUDA stream. What orders them is one event per item, *the hand-off*: the stage
that makes an item records an event after its work; the stage that takes it makes its own stream wait for that event
and marks the item's tensors as used there, so that the allocator does not hand their memory out too early. The CPU
never waits for the device except in ``download``, where the bytes are needed. On a CPU all of this is nothing.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flowreel.engine.config import Precision
from flowreel.engine.data import FlowBatch, Frame
from flowreel.engine.errors import DeviceError, UsageError

Item = TypeVar("Item")
Thing = TypeVar("Thing")
Stage = Callable[[Iterator[Any]], Any]


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to the device that will be used; auto takes CUDA when it is there.

    Raises:
        DeviceError: CUDA was asked for by name and is not there; there is never a silent CPU run.
        UsageError: no such kind of device.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = "without" if torch.version.cuda is None else "with"
            raise DeviceError(f"{name} was asked for, but torch {torch.__version__} ({built} CUDA) finds no GPU")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise DeviceError(f"{name} was asked for, but there are {torch.cuda.device_count()} GPUs, from cuda:0")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def resolve_precision(precision: Precision | None, device: torch.device) -> Precision:
    """auto is fp32 on a CPU and fp16 on a GPU; a CPU also takes bf16.

    Raises:
        UsageError: the device has no such precision.
    """
    if precision is None:
        return "fp16" if device.type == "cuda" else "fp32"
    if device.type == "cpu" and precision not in ("fp32", "bf16"):
        raise UsageError(f"a CPU runs fp32 or bf16, not {precision}")
    return precision


def device_name(device: torch.device) -> str:
    """For a person: ``cuda:0 (NVIDIA ...)``, or ``cpu (2 threads)``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


class Streams:
    """Gives every stage of one run its own stream and orders them by the hand-off described above."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ready: WeakKeyDictionary[Any, torch.cuda.Event] = WeakKeyDictionary()

    def on_stream(self, stage: Stage, name: str = "") -> Stage:
        """The same stage, each ``next()`` of it run on a stream of its own; on a CPU the stage itself.

        ``stage`` may also be a consumer, which runs to its end when called.
        """
        if self.device.type != "cuda":
            return stage

        def staged(items: Iterator[Any]) -> Any:
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                results = stage(self._awaited(items, lambda: stream))
            return self._stepped(results, stream) if isinstance(results, Iterator) else results

        return staged

    def handed_over(self, items: Iterator[Item]) -> Iterator[Item]:
        """For a caller's own loop: each item is ready on whatever stream is current when it is taken."""
        if self.device.type != "cuda":
            return items
        return self._awaited(items, lambda: torch.cuda.current_stream(self.device))

    def _stepped(self, results: Iterator[Any], stream: torch.cuda.Stream) -> Iterator[Any]:
        try:
            while True:
                with torch.cuda.stream(stream):  # left before the yield: streams are the thread's, not ours
                    try:
                        item = next(results)
                    except StopIteration:
                        return
                    self._ready[item] = stream.record_event()
                yield item
                del item  # not kept alive, outside every bound, while the next one is made
        finally:
            close = getattr(results, "close", None)
            if close is not None:
                close()

    def _awaited(self, items: Iterator[Item], stream: Callable[[], torch.cuda.Stream]) -> Iterator[Item]:
        for item in items:
            event = self._ready.get(item)
            if event is not None:
                stream().wait_event(event)
            for tensor in getattr(item, "tensors", ()):
                if tensor.is_cuda:
                    tensor.record_stream(stream())
            yield item
            del item


# --- work that repeats ------------------------------------------------------------------------------------------------

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


# --- copies between host and device -----------------------------------------------------------------------------------


def upload(device: torch.device) -> Stage:
    """A stage that puts each frame on the device once, before pairs share it; frames already there pass."""

    def stage(frames: Iterator[Frame]) -> Iterator[Frame]:
        for frame in frames:
            if frame.rgb.device == device:
                yield frame
            else:
                pinned = frame.rgb.contiguous().pin_memory() if device.type == "cuda" else frame.rgb
                yield replace(frame, rgb=pinned.to(device, non_blocking=True))

    return stage


def download(batches: Iterator[FlowBatch]) -> Iterator[FlowBatch]:
    """A stage that brings flow to the host; flow already there passes untouched."""
    for batch in batches:
        if batch.flow.device.type == "cpu":
            yield batch
        else:
            flow = _begun(batch.flow)
            native = None if batch.native is None else _begun(batch.native)
            torch.cuda.current_stream(batch.flow.device).synchronize()  # this stage's stream alone
            yield replace(batch, flow=flow, native=native)


def _begun(tensor: Tensor) -> Tensor:
    """A pinned copy on the host that is under way on the current stream."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
