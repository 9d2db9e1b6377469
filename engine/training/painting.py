"""Paints many training pairs at once, on the device where the network is trained.

Slot by slot, back to front, a layer is painted for all views of a batch (``packing.py``) that have one. Pairs with more
layers come first, so these are always the first views. ``pairs.py`` and ``scenes/scene.py`` paint the same pictures one
by one, each layer only within its box: cheaper on a CPU, where the work costs more than launching it. The tests compare
the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from torch import Tensor

from flowreel.engine.device import send
from flowreel.engine.scenes.outlines import bar_distance, grating_distance, radial_distance
from flowreel.engine.scenes.scene import stays_visible, to_bytes
from flowreel.engine.scenes.textures import LEVELS, TATTER_SIZE, TextureBank, tatters, texture_bank
from flowreel.engine.training.development import develop
from flowreel.engine.training.drawing import Bank
from flowreel.engine.training.packing import BAR, GRATING, OF_LAYER, OF_VIEW, RADIAL, WAVES, Packed

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # first, second (B,3,H,W) uint8; flow (B,2,H,W) px; visible (B,H,W)

_UNDOING = 10  # iterations: for bends of ``drawing`` each leaves at most 0.3 of the error, ten less than 1e-3 px


class Painter:
    """Holds a bank of textures on a device and paints pictures from it there."""

    def __init__(self, device: torch.device, settings: Bank) -> None:
        self.device = device
        self._settings = settings
        bank = texture_bank(*settings)
        self._grey = torch.tensor([bank.grey(texture) for texture in range(bank.count)], device=device)
        self._sizes = torch.tensor([level.shape[-1] for level in bank.levels(0)], device=device)
        atlas, corners = _atlas(bank)
        self._atlas, self._corners = atlas.to(device), corners.to(device)
        fields = torch.from_numpy(tatters()).to(device)[:, None]
        self._tatters = functional.pad(fields, (0, 1, 0, 1), mode="circular")

    @torch.no_grad()
    def paint(self, parts: Sequence[Packed]) -> Batch:
        """Pictures and true flow of what ``pack`` packed, in the order of the pairs given to it.

        Raises ValueError for pairs that were drawn from another bank.
        """
        if any(packed.bank != self._settings for packed in parts):
            raise ValueError(f"this painter has the textures of bank {self._settings}, got {parts[0].bank}")
        painted = [self._part(packed) for packed in parts]
        first, second, flow, visible = (torch.cat(whole) for whole in zip(*painted, strict=True))
        return first, second, flow, visible

    def _part(self, packed: Packed) -> Batch:
        count = len(packed.counts)
        layers = send(torch.from_numpy(packed.layers), self.device)
        frames, owner = self._frames(packed, layers)
        flow, visible = _truth(packed, layers, owner[:count], owner[count:])
        pairs = torch.stack((frames[:count], frames[count:]), 1)
        pictures = to_bytes(develop(pairs, packed.developments))
        back = self._index(np.argsort(packed.places))
        return pictures[back, 0], pictures[back, 1], flow[back], visible[back]

    def _frames(self, packed: Packed, layers: Tensor) -> tuple[Tensor, Tensor]:
        """All first frames, then all second: colours (2 B, 3, H, W) float32, and the front layer's slot (2 B, H, W)."""
        colour, owner = self._views(packed, layers)
        main = self._index(packed.main)
        frames, counts = colour[main], np.bincount(packed.frame_of)
        others = np.setdiff1d(np.arange(len(packed.pair_of)), packed.main)
        if len(others):
            frames.index_add_(0, self._index(packed.frame_of[others]), colour[self._index(others)])
            frames /= self._index(counts)[:, None, None, None]
        return frames, owner[main]

    def _views(self, packed: Packed, layers: Tensor) -> tuple[Tensor, Tensor]:
        height, width, device = packed.height, packed.width, self.device
        colour = torch.zeros((len(packed.pair_of), 3, height, width), device=device)
        owner = torch.zeros((len(packed.pair_of), height, width), dtype=torch.uint8, device=device)
        views = send(torch.from_numpy(packed.views), device)
        pair_of = self._index(packed.pair_of)
        for slot in range(len(packed.layers)):
            count = int((packed.counts[packed.pair_of] > slot).sum())  # the views with this slot come first
            shown = packed.pair_of[:count]
            layer, view = layers[slot][pair_of[:count]], views[slot, :count]
            x, y = _object_points(view[:, OF_VIEW["inverse"]], height, width)
            if len(bent := np.flatnonzero(packed.bent[slot][shown])):
                self._bend(x, y, self._index(bent), layer, view)
            drawn = self._colours(x, y, layer)
            if slot == 0:
                colour[:] = drawn  # the background covers everything
                continue
            inside = self._inside(x, y, packed.kinds[slot][shown], packed.tattered[slot][shown], layer)
            cover = inside.mul_(_planes(view, OF_VIEW["sharpness"])[0]).add_(0.5).clamp_(0, 1)
            colour[:count].lerp_(drawn, cover[:, None])
            owner[:count].masked_fill_(cover >= 0.5, slot)
        return colour, owner

    def _index(self, places: npt.NDArray[np.int64]) -> Tensor:
        return send(torch.from_numpy(places), self.device)

    @staticmethod
    def _bend(x: Tensor, y: Tensor, bent: Tensor, layer: Tensor, view: Tensor) -> None:
        """Adds the bend to the points of the views ``bent``, in place."""
        at_x, at_y = x[bent], y[bent]
        shift_x, shift_y = _shift(at_x, at_y, layer[bent], view[bent][:, OF_VIEW["strength"]])
        x[bent] = at_x.add_(shift_x)
        y[bent] = at_y.add_(shift_y)

    def _colours(self, x: Tensor, y: Tensor, layer: Tensor) -> Tensor:
        """(M, 3, H, W) colours: the bank's textures, recoloured."""
        count, height, width = x.shape
        texture, level = (layer[:, OF_LAYER[name]][:, 0].long() for name in ("texture", "level"))
        size = self._sizes[level].float()[:, None, None]
        (texels,) = _planes(layer, OF_LAYER["texels"])
        grid = torch.empty((1, count * height, width, 2), device=x.device)
        starts = _planes(layer, OF_LAYER["corner"])
        for axis, (at, start) in enumerate(zip((x, y), starts, strict=True)):
            place = torch.remainder(at * texels + torch.remainder(start, size), size)
            place += self._corners[level, texture, axis][:, None, None]
            torch.add(place * (2 / (self._atlas.shape[-1 - axis] - 1)), -1, out=grid[0, ..., axis].view(x.shape))
        sampled = functional.grid_sample(self._atlas, grid, padding_mode="border", align_corners=True)
        gain = layer[:, OF_LAYER["gain"]].view(count, 3, 3)
        offset = layer[:, OF_LAYER["wanted"]] - gain.sum(2) * self._grey[texture][:, None]
        sampled = sampled.view(3, count, height * width).transpose(0, 1)
        return torch.baddbmm(offset[..., None], gain, sampled).clamp_(0, 255).view(count, 3, height, width)

    def _inside(
        self,
        x: Tensor,
        y: Tensor,
        kinds: npt.NDArray[np.uint8],
        tattered: npt.NDArray[np.bool_],
        layer: Tensor,
    ) -> Tensor:
        """(M, H, W) signed distance to the outlines and holes, object px."""
        inside = torch.empty_like(x)
        for kind, distance in _DISTANCES.items():
            places = np.flatnonzero(kinds == kind)
            if len(places):
                chosen = self._index(places)
                inside[chosen] = distance(x[chosen], y[chosen], layer[chosen])
        if tattered.any():
            chosen = self._index(np.flatnonzero(tattered))
            inside[chosen] = torch.minimum(inside[chosen], self._holes(x[chosen], y[chosen], layer[chosen]))
        return inside

    def _holes(self, x: Tensor, y: Tensor, layer: Tensor) -> Tensor:
        field, *starts = _planes(layer, OF_LAYER["tatters"])
        (texels,) = _planes(layer, OF_LAYER["texels"])
        grid = torch.stack(
            [
                torch.remainder(at * texels + start, TATTER_SIZE) * (2 / TATTER_SIZE) - 1
                for at, start in zip((x, y), starts, strict=True)
            ],
            -1,
        )
        fields = self._tatters[field.flatten().long()]
        return functional.grid_sample(fields, grid, padding_mode="border", align_corners=True)[:, 0] / texels


