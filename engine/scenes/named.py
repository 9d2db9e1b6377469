"""The scenes behind ``synthetic:NAME``: composed by hand, endless, determined by their seed.

To add one, write a function from (height, width, seed) to layers and add its line to ``SCENES``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as functional
from torch import Tensor

from flowreel.engine.errors import UsageError
from flowreel.engine.scenes.outlines import ANGLES, AROUND, BarOutline, Outline, polygon, radial_outline
from flowreel.engine.scenes.scene import Bend, Layer, Matrix, Pose, Scene, similarity
from flowreel.engine.scenes.textures import make_texture

_remembered_texture = functools.lru_cache(16)(make_texture)  # named scenes are often opened twice in a row


def named_scene(name: str, height: int, width: int, seed: int = 0) -> Scene:
    """An endless scene, time in frames. The same arguments give the same scene.

    ``translate`` moves by exactly (3, 1) px a frame, ``rotate`` rotates and zooms about its centre, ``objects`` has
    many objects occluding each other, ``still`` does not move.

    Raises:
        UsageError: there is no scene of that name.
    """
    if name not in SCENES:
        raise UsageError(f"no scene is called {name!r}; there are {', '.join(sorted(SCENES))}")
    return Scene(height, width, SCENES[name](height, width, seed))


def _endless(kind: str, seed: int, size: int, texels: float) -> tuple[Tensor, float, tuple[float, float]]:
    """A periodic texture, its texels per object px, and its centre: the first fields of a ``Layer``."""
    texture = functional.pad(_remembered_texture(kind, seed, size)[None].float(), (0, 1, 0, 1), mode="circular")
    return texture, texels, (size / 2, size / 2)


def _tile_size(height: int, width: int) -> int:
    """In frames up to 1536 px only ``rotate`` shows a repeat; beyond, a larger tile would take too long to make."""
    return min(-(-max(height, width, 256) // 128) * 128, 1536)


def _ground(height: int, width: int, seed: int, pose: Pose, texels: float = 1.0) -> Layer:
    texture = _endless("dead_leaves", seed, _tile_size(height, width), texels)
    return Layer(*texture, functools.lru_cache(4)(pose), wraps=True)


def _translate(height: int, width: int, seed: int) -> tuple[Layer, ...]:
    # One texel per pixel and integer steps: every frame is exactly the previous one, shifted.
    return (_ground(height, width, seed, lambda t: similarity(3.0 * t, 1.0 * t)),)


def _still(height: int, width: int, seed: int) -> tuple[Layer, ...]:
    return (_ground(height, width, seed, lambda t: np.eye(3)),)


def _rotate(height: int, width: int, seed: int) -> tuple[Layer, ...]:
    def pose(t: float) -> Matrix:
        return similarity((width - 1) / 2, (height - 1) / 2, 0.02 * t, math.exp(0.2 * math.sin(t / 12)))

    return (_ground(height, width, seed, pose),)


@dataclass(frozen=True)
class _Actor:
    """One object of the scene ``objects``. Lengths as shares of the frame's shorter side, periods in frames."""

    texture: str
    outline: Callable[[float], Outline]  # radius in px -> outline
    radius: float
    reach: tuple[float, float]  # amplitude of its path around the centre, as shares of width and height
    period: tuple[float, float]  # of its horizontal and vertical swing
    phase: float  # radians
    turn: float = 0.0  # radians a frame
    pulse: float = 0.0  # amplitude of the logarithm of its size
    flutter: float = 0.0  # amplitude of its bend, as a share of the radius


def _wavy(lobes: int, depth: float) -> Callable[[float], Outline]:
    return lambda radius: radial_outline(radius * (1 - depth + depth * np.cos(lobes * AROUND)))


def _regular(corners: int, inner: float = 1.0) -> Callable[[float], Outline]:
    """A regular polygon; with ``inner`` < 1 a star, whose every second corner is at ``inner`` times the radius."""
    count = corners if inner == 1 else 2 * corners
    at = -np.pi + 2 * np.pi * (np.arange(count) + 0.5) / count
    shares = np.where(np.arange(count) % 2 == 0, 1.0, inner)
    return lambda radius: radial_outline(polygon(AROUND, at, radius * shares))


