"""The hand-off between the CUDA streams of stages, on fake streams that detect every race."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine import device
from flowreel.engine.config import QueueConfig
from flowreel.engine.data import FlowBatch, Frame
from flowreel.engine.device import MOST_UPLOADS, Streams, WorkStream, download, upload
from flowreel.engine.errors import DeviceError, StageError
from flowreel.engine.pinned import PinnedRing
from flowreel.engine.pipeline import Pipeline
from flowreel.engine.stages import Stage, compose, joined
from tests.fakes.cuda_streams import GPU, Card, Event, LateCopies, OnCard, Stream


class Item:
    def __init__(self, *tensors: OnCard) -> None:
        self.tensors = tensors


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


class Chain:
    """Frames, pairs that share them, and one result a pair, as in the real chain."""

    def __init__(self, card: Card, count: int = 12) -> None:
        self.card = card
        self.count = count
        self.streams = Streams(GPU)
        self.seen: dict[str, set[Stream]] = {}

    def at(self, stage: str) -> None:
        self.seen.setdefault(stage, set()).add(self.card.current)

    def frames(self, _: Iterator[Item]) -> Iterator[Item]:
        for _number in range(self.count):
            self.at("frames")
            yield Item(self.card.made())

    def pairs(self, frames: Iterator[Item]) -> Iterator[Item]:
        earlier: Item | None = None
        for frame in frames:
            self.at("pairs")
            if earlier is not None:
                yield Item(*earlier.tensors, *frame.tensors)
            earlier = frame

    def model(self, pairs: Iterator[Item]) -> Iterator[Item]:
        for pair in pairs:
            self.at("model")
            self.card.read(*pair.tensors)
            del pair
            yield Item(self.card.made())

    def sink(self, flows: Iterator[Item]) -> None:
        for flow in flows:
            self.at("sink")
            self.card.read(*flow.tensors)

    @property
    def stages(self) -> list[Stage]:
        return [Stage("pairs", self.pairs), Stage("model", self.model)]

    def one_after_the_other(self) -> Iterator[Item]:
        """Each item passes all stages before the next begins: few blocks are needed, and each is reused at once."""
        wrap = self.streams.on_stream
        return compose(wrap(self.frames)(iter(())), [Stage(s.name, wrap(s.function)) for s in self.stages])


class Uncoupled:
    """Planted faults: one half of the hand-off does nothing."""

    def wait_event(self, event: object) -> None: ...
    def record_stream(self, stream: object) -> None: ...


def test_in_threads_nothing_races(card: Card) -> None:
    chain = Chain(card, count=60)

    def frames() -> Iterator[Item]:
        return chain.frames(iter(()))

    pipeline = Pipeline("frames", frames(), chain.stages, QueueConfig(items=2), wrap=chain.streams.on_stream)
    pipeline.run({"a": chain.sink, "b": chain.sink})
    assert card.races == []
    assert {name: len(streams) for name, streams in chain.seen.items()} == {
        "frames": 1,
        "pairs": 1,
        "model": 1,
        "sink": 2,
    }
    assert len(set.union(*chain.seen.values())) == 5  # each thread has its own
    assert card.streams[0] not in set.union(*chain.seen.values())


def test_a_callers_own_loop_reads_what_is_ready(card: Card) -> None:
    chain = Chain(card)
    for item in chain.streams.handed_over(chain.one_after_the_other()):
        assert card.current is card.streams[0]
        card.read(*item.tensors)
        del item
    assert card.races == []
    assert card.blocks <= 5  # freed blocks were used again, so a lifetime that is too short would show


@pytest.mark.parametrize(
    ("forgotten", "says"), [((Stream, "wait_event"), "read while"), ((OnCard, "record_stream"), "written while")]
)
def test_half_a_hand_off_is_found_out(
    card: Card, monkeypatch: pytest.MonkeyPatch, forgotten: tuple[type, str], says: str
) -> None:
    """The fakes detect a missing wait or mark, without which the tests above would prove nothing."""
    kind, method = forgotten
    monkeypatch.setattr(kind, method, getattr(Uncoupled, method))
    chain = Chain(card)
    for item in chain.streams.handed_over(chain.one_after_the_other()):
        card.read(*item.tensors)
        del item
    assert any(says in race for race in card.races)


def test_a_block_of_memory_is_marked_once(card: Card) -> None:
    """Even if an item has several tensors in it."""
    marked: list[int] = []

    def piece(block: int) -> Any:
        storage = SimpleNamespace(data_ptr=lambda: block)
        return SimpleNamespace(
            is_cuda=True, untyped_storage=lambda: storage, record_stream=lambda stream: marked.append(block)
        )

    on_host = SimpleNamespace(is_cuda=False, untyped_storage=lambda: SimpleNamespace(data_ptr=lambda: 3))
    assert list(Streams(GPU).handed_over(iter([Item(piece(1), piece(2), piece(1), on_host)])))
    assert sorted(marked) == [1, 2]


def test_streams_are_left_before_anything_is_handed_on(card: Card) -> None:
    chain = Chain(card)
    with closing(chain.streams.on_stream(chain.frames)(iter(()))) as frames:
        next(frames)
        assert card.current is card.streams[0]
    assert card.current is card.streams[0]


def test_a_device_that_is_not_asked_for_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first GPU may be full: even a CUDA context there could fail."""
    card, second = Card(monkeypatch, devices=2), torch.device("cuda", 1)

    def frames(_: Iterator[Item]) -> Iterator[Item]:
        for _number in range(3):
            assert card.current.device == second.index
            yield Item(card.made())

    def sink(items: Iterator[Item]) -> None:
        for item in items:
            card.read(*item.tensors)

    on_stream = Streams(second).on_stream
    on_stream(sink)(on_stream(frames)(iter(())))
    assert len(list(on_stream(frames)(iter(())))) == 3
    with torch.cuda.device(second), torch.cuda.stream(torch.cuda.Stream(second)):
        work = WorkStream(second)
    work.run(card.made)  # type: ignore[arg-type]
    assert card.current is card.streams[0]
    assert card.contexts == {second.index}
    assert card.races == []


