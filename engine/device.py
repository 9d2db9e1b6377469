"""Devices: which one, on which stream, and every copy between host and device. Nothing else moves data.

On a GPU each stage works on its own CUDA stream. What orders them is one event per item, *the hand-off*: the stage
that makes an item records an event after its work; the stage that takes it makes its own stream wait for that event
and marks the item's tensors as used there, so that the allocator does not hand their memory out too early. The CPU
never waits for the device except in ``download``, where the bytes are needed, and then for that copy's event alone. On
a CPU all of this is nothing.

A stream is entered with its device. torch leaves one by making the stream current that was before; on another device
that would make a context there, which takes half a gigabyte, and fails where others have filled that one's memory.
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
from flowreel.engine.errors import DeviceError, FlowreelError, StageError, UsageError, first_line
from flowreel.engine.pinned import PinnedRing, pin

if TYPE_CHECKING:
    from flowreel.engine.data import Pin

Item = TypeVar("Item")
Batch = TypeVar("Batch", FlowBatch, Prepared)
Stage = Callable[[Iterator[Any]], Any]
_MEMORY_ENDED = ("out of memory", "unable to find an engine", "STATUS_ALLOC_FAILED")
# Of the stages' streams: above that of a network's captured work (``compiled/graphs.py``). What is short goes first, so
# that no frame on its way in and no result on its way out waits for kernels that would take the whole device.
STAGE_PRIORITY = -2
_BF16_SINCE = (8, 0)  # compute capability; TF32 came with it
MOST_UPLOADS = 4  # frames on their way to the device at once: each holds a pinned buffer


def resolve_devices(name: str) -> tuple[torch.device, ...]:
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``cuda:N,M,...`` to the devices that will be used, in that order.

    auto takes CUDA when it is there. Frames come to the first device, and flow leaves from it.

    Raises:
        DeviceError: CUDA was asked for by name and is not there; there is never a silent CPU run.
        UsageError: no such kind of device, or one twice.
    """
    kind, _, numbers = name.partition(":")
    names = [f"{kind}:{number.strip().removeprefix(f'{kind}:')}" for number in numbers.split(",")]
    devices = tuple(_resolved(one, name) for one in (names if len(names) > 1 else [name]))
    if len(devices) > 1 and (len(set(devices)) < len(devices) or devices[0].type != "cuda"):
        raise UsageError(f"several devices are different GPUs, cuda:0,1: got {name!r}")
    return devices


def resolve_device(name: str) -> torch.device:
    """The first, and mostly the only one, of ``resolve_devices``; raises as that does."""
    return resolve_devices(name)[0]


def one_device(name: str) -> torch.device:
    """The only one; raises as ``resolve_devices`` does, and UsageError for several."""
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
            raise DeviceError(f"{name} was asked for, but torch {torch.__version__} ({built} CUDA) finds no GPU")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise DeviceError(f"{name} was asked for, but there are {torch.cuda.device_count()} GPUs, from cuda:0")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def resolve_precision(precision: Precision | None, device: torch.device) -> Precision:
    """auto is fp32 on a CPU and fp16 on a GPU; a CPU also takes bf16. A GPU's bf16 and tf32 ask for a newer one.

    Raises:
        UsageError: the device has no such precision.
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
    """For a person: ``cuda:0 (NVIDIA ...)``, or ``cpu (2 threads)``; of several GPUs, each."""
    if others:
        return ", ".join(map(device_name, (device, *others)))
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
            stream = torch.cuda.Stream(self.device, priority=STAGE_PRIORITY)  # type: ignore[no-untyped-call]
            with torch.cuda.device(self.device), torch.cuda.stream(stream), _memory_told(self.device):
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
                # Left before the yield: streams are the thread's, not ours.
                with torch.cuda.device(self.device), torch.cuda.stream(stream):
                    try:
                        with _memory_told(self.device):
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
        def taken(item: Item) -> Item:
            event = self._ready.get(item)
            here = stream()
            if event is not None:
                here.wait_event(event)
            for tensor in _each_storage(getattr(item, "tensors", ())):
                tensor.record_stream(here)
            return item

        return map(taken, items)  # a map keeps no item alive while whoever took it works


def _each_storage(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """One tensor of each block of a GPU's memory: a frame is in two pairs of a batch, and shares its block."""
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor.is_cuda}.values()


def upload(device: torch.device) -> Stage:
    """A stage that puts each frame on the device once, before pairs share it; frames already there pass."""

    def stage(frames: Iterator[Frame]) -> Iterator[Frame]:
        sender = _Sender(device)
        try:
            for frame in frames:
                yield frame if frame.rgb.device == device else replace(frame, rgb=sender.begun(frame.rgb))
        finally:
            sender.finish()

    return stage


