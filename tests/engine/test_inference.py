"""The model stage: batch sizes, programs made in advance, flow in pixels of the frame, and running out of memory."""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine import inference as module
from flowreel.engine.config import ModelConfig
from flowreel.engine.data import FlowBatch, Frame, FramePair, PairBatch
from flowreel.engine.errors import DeviceError, StageError, UsageError
from flowreel.engine.inference import Inference, Made, auto_batch, load_network
from flowreel.engine.scenes.named import named_scene
from flowreel.kernels import channel_norm
from tests.fakes.cuda_streams import GPU


def test_the_batch_follows_from_the_frame_size_alone() -> None:
    sizes = [(64, 64), (384, 512), (448, 1024), (1088, 1920), (2176, 3840)]
    assert [auto_batch(*size) for size in sizes] == [8, 5, 2, 1, 1]


def test_on_a_gpu_free_memory_bounds_it_too() -> None:
    plenty = 70 << 30
    sizes = [(64, 64), (448, 1024), (1088, 1920), (2176, 3840)]
    assert [auto_batch(*size, "fp16", plenty) for size in sizes] == [8, 8, 8, 2]
    assert [auto_batch(*size, "fp16", 8 << 30) for size in sizes] == [8, 8, 1, 1]
    assert [auto_batch(*size, "fp32", 8 << 30) for size in sizes] == [8, 2, 1, 1]
    assert auto_batch(2176, 3840, "fp16", 0) == 1  # one pair is tried even if it does not seem to fit


def test_the_batch_an_earlier_run_chose_is_taken_again_unless_another_is_asked_for() -> None:
    network = load_network(ModelConfig(device="cpu", model="flownet2c"))
    assert network.fitted(64, 64, recorded_batch=3).batch == 3
    network = load_network(ModelConfig(device="cpu", model="flownet2c", batch=2))
    assert network.fitted(64, 64, recorded_batch=3).batch == 2


def test_sources_of_one_size_share_what_was_made_for_it(tiny_weights: str) -> None:
    network = load_network(ModelConfig(device="cpu", weights=tiny_weights))
    first = network.fitted(64, 64)
    first.make_ready(16, 19)
    again = network.fitted(60, 64)  # padded to the same size
    assert again.made is first.made
    assert again.notes is not first.notes
    assert again.batch == first.batch
    assert list(again.made.programs) == [8, 3]
    network.fitted(64, 128)
    assert network.fitted(64, 64).made is not first.made  # only one size is kept at a time
    assert list(first.made.programs) == [8, 3]  # but the earlier one goes on working for whoever holds it


def test_what_ran_is_told_to_every_source() -> None:
    """Also to one that reuses a program (on a GPU: replays a captured graph), in which no operation is called again."""
    network = load_network(ModelConfig(device="cpu", model="flownet2c"))
    frames = torch.zeros(2, 1, 3, 64, 64)
    network.fitted(64, 64).flow(*frames)
    assert network.fitted(64, 64).kernels == {"correlation": "torch"}
    assert network.fitted(64, 128).kernels == {}