def test_streams_are_left_when_a_stage_fails(card: Card) -> None:
    def failing(items: Iterator[Item]) -> Iterator[Item]:
        assert card.current is not card.streams[0]
        yield next(items)
        raise ValueError("broken")

    stage = Streams(GPU).on_stream(failing)(iter([Item()]))
    next(stage)
    with pytest.raises(ValueError, match="broken"):
        next(stage)
    assert card.current is card.streams[0]


def test_a_stage_that_finds_no_memory_says_what_to_do(card: Card) -> None:
    """The message is the same for stages that yield and for sinks; a DeviceError of the stage's own is kept."""
    ended = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nand much more")

    def giving(items: Iterator[Item]) -> Iterator[Item]:
        for item in items:
            yield item
            raise ended

    def taking(items: Iterator[Item]) -> None:
        for _ in items:
            raise ended

    def saying(items: Iterator[Item]) -> Iterator[Item]:
        raise DeviceError("take another") from ended
        yield from items

    def wrong(items: Iterator[Item]) -> Iterator[Item]:
        raise RuntimeError("something else")
        yield from items

    told = rf"{GPU} has too little free memory: .*--batch.*\(CUDA out of memory. Tried to allocate 20.00 MiB\)$"
    items = Streams(GPU).on_stream(giving)(iter([Item()]))
    next(items)
    with pytest.raises(DeviceError, match=told):
        next(items)
    with pytest.raises(DeviceError, match=told):
        Streams(GPU).on_stream(taking)(iter([Item()]))
    several = joined(Stage("first", lambda items: items), Stage("second", giving))
    items = Streams(GPU).on_stream(several)(iter([Item()]))
    next(items)
    with pytest.raises(StageError, match=f"^second: {told}") as failure:
        next(items)
    assert isinstance(failure.value.__cause__, DeviceError)
    for stage, error in ((saying, "^take another$"), (wrong, "^something else$")):
        with pytest.raises(RuntimeError, match=error):
            next(Streams(GPU).on_stream(stage)(iter([Item()])))


