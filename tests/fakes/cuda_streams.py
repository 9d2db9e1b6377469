"""Fake CUDA streams that compute nothing but detect races.

Each stream has a vector clock: for every stream, how much of its work is known to be over before this stream goes on.
Recording an event copies the clock, waiting for the event merges it. Every read or write of a block of memory checks
that the earlier accesses it conflicts with are over. As in torch, a freed block goes back to the stream it was
allocated on, and only streams passed to ``record_stream`` are waited for before it is used again.

``LateCopies`` additionally works on real numbers: it delays asynchronous copies as long as the synchronisation allows,
so a buffer that is overwritten too early shows in the copied values.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

Clock = dict[int, int]


def _merge(into: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        into[stream] = max(into.get(stream, 0), tick)


class Stream:
    def __init__(self, card: Card, number: int, device: int = 0) -> None:
        self.card = card
        self.cuda_stream = number  # the first device's default one is 0
        self.device = device
        self.clock: Clock = {}
        self.late: list[Callable[[], object]] = []  # delayed work
        self.done = 0  # how many pieces of delayed work have been done

    def tick(self) -> int:
        self.clock[self.cuda_stream] = self.clock.get(self.cuda_stream, 0) + 1
        return self.clock[self.cuda_stream]

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        with self.card.lock:
            _merge(self.clock, event.clock)
            self.put_off(event.work_off)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def put_off(self, work: Callable[[], object]) -> None:
        self.late.append(work)

    def work_off(self, until: int | None = None) -> None:
        """Does the delayed work in order, up to a total of ``until`` pieces, or all of it."""
        with self.card.lock:
            while self.late and (until is None or self.done < until):
                self.late.pop(0)()
                self.done += 1


class Event:
    """An event that was never recorded counts as over, as in CUDA."""

    def __init__(self, *, blocking: bool = False) -> None:
        self.blocking = blocking
        self.clock: Clock = {}
        self.stream: Stream | None = None
        self.until = 0

    def record(self, stream: Stream) -> None:
        assert self.stream is None or self.stream.device == stream.device, "an event belongs to one device"
        with stream.card.lock:
            self.stream, self.clock = stream, dict(stream.clock)
            self.until = stream.done + len(stream.late)

    def query(self) -> bool:
        return self.stream is None or self.stream.done >= self.until

    def synchronize(self) -> None:
        if self.stream is not None and not self.query():
            self.stream.card.waits.append(self)
            self.work_off()

    def work_off(self) -> None:
        if self.stream is not None:
            self.stream.work_off(self.until)


class Block:
    """A block of device memory and who accessed it."""

    def __init__(self, owner: Stream) -> None:
        self.owner = owner
        self.used_on: set[Stream] = set()
        self.written: tuple[int, int] | None = None  # stream, tick
        self.read: Clock = {}
        self.safe: Clock = {}  # work that is over before a freed block is used again


class OnCard:
    """A fake tensor with only the attributes that streams and channels use."""

    is_cuda = True

    def __init__(self, card: Card, block: Block) -> None:
        self.card = card
        self.block = block

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.block.owner.device)

    def to(self, device: torch.device, *, non_blocking: bool) -> OnCard:
        """As in torch, the copy runs on the source's current stream; the two devices' streams wait for each other."""
        assert non_blocking
        if device == self.device:
            return self
        here, there = self.card.current_on(self.device), self.card.current_on(device)
        here.wait_stream(there)
        with self.card.entered(here):
            self.card.read(self)
        there.wait_stream(here)
        with self.card.entered(there):
            return self.card.made()

    def record_stream(self, stream: Stream) -> None:
        self.block.used_on.add(stream)

    def untyped_storage(self) -> Any:
        return SimpleNamespace(data_ptr=lambda: id(self.block), nbytes=lambda: 1000)

    def __del__(self) -> None:
        with self.card.lock:
            self.block.safe = {}
            for stream in self.block.used_on:
                _merge(self.block.safe, stream.clock)
            self.block.used_on = set()
            self.card.free.append(self.block)


class Card:
    """Replaces ``torch.cuda``, with one or several devices; ``races`` lists the races that were found."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, devices: int = 1) -> None:
        self.lock = threading.RLock()
        self.races: list[str] = []
        self.waits: list[Event] = []  # events that the CPU waited for
        self.copies: LateCopies | None = None  # if set, active on every stream
        self.free: list[Block] = []
        self.blocks = 0
        self.contexts: set[int] = set()  # devices that were used; making one of their streams current is enough
        self.streams = [Stream(self, number, number) for number in range(devices)]  # first, the default streams
        self._here = threading.local()
        monkeypatch.setattr(torch.cuda, "Stream", self._new_stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)  # only ``OnCard`` keeps track
        monkeypatch.setattr(torch.cuda, "stream", self.entered)
        monkeypatch.setattr(torch.cuda, "device", self.on_device)
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_on)

        def never(*_: object) -> None:
            raise AssertionError("the whole device is waited for")

        monkeypatch.setattr(torch.cuda, "synchronize", never)

    @property
    def current(self) -> Stream:
        """The calling thread's current stream on its current device."""
        return self.current_on(None)

    def current_on(self, device: torch.device | None = None) -> Stream:
        number = getattr(self._here, "device", 0) if device is None or device.index is None else device.index
        streams: dict[int, Stream] = getattr(self._here, "streams", {})
        return streams.get(number, self.streams[number])

    def _new_stream(self, device: torch.device, priority: int = 0) -> Stream:
        with self.lock:
            self.streams.append(Stream(self, len(self.streams), torch.device(device).index or 0))
            return self.streams[-1]

    @contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        """As in torch: makes the stream the current one on its device, and that device the current one."""
        before = dict(getattr(self._here, "streams", {})), getattr(self._here, "device", 0)
        self._here.streams, self._here.device = before[0] | {stream.device: stream}, stream.device
        self.contexts.add(stream.device)
        try:
            with nullcontext() if self.copies is None or self.copies in _modes() else self.copies:
                yield
        finally:
            self._here.streams, self._here.device = before
            self.contexts.add(before[1])

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        """As in torch: leaving makes the previous device current again, which does not count as using it."""
        before, self._here.device = getattr(self._here, "device", 0), device.index or 0
        self.contexts.add(self._here.device)
        try:
            yield
        finally:
            self._here.device = before

    def made(self) -> OnCard:
        """A new tensor, written on the current stream."""
        with self.lock:
            place = next((n for n, block in enumerate(self.free) if block.owner is self.current), None)
            if place is None:
                self.blocks += 1
                block = Block(self.current)
            else:
                block = self.free.pop(place)
                _merge(self.current.clock, block.safe)
            tensor = OnCard(self, block)
            self.write(tensor)
            return tensor

    def write(self, tensor: OnCard) -> None:
        with self.lock:
            block, stream = tensor.block, self.current
            tick = stream.tick()
            for reader, when in block.read.items():
                self._after(stream, (reader, when), "written while stream {0} may still read it")
            self._after(stream, block.written, "written while stream {0} may still write it")
            block.written, block.read = (stream.cuda_stream, tick), {}

    def read(self, *tensors: OnCard) -> None:
        with self.lock:
            stream = self.current
            tick = stream.tick()
            for tensor in tensors:
                self._after(stream, tensor.block.written, "read while stream {0} may still write it")
                tensor.block.read[stream.cuda_stream] = tick

    def _after(self, stream: Stream, other: tuple[int, int] | None, what: str) -> None:
        if other is not None and stream.clock.get(other[0], 0) < other[1]:
            self.races.append(f"on stream {stream.cuda_stream}: {what.format(other[0])}")


