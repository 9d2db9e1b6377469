"""Devices: which one, on which stream, and every copy between host and device. No other file moves data.

On a GPU each stage works on its own CUDA stream. One event per item orders the streams, *the hand-off*: the stage that
makes an item records an event after its work; the stage that takes it makes its own stream wait for that event and
marks the item's tensors as used there, so that the allocator does not reuse their memory too early. The CPU never
waits for the device except in ``download``, where the bytes are needed, and then only for that copy's event. Without a
GPU none of this happens.

A stream is always entered together with its device. torch leaves a stream by making the previously current one current
again; if that one is on another device, this would create a CUDA context there, which takes half a gigabyte and fails
where other programs have filled that device's memory.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flowreel.engine.config import Precision
from flowreel.engine.data import FlowBatch, Frame, Prepared
from flowreel.engine.errors import DeviceError, FlowreelError, StageError, UsageError, counted, first_line
from flowreel.engine.pinned import PinnedRing, pin
from flowreel.engine.stages import Consumer, StageFunction

if TYPE_CHECKING:
    from flowreel.engine.data import Pin

Item = TypeVar("Item")
Batch = TypeVar("Batch", FlowBatch, Prepared)
_MEMORY_ENDED = ("out of memory", "unable to find an engine", "STATUS_ALLOC_FAILED")
# Priority of the stages' streams (lower is sooner), above that of a network's captured graph (``compiled/graphs.py``).
# Short work goes first, so that no incoming frame or outgoing result waits for kernels that fill the whole device.
STAGE_PRIORITY = -2
_BF16_SINCE = (8, 0)  # compute capability; TF32 came with it
MOST_UPLOADS = 4  # uploads in flight at once: each holds a pinned buffer


def resolve_devices(name: str) -> tuple[torch.device, ...]:
    """Resolves ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``cuda:N,M,...`` to the devices to use, in that order.

    ``auto`` takes CUDA if it is available. Frames enter on the first device, and flow leaves from it.

    Raises:
        DeviceError: CUDA was asked for by name but is not available; it never falls back silently to the CPU.
        UsageError: an unknown kind of device, or the same one twice.
    """
    kind, _, numbers = name.partition(":")
    names = [f"{kind}:{number.strip().removeprefix(f'{kind}:')}" for number in numbers.split(",")]
    devices = tuple(_resolved(one, name) for one in (names if len(names) > 1 else [name]))
    if len(devices) > 1 and (len(set(devices)) < len(devices) or devices[0].type != "cuda"):
        raise UsageError(f"several devices are different GPUs, cuda:0,1: got {name!r}")
    return devices


def resolve_device(name: str) -> torch.device:
    """The first of ``resolve_devices``, usually the only one; raises the same errors."""
    return resolve_devices(name)[0]


def one_device(name: str) -> torch.device:
    """The device, where only one is allowed; raises like ``resolve_devices``, and UsageError for several."""
    device, *others = resolve_devices(name)
    if others:
        raise UsageError(f"only one device can be used here, got {name!r}")
    return device


def _resolved(name: str, given: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu, cuda, cuda:N or cuda:N,M,..., got {given!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = "without" if torch.version.cuda is None else "with"
            raise DeviceError(
                f"{name} was asked for, but torch {torch.__version__} ({built} CUDA) finds no GPU: flowreel doctor "
                "says what is missing, --device cpu does without"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise DeviceError(f"{name} was asked for, but the last GPU is cuda:{torch.cuda.device_count() - 1}")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def resolve_precision(precision: Precision | None, device: torch.device) -> Precision:
    """None (auto) is fp32 on a CPU and fp16 on a GPU. A CPU also runs bf16; on a GPU bf16 and tf32 need compute
    capability 8.0.

    Raises:
        UsageError: the device does not support this precision.
    """
    if precision is None:
        return "fp16" if device.type == "cuda" else "fp32"
    if device.type == "cpu" and precision not in ("fp32", "bf16"):
        raise UsageError(f"a CPU runs fp32 or bf16, not {precision}")
    if device.type == "cuda" and precision in ("bf16", "tf32"):
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < _BF16_SINCE:
            raise UsageError(
                f"{precision} needs compute capability {_BF16_SINCE[0]}.{_BF16_SINCE[1]}, and {device_name(device)} "
                f"has {major}.{minor}: take fp16 or fp32"
            )
    return precision


def device_name(device: torch.device, *others: torch.device) -> str:
    """The device in words: ``cuda:0 (NVIDIA ...)`` or ``cpu (x86_64, 2 threads)``; several are listed."""
    if others:
        return ", ".join(map(device_name, (device, *others)))
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {counted(torch.get_num_threads(), 'thread')})"


class Streams:
    """Gives every stage of one run its own stream and orders the streams by the hand-off described above."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ready: WeakKeyDictionary[Any, torch.cuda.Event] = WeakKeyDictionary()

    def on_stream(self, stage: Consumer, name: str = "") -> Consumer:
        """The stage with each ``next()`` run on the stage's own stream; on a CPU, the stage unchanged.

        ``stage`` may also be a consumer, which runs to its end when called.
        """
        if self.device.type != "cuda":
            return stage

        def staged(items: Iterator[Any]) -> Any:
            stream = torch.cuda.Stream(self.device, priority=STAGE_PRIORITY)  # type: ignore[no-untyped-call]
            with torch.cuda.device(self.device), torch.cuda.stream(stream), _memory_told(self.device):
                results = stage(self._awaited(items, lambda: stream))
            return self._stepped(results, stream) if isinstance(results, Iterator) else results

        return staged

    def handed_over(self, items: Iterator[Item]) -> Iterator[Item]:
        """For a caller's own loop: each item is ready on the stream that is current when it is taken."""
        if self.device.type != "cuda":
            return items
        return self._awaited(items, lambda: torch.cuda.current_stream(self.device))

    def _stepped(self, results: Iterator[Any], stream: torch.cuda.Stream) -> Iterator[Any]:
        while True:
            # Left before the yield: the current stream is thread state, shared with the code that runs us.
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                try:
                    with _memory_told(self.device):
                        item = next(results)
                except StopIteration:
                    return
                self._ready[item] = stream.record_event()
            yield item
            del item  # else it stays alive, counted in no budget, while the next one is made

    def _awaited(self, items: Iterator[Item], stream: Callable[[], torch.cuda.Stream]) -> Iterator[Item]:
        def taken(item: Item) -> Item:
            event = self._ready.get(item)
            here = stream()
            if event is not None:
                here.wait_event(event)
            for tensor in _each_storage(getattr(item, "tensors", ())):
                tensor.record_stream(here)
            return item

        return map(taken, items)  # a map, unlike a generator's local, keeps no item alive while the consumer works


