"""Moving scenes whose optical flow is known exactly.

A scene is a stack of layers, back to front. Each layer has *object coordinates* p, in which its texture and its
outline are fixed, and a pose that says where those coordinates lie in the frame at time t:

    frame pixel x  --inverse pose-->  q  --bend-->  p = q + amount(t) * d(q)  -->  texture(p), outline(p)

Rendering follows these arrows only forwards, so every pixel is evaluated exactly and without holes. Flow follows them
forwards at t0 and backwards at t1: x0 -> p -> x1, where the bend, a contraction, is inverted by fixed-point iteration.
The flow of a pixel is the motion of the front-most layer that covers at least half of it.

The content comes from elsewhere: ``training/drawing.py`` draws random scenes, ``named.py`` composes those of
``synthetic:NAME``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from torch import Tensor

from flowreel.engine.scenes.outlines import Outline

Matrix = npt.NDArray[np.float64]  # (3, 3), acts on column vectors (x, y, 1)
Pose = Callable[[float], Matrix]  # time -> object coordinates to frame pixels
Points = tuple[Tensor, Tensor]  # x and y, each (h, w) float32
Box = tuple[int, int, int, int]  # top, bottom, left, right of a part of the frame, bottom and right exclusive

NEAR = 1e-3  # px: a point that ends on the frame's border counts as inside, despite rounding


@dataclass(frozen=True, eq=False)
class Bend:
    """A smooth non-rigid displacement d(q) = sum_k a_k sin(w_k . q + phase_k), scaled by ``amount(t)``."""

    strength: Matrix  # (K, 2) a_k, object px
    wave: Matrix  # (K, 2) w_k, radians per object px
    phase: Matrix  # (K,) radians
    amount: Callable[[float], float]

    def __post_init__(self) -> None:
        steepest = float((np.hypot(*self.strength.T) * np.hypot(*self.wave.T)).sum())
        if steepest > 0.6:
            raise ValueError(f"a bend must stay a contraction: steepest slope {steepest:.2f}, at most 0.6")

    @property
    def reach(self) -> float:
        """Largest displacement at amount 1, object px."""
        return float(np.hypot(*self.strength.T).sum())

    def shift(self, x: Tensor, y: Tensor, amount: float) -> Points:
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        for (ax, ay), (wx, wy), phase in zip(self.strength, self.wave, self.phase, strict=True):
            swing = (x * float(wx)).add_(y, alpha=float(wy)).add_(float(phase)).sin_()
            dx.add_(swing, alpha=float(ax) * amount)
            dy.add_(swing, alpha=float(ay) * amount)
        return dx, dy

    def undo(self, x: Tensor, y: Tensor, amount: float) -> Points:
        """The q with q + amount * d(q) = (x, y), to 1e-3 px, by fixed-point iteration."""
        qx, qy = x, y
        for _ in range(24):
            dx, dy = self.shift(qx, qy, amount)
            nx, ny = x - dx, y - dy
            change = max(float((nx - qx).abs_().max()), float((ny - qy).abs_().max()))
            qx, qy = nx, ny
            if change < 1e-3:
                break
        return qx, qy


@dataclass(frozen=True, eq=False)
class Layer:
    """One textured surface. Object coordinates are in pixels of the frame when the pose has scale 1."""

    texture: Tensor  # (1, 3 or 4, h, w) float32, RGB 0..255; a fourth channel, a signed distance in px, cuts holes
    texels: float  # texels per object px
    origin: tuple[float, float]  # texel (x, y) that lies at object (0, 0)
    pose: Pose
    outline: Outline | None = None  # None: covers everything
    softness: float = 1.0  # width of the edge, frame px; 1: merely antialiased
    bend: Bend | None = None
    wraps: bool = False  # the texture is periodic, and its last row and column repeat the first;
    # else its border colours extend outwards
    tint: tuple[Tensor, Tensor] | None = None  # (3, 3) gain, (3,) offset applied to colours, then clipped to 0..255

    def box(self, t: float, height: int, width: int) -> Box | None:
        """The part of the frame that this layer can affect at time t; None: it is outside the frame."""
        if self.outline is None:
            return 0, height, 0, width
        margin = self.softness + 1 + (abs(self.bend.amount(t)) * self.bend.reach if self.bend else 0)
        half_width, half_height = (side + margin for side in self.outline.extent)
        corners = self.pose(t) @ [[-half_width, half_width] * 2, [-half_height] * 2 + [half_height] * 2, [1.0] * 4]
        x, y = corners[:2] / corners[2]
        top, bottom = max(math.floor(y.min()), 0), min(math.ceil(y.max()) + 1, height)
        left, right = max(math.floor(x.min()), 0), min(math.ceil(x.max()) + 1, width)
        return (top, bottom, left, right) if top < bottom and left < right else None

    def object_points(self, t: float, box: Box) -> Points:
        """Object coordinates x, y of the pixels of ``box`` at time t, each (h, w) float32."""
        x, y = _project(inverse(self.pose(t)), box)
        amount = self.bend.amount(t) if self.bend else 0.0
        if self.bend and amount:
            dx, dy = self.bend.shift(x, y, amount)
            x, y = x + dx, y + dy
        return x, y

    def draw(self, t: float, box: Box) -> tuple[Tensor, Tensor | None]:
        """Colour (3, h, w) float32 and cover (h, w) 0..1 of the pixels of ``box``; cover None: 1 everywhere."""
        x, y = self.object_points(t, box)
        sampled = self._sample(x, y)
        colour = sampled[:3]
        if self.tint is not None:
            gain, offset = self.tint
            colour = torch.addmm(offset[:, None], gain, colour.reshape(3, -1)).clamp_(0, 255).view(colour.shape)
        if self.outline is None:
            return colour, None
        inside = self.outline.distance(x, y)
        if len(sampled) > 3:
            inside = torch.minimum(inside, sampled[3])
        return colour, inside.mul_(sharpness(self.pose(t), self.softness)).add_(0.5).clamp_(0, 1)

    def _sample(self, x: Tensor, y: Tensor) -> Tensor:
        height, width = self.texture.shape[-2:]
        grid = x.new_empty((1, *x.shape, 2))
        for axis, (at, texels) in enumerate(((x, width), (y, height))):
            if self.wraps:  # the first row and column are repeated, so the period is one texel less
                at = torch.remainder(at * self.texels + self.origin[axis], texels - 1)
                torch.add(at * (2 / (texels - 1)), -1, out=grid[0, ..., axis])
            else:
                unit = 2 / (texels - 1)
                torch.add(at * (self.texels * unit), self.origin[axis] * unit - 1, out=grid[0, ..., axis])
        return functional.grid_sample(self.texture, grid, padding_mode="border", align_corners=True)[0]

    def motion(self, t0: float, t1: float, box: Box) -> Tensor:
        """Displacement from t0 to t1 of the surface at each pixel of ``box``: (2, h, w) float32 px."""
        top, bottom, left, right = box
        before, after = self.pose(t0), self.pose(t1)
        amounts = (self.bend.amount(t0), self.bend.amount(t1)) if self.bend else (0.0, 0.0)
        if self.bend is None or amounts == (0.0, 0.0):
            across = np.eye(3) if np.array_equal(before, after) else after @ inverse(before)
            if _is_affine(across):  # the displacement itself is affine: exact even far from the origin
                across = across / across[2, 2] - np.eye(3)
                across[2, 2] = 1
                return torch.stack(_project(across, box))
            x, y = _project(across, box)
        else:
            x, y = self.object_points(t0, box)
            x, y = self.bend.undo(x, y, amounts[1])
            x, y = _transform(after, x, y)
        x, y = x - torch.arange(left, right), y - torch.arange(top, bottom)[:, None]
        return torch.stack((x, y))


@dataclass(frozen=True, eq=False)
class Scene:
    """Layers from back to front; the first covers the whole frame."""

    height: int  # px
    width: int  # px
    layers: tuple[Layer, ...]

    def paint(self, t: float) -> tuple[Tensor, Tensor]:
        """RGB (3, H, W) float32 0..255 at time t (in frames), and the number of the front layer (H, W) uint8."""
        colour = torch.zeros((3, self.height, self.width), dtype=torch.float32)
        owner = torch.zeros((self.height, self.width), dtype=torch.uint8)
        for number, layer in enumerate(self.layers):
            box = layer.box(t, self.height, self.width)
            if box is None:
                continue
            drawn, cover = layer.draw(t, box)
            part = (slice(box[0], box[1]), slice(box[2], box[3]))
            if cover is None:
                colour[:, *part] = drawn
                owner[part] = number
            else:
                colour[:, *part].lerp_(drawn, cover)
                owner[part].masked_fill_(cover >= 0.5, number)
        return colour, owner

    def render(self, t: float) -> Tensor:
        """The frame at time t: (3, H, W) uint8 RGB."""
        return to_bytes(self.paint(t)[0])

    def flow(self, t0: float, t1: float) -> tuple[Tensor, Tensor]:
        """Exact flow from t0 to t1, (2, H, W) float32 px, and where its end point is visible at t1, (H, W) bool."""
        return self.flow_between(t0, self.paint(t0)[1], t1, self.paint(t1)[1])

    def flow_between(self, t0: float, owner0: Tensor, t1: float, owner1: Tensor) -> tuple[Tensor, Tensor]:
        """``flow`` for a caller that has painted both frames and so has their front layers."""
        flow = torch.zeros((2, self.height, self.width), dtype=torch.float32)
        for number, layer in enumerate(self.layers):
            box = layer.box(t0, self.height, self.width)
            if box is None:
                continue
            part = (slice(box[0], box[1]), slice(box[2], box[3]))
            mine = owner0[part] == number
            if number == 0:
                flow[:, *part] = layer.motion(t0, t1, box)
            elif mine.any():
                flow[:, *part] = torch.where(mine, layer.motion(t0, t1, box), flow[:, *part])
        return flow, stays_visible(flow, owner0, owner1)


def ends(flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where flow (..., 2, H, W) leads: x and y, (..., H, W) each, and whether that is a point of the frame."""
    height, width = flow.shape[-2:]
    x = flow[..., 0, :, :] + torch.arange(width, device=flow.device)
    y = flow[..., 1, :, :] + torch.arange(height, device=flow.device)[:, None]
    return x, y, (x >= -NEAR) & (x <= width - 1 + NEAR) & (y >= -NEAR) & (y <= height - 1 + NEAR)


