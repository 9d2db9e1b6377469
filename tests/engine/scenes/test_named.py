from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowreel.engine.errors import UsageError
from flowreel.engine.scenes.named import SCENES, named_scene

Pulled = Callable[[Tensor, Tensor], Tensor]
HEIGHT, WIDTH = 96, 128


@pytest.mark.parametrize("t", [0, 7, 20_000])
def test_translate_moves_every_pixel_by_3_and_1(t: int) -> None:
    scene = named_scene("translate", HEIGHT, WIDTH)
    before, after = scene.render(t), scene.render(t + 1)
    assert torch.equal(after[:, 1:, 3:], before[:, :-1, :-3])
    flow, visible = scene.flow(t, t + 1)
    assert torch.equal(flow, torch.tensor([3.0, 1.0])[:, None, None].expand(2, HEIGHT, WIDTH))
    assert torch.equal(visible, torch.arange(WIDTH).le(WIDTH - 4) & torch.arange(HEIGHT).le(HEIGHT - 2)[:, None])


def test_still_stays() -> None:
    scene = named_scene("still", HEIGHT, WIDTH)
    assert torch.equal(scene.render(0), scene.render(1234))
    flow, visible = scene.flow(0, 1234)
    assert not flow.any()
    assert visible.all()


def test_rotate_turns_and_zooms_about_the_middle() -> None:
    flow, _ = named_scene("rotate", 65, 97).flow(10, 13)
    ratio = math.exp(0.2 * (math.sin(13 / 12) - math.sin(10 / 12)))
    cos, sin = ratio * math.cos(0.06), ratio * math.sin(0.06)
    x, y = torch.arange(97.0) - 48, torch.arange(65.0)[:, None] - 32
    exact = torch.stack((x * cos - y * sin - x, x * sin + y * cos - y))
    assert (flow - exact).abs().max() < 1e-4
    assert flow[:, 32, 48].abs().max() < 1e-5


@pytest.mark.parametrize("name", sorted(SCENES))
def test_named_scenes_are_textured_repeatable_and_true_after_thousands_of_frames(name: str, pulled: Pulled) -> None:
    scene = named_scene(name, HEIGHT, WIDTH, seed=2)
    frame = scene.render(5000)
    assert torch.equal(frame, named_scene(name, HEIGHT, WIDTH, seed=2).render(5000))
    assert not torch.equal(frame, named_scene(name, HEIGHT, WIDTH, seed=3).render(5000))
    assert frame.float().std() > 20
    flow, visible = scene.flow(5000, 5001)
    assert visible.float().mean() > 0.7
    off = (pulled(scene.render(5001), flow) - frame).abs().mean(0)[visible]
    assert off.median() < 4
    assert off.mean() < 8


def test_an_unknown_scene_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="objects, rotate, still, translate"):
        named_scene("Objects", 64, 64)
