"""Training pairs: random scenes at two moments, with the flow between them.

``sample_pair`` draws camera, background, objects, their motions, light and noise from one seed; how much of each is
a matter of ``SceneConfig``. Textures come from a bank that is built on first use in a process.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from flowreel.engine.outlines import random_outline
from flowreel.engine.scenes import Bend, Layer, Matrix, Pose, Scene, inverse, similarity, to_bytes
from flowreel.engine.textures import Array, Rng, TextureBank, noise, texture_bank


@dataclass(frozen=True)
class SceneConfig:
    """What ``sample_pair`` draws from. Speeds hold for 256 x 192 px and grow with the frame's diagonal."""

    objects: tuple[int, int] = (0, 6)  # fewest and most moving layers before the background
    median_px: float = 5.0  # the middle of the pairs' speeds; 0.8 or so for a network of small motions
    spread: float = 0.9  # deviation of the logarithm of a pair's speed: plenty below 1 px, a tail past 40
    max_px: float = 48.0  # no layer's centre moves farther
    still: float = 0.10  # share of pairs whose background does not move at all
    follow: float = 0.60  # share of objects that share the camera's motion, beside their own
    bends: float = 0.25  # share of layers that also move non-rigidly
    photometric: float = 0.6  # strength of lighting changes, noise, blur, fog; 0: clean pictures
    motion_blur: float = 0.04  # share of pairs with an open shutter
    bank: tuple[int, int, int] = (0, 48, 512)  # seed, count, size of the texture bank


@dataclass(frozen=True, eq=False)
class ScenePair:
    """Two frames and the truth between them."""

    first: Tensor  # (3, H, W) uint8 RGB
    second: Tensor  # (3, H, W) uint8 RGB
    flow: Tensor  # (2, H, W) float32, px of first, x then y
    visible: Tensor  # (H, W) bool: the point is seen in second too


def sample_pair(seed: int, height: int, width: int, config: SceneConfig | None = None) -> ScenePair:
    """A random scene at times 0 and 1. The same seed, size and config give the same pair."""
    config = config or SceneConfig()
    rng = np.random.default_rng((seed, 1))
    scene, speed = _random_scene(rng, height, width, config)
    shutter = rng.uniform(0.15, 0.5) if rng.random() < config.motion_blur else 0.0
    (first, owner0), (second, owner1) = (_expose(scene, t, shutter, speed) for t in (0.0, 1.0))
    flow, visible = scene.flow_between(0.0, owner0, 1.0, owner1)
    if config.photometric > 0:
        first, second = _develop(rng, first, second, config.photometric)
    return ScenePair(to_bytes(first), to_bytes(second), flow, visible)


def _random_scene(rng: Rng, height: int, width: int, config: SceneConfig) -> tuple[Scene, float]:
    """The scene and the speed, px a frame, around which its layers' speeds were drawn."""
    zoom = math.hypot(height, width) / 320
    fastest = config.max_px * zoom
    speed = min(config.median_px * zoom * math.exp(config.spread * rng.normal()), fastest)
    camera_speed = 0.0 if rng.random() < config.still else min(speed * math.exp(0.5 * rng.normal()), fastest)
    camera = _camera(rng, height, width, camera_speed)
    layers = [_background(rng, height, width, config, camera, camera_speed)]
    for _ in range(int(rng.integers(config.objects[0], config.objects[1] + 1))):
        own = min(speed * math.exp(0.8 * rng.normal() - 0.1), fastest)
        layers.append(_object(rng, height, width, config, camera if rng.random() < config.follow else _stay, own))
    return Scene(height, width, tuple(layers)), speed


def _stay(t: float) -> Matrix:
    return np.eye(3)


def _spin(rng: Rng, speed: float, radius: float, most: float, share: float) -> float:
    """A rate (turn or zoom, 1/frame) that moves points at ``radius`` by about ``share * speed`` px."""
    return float(np.clip(rng.normal() * share * speed / radius, -most, most))