GPU = torch.device("cuda", 0)
_JUNK = 0xAA


class LateCopies(TorchFunctionMode):
    """While active, tensors that torch moves to a GPU stay on the CPU but report that GPU as their device.

    Copies with ``non_blocking`` are delayed until something waits for their stream: the CPU, or work on another stream.
    Until then their destination holds junk. All other work is done at once; it must not mix tensors of different GPUs.
    """

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        card.copies = self
        self.brought: list[int] = []  # bytes of each copy to the host
        self.stalls: list[str] = []  # operations in which a thread waits for all that its stream has been given
        self._pinned: list[torch.Tensor] = []  # kept alive, so that delayed copies never touch freed memory
        # By address; kept alive, so that no address is used twice.
        self._there: dict[int, tuple[torch.UntypedStorage, torch.device]] = {}

    def put(self, tensor: torch.Tensor, device: torch.device = GPU) -> torch.Tensor:
        """Marks the tensor as being on the GPU and returns it."""
        storage = tensor.untyped_storage()
        self._there[storage.data_ptr()] = storage, device
        return tensor

    def finish(self) -> None:
        """Does all delayed work."""
        for stream in self.card.streams:
            stream.work_off()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            self._pinned.append(func(*args, **kwargs))
            return self._pinned[-1]
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return self._where(args[0]) or func(*args)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self._on_card(args[0])
        if name == "to" and (wanted := [x for x in args if isinstance(x, torch.device) and x.type == "cuda"]):
            return self._moved(args[0], wanted[0], **kwargs)
        if name == "copy_":
            return self._copied(*args, **kwargs)
        if name in ("numpy", "__array__") and self._on_card(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        devices = {device for tensor in _tensors(args, kwargs) if (device := self._where(tensor)) is not None}
        if not devices or name in _LOOKS or kwargs.get("device") == "meta":
            return func(*args, **kwargs)
        assert len(devices) == 1, f"{name} is given tensors of several GPUs"
        (device,) = devices
        self.card.current_on(device).work_off()
        if name in _STALLS:
            self.stalls.append(name)
        if name == "cpu":
            self.brought.append(args[0].nbytes)
            return func(*args, **kwargs).clone()
        result = func(*args, **kwargs)
        for tensor in _tensors((result,), {}):
            self.put(tensor, device)
        return result

    def _where(self, tensor: torch.Tensor) -> torch.device | None:
        """The GPU that it is on; None: it is on the CPU."""
        known = tensor.layout is torch.strided and tensor.device.type != "meta"
        return self._there.get(tensor.untyped_storage().data_ptr(), (None, None))[1] if known else None

    def _on_card(self, tensor: torch.Tensor) -> bool:
        return self._where(tensor) is not None

    def _moved(self, tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        source = self._where(tensor)
        if source == device:
            return tensor
        into = self.put(torch.empty_like(tensor), device)
        if source is None:
            return self._copied(into, tensor, non_blocking)
        # Never waited for by the CPU, and ordered as in ``OnCard.to``.
        here, there = self.card.current_on(source), self.card.current_on(device)
        here.wait_stream(there)
        with self.card.entered(here):
            self._copied(into, tensor, non_blocking=True)
        there.wait_stream(here)
        return into

    def _copied(self, into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        leaves = self._on_card(source) and not self._on_card(into)
        arrives = self._on_card(into) or (non_blocking and not leaves)
        if leaves:
            self.brought.append(source.nbytes)
        if arrives and not self._on_card(into):
            self.put(into)
        if non_blocking:
            # Only addresses are kept, not the tensors, so that their memory can be reused too early, as on a real GPU.
            late, early, size = into.data_ptr(), source.data_ptr(), source.nbytes
            ctypes.memset(late, _JUNK, size)
            self.card.current.put_off(lambda: ctypes.memmove(late, early, size))
        else:
            if leaves or arrives:
                self.card.current.work_off()
            into.copy_(source)
        return into


_modes = torch.overrides._get_current_function_mode_stack  # the calling thread's
_STALLS = {"new_tensor", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "cpu"}
_LOOKS = {"__get__", "__len__", "data_ptr", "dim", "element_size", "numel", "size", "stride", "untyped_storage"}


def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value, {})
    return found