def _each_storage(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """One CUDA tensor for each distinct storage: a frame shared by two pairs of a batch appears twice."""
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor.is_cuda}.values()


def upload(device: torch.device) -> StageFunction:
    """A stage that copies each frame to the device once, before pairs share it; frames already there pass through."""

    def stage(frames: Iterator[Frame]) -> Iterator[Frame]:
        sender = _Sender(device)
        try:
            for frame in frames:
                yield frame if frame.rgb.device == device else replace(frame, rgb=sender.begun(frame.rgb))
        finally:
            sender.finish()

    return stage


class _Sender:
    """Starts copies from the host in order on the current stream, and keeps each pinned buffer until its copy ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ring = PinnedRing(_pinned)
        self._under_way: deque[tuple[torch.cuda.Event, Tensor]] = deque()  # (end of copy, its buffer), oldest first

    def begun(self, tensor: Tensor) -> Tensor:
        """Starts the copy and returns its result, which is ready once the current stream reaches that point.

        The order of dimensions in memory is kept; if it has to change, that is left to the device.
        """
        while self._under_way and (_is_over(self._under_way[0][0]) or len(self._under_way) == MOST_UPLOADS):
            self._under_way.popleft()[0].synchronize()
        buffer = self._ring.take(tensor).copy_(tensor)
        sent = buffer.to(self._device, non_blocking=True)
        self._under_way.append((_recorded(self._device), buffer))
        return sent

    def finish(self) -> None:
        while self._under_way:
            self._under_way.popleft()[0].synchronize()


def download(batches: Iterator[Batch], landing: Callable[[Batch, Pin], Tensor | None] | None = None) -> Iterator[Batch]:
    """A stage that copies flow, or what a sink prepared from it, to the host; batches already there pass unchanged.

    Copies land in a ring of pinned buffers; a buffer is not refilled while anything still refers to its content. The
    first tensor of a batch lands where ``landing`` says instead, see ``LandingSink``.
    """
    ring = PinnedRing(_pinned)
    for batch in batches:
        device = batch.tensors[0].device
        if device.type != "cpu":
            place = None if landing is None else landing(batch, partial(pin, device=device))
            try:
                batch = _begun(batch, place, ring)  # drops its tensors on the device
            finally:  # also if one of its copies cannot be started: no copy may outlive the memory that it writes to
                _recorded(device).synchronize()
        yield batch
        del batch


def _begun(batch: Batch, place: Tensor | None, ring: PinnedRing) -> Batch:
    """Starts the batch's copies to the host, without waiting for them."""
    first = batch.tensors[0]

    def copied(tensor: Tensor) -> Tensor:
        room = place if tensor is first else None
        tensor = tensor.contiguous()
        return (ring.take(tensor) if room is None else room).copy_(tensor, non_blocking=True)

    return batch.moved(copied)


