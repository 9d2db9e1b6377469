"""The model stage: what is settled before the first frame, and that flow is in the frame's pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowreel.engine.config import ModelConfig
from flowreel.engine.data import Frame, FramePair, PairBatch
from flowreel.engine.errors import UsageError
from flowreel.engine.inference import auto_batch, load_network, prepare
from flowreel.engine.named_scenes import named_scene


def test_the_batch_follows_from_the_frame_size_alone() -> None:
    sizes = [(64, 64), (384, 512), (448, 1024), (1088, 1920), (2176, 3840)]
    assert [auto_batch(*size) for size in sizes] == [8, 5, 2, 1, 1]


def test_on_a_gpu_free_memory_bounds_it_too() -> None:
    plenty = 70 << 30
    sizes = [(64, 64), (448, 1024), (1088, 1920), (2176, 3840)]
    assert [auto_batch(*size, "fp16", plenty) for size in sizes] == [8, 8, 8, 2]
    assert [auto_batch(*size, "fp16", 8 << 30) for size in sizes] == [8, 8, 2, 1]
    assert [auto_batch(*size, "fp32", 8 << 30) for size in sizes] == [8, 5, 1, 1]
    assert auto_batch(2176, 3840, "fp16", 0) == 1  # and then memory ends, or does not: it is tried


def test_the_batch_an_earlier_run_chose_is_taken_again_unless_another_is_asked_for() -> None:
    network = load_network(ModelConfig(device="cpu", model="flownet2c"))
    assert network.fitted(64, 64, recorded_batch=3).batch == 3
    network = load_network(ModelConfig(device="cpu", model="flownet2c", batch=2))
    assert network.fitted(64, 64, recorded_batch=3).batch == 2


def frame(scene: object, number: int) -> Frame:
    return Frame(scene.render(number), number, number / 25)  # type: ignore[attr-defined]


def test_the_shipped_weights_know_a_known_motion() -> None:
    """A texture moved by (3, 1) px: not exact yet, but far from no motion, and to the right side."""
    scene = named_scene("translate", 192, 256)
    inference = prepare(ModelConfig(device="cpu"), 192, 256)
    batch = PairBatch((FramePair(frame(scene, 0), frame(scene, 1)),), 0)
    (result,) = inference.stage(iter([batch]))
    mean = result.flow[0].mean((1, 2)).numpy()
    assert np.hypot(*(mean - (3, 1))) < 0.5 * np.hypot(3, 1)
    assert (result.frame[0], result.frame_to[0], result.timestamp_to_s[0]) == (0, 1, 0.04)


def test_one_loaded_network_serves_frames_of_any_size() -> None:
    config = ModelConfig(device="cpu", model="flownet2c")
    network = load_network(config)
    for height, width in ((64, 64), (70, 130)):
        shared, alone = network.fitted(height, width), prepare(config, height, width)
        assert shared.packed is network.packed
        assert (shared.model, shared.batch, shared.fit) == (alone.model, alone.batch, alone.fit)
        assert shared.made_by() == alone.made_by()
        frames = torch.randint(0, 256, (2, 1, 3, height, width), dtype=torch.uint8)
        assert torch.equal(shared.flow(*frames), alone.flow(*frames))
    assert load_network(ModelConfig(device="cpu", batch=3)).fitted(64, 64).batch == 3
    with pytest.raises(UsageError, match="fit=crop"):
        load_network(ModelConfig(device="cpu", fit="crop")).fitted(32, 64)


def test_flow_is_an_ordinary_tensor_without_gradients() -> None:
    inference = prepare(ModelConfig(device="cpu"), 64, 64)
    flow = inference.flow(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))
    assert not flow.requires_grad
    assert not flow.is_inference()
    assert torch.is_grad_enabled()