def test_an_item_that_passes_through_is_handed_on_again(card: Card) -> None:
    """A stage may write to an item before it passes it on, so the next stage must wait for it again."""
    streams = Streams(GPU)

    def source(_: Iterator[Item]) -> Iterator[Item]:
        yield Item(card.made())

    def painted(items: Iterator[Item]) -> Iterator[Item]:
        for item in items:
            card.write(item.tensors[0])
            yield item

    for item in streams.handed_over(streams.on_stream(painted)(streams.on_stream(source)(iter(())))):
        card.read(*item.tensors)
    assert card.races == []


class TestWorkStream:
    def test_takes_the_stages_own(self, card: Card) -> None:
        with torch.cuda.stream(torch.cuda.Stream(GPU)):
            assert WorkStream(GPU).handle == card.current.cuda_stream

    def test_the_default_stream_has_no_handle_so_another_is_made_and_waited_for(self, card: Card) -> None:
        work = WorkStream(GPU)
        assert work.handle != 0
        for _ in range(5):
            tensor: OnCard = work.run(card.made)  # type: ignore[assignment, arg-type]
            card.read(tensor)
            del tensor
        assert card.races == []
        assert card.blocks == 1

    def test_finish_waits_for_that_stream_alone(self, card: Card) -> None:
        work = WorkStream(GPU)
        for stream in card.streams:
            stream.put_off(lambda: None)
        work.finish()
        assert [event.stream for event in card.waits] == [card.streams[1]]


# -- Copies between host and device ------------------------------------------------------------------------------


@pytest.fixture
def late(card: Card) -> Iterator[LateCopies]:
    with LateCopies(card) as copies:
        yield copies


def frame_of(number: int, size: tuple[int, int] = (4, 6)) -> Frame:
    return Frame(torch.full((*size, 3), number, dtype=torch.uint8).permute(2, 0, 1), number, number / 25)