def _recorded(device: torch.device) -> torch.cuda.Event:
    """An event after all work queued on the current stream so far; waiting for it sleeps, as spinning takes a core."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _is_over(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor copied to the device; the tensor itself if it is there already."""
    return tensor if tensor.device == device else tensor.to(device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``to_device`` for small tensors that are sent often: the CPU does not wait for the device's pending work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # torch keeps that memory until the copy is done
    return tensor.to(device, non_blocking=True)


def to_host(flow: Tensor) -> Tensor:
    """The flow copied to the host, waiting for the copy; the tensor itself if it is there already."""
    return flow if flow.device.type == "cpu" else flow.cpu()


class WorkStream:
    """A stream for a library that takes a raw stream handle: the library's work and torch's on it stay in order."""

    def __init__(self, device: torch.device) -> None:
        """Takes the current stream of ``device``, or a new one if that is the default stream, which has no handle."""
        self.device = device
        current = torch.cuda.current_stream(device)
        self._stream = current if current.cuda_stream else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.handle = int(self._stream.cuda_stream)  # its cudaStream_t, never 0

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Runs ``work`` on the stream; the result is ready on the stream that is current in the caller."""
        outside = torch.cuda.current_stream(self.device)
        if outside == self._stream:
            return work()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            result = work()
        outside.wait_stream(self._stream)
        result.record_stream(outside)
        return result

    def finish(self) -> None:
        """Waits for the work on this stream alone."""
        self._stream.synchronize()


class Lane:
    """One device's share of a run over several GPUs: its work runs concurrently with that of the other lanes.

    Items come from the streams of the run's stages on one device, ``home``, and results go back there. In between, the
    work on ``device`` and the copies there and back never wait for other lanes.
    """

    def __init__(self, device: torch.device, home: torch.device) -> None:
        self._home = home
        self._at_home = torch.cuda.Stream(home, priority=STAGE_PRIORITY)  # type: ignore[no-untyped-call]
        self._there = self._at_home
        if device != home:
            self._there = torch.cuda.Stream(device, priority=STAGE_PRIORITY)  # type: ignore[no-untyped-call]

    def begun(self, item: Any, work: Callable[[], list[FlowBatch]]) -> Callable[[], list[FlowBatch]]:
        """Starts ``work`` on the item, which is ready on the current stream of ``home``.

        Returns a function that gives the results, ready on the stream of ``home`` that is current when it is called.
        """
        self._at_home.wait_stream(torch.cuda.current_stream(self._home))
        for tensor in _each_storage(item.tensors):
            tensor.record_stream(self._at_home)
        with torch.cuda.stream(self._at_home), torch.cuda.stream(self._there):
            # torch orders a copy between devices after all earlier work on the current streams of both devices, and
            # before whatever is queued on them next.
            results = [batch.moved(lambda flow: flow.to(self._home, non_blocking=True)) for batch in work()]
        done = self._at_home.record_event()

        def awaited() -> list[FlowBatch]:
            torch.cuda.current_stream(self._home).wait_event(done)
            return results

        return awaited


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU ran out of memory, as reported by torch, CUDA or cuDNN (which then finds no algorithm)."""
    seen: list[BaseException] = []  # the chain of a re-raised error may contain a cycle
    while error is not None and not any(error is one for one in seen):
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _MEMORY_ENDED):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _memory_told(device: torch.device) -> Iterator[None]:
    """Turns an out-of-memory error of a stage, or of one of several joined ones, into a DeviceError that says what to
    try. Errors that already are flowreel's own pass unchanged."""
    try:
        yield
    except (RuntimeError, StageError) as error:
        cause = error.__cause__ if isinstance(error, StageError) else error
        if cause is None or isinstance(cause, FlowreelError) or not ran_out_of_memory(cause):
            raise
        told = DeviceError(
            f"{device} has too little free memory: end what else runs there, take a smaller --batch or --model, or "
            f"--device cpu ({first_line(cause)})"
        )
        told.__cause__ = cause
        if isinstance(error, StageError):
            raise StageError(error.stage, error.frame, told) from told
        raise told from cause


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU's memory that neither other programs nor torch's allocator have taken."""
    return int(torch.cuda.mem_get_info(device)[0])
