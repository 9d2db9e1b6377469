"""Batches that several GPUs compute in turn, on fake streams that detect every race."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import ref

import pytest
import torch

from flowreel.engine.config import ModelConfig
from flowreel.engine.data import Frame, FramePair, PairBatch
from flowreel.engine.device import Lane, Streams
from flowreel.engine.inference import Inference, Made, load_network
from flowreel.engine.several_gpus import in_turn
from tests.fakes.cuda_streams import Card, Clock, OnCard, Stream

GPUS = tuple(torch.device("cuda", number) for number in range(3))


class Batch:
    """A batch of pairs or of flow."""

    def __init__(self, index: int, *tensors: OnCard) -> None:
        self.index = index
        self.tensors = tensors

    def moved(self, copy: Callable[[Any], Any]) -> Batch:
        return Batch(self.index, *map(copy, self.tensors))


class Run:
    """Batches go from the first device to lanes on ``devices`` and back, and a sink reads each result."""

    def __init__(self, card: Card, devices: tuple[torch.device, ...], parts: int = 1) -> None:
        self.card, self.devices, self.parts = card, devices, parts
        self.streams = Streams(GPUS[0])
        self.began: dict[int, Clock] = {}  # by batch: all work that is known to precede it
        self.ended: dict[int, tuple[int, int]] = {}  # by batch: the stream and tick at which its work ended
        self.asked: list[tuple[int, int]] = []  # (result, number of batches taken when it came)
        self.held = 0  # batches that were still there when the next one was asked for
        self.kept: list[object] | None = None  # keeps memory from being reused: reuse would impose an order

    def batches(self, count: int) -> Iterator[Batch]:
        self.taken = 0
        for index in range(count):
            self.taken += 1
            batch = Batch(index, self.card.made(), self.card.made())
            if self.kept is not None:
                self.kept.append(batch)
            given = ref(batch)
            yield batch
            del batch
            self.held += given() is not None

    def computed(self, device: torch.device, batch: Any) -> list[Any]:
        inputs = [tensor.to(device, non_blocking=True) for tensor in batch.tensors]
        self.began[batch.index] = dict(self.card.current.clock)
        assert self.card.current.device == device.index
        self.card.read(*inputs)
        flows = [Batch(batch.index, self.card.made()) for _ in range(self.parts)]
        if self.kept is not None:
            self.kept += [*inputs, *flows]
        stream = self.card.current
        self.ended[batch.index] = (stream.cuda_stream, stream.clock[stream.cuda_stream])
        return flows

    def model(self, batches: Iterator[Any]) -> Iterator[Any]:
        lanes = [(Lane(device, GPUS[0]), partial(self.computed, device)) for device in self.devices]
        return in_turn(batches, lanes)

    def indices(self, count: int) -> list[int]:
        """The indices of the flows in the order in which a sink got them."""
        on = self.streams.on_stream
        got = []
        for flow in self.streams.handed_over(on(self.model)(on(lambda _: self.batches(count))(iter(())))):
            self.card.read(*flow.tensors)
            got.append(flow.index)
            self.asked.append((flow.index, self.taken))
            del flow
        return got

    def comes_after(self, later: int, earlier: int) -> bool:
        stream, tick = self.ended[earlier]
        return self.began[later].get(stream, 0) >= tick


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch, devices=len(GPUS))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 11])
@pytest.mark.parametrize("devices", [GPUS[:1], GPUS[:2], GPUS, (GPUS[1], GPUS[0]), (GPUS[0], GPUS[0])])
def test_flow_comes_in_order_and_nothing_races(card: Card, devices: tuple[torch.device, ...], count: int) -> None:
    run = Run(card, devices)
    assert run.indices(count) == list(range(count))
    assert card.races == []
    # A result comes as soon as every device has a batch, and no batch is taken before that is needed.
    assert run.asked == [(index, min(index + len(devices), count)) for index in range(count)]


@pytest.mark.parametrize("devices", [GPUS[:2], GPUS, (GPUS[0], GPUS[0])])
def test_devices_work_beside_each_other(card: Card, devices: tuple[torch.device, ...]) -> None:
    count = len(devices)
    run = Run(card, devices)
    run.kept = []
    run.indices(12)
    assert {device.index for device in devices} == {card.streams[stream].device for stream, _ in run.ended.values()}
    for batch in range(12):
        assert not any(run.comes_after(batch, other) for other in range(max(batch - count + 1, 0), batch))
        assert batch < count or run.comes_after(batch, batch - count)


def test_what_was_done_in_parts_is_handed_on_in_parts(card: Card) -> None:
    run = Run(card, GPUS[:2], parts=2)
    assert run.indices(5) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert card.races == []


def test_memory_is_used_again(card: Card) -> None:
    run = Run(card, GPUS[:2])
    run.indices(5)
    blocks = card.blocks
    run.indices(50)
    assert (card.races, run.held) == ([], 0)
    assert card.blocks <= 2 * blocks


@pytest.mark.parametrize(("forgotten", "says"), [("wait_event", "read while"), ("record_stream", "written while")])
def test_half_a_hand_off_is_found_out(card: Card, monkeypatch: pytest.MonkeyPatch, forgotten: str, says: str) -> None:
    """The fakes detect a missing wait or mark, without which the tests above would prove nothing.

    Only the lanes' own hand-off is broken here; copies between devices stay ordered.
    """
    kind = {"wait_event": Stream, "record_stream": OnCard}[forgotten]
    whole = getattr(kind, forgotten)

    def half(self: Any, other: Any) -> None:
        if not lanes.inside:
            whole(self, other)

    class Lanes(Lane):
        inside = False

        def begun(self, item: Any, work: Any) -> Any:
            lanes.inside = True
            try:
                ready = super().begun(item, work)
            finally:
                lanes.inside = False

            def awaited() -> Any:
                lanes.inside = True
                try:
                    return ready()
                finally:
                    lanes.inside = False

            return awaited

    lanes: Any = Lanes
    monkeypatch.setattr(kind, forgotten, half)
    monkeypatch.setattr("tests.engine.test_several_gpus.Lane", Lanes)
    Run(card, (GPUS[0], GPUS[0])).indices(30)
    assert any(says in race for race in card.races)


def test_on_a_card_flow_is_that_of_one_lane(gpu: torch.device, tiny_weights: str) -> None:
    """Two lanes on one GPU give the same flow as one; so do two GPUs where there are several."""
    generator = torch.Generator().manual_seed(0)
    frames = [
        Frame(torch.randint(0, 256, (3, 70, 100), dtype=torch.uint8, generator=generator).to(gpu), number, number / 25)
        for number in range(24)
    ]
    given = [
        PairBatch((FramePair(frames[n], frames[n + 1]), FramePair(frames[n + 1], frames[n])), n) for n in range(23)
    ]

    def flows(inference: Inference) -> list[torch.Tensor]:
        return [batch.flow.cpu() for batch in inference.stage(iter(given))]

    config = ModelConfig(device=str(gpu), weights=tiny_weights, batch=2)
    alone = load_network(config).fitted(70, 100)
    expected = flows(alone)
    twice = replace(alone, others=(replace(alone, made=Made()),))
    assert all(torch.equal(ours, other) for ours, other in zip(flows(twice), expected, strict=True))
    if torch.cuda.device_count() > 1:
        several = load_network(replace(config, device=f"{gpu},{(gpu.index + 1) % 2}")).fitted(70, 100)
        got = flows(several)
        assert all(torch.allclose(ours, other, atol=0.05) for ours, other in zip(got, expected, strict=True))