def test_the_batch_is_chosen_once_for_a_size(tiny_weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory is read once: later, what the first source still holds would make it look too small."""
    free = [1 << 30, 1 << 20]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free.pop(0), 1 << 40))
    network = replace(load_network(ModelConfig(device="cpu", weights=tiny_weights)), device=GPU, precision="fp16")
    assert [network.fitted(320, 256).batch for _ in range(2)] == [6, 6]
    assert network.fitted(320, 256, recorded_batch=2).batch == 2
    assert network.fitted(320, 256).batch == 6
    assert network.fitted(320, 192).batch == 1
    free += [1 << 30, 1 << 20]
    assert (
        replace(network, others=(replace(network, _made={}),), _made={}).fitted(320, 256).batch == 1
    )  # the least counts
    assert not free


@pytest.mark.parametrize(
    ("batch", "lengths"), [(8, [1, 2, 4, 4, 8, 8, 8, 8]), (6, [1, 3, 3, 6, 6, 6]), (3, [1, 3, 3]), (1, [1])]
)
def test_on_a_gpu_few_lengths_are_captured(tiny_weights: str, batch: int, lengths: list[int]) -> None:
    inference = load_network(ModelConfig(device="cpu", weights=tiny_weights, batch=batch)).fitted(64, 64)
    assert [inference._length(pairs) for pairs in range(1, batch + 1)] == list(range(1, batch + 1))
    on_gpu = replace(inference, device=GPU)
    assert [on_gpu._length(pairs) for pairs in range(1, batch + 1)] == lengths
    on_gpu.make_ready(3 * batch, 4 * batch - 1)
    assert set(on_gpu.made.programs) == {batch, *lengths[batch - 2 : -1]}


def frame(scene: object, number: int) -> Frame:
    return Frame(scene.render(number), number, number / 25)  # type: ignore[attr-defined]


def test_the_shipped_weights_know_a_known_motion() -> None:
    """A texture moved by (3, 1) px: the mean flow is off by less than half of that motion."""
    scene = named_scene("translate", 192, 256)
    inference = load_network(ModelConfig(device="cpu")).fitted(192, 256)
    batch = PairBatch((FramePair(frame(scene, 0), frame(scene, 1)),), 0)
    (result,) = inference.stage(iter([batch]))
    mean = result.flow[0].mean((1, 2)).numpy()
    assert np.hypot(*(mean - (3, 1))) < 0.5 * np.hypot(3, 1)
    assert (result.frame[0], result.frame_to[0], result.timestamp_to_s[0]) == (0, 1, 0.04)


def test_one_loaded_network_serves_frames_of_any_size() -> None:
    config = ModelConfig(device="cpu", model="flownet2c")
    network = load_network(config)
    for height, width in ((64, 64), (70, 130)):
        shared, alone = network.fitted(height, width), load_network(config).fitted(height, width)
        assert shared.packed is network.packed
        assert (shared.model, shared.batch, shared.fit) == (alone.model, alone.batch, alone.fit)
        assert shared.made_by() == alone.made_by()
        frames = torch.randint(0, 256, (2, 1, 3, height, width), dtype=torch.uint8)
        assert torch.equal(shared.flow(*frames), alone.flow(*frames))
    assert load_network(ModelConfig(device="cpu", batch=3)).fitted(64, 64).batch == 3
    with pytest.raises(UsageError, match="fit=crop"):
        load_network(ModelConfig(device="cpu", fit="crop")).fitted(32, 64)


def test_it_knows_by_what_each_operation_ran() -> None:
    frames = torch.zeros(2, 1, 3, 64, 64)
    inference = load_network(ModelConfig(device="cpu", model="flownet2c")).fitted(64, 64)
    assert inference.kernels == {}
    inference.flow(*frames)
    assert inference.kernels == {"correlation": "torch"}
    inference.kernels.clear()
    frame, following = (Frame(picture[0].to(torch.uint8), number, 0.0) for number, picture in enumerate(frames))
    list(inference.stage(iter([PairBatch((FramePair(frame, following),), 0)])))
    assert inference.kernels == {"correlation": "torch"}
    capturing: Any = SimpleNamespace(program=lambda shape: channel_norm(frames[0]))
    captured = replace(inference, packed=capturing, made=Made())
    captured.make_ready(8, None)
    assert captured.kernels == {"channel_norm": "torch"}  # a graph that is captured then is only replayed later


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    ("pairs", "what"),
    [
        ([(0, 1), (1, 2), (2, 3)], "forward"),
        ([(1, 0), (2, 1), (3, 2)], "backward"),
        ([(0, 1), (2, 3), (3, 4)], "two clips"),
        ([(0, 1), (5, 6)], "chosen by number"),
        ([(0, 1), (1, 2), (1, 2), (1, 2)], "a short batch, filled"),
    ],
)
def test_a_batch_gives_each_pairs_own_flow(pairs: list[tuple[int, int]], what: str, native: bool) -> None:
    """Frames that two pairs share are converted once; each pair must still get its own two frames."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (7, 3, 70, 60), dtype=torch.uint8, generator=generator)
    frames = [Frame(picture, number, number / 25) for number, picture in enumerate(pictures)]
    config = ModelConfig(device="cpu", batch=len(pairs))
    inference = load_network(config).fitted(70, 60, native=native)
    batch = PairBatch(tuple(FramePair(frames[first], frames[second]) for first, second in pairs), 0)
    (got,) = inference.stage(iter([batch]))
    first, second = (pictures[torch.tensor(numbers)] for numbers in zip(*pairs, strict=True))
    torch.testing.assert_close(got.flow, inference.flow(first, second), rtol=0, atol=1e-5, msg=what)
    assert got.frame.tolist() == [first for first, _ in pairs]
    assert got.frame_to.tolist() == [second for _, second in pairs]


def test_flow_is_an_ordinary_tensor_without_gradients() -> None:
    inference = load_network(ModelConfig(device="cpu")).fitted(64, 64)
    flow = inference.flow(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))
    assert not flow.requires_grad
    assert not flow.is_inference()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("batch", "shard", "count", "made"),
    [
        (4, 12, None, [4]),
        (4, 12, 24, [4]),
        (4, 12, 27, [4, 3]),
        (4, 10, None, [4, 2]),
        (4, 10, 21, [4, 2, 1]),
        (4, 12, 3, [3]),
        (4, 12, 0, []),
        (8, 5, None, [5]),
        (8, 5, 7, [5, 2]),
        (1, 9, 20, [1]),
    ],
)
def test_what_a_run_will_need_is_made_before_it(
    tiny_weights: str, batch: int, shard: int, count: int | None, made: list[int]
) -> None:
    inference = load_network(ModelConfig(device="cpu", weights=tiny_weights, batch=batch)).fitted(64, 64)
    other = replace(inference, made=Made())
    replace(inference, others=(other,)).make_ready(shard, count)
    assert list(inference.made.programs) == list(other.made.programs) == made
    if count is not None:
        lengths = {min(batch, shard - place % shard, count - place) for place in _starts(batch, shard, count)}
        assert lengths == set(made)


