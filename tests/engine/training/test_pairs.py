from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flowreel.engine.training.drawing import SceneConfig
from flowreel.engine.training.pairs import sample_pair

Pulled = Callable[[Tensor, Tensor], Tensor]
BANK = (3, 16, 128)  # small: one texture of each kind is enough here
PLAIN = SceneConfig(bank=BANK, photometric=0, motion_blur=0)
HEIGHT, WIDTH = 96, 128


def test_a_pair_is_decided_by_its_seed() -> None:
    one, same, other = (sample_pair(seed, HEIGHT, WIDTH, SceneConfig(bank=BANK)) for seed in (5, 5, 6))
    for name in ("first", "second", "flow", "visible"):
        assert torch.equal(getattr(one, name), getattr(same, name))
    assert not torch.equal(one.first, other.first)
    assert (one.first.dtype, one.first.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert (one.flow.dtype, one.flow.shape) == (torch.float32, (2, HEIGHT, WIDTH))
    assert (one.visible.dtype, one.visible.shape) == (torch.bool, (HEIGHT, WIDTH))
    assert torch.equal(pickle.loads(pickle.dumps(one)).flow, one.flow)  # so that worker processes can send it


def test_second_frame_pulled_back_along_the_flow_is_the_first(pulled: Pulled) -> None:
    """Without noise and changes of light, only interpolation errors remain, at edges and in fine texture."""
    aligned, unaligned, moved = [], [], []
    for seed in range(40):
        pair = sample_pair(seed, HEIGHT, WIDTH, PLAIN)
        first = pair.first.float()
        aligned.append(float((pulled(pair.second, pair.flow) - first).abs().mean(0)[pair.visible].mean()))
        unaligned.append(float((pair.second.float() - first).abs().mean(0)[pair.visible].mean()))
        moved.append(float(pair.flow.norm(dim=0).mean()))
        off_by_half = pulled(pair.second, pair.flow + 0.5) - first
        if aligned[-1] > 1:  # textured: an error of half a pixel shows
            assert off_by_half.abs().mean(0)[pair.visible].mean() > aligned[-1]
    assert np.mean(aligned) < 4
    assert max(aligned) < 16
    assert np.mean(unaligned) > 4 * np.mean(aligned)


def test_speeds_are_spread_as_meant() -> None:
    pairs = [sample_pair(seed, HEIGHT, WIDTH, PLAIN) for seed in range(120)]
    speed = torch.stack([pair.flow.norm(dim=0) for pair in pairs]) * 320 / math.hypot(HEIGHT, WIDTH)
    assert 3 < speed.median() < 7
    assert 0.1 < (speed < 1).float().mean() < 0.35
    assert 0.002 < (speed > 30).float().mean() < 0.05
    still = sum(bool((pair.flow == 0).all(0).float().mean() > 0.2) for pair in pairs) / len(pairs)
    assert 0.03 < still < 0.2
    visible = torch.stack([pair.visible for pair in pairs]).float().mean()
    assert 0.8 < visible < 0.97


def test_slow_pairs_can_be_asked_for() -> None:
    slow = replace(PLAIN, median_px=0.8, spread=0.5, max_px=3)
    speed = torch.stack([sample_pair(seed, HEIGHT, WIDTH, slow).flow.norm(dim=0) for seed in range(30)])
    assert 0.1 < speed.median() < 1
    assert speed.quantile(0.99) < 5


def test_light_and_noise_change_the_pictures_but_not_the_truth() -> None:
    changed = 0.0
    for seed in range(8):
        clean, real = (
            sample_pair(seed, HEIGHT, WIDTH, PLAIN),
            sample_pair(seed, HEIGHT, WIDTH, replace(PLAIN, photometric=1)),
        )
        assert torch.equal(clean.flow, real.flow)
        assert torch.equal(clean.visible, real.visible)
        changed += float((clean.first.float() - real.first.float()).abs().mean())
    assert changed / 8 > 3


def test_an_open_shutter_blurs_along_the_motion() -> None:
    sharp = sum(_detail(sample_pair(seed, HEIGHT, WIDTH, replace(PLAIN, median_px=20)).first) for seed in range(6))
    config = replace(PLAIN, median_px=20, motion_blur=1.0)
    assert sum(_detail(sample_pair(seed, HEIGHT, WIDTH, config).first) for seed in range(6)) < 0.85 * sharp


def _detail(picture: Tensor) -> float:
    return float(picture.float().diff(dim=2).abs().mean())