def _ring(hole: float) -> Callable[[float], Outline]:
    return lambda radius: radial_outline(np.full(ANGLES, radius), hole)


_CAST = (  # back to front; neighbours differ in texture, so that each stands out from the next
    _Actor("fractal", _wavy(3, 0.18), 0.42, (0.34, 0.20), (210, 170), 0.4, turn=0.008, flutter=0.07),
    _Actor("cells", _regular(6), 0.26, (0.40, 0.30), (150, 190), 2.2, turn=-0.012),
    _Actor("stripes", _ring(0.58), 0.27, (0.36, 0.28), (170, 120), 4.1, turn=0.02, pulse=0.12),
    _Actor("dots", _wavy(5, 0.10), 0.20, (0.44, 0.34), (130, 140), 5.3, turn=-0.02, flutter=0.10),
    _Actor("posterised", _regular(5, inner=0.45), 0.25, (0.38, 0.36), (160, 110), 1.2, turn=0.03),
    _Actor("cells", lambda radius: BarOutline(radius, 0.14 * radius), 0.38, (0.30, 0.25), (190, 150), 3.3, turn=-0.025),
    _Actor("dead_leaves", _regular(4), 0.17, (0.46, 0.40), (120, 95), 0.1, turn=0.015, pulse=0.2),
    _Actor("fractal", _ring(0.0), 0.12, (0.48, 0.42), (85, 75), 2.9, turn=0.05),
    _Actor("stripes", _regular(3), 0.13, (0.45, 0.40), (100, 130), 4.9, turn=-0.04),
)


def _objects(height: int, width: int, seed: int) -> tuple[Layer, ...]:
    short = min(height, width)

    def camera(t: float) -> Matrix:
        x, y = 0.28 * short * math.sin(t / 40), 0.2 * short * math.sin(t / 31 + 1)
        return similarity(width / 2 + x, height / 2 + y, 0.12 * math.sin(t / 53), math.exp(0.1 * math.sin(t / 45)))

    ground = _ground(height, width, seed + 100, camera, texels=0.8)
    cast = (_play(actor, height, width, seed * len(_CAST) + number) for number, actor in enumerate(_CAST))
    return (ground, *cast)


def _play(actor: _Actor, height: int, width: int, seed: int) -> Layer:
    """The layer of one actor, which swings, turns, pulses and flutters."""
    radius = actor.radius * min(height, width)
    (reach_x, reach_y), (period_x, period_y) = actor.reach, actor.period

    def pose(t: float) -> Matrix:
        x = width * (0.5 + reach_x * math.sin(2 * math.pi * t / period_x + actor.phase))
        y = height * (0.5 + reach_y * math.sin(2 * math.pi * t / period_y + 2 * actor.phase))
        swell = math.exp(actor.pulse * math.sin(t / 14 + actor.phase))
        return similarity(x, y, actor.turn * t + actor.phase, swell)

    bend = None
    if actor.flutter:
        wave = np.array([[1.0, 0.3], [-0.4, 1.0]]) * 2.2 / radius
        strength = np.array([[0.0, 1.0], [1.0, 0.0]]) * actor.flutter * radius
        bend = Bend(strength, wave, np.array([0.0, 1.0]), lambda t: math.sin(t / 9 + actor.phase))
    texture, texels, origin = _endless(actor.texture, seed, 256, 256 / max(256.0, 2 * radius))
    return Layer(
        texture,
        texels,
        origin,
        functools.lru_cache(4)(pose),
        actor.outline(radius),
        softness=1.2,
        bend=bend,
        wraps=True,
    )


SCENES: dict[str, Callable[[int, int, int], tuple[Layer, ...]]] = {
    "objects": _objects,
    "rotate": _rotate,
    "still": _still,
    "translate": _translate,
}