def _starts(batch: int, shard: int, count: int) -> list[int]:
    """Where batches begin, by the same rule as ``pairing.batches``."""
    return [place for place in range(count) if place % shard % batch == 0]


class LittleMemory:
    """A network that runs out of memory for more than ``fits`` pairs, after allocating some, as on a GPU."""

    def __init__(self, inference: Inference, fits: int, when_made: bool = False) -> None:
        self.packed = inference.packed
        self.fits = fits
        self.when_made = when_made  # the memory already runs out when the program is made
        self.attempts: list[int] = []  # pairs
        self.held: list[weakref.ref[torch.Tensor]] = []  # what failed attempts had allocated
        self.words = ""  # the message of another error to raise than torch.OutOfMemoryError

    def program(self, shape: tuple[int, int, int]) -> Any:
        pairs = shape[0]
        if self.when_made:
            self._need(pairs)
        return _Program(self, self.packed.program(shape))

    def _need(self, pairs: int) -> None:
        assert not any(one() is not None for one in self.held), "what had failed is still in memory"
        self.attempts.append(pairs)
        if pairs > self.fits:
            activations = torch.zeros(pairs)
            self.held.append(weakref.ref(activations))
            if self.words:
                raise RuntimeError(self.words)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class _Program:
    def __init__(self, memory: LittleMemory, inner: Any) -> None:
        self.memory = memory
        self.inner = inner

    def flow(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        self.memory._need(len(first))
        flow: torch.Tensor = self.inner.flow(first, second)
        return flow

    def quarter(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        self.memory._need(len(first))
        quarter: torch.Tensor = self.inner.quarter(first, second)
        return quarter


class TestOutOfMemory:
    def pair_batches(self, lengths: list[int]) -> list[PairBatch]:
        generator = torch.Generator().manual_seed(0)
        count = sum(lengths) + 1
        pictures = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)
        frames = [Frame(picture, number, number / 25) for number, picture in enumerate(pictures)]
        pairs = [FramePair(one, two) for one, two in pairwise(frames)]
        starts = [sum(lengths[:place]) for place in range(len(lengths))]
        return [PairBatch(tuple(pairs[s : s + n]), s) for s, n in zip(starts, lengths, strict=True)]

    def run(
        self, weights: str, lengths: list[int], fits: int, when_made: bool = False, native: bool = False
    ) -> tuple[list[FlowBatch], LittleMemory, Inference]:
        network = load_network(ModelConfig(device="cpu", weights=weights, batch=lengths[0]))
        plenty = network.fitted(64, 64, native=native)
        memory = LittleMemory(plenty, fits, when_made)
        little = replace(plenty, packed=memory, notes=[], made=Made())
        return list(little.stage(iter(self.pair_batches(lengths)))), memory, little

    @pytest.mark.parametrize("native", [False, True])
    @pytest.mark.parametrize("when_made", [False, True])
    def test_batches_are_halved_and_no_pair_is_lost(self, tiny_weights: str, when_made: bool, native: bool) -> None:
        given, memory, inference = self.run(tiny_weights, [8, 8, 3], fits=3, when_made=when_made, native=native)
        if not when_made:
            assert memory.attempts == [8, 4, *[2] * 8, 2, 1]  # the smaller size is remembered
        assert [batch.index for batch in given] == list(range(0, 19, 2))
        assert [int(number) for batch in given for number in batch.frame] == list(range(19))
        assert [int(number) for batch in given for number in batch.frame_to] == list(range(1, 20))
        assert inference.notes == [
            "8 pairs a batch did not fit in the memory of cpu: 4 from flow 0 on",
            "4 pairs a batch did not fit in the memory of cpu: 2 from flow 0 on",
        ]
        whole, _, _ = self.run(tiny_weights, [2] * 9 + [1], fits=2, native=native)
        assert all(torch.equal(a.flow, b.flow) for a, b in zip(given, whole, strict=True))

    def test_memory_that_ends_later(self, tiny_weights: str) -> None:
        """Another process takes some memory during the run: programs for larger batches are given up."""
        network = load_network(ModelConfig(device="cpu", weights=tiny_weights, batch=4)).fitted(64, 64)
        memory = LittleMemory(network, fits=4)
        inference = replace(network, packed=memory, notes=[], made=Made())
        stage = inference.stage(iter(self.pair_batches([4, 4, 4])))
        assert len(next(stage)) == 4
        memory.fits = 2
        assert [len(batch) for batch in stage] == [2] * 4
        assert list(inference.made.programs) == [2]
        assert inference.notes == ["4 pairs a batch did not fit in the memory of cpu: 2 from flow 4 on"]

    def test_memory_that_ends_before_the_run_is_left_to_the_run(self, tiny_weights: str) -> None:
        network = load_network(ModelConfig(device="cpu", weights=tiny_weights, batch=4)).fitted(64, 64)
        inference = replace(network, packed=LittleMemory(network, fits=3, when_made=True), notes=[], made=Made())
        inference.make_ready(8, None)
        assert (list(inference.made.programs), inference.notes) == ([], [])
        assert [len(batch) for batch in inference.stage(iter(self.pair_batches([4])))] == [2, 2]

    @pytest.mark.parametrize("words", ["unable to find an engine to execute this", "CUDA error: out of memory"])
    def test_whoever_says_that_memory_ended(self, tiny_weights: str, words: str) -> None:
        network = load_network(ModelConfig(device="cpu", weights=tiny_weights, batch=4)).fitted(64, 64)
        memory = LittleMemory(network, fits=2)
        memory.words = words
        inference = replace(network, packed=memory, notes=[], made=Made())
        assert [len(batch) for batch in inference.stage(iter(self.pair_batches([4])))] == [2, 2]

    def test_any_other_error_before_the_run_is_the_models(self, tiny_weights: str) -> None:
        network = load_network(ModelConfig(device="cpu", weights=tiny_weights, batch=4)).fitted(64, 64)
        memory = LittleMemory(network, fits=2, when_made=True)
        memory.words = "CUDA error: an illegal memory access was encountered"
        with pytest.raises(StageError, match="model: CUDA error: an illegal"):
            replace(network, packed=memory, notes=[], made=Made()).make_ready(8, None)

    def test_any_other_error_ends_the_run(self, tiny_weights: str) -> None:
        network = load_network(ModelConfig(device="cpu", weights=tiny_weights, batch=4)).fitted(64, 64)
        memory = LittleMemory(network, fits=2)
        memory.words = "CUDA error: an illegal memory access was encountered"
        inference = replace(network, packed=memory, notes=[], made=Made())
        with pytest.raises(RuntimeError, match="illegal memory access"):
            list(inference.stage(iter(self.pair_batches([4]))))

    def test_not_even_the_weights(self, tiny_weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> object:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(module, "pack", full)
        with pytest.raises(DeviceError, match=r"cpu has too little free memory for the weights: .*--device cpu \(CUDA"):
            load_network(ModelConfig(device="cpu", weights=tiny_weights))

    def test_not_even_one_pair(self, tiny_weights: str) -> None:
        with pytest.raises(DeviceError, match=r"cpu has too little free memory for one pair of 64x64.*--precision"):
            self.run(tiny_weights, [4], fits=0)
