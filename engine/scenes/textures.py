"""Procedural textures that tile seamlessly, and a bank of them built once per process.

Each maker takes a random generator and a size and returns a (size, size, 3) float32 picture with values about 0..255;
``make_texture`` rounds it to uint8. Everything is determined by seeds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from torch import Tensor

Array = npt.NDArray[np.float32]
Rng = np.random.Generator


def noise(rng: Rng, size: int, slope: float, cutoff: float = 0.0) -> Array:
    """Periodic fractal noise, (size, size), mean 0, standard deviation 1; amplitude falls as 1/frequency^slope."""
    fy, fx = np.fft.fftfreq(size)[:, None] * size, np.fft.rfftfreq(size)[None] * size
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = np.inf
    amplitude = (frequency + cutoff) ** -slope
    spectrum = amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape, dtype=np.float32))
    field = np.fft.irfft2(spectrum, s=(size, size)).astype(np.float32)
    return np.asarray((field - field.mean()) / (field.std() + 1e-12), dtype=np.float32)


def _palette(rng: Rng, count: int) -> Array:
    """(count, 3) matching colours 0..255: lightness varies most, as in photographs; some palettes are vivid."""
    base = rng.uniform(40, 200) + rng.normal(0, 25, 3)
    lightness = rng.normal(0, rng.uniform(30, 75), (count, 1))
    chroma = rng.normal(0, rng.choice([12, 25, 60], p=[0.4, 0.35, 0.25]), (count, 3))
    return np.asarray(np.clip(base + lightness + chroma, 0, 255), dtype=np.float32)


def _halve(picture: Array) -> Array:
    """Averages 2 x 2 blocks: makers with hard edges draw at twice the size and are antialiased here."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 2
    return np.asarray(picture.reshape(height, 2, width, 2, -1).mean(axis=(1, 3)), dtype=np.float32)


def _fractal(rng: Rng, size: int) -> Array:
    slope = rng.uniform(0.8, 1.7)
    colour = noise(rng, size, slope)[..., None] * rng.normal(0, rng.choice([8, 18, 40]), 3) + rng.uniform(60, 190)
    colour += noise(rng, size, slope + rng.uniform(0, 0.5))[..., None] * rng.normal(0, 15, 3) + rng.normal(0, 25, 3)
    return np.asarray(colour + rng.uniform(25, 60) * noise(rng, size, slope)[..., None], dtype=np.float32)


def _posterised(rng: Rng, size: int) -> Array:
    levels = int(rng.integers(2, 9))
    field = noise(rng, 2 * size, rng.uniform(1.1, 2.0), cutoff=rng.uniform(0, 20))
    step = np.clip((field + 2) / 4 * levels, 0, levels - 1).astype(np.int64)
    return _halve(_palette(rng, levels)[step]) + rng.uniform(0, 10) * noise(rng, size, 1.0)[..., None]