def _camera(rng: Rng, height: int, width: int, speed: float) -> Pose:
    """Pan, turn, zoom and a little perspective, growing from the identity at time 0."""
    direction, radius = rng.uniform(0, 2 * np.pi), 0.35 * math.hypot(height, width)
    pan = speed * rng.uniform(0.5, 1.1)
    dx, dy = pan * math.cos(direction), pan * math.sin(direction) * 0.8  # cameras pan more than they tilt
    turn, zoom = _spin(rng, speed, radius, 0.27, 0.6), _spin(rng, speed, radius, 0.15, 0.6)
    lean = np.clip(rng.normal(0, 0.25 * speed / radius**2, 2), -0.1 / radius, 0.1 / radius) * (rng.random() < 0.5)
    px, py = width * rng.uniform(0.25, 0.75), height * rng.uniform(0.25, 0.75)

    def pose(t: float) -> Matrix:
        if speed == 0:
            return np.eye(3)
        move = similarity(px + dx * t, py + dy * t, turn * t, math.exp(zoom * t))
        move[2, :2] = lean * t  # small: the frame stays well on this side of the horizon
        move[:2] += np.outer((px, py), move[2]) - np.outer((px, py), (0, 0, 1))
        return np.asarray(move @ similarity(-px, -py))

    return functools.lru_cache(4)(pose)


def _random_bend(rng: Rng, speed: float, size: float) -> Bend:
    """Two or three slow waves, wavelengths around ``size`` px, absent at time 0."""
    count = int(rng.integers(2, 4))
    length = size * np.exp(rng.uniform(-0.5, 0.9, count))
    heading, side = rng.uniform(0, 2 * np.pi, (2, count))
    if rng.random() < 0.4:  # all along one line: parallax of an uneven ground
        side[:] = side[0]
    wave = np.stack((np.cos(heading), np.sin(heading)), 1) * (2 * np.pi / length)[:, None]
    strongest = 0.3 / count * length / (2 * np.pi)
    strength = np.minimum(speed * rng.uniform(0.05, 0.5, count), strongest)
    return Bend(
        np.stack((np.cos(side), np.sin(side)), 1) * strength[:, None],
        wave,
        rng.uniform(0, 2 * np.pi, count),
        lambda t: t,
    )


def _recolour(rng: Rng, picture: Tensor) -> Tensor:
    """Turns the hue of (3, h, w), changes saturation and contrast, and moves the mean to where little is clipped."""
    hue, saturation = rng.uniform(-np.pi, np.pi) * (rng.random() < 0.6), rng.uniform(0.3, 1.3)
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = axis + saturation * (math.cos(hue) * (np.eye(3) - axis) + math.sin(hue) * cross)
    matrix = math.exp(rng.normal(-0.05, 0.3)) * turn
    mean = picture.mean(dim=(1, 2)).numpy().astype(np.float64)
    wanted = np.clip(rng.normal(118, 42), 30, 225) + rng.normal(0, 8, 3)
    # The mean's grey goes to ``wanted``; its hue turns with the rest.
    offset = wanted - matrix @ np.full(3, mean.mean())
    gain, shift = torch.from_numpy(matrix.astype(np.float32)), torch.from_numpy(offset.astype(np.float32))
    return torch.addmm(shift[:, None], gain, picture.reshape(3, -1)).clamp_(0, 255).view(picture.shape)


def _pick(rng: Rng, bank: TextureBank, ground: bool) -> int:
    """Number of a texture. A calm background tells little of its motion, so it is drawn less often."""
    index = int(rng.integers(len(bank.kinds)))
    return int(rng.integers(len(bank.kinds))) if ground and bank.kinds[index] == "calm" else index