def _atlas(bank: TextureBank) -> tuple[Tensor, Tensor]:
    """All textures in one, (1, 3, rows, columns) float32, and the top-left texel (x, y) of each, (levels, textures, 2).

    It holds every level of every texture, each with its first row and column repeated at its end.
    """
    count = bank.count
    across = int(np.ceil(np.sqrt(count)))
    rows: list[Tensor] = []
    corners = torch.zeros((LEVELS, count, 2))
    top = 0
    for level in range(LEVELS):
        tiles = torch.stack([bank.levels(texture)[level] for texture in range(count)]).float()
        tiles = functional.pad(tiles, (0, 1, 0, 1), mode="circular")
        side = tiles.shape[-1]
        for first in range(0, count, across):
            row = tiles[first : first + across]
            rows.append(torch.cat(list(row), -1))
            corners[level, first : first + len(row), 0] = torch.arange(len(row)) * float(side)
            corners[level, first : first + len(row), 1] = top
            top += side
    width = max(row.shape[-1] for row in rows)
    return torch.cat([functional.pad(row, (0, width - row.shape[-1])) for row in rows], 1)[None], corners


def _planes(rows: Tensor, columns: slice) -> list[Tensor]:
    """Each of these columns of an (M, ...) table as (M, 1, 1), to broadcast over planes."""
    return [column[:, None, None] for column in rows[:, columns].unbind(1)]


