from __future__ import annotations

import numpy as np
import pytest
import torch

from flowreel.engine.scenes.textures import MAKERS, TextureBank, make_texture


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_textures_repeat_without_a_seam(kind: str, seed: int) -> None:
    texture = make_texture(kind, seed, 128)
    assert (texture.shape, texture.dtype) == ((3, 128, 128), torch.uint8)
    assert torch.equal(texture, make_texture(kind, seed, 128))
    assert not torch.equal(texture, make_texture(kind, seed + 2, 128))
    assert texture.float().std() > 1
    values = texture.float()
    for axis in (1, 2):
        steps = (values - values.roll(1, axis)).abs().mean((0, 3 - axis))  # from each line to the one before it
        assert steps[0] <= steps.max() * 1.5 + 1
        assert steps[0] < 3 * steps.median() + 6


def test_what_is_blacker_than_black_stays_black(monkeypatch: pytest.MonkeyPatch) -> None:
    colour = np.float32([-5, 300, 100.6])
    monkeypatch.setitem(MAKERS, "beyond", lambda rng, size: np.tile(colour, (size, size, 1)))
    assert make_texture("beyond", 0, 4)[:, 1, 2].tolist() == [0, 255, 101]


def test_a_window_wraps_round_its_texture() -> None:
    bank = TextureBank(seed=1, count=1, size=64)
    window = bank.window(0, 1, top=30, left=-5, height=70, width=40)
    texture = bank.levels(0)[1].float()
    assert texture.shape == (3, 32, 32)
    rows, columns = (torch.arange(70) + 30) % 32, (torch.arange(40) - 5) % 32
    assert torch.equal(window, texture[:, rows][:, :, columns])
    assert torch.equal(bank.window(0, 1, 3, 4, 5, 6), texture[:, 3:8, 4:10])