class _Sender:
    """Copies from the host, begun in order on the current stream; each buffer is kept until its copy is over."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ring = PinnedRing(_pinned)
        self._under_way: deque[tuple[torch.cuda.Event, Tensor]] = deque()  # the end of each copy, and its buffer

    def begun(self, tensor: Tensor) -> Tensor:
        """The tensor on the device once the current stream has got there. The device sorts its bytes, if at all."""
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
    """A stage that brings flow, or what is made of it, to the host; what is there already passes untouched.

    It lands in a ring of pinned buffers, none of which is filled again while anybody still holds what was in it; the
    first tensor of a batch where ``landing`` says, see ``LandingSink``.
    """
    ring = PinnedRing(_pinned)
    for batch in batches:
        device = batch.tensors[0].device
        if device.type != "cpu":
            place = None if landing is None else landing(batch, partial(pin, device=device))
            try:
                batch = _begun(batch, place, ring)  # its memory on the device is free from here on
            finally:  # also when one of its copies cannot be begun: none outlasts this, and what it writes to
                del place
                _recorded(device).synchronize()
        yield batch
        del batch


def _begun(batch: Batch, place: Tensor | None, ring: PinnedRing) -> Batch:
    """On its way to the host."""
    first = batch.tensors[0]

    def copied(tensor: Tensor) -> Tensor:
        room = place if tensor is first else None
        tensor = tensor.contiguous()
        return (ring.take(tensor) if room is None else room).copy_(tensor, non_blocking=True)

    return batch.moved(copied)


def _recorded(device: torch.device) -> torch.cuda.Event:
    """What the current stream has been given so far, to wait for asleep: a thread that spins takes a core."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _is_over(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """What was read or made on the host, on the device; the tensor itself where it is there already."""
    return tensor if tensor.device == device else tensor.to(device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The same of something small that is wanted often: nobody waits for what the device has still to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # torch keeps that until it is copied
    return tensor.to(device, non_blocking=True)


def to_host(flow: Tensor) -> Tensor:
    """Flow on the host; waits for it. The tensor itself where it is there already."""
    return flow if flow.device.type == "cpu" else flow.cpu()


class WorkStream:
    """One stream for a library that takes a stream's handle: what it does and what is done with it stay in order."""

    def __init__(self, device: torch.device) -> None:
        """The stream that is current on ``device``; a new one where that is the default one, which has no handle."""
        self.device = device
        current = torch.cuda.current_stream(device)
        self._stream = current if current.cuda_stream else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.handle = int(self._stream.cuda_stream)  # its cudaStream_t, never 0

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Does ``work`` on the stream; its result is ready on the stream that is current outside."""
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
    """A device's own work, which goes on beside that of others: a run over several GPUs has one for each.

    Items come from the streams of a run's stages on one device, ``home``, and go back there. In between nothing waits
    for what other lanes do: neither the work on ``device``, nor the copies there and back.
    """

    def __init__(self, device: torch.device, home: torch.device) -> None:
        self._home = home
        self._at_home = torch.cuda.Stream(home, priority=STAGE_PRIORITY)  # type: ignore[no-untyped-call]
        self._there = self._at_home
        if device != home:
            self._there = torch.cuda.Stream(device, priority=STAGE_PRIORITY)  # type: ignore[no-untyped-call]

    def begun(self, item: Any, work: Callable[[], list[FlowBatch]]) -> Callable[[], list[FlowBatch]]:
        """Starts ``work`` on the item, which is ready on the stream that is current at home.

        Calling for the results makes them ready on the stream that is current then.
        """
        self._at_home.wait_stream(torch.cuda.current_stream(self._home))
        for tensor in _each_storage(item.tensors):
            tensor.record_stream(self._at_home)
        with torch.cuda.stream(self._at_home), torch.cuda.stream(self._there):
            # A copy between devices comes after all work on the streams that are current on both, and before what they
            # are given next.
            results = [batch.moved(lambda flow: flow.to(self._home, non_blocking=True)) for batch in work()]
        done = self._at_home.record_event()

        def awaited() -> list[FlowBatch]:
            torch.cuda.current_stream(self._home).wait_event(done)
            return results

        return awaited


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU's memory ended: as torch says it, or CUDA, or cuDNN, which then has no algorithm to offer."""
    seen: list[BaseException] = []  # what is raised again may hang on itself
    while error is not None and not any(error is one for one in seen):
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _MEMORY_ENDED):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _memory_told(device: torch.device) -> Iterator[None]:
    """Says what to do where a stage, or one of several joined ones, finds no memory and knows nothing better itself."""
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
    """Bytes that other programs and torch's allocator have left on a GPU."""
    return int(torch.cuda.mem_get_info(device)[0])
