"""Outlines of layers as signed distances in object coordinates: star shapes, polygons, bars, gratings, random ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Radii = npt.NDArray[np.float64]  # (n,) radii in object px, or their angles in radians
Length = float | Tensor  # object px; for M outlines at once (M, 1, 1), with points (M, h, w)

ANGLES = 512  # samples of an outline's radius
AROUND: Radii = -np.pi + 2 * np.pi * np.arange(ANGLES) / ANGLES  # the angles they are taken at


class Outline(Protocol):
    """The area of a layer: a signed distance to its edge, and a bounding rectangle centred on the origin."""

    @property
    def extent(self) -> tuple[float, float]:
        """Half width, half height, object px."""
        ...

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Signed distance of the object points (x, y), in object px, positive inside."""
        ...


@dataclass(frozen=True, eq=False)
class RadialOutline:
    """A star-shaped outline; see ``radial_outline``."""

    edge: Tensor  # (n + 2,) float32, object px, radius at angles -pi + 2 pi k / n; the last two repeat the first
    lean: Tensor  # (n + 2,) float32, distance to the edge divided by the distance along the radius
    hole: float  # share of the radius cut out
    extent: tuple[float, float]

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return radial_distance(x, y, self.edge, self.lean, self.hole)


@dataclass(frozen=True, eq=False)
class BarOutline:
    """A straight bar along x."""

    half_length: float  # object px
    half_width: float  # object px

    @property
    def extent(self) -> tuple[float, float]:
        return self.half_length, self.half_width

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return bar_distance(x, y, self.half_length, self.half_width)


@dataclass(frozen=True, eq=False)
class GratingOutline:
    """Parallel bars within a circle; what is behind shows through the gaps."""

    radius: float  # of the circle, object px
    half_width: float  # of a bar, object px
    pitch: float  # from bar to bar, object px

    @property
    def extent(self) -> tuple[float, float]:
        return self.radius, self.radius

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return grating_distance(x, y, self.radius, self.half_width, self.pitch)


def radial_distance(x: Tensor, y: Tensor, edge: Tensor, lean: Tensor, hole: Length) -> Tensor:
    """The distance of ``RadialOutline``; for M outlines at once the tables are (M, n + 2)."""
    count = edge.shape[-1] - 2
    angle = torch.atan2(y, x).add_(math.pi).mul_(count / (2 * math.pi))
    place = angle.to(torch.int32 if edge.ndim == 1 else torch.int64).clamp_(0, count)

    def at(table: Tensor, places: Tensor) -> Tensor:
        return table[places] if table.ndim == 1 else table.gather(1, places.flatten(1)).view(places.shape)

    reach = torch.lerp(at(edge, place), at(edge, place + 1), angle.sub_(place))
    radius = torch.hypot(x, y)
    inside = reach - radius
    if isinstance(hole, Tensor):
        inside = torch.minimum(inside, torch.where(hole > 0, radius - hole * reach, torch.inf))
    elif hole > 0:
        inside = torch.minimum(inside, radius - hole * reach)
    return inside.mul_(at(lean, place))


def bar_distance(x: Tensor, y: Tensor, half_length: Length, half_width: Length) -> Tensor:
    """The distance of ``BarOutline``."""
    return torch.minimum(half_length - x.abs(), half_width - y.abs())


def grating_distance(x: Tensor, y: Tensor, radius: Length, half_width: Length, pitch: Length) -> Tensor:
    """The distance of ``GratingOutline``."""
    bars = half_width - torch.remainder(y, pitch).sub_(pitch / 2).abs_()
    return torch.minimum(bars, radius - torch.hypot(x, y))


def radial_outline(radii: npt.NDArray[np.floating], hole: float = 0.0) -> RadialOutline:
    """A star-shaped outline: ``radii`` (n,) at angles -pi + 2 pi k / n; ``hole``: share of the radius cut out."""
    count = len(radii)
    slope = (np.roll(radii, -1) - np.roll(radii, 1)) * count / (4 * np.pi)
    lean = 1 / np.sqrt(1 + (slope / radii) ** 2)  # where the edge is slanted, it is nearer than along the radius
    edges, leans = (torch.from_numpy(np.concatenate([v, v[:2]]).astype(np.float32)) for v in (radii, lean))
    angles = -np.pi + 2 * np.pi * np.arange(count) / count
    extent = (float(np.abs(radii * np.cos(angles)).max()) + 1, float(np.abs(radii * np.sin(angles)).max()) + 1)
    return RadialOutline(edges, leans, hole, extent)


def polygon(angles: Radii, corner_angles: Radii, corner_radii: Radii) -> Radii:
    """Radius, at each of ``angles``, of the polygon through the corners, which are sorted by their angle.

    All angles lie between -pi and pi. A corner below -pi also works, but leaves a radial step in the outline at pi.
    """
    after = np.searchsorted(corner_angles, angles) % len(corner_angles)
    before = (after - 1) % len(corner_angles)
    ax, ay = corner_radii[before] * np.cos(corner_angles[before]), corner_radii[before] * np.sin(corner_angles[before])
    bx, by = corner_radii[after] * np.cos(corner_angles[after]), corner_radii[after] * np.sin(corner_angles[after])
    ex, ey = bx - ax, by - ay
    crossing = (ax * ey - ay * ex) / (np.cos(angles) * ey - np.sin(angles) * ex)
    return np.asarray(np.clip(np.nan_to_num(crossing, nan=1.0), 1.0, corner_radii.max()), dtype=np.float64)


def random_outline(rng: np.random.Generator, radius: float) -> Outline:
    """A polygon, wobbly blob or ellipse, some with a hole, a bar or a grating; outer radius about ``radius`` px."""
    hole = float(rng.uniform(0.35, 0.8)) if rng.random() < 0.12 else 0.0
    kind = rng.choice(5, p=[0.34, 0.27, 0.17, 0.16, 0.06])
    if kind == 0:  # smooth and wobbly
        order = np.arange(2, 9)[:, None]
        strength = rng.normal(0, rng.uniform(0.1, 0.5), (7, 1)) / order
        wobble = (strength * np.cos(order * AROUND + rng.uniform(0, 6.3, (7, 1)))).sum(0)
        shape = np.exp(wobble) / np.sqrt(1 - rng.uniform(0, 0.85) * np.cos(AROUND) ** 2)
        return radial_outline(radius * shape / shape.max(), hole)
    if kind == 1:  # a polygon, convex or not: straight edges between corners
        corners = int(rng.integers(3, 10))
        at = np.sort((np.arange(corners) + rng.uniform(-0.35, 0.35, corners)) / corners * 2 * np.pi) - np.pi
        reach = radius * rng.uniform(rng.uniform(0.25, 1), 1, corners)
        return radial_outline(polygon(AROUND, at, reach), hole)
    if kind == 2:  # an ellipse
        flat = rng.uniform(0.2, 1)
        return radial_outline(radius * flat / np.hypot(flat * np.cos(AROUND), np.sin(AROUND)), hole)
    if kind == 3:  # a bar, often thin
        return BarOutline(radius, max(radius * math.exp(rng.uniform(math.log(0.03), math.log(0.6))), 1.0))
    pitch = max(radius * rng.uniform(0.12, 0.5), 6.0)
    return GratingOutline(radius, pitch * rng.uniform(0.1, 0.3), pitch)
