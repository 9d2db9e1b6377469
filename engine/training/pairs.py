"""One training pair: a random scene at two moments, painted on the host, and the flow between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowreel.engine.scenes.scene import Layer, Scene, to_bytes
from flowreel.engine.scenes.textures import TATTER_SIZE, TextureBank, tatters, texture_bank
from flowreel.engine.training.development import develop
from flowreel.engine.training.drawing import DrawnLayer, Piece, SceneConfig, draw_pair


@dataclass(frozen=True, eq=False)
class ScenePair:
    """Two frames and the true flow between them."""

    first: Tensor  # (3, H, W) uint8 RGB
    second: Tensor  # (3, H, W) uint8 RGB
    flow: Tensor  # (2, H, W) float32, px of first, x then y
    visible: Tensor  # (H, W) bool: the point is also visible in second


def sample_pair(seed: int, height: int, width: int, config: SceneConfig | None = None) -> ScenePair:
    """A random scene at times 0 and 1. The same seed, size and config give the same pair."""
    drawn = draw_pair(seed, height, width, config)
    bank = texture_bank(*drawn.bank)
    scene = Scene(height, width, tuple(_layer(layer, bank) for layer in drawn.layers))
    (first, owner0), (second, owner1) = (_expose(scene, t, drawn.moments) for t in (0.0, 1.0))
    flow, visible = scene.flow_between(0.0, owner0, 1.0, owner1)
    developed = develop(torch.stack((first, second))[None], [drawn.development])
    first, second = to_bytes(developed[0])
    return ScenePair(first, second, flow, visible)


def _layer(drawn: DrawnLayer, bank: TextureBank) -> Layer:
    piece = drawn.piece
    left, top = piece.corner
    texture = bank.window(piece.texture, piece.level, top, left, *piece.size)[None]
    if piece.tatters is not None:
        texture = torch.cat((texture, _holes(piece, piece.tatters)), 1)
    gain, offset = (torch.from_numpy(values.astype(np.float32)) for values in (piece.gain, piece.offset(bank)))
    return Layer(
        texture,
        piece.texels,
        piece.origin,
        drawn.pose,
        outline=drawn.outline,
        softness=drawn.softness,
        bend=drawn.bend,
        tint=(gain, offset),
    )


def _holes(piece: Piece, where: tuple[int, int, int]) -> Tensor:
    """(1, 1, h, w) signed distance to the holes' edges, object px."""
    number, top, left = where
    rows, columns = (
        np.arange(start, start + count) % TATTER_SIZE for start, count in zip((top, left), piece.size, strict=True)
    )
    return torch.from_numpy(tatters()[number][rows[:, None], columns] / np.float32(piece.texels))[None, None]


def _expose(scene: Scene, t: float, moments: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """``paint``, averaged over t and the moments around it; the front layers are those at t itself."""
    colour, owner = scene.paint(t)
    for moment in moments:
        colour = colour + scene.paint(t + moment)[0]
    return colour / (1 + len(moments)), owner