def stays_visible(flow: Tensor, owner0: Tensor, owner1: Tensor) -> Tensor:
    """(..., H, W): where flow (..., 2, H, W) ends inside the frame, and not behind another layer.

    owner0, owner1: (..., H, W), numbers of the front layers in the two frames.
    """
    height, width = flow.shape[-2:]
    x, y, inside = ends(flow)
    place = y.round_().clamp_(0, height - 1).long().mul_(width).add_(x.round_().clamp_(0, width - 1).long())
    in_front = owner1.flatten(-2).gather(-1, place.flatten(-2)).view(owner0.shape)
    return inside & (in_front <= owner0)  # < at the layer's own edge, where rounding hits the pixel beside it


def similarity(x: float, y: float, angle: float = 0.0, scale: float = 1.0) -> Matrix:
    """Scales and rotates about the origin, then translates by (x, y)."""
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    return np.array([[cos, -sin, x], [sin, cos, y], [0.0, 0.0, 1.0]])


def inverse(matrix: Matrix) -> Matrix:
    """The inverse, (3, 3) float64: frame pixels to object coordinates, given a pose's matrix."""
    return np.asarray(np.linalg.inv(matrix), dtype=np.float64)


def sharpness(pose: Matrix, softness: float) -> float:
    """Slope of the cover across an outline, 1/object px, for an edge ``softness`` frame px wide."""
    return math.sqrt(abs(np.linalg.det(pose[:2, :2]))) / softness