def _object_points(back: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Object coordinates x, y (M, H, W) of all pixels. ``back``: (M, 9) inverse poses."""
    columns, rows = _pixels(height, width, back.device)
    m = _planes(back, slice(None))
    x, y, depth = (m[at] * columns + (m[at + 1] * rows + m[at + 2]) for at in (0, 3, 6))
    return x.div_(depth), y.div_(depth)


def _pixels(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns (1, 1, W) and rows (1, H, 1)."""
    columns, rows = (torch.arange(size, dtype=torch.float32, device=device) for size in (width, height))
    return columns.view(1, 1, -1), rows.view(1, -1, 1)


def _shift(x: Tensor, y: Tensor, layer: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """A bend's displacement at the points (M, H, W). ``strength``: (M, 2 * WAVES)."""
    wave, phase, pull = (
        _planes(layer, OF_LAYER["wave"]),
        _planes(layer, OF_LAYER["phase"]),
        _planes(strength, slice(None)),
    )
    shift_x, shift_y = torch.zeros_like(x), torch.zeros_like(y)
    for number in range(WAVES):
        swing = torch.addcmul(phase[number], x, wave[2 * number]).addcmul_(y, wave[2 * number + 1]).sin_()
        shift_x.addcmul_(swing, pull[2 * number])
        shift_y.addcmul_(swing, pull[2 * number + 1])
    return shift_x, shift_y


def _radial(x: Tensor, y: Tensor, layer: Tensor) -> Tensor:
    (hole,) = _planes(layer, OF_LAYER["hole"])
    return radial_distance(x, y, layer[:, OF_LAYER["edge"]], layer[:, OF_LAYER["lean"]], hole)


def _bar(x: Tensor, y: Tensor, layer: Tensor) -> Tensor:
    half_length, half_width, _ = _planes(layer, OF_LAYER["bar"])
    return bar_distance(x, y, half_length, half_width)


def _grating(x: Tensor, y: Tensor, layer: Tensor) -> Tensor:
    return grating_distance(x, y, *_planes(layer, OF_LAYER["bar"]))


_DISTANCES = {RADIAL: _radial, BAR: _bar, GRATING: _grating}


# --- the truth --------------------------------------------------------------------------------------------------------


def _truth(packed: Packed, layers: Tensor, owner0: Tensor, owner1: Tensor) -> tuple[Tensor, Tensor]:
    """``Scene.flow_between`` for times 0 and 1: flow (B, 2, H, W), and where its end point is visible (B, H, W).

    A pixel of the front layer moves to pose(q), q = p + e, where p is its object point and e what undoes the bend.
    """
    columns, rows = _pixels(packed.height, packed.width, owner0.device)
    owned = owner0.flatten(1).long()

    def of_owner(name: str, at: int) -> Tensor:
        """Element ``at`` of column ``name`` for the front layer of every pixel, (B, H, W)."""
        return layers[:, :, OF_LAYER[name]][..., at].T.gather(1, owned).view(owner0.shape)

    moved = [
        of_owner("across", row) * columns + of_owner("across", row + 1) * rows + of_owner("across", row + 2)
        for row in (0, 3, 6)
    ]
    if packed.bent.any():
        undone = _undone(packed, layers, owner0)
        for row, plane in zip((0, 3, 6), moved, strict=True):
            for axis in range(2):
                plane.addcmul_(of_owner("pose", row + axis), undone[axis])
    depth = moved[2] + 1
    flow = torch.stack([(moved[0] - columns * moved[2]) / depth, (moved[1] - rows * moved[2]) / depth], 1)
    return flow, stays_visible(flow, owner0, owner1)


def _undone(packed: Packed, layers: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Offset x, y from each pixel's object point to its unbent position at time 1, (B, H, W) each; 0 without a bend."""
    slots, pairs = np.nonzero(packed.bent)
    slot, pair = (send(torch.from_numpy(places), owner.device) for places in (slots, pairs))
    layer = layers[slot, pair]
    x, y = _object_points(layer[:, OF_LAYER["inverse"]], packed.height, packed.width)
    strength = layer[:, OF_LAYER["strength"]]
    shift_x, shift_y = torch.zeros_like(x), torch.zeros_like(y)
    for _ in range(_UNDOING):
        shift_x, shift_y = _shift(x - shift_x, y - shift_y, layer, strength)
    mine = owner[pair] == slot[:, None, None]
    undone = torch.zeros((2, *owner.shape), device=owner.device)
    for plane, shift in zip(undone, (shift_x, shift_y), strict=True):
        plane.index_add_(0, pair, shift.neg_().mul_(mine))  # at most one of the summands of a pixel is not 0
    return undone[0], undone[1]