class Rings:
    """Records every ring that is made from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[PinnedRing] = []
        monkeypatch.setattr(device, "PinnedRing", self._make)

    def _make(self, pinned: Callable[[int], torch.Tensor]) -> PinnedRing:
        self.made.append(PinnedRing(pinned))
        return self.made[-1]

    @property
    def buffers(self) -> int:
        return sum(ring.buffers for ring in self.made)


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> Rings:
    return Rings(monkeypatch)


class TestUpload:
    def sent(self, late: LateCopies, count: int = 12) -> list[int]:
        """The values of frames 0, 1, ... on the GPU after all copies have ended."""
        frames = list(Streams(GPU).on_stream(upload(GPU))(map(frame_of, range(count))))
        late.finish()
        assert all(frame.rgb.device == GPU for frame in frames)
        assert [frame.index for frame in frames] == list(range(count))
        assert all(bool((frame.rgb == frame.rgb[0, 0, 0]).all()) for frame in frames)
        return [int(frame.rgb[0, 0, 0]) for frame in frames]

    def test_frames_arrive_through_few_buffers(self, card: Card, late: LateCopies, rings: Rings) -> None:
        assert self.sent(late) == list(range(12))
        assert rings.buffers == MOST_UPLOADS
        assert all(event.blocking for event in card.waits)

    def test_what_has_arrived_is_not_waited_for(self, card: Card, late: LateCopies, rings: Rings) -> None:
        for frame in Streams(GPU).on_stream(upload(GPU))(map(frame_of, range(12))):
            assert not card.waits
            late.finish()
            assert int(frame.rgb[0, 0, 0]) == frame.index
        assert rings.buffers == 1

    def test_a_buffer_that_is_filled_too_early_is_found_out(
        self, late: LateCopies, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Event, "query", lambda self: True)  # planted faults: no event is waited for
        monkeypatch.setattr(Event, "synchronize", lambda self: None)
        assert self.sent(late) != list(range(12))

    def test_leaving_early_waits_for_what_is_under_way(self, card: Card, late: LateCopies) -> None:
        with closing(Streams(GPU).on_stream(upload(GPU))(map(frame_of, range(12)))) as frames:
            first = next(frames)
        assert int(first.rgb[0, 0, 0]) == 0
        assert len(card.waits) == 1

    def test_bytes_are_sent_in_the_order_they_lie_in(self, late: LateCopies) -> None:
        frame = frame_of(1)
        (sent,) = upload(GPU)(iter([frame]))
        assert sent.rgb.stride() == frame.rgb.stride()

    def test_frames_that_are_there_pass(self, card: Card, late: LateCopies) -> None:
        frame = Frame(late.put(torch.zeros(3, 4, 6, dtype=torch.uint8)), 0, 0.0)
        assert list(upload(GPU)(iter([frame]))) == [frame]
        assert not card.waits


def batch_of(late: LateCopies, number: int, flows: int = 2) -> FlowBatch:
    flow = late.put(torch.full((flows, 2, 4, 6), float(number)))
    frames, times = np.arange(flows), np.arange(flows, dtype=np.float64)
    return FlowBatch(flow, 0, frames, frames, times, times, native=flow.transpose(2, 3))


class TestDownload:
    def test_the_first_tensor_lands_where_it_is_wanted(self, card: Card, late: LateCopies, rings: Rings) -> None:
        places = [torch.zeros(2, 2, 4, 6) for _ in range(3)]
        asked = iter([*places, None])
        batches = (batch_of(late, number) for number in range(4))
        on_stream = Streams(GPU).on_stream(partial(download, landing=lambda batch, pin: next(asked)))
        for number, batch in enumerate(on_stream(batches)):
            assert (number < 3) == any(batch.flow is place for place in places)
            assert not any(batch.native is place for place in places)
            assert bool((batch.flow == number).all() and (batch.native == number).all())
        assert [float(place.min()) for place in places] == [0, 1, 2]
        assert len(card.waits) == 4

    def test_reads_back_into_a_ring(self, card: Card, late: LateCopies, rings: Rings) -> None:
        on_stream = Streams(GPU).on_stream(download)
        kept = []
        for number, batch in enumerate(on_stream(batch_of(late, n) for n in range(8))):
            assert batch.flow.device.type == batch.native.device.type == "cpu"
            assert batch.flow.is_contiguous()
            assert batch.native.is_contiguous()
            if number % 4 == 0:
                kept.append(batch)
            assert bool((batch.flow == number).all() and (batch.native == number).all())
        assert [float(batch.flow.min()) for batch in kept] == [0, 4]
        assert rings.buffers <= 8  # four batches at a time (two kept, this one, the one before), two tensors each
        assert [event.stream for event in card.waits] == [card.streams[1]] * 8  # on its own stream, once for each batch
        assert all(event.blocking for event in card.waits)

    def test_flow_that_is_not_waited_for_is_found_out(self, late: LateCopies, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Event, "synchronize", lambda self: None)
        (batch,) = download(iter([batch_of(late, 1)]))
        assert not bool((batch.native == 1).any())

    def test_memory_is_not_held_on_the_device_while_the_host_works_nor_on_the_host_afterwards(
        self, late: LateCopies
    ) -> None:
        sent: list[weakref.ref[FlowBatch]] = []
        brought: list[weakref.ref[FlowBatch]] = []

        def made(number: int) -> FlowBatch:
            assert [one() for one in brought] == [None] * number
            batch = batch_of(late, number)
            sent.append(weakref.ref(batch))
            return batch

        for batch in Streams(GPU).on_stream(download)(map(made, range(3))):
            assert [one() for one in sent] == [None] * len(sent)
            brought.append(weakref.ref(batch))
            del batch
        assert len(brought) == 3

    def test_a_copy_that_fails_leaves_none_under_way(self, late: LateCopies) -> None:
        place = torch.zeros(2, 2, 4, 6)

        def moved(copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
            copy(batch.tensors[0])
            raise torch.OutOfMemoryError

        batch = SimpleNamespace(tensors=batch_of(late, 1).tensors, moved=moved)
        with pytest.raises(torch.OutOfMemoryError):
            next(download(iter([batch]), landing=lambda batch, pin: place))  # type: ignore[type-var]
        assert bool((place == 1).all())