def _stripes(rng: Rng, size: int) -> Array:
    """Stripes, checks or plaid; a whole number of waves along each axis keeps it periodic."""
    across = np.arange(2 * size, dtype=np.float32) / (2 * size)
    warp = noise(rng, 2 * size, 2.5) * rng.choice([0.0, 0.15, 0.6]) if rng.random() < 0.7 else 0.0
    colours = _palette(rng, 3)
    waves = rng.integers(4, size // 7, 2)
    tilt = rng.integers(-size // 10, size // 10 + 1, 2)
    one = np.sin(2 * np.pi * (waves[0] * across[None] + tilt[0] * across[:, None]) + warp)
    two = np.sin(2 * np.pi * (waves[1] * across[:, None] + tilt[1] * across[None]) + warp)
    if rng.random() < 0.6:  # hard edges, with a random duty cycle
        one, two = one > rng.uniform(-0.7, 0.7), two > rng.uniform(-0.7, 0.7)
    first, second = np.asarray(one, np.float32)[..., None], np.asarray(two, np.float32)[..., None]
    kind = rng.integers(3)
    if kind == 0:
        second = np.zeros_like(second)
    elif kind == 1:
        first, second = first * second + (1 - first) * (1 - second), np.zeros_like(second)
    return _halve(colours[0] + (colours[1] - colours[0]) * first + 0.6 * (colours[2] - colours[0]) * second)


def _neighbours(rng: Rng, size: int, cells: int) -> tuple[Array, Array, npt.NDArray[np.int64]]:
    """Distances (px) to the nearest and second nearest of cells^2 random points on a torus; number of the nearest."""
    pitch = size / cells
    points = rng.random((cells, cells, 2), dtype=np.float32)
    at = (np.arange(size, dtype=np.float32) + 0.5) / pitch
    cell = at.astype(np.int64)
    nearest = np.full((size, size), np.inf, np.float32)
    following = nearest.copy()
    number = np.zeros((size, size), np.int64)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            rows, columns = (cell + dy) % cells, (cell + dx) % cells
            point = points[rows[:, None], columns[None]]  # (size, size, 2)
            away_y = (cell + dy - at)[:, None] + point[..., 0]
            away_x = (cell + dx - at)[None] + point[..., 1]
            distance = away_x * away_x + away_y * away_y
            closer = distance < nearest
            following = np.minimum(following, np.where(closer, nearest, distance))
            nearest = np.where(closer, distance, nearest)
            number = np.where(closer, (rows * cells)[:, None] + columns[None], number)
    return np.sqrt(nearest) * np.float32(pitch), np.sqrt(following) * np.float32(pitch), number


def _cells(rng: Rng, size: int) -> Array:
    """Voronoi cells: paving, scales, cracked earth."""
    cells = int(np.exp(rng.uniform(np.log(7), np.log(size / 9))))
    nearest, following, number = _neighbours(rng, size, cells)
    colour = _palette(rng, cells * cells)[number]
    if rng.random() < 0.6:  # joints between the cells
        joint = np.clip(following - nearest - rng.uniform(0, 3), 0, 1)[..., None]
        colour = colour * joint + _palette(rng, 1)[0] * (1 - joint)
    shade = nearest / (size / cells) * rng.uniform(-70, 70) + rng.uniform(0, 14) * noise(rng, size, 1.0)
    return np.asarray(colour + shade[..., None], dtype=np.float32)


def _dots(rng: Rng, size: int) -> Array:
    """Round dots of varied size on a calm ground."""
    cells = int(np.exp(rng.uniform(np.log(10), np.log(size / 8))))
    nearest, _, number = _neighbours(rng, size, cells)
    radius = rng.uniform(0.1, 0.45, cells * cells).astype(np.float32)[number] * (size / cells)
    cover = np.clip((radius - nearest) / rng.uniform(1, 3) + 0.5, 0, 1)[..., None]
    ground = _palette(rng, 1)[0] + rng.uniform(2, 25) * noise(rng, size, 1.5)[..., None]
    return np.asarray(ground * (1 - cover) + _palette(rng, cells * cells)[number] * cover, dtype=np.float32)


def _calm(rng: Rng, size: int) -> Array:
    """Almost homogeneous: sky, walls, skin. The flow here must be inferred from the surroundings."""
    slow = noise(rng, size, 3.0)[..., None] * rng.normal(0, rng.uniform(5, 45), 3)
    return np.asarray(_palette(rng, 1)[0] + slow + rng.uniform(0, 4) * noise(rng, size, 0.8)[..., None], np.float32)


def _dead_leaves(rng: Rng, size: int) -> Array:
    """Overlapping opaque shapes, radii with density r^-3, which gives the statistics of natural images.

    The model: A. B. Lee, D. Mumford, J. Huang, "Occlusion models for natural images", IJCV 41, 2001.
    """
    canvas = _fractal(rng, size)
    grain = noise(rng, size, rng.uniform(0.9, 1.4))
    smallest, largest = rng.uniform(2.2, 5.0), size * rng.uniform(0.12, 0.3)
    mean_area = 2 * np.pi * np.log(largest / smallest) / (smallest**-2 - largest**-2)
    count = int(2.3 * size * size / mean_area)
    radii = (rng.random(count) * (smallest**-2 - largest**-2) + largest**-2) ** -0.5
    moods = int(rng.choice([6, 12, 40]))
    colours = _palette(rng, moods)[rng.integers(0, moods, count)] + rng.normal(0, 14, (count, 3))
    centres, turns = rng.random((count, 2)) * size, rng.random(count) * np.pi
    stretches = np.exp(rng.uniform(-0.7, 0.7, count))
    kinds = rng.choice(4, count, p=rng.dirichlet([4, 2, 1, 1]))
    slopes, grains = rng.normal(0, 22, count), np.abs(rng.normal(0, 20, count)) * (rng.random(count) < 0.8)
    for leaf in range(count):
        long, short = radii[leaf] * stretches[leaf], radii[leaf] / stretches[leaf]
        _drop_leaf(
            canvas,
            grain,
            centres[leaf],
            long,
            short,
            turns[leaf],
            kinds[leaf],
            colours[leaf],
            slopes[leaf],
            grains[leaf],
        )
    return canvas


def _drop_leaf(
    canvas: Array,
    grain: Array,
    centre: npt.NDArray[np.float64],
    long: float,
    short: float,
    turn: float,
    kind: int,
    colour: npt.NDArray[np.float64],
    slope: float,
    grain_amount: float,
) -> None:
    """Paints one ellipse (0), rectangle (1), triangle (2) or diamond (3) on the torus ``canvas``."""
    size = canvas.shape[0]
    reach = min(int(max(long, short) * (1.0 if kind in (0, 3) else 1.42)) + 2, size // 2 - 1)
    top, left = int(centre[0]) - reach, int(centre[1]) - reach
    y = np.arange(top, top + 2 * reach, dtype=np.float32)[:, None] - np.float32(centre[0])
    x = np.arange(left, left + 2 * reach, dtype=np.float32)[None] - np.float32(centre[1])
    cos, sin = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    u, v = (x * cos + y * sin) / np.float32(long), (y * cos - x * sin) / np.float32(short)
    if kind == 0:
        depth = 1 - np.sqrt(u * u + v * v)
    elif kind == 1:
        depth = 1 - np.maximum(np.abs(u), np.abs(v))
    elif kind == 2:
        depth = 1 - np.maximum(np.abs(u) * 1.5 + v * 0.5, -v) * 1.3
    else:
        depth = 1 - np.abs(u) - np.abs(v)
    cover = np.clip(depth * np.float32(min(long, short)) + 0.5, 0, 1)[..., None]
    inside = top >= 0 and left >= 0 and top + 2 * reach <= size and left + 2 * reach <= size
    where: tuple[object, object]
    if inside:
        where = (slice(top, top + 2 * reach), slice(left, left + 2 * reach))
    else:  # crosses the border and wraps around
        rows, columns = np.arange(top, top + 2 * reach) % size, np.arange(left, left + 2 * reach) % size
        where = (rows[:, None], columns[None])
    fill = colour.astype(np.float32) + (np.float32(slope) * u + np.float32(grain_amount) * grain[where])[..., None]  # type: ignore[index]
    canvas[where] += cover * (fill - canvas[where])  # type: ignore[index]


MAKERS: dict[str, Callable[[Rng, int], Array]] = {
    "dead_leaves": _dead_leaves,
    "fractal": _fractal,
    "posterised": _posterised,
    "stripes": _stripes,
    "cells": _cells,
    "dots": _dots,
    "calm": _calm,
}
_MIX = (  # repeated to fill a bank: a third dead leaves, the kind closest to photographs
    *("dead_leaves", "fractal", "cells", "dead_leaves", "posterised", "calm", "dead_leaves", "stripes"),
    *("fractal", "dead_leaves", "posterised", "dots", "dead_leaves", "calm", "fractal", "stripes"),
)


def make_texture(kind: str, seed: int, size: int) -> Tensor:
    """A seamless texture: (3, size, size) uint8. ``kind`` is a key of ``MAKERS``."""
    picture = MAKERS[kind](np.random.default_rng((seed, size, *kind.encode())), size)
    return torch.from_numpy(np.clip(picture, 0, 255).round().astype(np.uint8)).permute(2, 0, 1).contiguous()


LEVELS = 3  # of a texture's pyramid, each half the size of the one before


def kind_of(index: int) -> str:
    """The maker of a bank's texture, the same for any seed and size of the bank."""
    return _MIX[index % len(_MIX)]


class TextureBank:
    """Many textures at several resolutions, as uint8, each made on first use.

    48 textures of 512 px take 50 MB and about four seconds on one core.
    """

    def __init__(self, seed: int, count: int, size: int) -> None:
        self.seed, self.count, self.size = seed, count, size
        self._made: dict[int, tuple[Tensor, ...]] = {}
        self._grey: dict[int, float] = {}

    def levels(self, index: int) -> tuple[Tensor, ...]:
        """A texture: (3, size, size), (3, size/2, size/2), (3, size/4, size/4) uint8."""
        levels = self._made.get(index)
        if levels is None:
            texture = make_texture(kind_of(index), self.seed * 9973 + index, self.size)
            levels = self._made[index] = self._pyramid(texture)
        return levels

    def grey(self, index: int) -> float:
        """The mean of all values of a texture."""
        if index not in self._grey:
            self._grey[index] = float(self.levels(index)[0].double().mean())
        return self._grey[index]

    @staticmethod
    def _pyramid(texture: Tensor) -> tuple[Tensor, ...]:
        pyramid, level = [texture], texture.float()
        for _ in range(LEVELS - 1):
            level = functional.avg_pool2d(level, 2)
            pyramid.append(level.round().to(torch.uint8))
        return tuple(pyramid)

    def window(self, index: int, level: int, top: int, left: int, height: int, width: int) -> Tensor:
        """A part of one texture, wrapping around at its borders: (3, height, width) float32."""
        texture = self.levels(index)[level]
        size = texture.shape[1]
        top, left = top % size, left % size
        if top + height <= size and left + width <= size:
            return texture[:, top : top + height, left : left + width].float()
        rows, columns = torch.arange(top, top + height) % size, torch.arange(left, left + width) % size
        return texture.index_select(1, rows).index_select(2, columns).float()


@functools.cache
def texture_bank(seed: int, count: int, size: int) -> TextureBank:
    """The bank with these settings, one per process."""
    return TextureBank(seed, count, size)


TATTERS, TATTER_SIZE = 4, 384  # number of fields that cut holes, and their side in texels


@functools.cache
def tatters() -> Array:
    """Smooth periodic random fields, (TATTERS, TATTER_SIZE, TATTER_SIZE), divided by their RMS slope.

    So near zero, at the edges of holes, they approximate signed distances in texels.
    """
    fields = []
    for index in range(TATTERS):
        field = noise(np.random.default_rng((11, index)), TATTER_SIZE, 3.0, cutoff=5.0 * 2**index)
        down, right = np.gradient(field)
        fields.append((field + 0.4) / np.sqrt(np.mean(down**2 + right**2)))
    return np.asarray(fields, dtype=np.float32)