def _cut_texture(
    rng: Rng, bank: TextureBank, box: tuple[float, float, float, float], ground: bool = False
) -> tuple[Tensor, float, tuple[float, float]]:
    """A recoloured piece of a random texture that covers ``box`` (left, top, right, bottom; object px).

    Gives the piece (1, 3, h, w), its texels per object px and the texel at object (0, 0).
    """
    texels = math.exp(rng.uniform(math.log(0.45), math.log(2.8)))
    level = min(max(math.ceil(math.log2(texels)), 0), 2)  # at most one texel a pixel, or it would glitter
    texels /= 2**level
    left, top = math.floor(box[0] * texels) - 1, math.floor(box[1] * texels) - 1
    width, height = math.ceil(box[2] * texels) + 2 - left, math.ceil(box[3] * texels) + 2 - top
    index, corner = _pick(rng, bank, ground), rng.integers(0, 1 << 16, 2)
    picture = bank.window(index, level, int(corner[0]), int(corner[1]), height, width)
    return _recolour(rng, picture)[None], texels, (-left, -top)


def _background(rng: Rng, height: int, width: int, config: SceneConfig, camera: Pose, speed: float) -> Layer:
    base = similarity(width / 2, height / 2, rng.uniform(0, 2 * np.pi))
    bend = _random_bend(rng, speed, 0.6 * width) if rng.random() < config.bends else None
    corners = np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]], dtype=np.float64)
    seen = np.concatenate([inverse(camera(t) @ base) @ corners for t in (0.0, 1.0)], axis=1)
    x, y = seen[:2] / seen[2]
    margin = 2 + (bend.reach if bend else 0)
    bounds = (x.min() - margin, y.min() - margin, x.max() + margin, y.max() + margin)
    texture, texels, origin = _cut_texture(rng, texture_bank(*config.bank), bounds, ground=True)
    return Layer(texture, texels, origin, functools.lru_cache(4)(lambda t: camera(t) @ base), bend=bend)


def _object(rng: Rng, height: int, width: int, config: SceneConfig, camera: Pose, speed: float) -> Layer:
    short = min(height, width)
    radius = float(np.clip(short * math.exp(rng.normal(math.log(0.17), 0.65)), 0.03 * short, 0.6 * short))
    x, y = width * rng.uniform(-0.1, 1.1), height * rng.uniform(-0.1, 1.1)
    heading, angle = rng.uniform(0, 2 * np.pi, 2)
    dx, dy = speed * math.cos(heading), speed * math.sin(heading)
    turn, zoom = _spin(rng, speed, radius, 0.33, 0.4), _spin(rng, speed, radius, 0.15, 0.3)
    bend = _random_bend(rng, speed, 2 * radius + 20) if rng.random() < config.bends else None
    outline = random_outline(rng, radius)
    wide, tall = outline.extent
    texture, texels, origin = _cut_texture(rng, texture_bank(*config.bank), (-wide, -tall, wide, tall))
    if rng.random() < 0.15 and radius > 12:
        texture = torch.cat((texture, _tatters(rng, texture.shape[-2:], texels)), 1)
    return Layer(
        texture,
        texels,
        origin,
        functools.lru_cache(4)(
            lambda t: camera(t) @ similarity(x + dx * t, y + dy * t, angle + turn * t, math.exp(zoom * t))
        ),
        outline=outline,
        softness=float(rng.choice([1.0, 1.5, 3.0], p=[0.7, 0.2, 0.1])),
        bend=bend,
    )


@functools.cache
def _tatter_fields() -> tuple[Array, ...]:
    """Smooth random fields, (384, 384) each, divided by their slope: near zero they are signed distances in texels."""
    fields = []
    for index in range(4):
        field = noise(np.random.default_rng((11, index)), 384, 3.0, cutoff=5.0 * 2**index)
        down, right = np.gradient(field)
        fields.append(np.asarray((field + 0.4) / np.sqrt(np.mean(down**2 + right**2)), dtype=np.float32))
    return tuple(fields)


def _tatters(rng: Rng, shape: torch.Size, texels: float) -> Tensor:
    """Foliage-like holes for a texture of this (h, w): (1, 1, h, w) signed distance in object px."""
    field = _tatter_fields()[int(rng.integers(4))]
    top, left = rng.integers(0, 384, 2)
    part = field[(top + np.arange(shape[0]))[:, None] % 384, (left + np.arange(shape[1]))[None] % 384]
    return torch.from_numpy(part / np.float32(texels))[None, None]