def _is_affine(matrix: Matrix) -> bool:
    return bool(abs(matrix[2, 0]) + abs(matrix[2, 1]) < 1e-12 * abs(matrix[2, 2]))


def _project(matrix: Matrix, box: Box) -> Points:
    """The pixel coordinates of ``box`` mapped by a homography: x and y, each (h, w) float32."""
    top, bottom, left, right = box
    columns, rows = torch.arange(left, right, dtype=torch.float64), torch.arange(top, bottom, dtype=torch.float64)

    def row(a: float, b: float, c: float) -> Tensor:
        return (columns * a + c).float() + (rows * b).float()[:, None]  # float64 up to the sum

    x, y = row(*matrix[0].tolist()), row(*matrix[1].tolist())
    if _is_affine(matrix):
        scale = 1 / float(matrix[2, 2])
        return (x, y) if scale == 1 else (x * scale, y * scale)
    depth = row(*matrix[2].tolist())
    return x.div_(depth), y.div_(depth)


def _transform(matrix: Matrix, x: Tensor, y: Tensor) -> Points:
    """Points mapped by a homography."""
    m = matrix.tolist()
    out_x, out_y = (x * row[0] + row[2] + y * row[1] for row in m[:2])
    if _is_affine(matrix) and m[2][2] == 1:
        return out_x, out_y
    depth = x * m[2][0] + m[2][2] + y * m[2][1]
    return out_x.div_(depth), out_y.div_(depth)


def to_bytes(colour: Tensor) -> Tensor:
    """Rounds RGB 0..255 to uint8, clipping what lies outside."""
    return colour.add(0.5).clamp_(0, 255).to(torch.uint8)
