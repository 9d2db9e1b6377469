"""Pairs painted in a batch are the same as pairs painted one by one."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from flowreel.engine.training import batches, packing
from flowreel.engine.training.config import TrainConfig
from flowreel.engine.training.drawing import DrawnPair, SceneConfig, draw_pair
from flowreel.engine.training.packing import pack
from flowreel.engine.training.painting import Batch, Painter
from flowreel.engine.training.pairs import ScenePair, sample_pair
from tests.fakes.one_device import NOWHERE, OneDevice

CONFIG = SceneConfig(bank=(3, 16, 128), motion_blur=0.2)
HEIGHT, WIDTH = 96, 128
SEEDS = range(100)  # every kind of outline, bend, hole and light is among them


def drawn(config: SceneConfig = CONFIG) -> list[DrawnPair]:
    return [draw_pair(seed, HEIGHT, WIDTH, config) for seed in SEEDS]


def assert_alike(painted: Batch, wanted: list[ScenePair]) -> None:
    """Frames differ by at most one level, flow and visibility not at all, except for a few pixels at edges."""
    first, second, flow, visible = (part.cpu() for part in painted)
    for frames, name in ((first, "first"), (second, "second")):
        apart = (frames.float() - torch.stack([getattr(pair, name) for pair in wanted])).abs()
        assert (apart <= 1).float().mean() > 0.9999
        assert (apart <= 1).flatten(1).float().mean(1).min() > 0.995
        assert (apart > 0).float().mean() < 0.01
    apart = (flow - torch.stack([pair.flow for pair in wanted])).norm(dim=1)
    assert (apart > 2e-3).float().mean() < 1e-4  # pixels that a front layer covers by about half
    assert apart.median() < 1e-4
    assert (visible != torch.stack([pair.visible for pair in wanted])).float().mean() < 1e-3


def test_together_they_are_as_one_by_one() -> None:
    pairs = drawn()
    layers = [layer for pair in pairs for layer in pair.layers]
    assert len({type(layer.outline) for layer in layers}) == 4
    assert {layer.piece.level for layer in layers} == {0, 1, 2}
    assert any(layer.bend is not None and layer.outline is not None for layer in layers)
    assert any(layer.piece.tatters is not None for layer in layers)
    assert 5 < sum(bool(pair.moments) for pair in pairs) < 50
    assert len({len(pair.layers) for pair in pairs}) == 7
    assert_alike(
        Painter(torch.device("cpu"), CONFIG.bank).paint(pack(pairs)),
        [sample_pair(seed, HEIGHT, WIDTH, CONFIG) for seed in SEEDS],
    )


def test_parts_of_a_batch_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    painter, pairs = Painter(torch.device("cpu"), CONFIG.bank), drawn()[:10]
    whole = painter.paint(pack(pairs))
    monkeypatch.setattr(packing, "PIXELS", 6 * HEIGHT * WIDTH)  # three pairs without motion blur
    parts = pack(pairs)
    views = [2 * (1 + len(pair.moments)) for pair in pairs]
    assert len(parts) >= sum(views) / 6 > 3
    assert all(len(part.pair_of) < 6 + max(views) for part in parts)
    for one, other in zip(whole, painter.paint(pickle.loads(pickle.dumps(parts))), strict=True):
        assert torch.equal(one, other)


def test_clean_scenes_of_a_background_alone() -> None:
    config = replace(CONFIG, objects=(0, 0), photometric=0, motion_blur=0, bends=0)
    painted = Painter(torch.device("cpu"), CONFIG.bank).paint(pack(drawn(config)))
    assert_alike(painted, [sample_pair(seed, HEIGHT, WIDTH, config) for seed in SEEDS])


def test_painting_keeps_to_its_device() -> None:
    painter = Painter(NOWHERE, CONFIG.bank)
    with OneDevice():
        painted = painter.paint(pack(drawn()))
    assert {part.device.type for part in painted} == {"meta"}
    assert [part.shape[1:] for part in painted] == [
        (3, HEIGHT, WIDTH),
        (3, HEIGHT, WIDTH),
        (2, HEIGHT, WIDTH),
        (HEIGHT, WIDTH),
    ]


def test_a_run_sees_the_same_scenes_whoever_paints() -> None:
    config = TrainConfig(steps=3, batch=3, height=64, width_px=64, reuse=2)
    painter = batches.painter_on(torch.device("cpu"))
    wanted = list(batches.batches(config, 0, workers=0))
    assert len(wanted) == 3
    for workers in (0, 1):
        for one, other in zip(batches.batches(config, 0, workers, painter), wanted, strict=True):
            assert_alike(one, [ScenePair(*parts) for parts in zip(*other, strict=True)])


def test_a_batch_of_another_bank_is_refused() -> None:
    with pytest.raises(ValueError, match="textures of bank"):
        Painter(torch.device("cpu"), CONFIG.bank).paint(pack([draw_pair(0, 64, 64)]))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (97, 131)])
def test_one_pair_of_any_size(size: tuple[int, int]) -> None:
    (painted,) = zip(*Painter(torch.device("cpu"), CONFIG.bank).paint(pack([draw_pair(3, *size, CONFIG)])), strict=True)
    wanted = sample_pair(3, *size, CONFIG)
    assert torch.equal(painted[3], wanted.visible)
    assert (painted[0].float() - wanted.first).abs().max() <= 1
    torch.testing.assert_close(painted[2], wanted.flow, atol=2e-3, rtol=0)


def test_a_strong_bend_is_undone_as_by_itself() -> None:
    """If a background only bends, its flow must undo the bend, to a thousandth of a pixel."""
    pairs = [draw_pair(seed, HEIGHT, WIDTH, replace(CONFIG, objects=(0, 0), bends=1, still=0)) for seed in range(8)]
    bends = []
    for pair in pairs:
        bend = pair.layers[0].bend
        assert bend is not None
        largest = 0.29 / float((np.hypot(*bend.strength.T) * np.hypot(*bend.wave.T)).sum())
        bends.append(replace(bend, strength=bend.strength * largest))
    still = [
        replace(pair, layers=(replace(pair.layers[0], pose=lambda t: np.eye(3), bend=bend),), moments=())
        for pair, bend in zip(pairs, bends, strict=True)
    ]
    _, _, flow, _ = Painter(torch.device("cpu"), CONFIG.bank).paint(pack(still))
    y, x = torch.meshgrid(torch.arange(float(HEIGHT)), torch.arange(float(WIDTH)), indexing="ij")
    for moved, bend in zip(flow, bends, strict=True):
        dx, dy = bend.shift(x + moved[0], y + moved[1], 1.0)
        assert moved.norm(dim=0).max() > 1
        assert max((moved[0] + dx).abs().max(), (moved[1] + dy).abs().max()) < 1e-3


def test_on_a_gpu(gpu: torch.device) -> None:
    wanted = [sample_pair(seed, HEIGHT, WIDTH, CONFIG) for seed in SEEDS]
    assert_alike(Painter(gpu, CONFIG.bank).paint(pack(drawn())), wanted)