def _expose(scene: Scene, t: float, shutter: float, speed: float) -> tuple[Tensor, Tensor]:
    """``paint`` with the shutter open for ``shutter`` frames around t; the front layers are those at t itself.

    Takes about one picture for every two pixels that things at ``speed`` (px a frame) pass in that time.
    """
    colour, owner = scene.paint(t)
    if shutter == 0:
        return colour, owner
    steps = min(max(round(shutter * speed / 4), 1), 4)
    for moment in np.linspace(-shutter / 2, shutter / 2, 2 * steps):
        colour = colour + scene.paint(t + moment)[0]
    return colour / (2 * steps + 1), owner


def _develop(rng: Rng, first: Tensor, second: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """What light, lens and sensor do to the pair: mostly alike in both frames, a little different between them."""
    if rng.random() < 0.12:
        haze = _haze(rng, first.shape[-2:])
        grey = float(rng.uniform(0, 255)) if rng.random() < 0.6 else 0.0  # fog, or a shadow
        first, second = (picture.lerp_(torch.tensor(grey), haze) for picture in (first, second))
    if rng.random() < 0.2:
        side = rng.uniform(0.08, 0.3)
        first, second = (_blur(picture, side) for picture in (first, second))
    contrast = math.exp(strength * rng.normal(0, 0.15))
    gamma = math.exp(strength * rng.normal(0, 0.3)) if rng.random() < 0.3 else 1.0
    brightness = strength * (rng.normal(0, 12) + rng.normal(0, 4, 3))
    grain = strength * (float(rng.exponential(2.5)) if rng.random() < 0.8 else 0.0)
    developed = []
    for picture in (first, second):
        gain = contrast * np.exp(strength * (rng.normal(0, 0.02) + rng.normal(0, 0.008, 3)))
        offset = brightness + strength * rng.normal(0, 2) + 128 * (1 - gain)
        gain_t, offset_t = (torch.from_numpy(values.astype(np.float32))[:, None, None] for values in (gain, offset))
        picture = torch.addcmul(offset_t, picture, gain_t).clamp_(0, 255)
        if gamma != 1:
            picture = picture.mul_(1 / 255).pow_(gamma * math.exp(strength * rng.normal(0, 0.02))).mul_(255)
        if grain > 0:
            tile, size = _noise_tile(), picture.numel()
            start = int(rng.integers(0, max(len(tile) - size, 1)))
            if start + size > len(tile):
                tile = tile.repeat(size // len(tile) + 1)
            picture = picture.add_(tile[start : start + size].view_as(picture), alpha=grain)
        developed.append(picture)
    return developed[0], developed[1]


@functools.cache
def _noise_tile() -> Tensor:
    """Gaussian noise to cut windows from, (2^21,) float32: drawing it afresh would cost more than the scene."""
    return torch.randn(1 << 21, generator=torch.Generator().manual_seed(7))


def _haze(rng: Rng, shape: torch.Size) -> Tensor:
    """A slowly varying opacity (H, W), 0..0.7, fixed to the frame."""
    coarse = torch.from_numpy(rng.uniform(0, rng.uniform(0.2, 0.7), (1, 1, 3, 4)).astype(np.float32))
    return functional.interpolate(coarse, tuple(shape), mode="bilinear", align_corners=True)[0, 0]


def _blur(picture: Tensor, side: float) -> Tensor:
    """Blurs (3, H, W) by the weights (side, 1 - 2 side, side) along both axes, borders repeated."""
    for axis in (1, 2):
        size = picture.shape[axis]
        before = torch.cat((picture.narrow(axis, 0, 1), picture.narrow(axis, 0, size - 1)), axis)
        after = torch.cat((picture.narrow(axis, 1, size - 1), picture.narrow(axis, size - 1, 1)), axis)
        picture = before.add_(after).mul_(side).add_(picture, alpha=1 - 2 * side)
    return picture
