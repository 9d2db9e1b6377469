"""Packs the drawn pairs of a batch into two tables of numbers, which ``painting.py`` copies to a device.

One table holds the layers, the other the *views*: a view is a pair at one moment, at time 0 or 1 or while the shutter
is open around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flowreel.engine.scenes.outlines import ANGLES, BarOutline, GratingOutline, RadialOutline
from flowreel.engine.scenes.scene import Matrix, inverse, sharpness
from flowreel.engine.scenes.textures import TATTER_SIZE
from flowreel.engine.training.drawing import Bank, Development, DrawnLayer, DrawnPair

WAVES = 3  # most waves of a bend
PIXELS = 1 << 25  # most pixels painted at once, over all views; each takes about a hundred bytes


class Columns:
    """Named columns of a float32 table."""

    def __init__(self, **sizes: int) -> None:
        ends = np.cumsum(list(sizes.values())).tolist()
        self.count = ends[-1]
        self._slices = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}

    def fill(self, row: npt.NDArray[np.float32], **values: npt.ArrayLike) -> None:
        for name, value in values.items():
            row[self._slices[name]] = np.asarray(value, dtype=np.float32).ravel()

    def __getitem__(self, name: str) -> slice:
        return self._slices[name]


OF_LAYER = Columns(
    texture=1,
    level=1,
    texels=1,
    corner=2,  # texel x, y of the level at object (0, 0)
    gain=9,
    wanted=3,
    bar=3,  # half length or radius, half width, pitch
    edge=ANGLES + 2,
    lean=ANGLES + 2,
    hole=1,
    tatters=3,  # field, texel x and y at object (0, 0)
    wave=2 * WAVES,
    phase=WAVES,
    strength=2 * WAVES,  # at time 1
    inverse=9,  # of the pose at time 0
    pose=9,  # at time 1
    across=9,  # homography from the frame at time 0 to that at time 1, minus the identity
)
OF_VIEW = Columns(inverse=9, sharpness=1, strength=2 * WAVES)
PLAIN, RADIAL, BAR, GRATING = range(4)  # kinds of outline; PLAIN: none


@dataclass(frozen=True, eq=False)
class Packed:
    """B drawn pairs as numbers, sorted by descending layer count. Slot n is the n-th layer from the back."""

    height: int  # px
    width: int  # px
    bank: Bank
    layers: npt.NDArray[np.float32]  # (slots, B, OF_LAYER.count)
    views: npt.NDArray[np.float32]  # (slots, V, OF_VIEW.count)
    pair_of: npt.NDArray[np.int64]  # (V,) index of each view's pair
    frame_of: npt.NDArray[np.int64]  # (V,) index of the frame it belongs to: pair at time 0, B + pair at time 1
    main: npt.NDArray[np.int64]  # (2 B,) for each frame, index of the view at exactly its time
    kinds: npt.NDArray[np.uint8]  # (slots, B) kinds of outline; meaningless where a pair has no such layer
    tattered: npt.NDArray[np.bool_]  # (slots, B)
    bent: npt.NDArray[np.bool_]  # (slots, B)
    counts: npt.NDArray[np.int64]  # (B,) layers of each pair
    places: npt.NDArray[np.int64]  # (B,) index of each pair before sorting
    developments: tuple[Development | None, ...]


def pack(pairs: Sequence[DrawnPair]) -> list[Packed]:
    """Packs pairs of one size and bank, in as many parts as bound the memory of painting, if a single pair fits."""
    pixels = [2 * (1 + len(pair.moments)) * pair.height * pair.width for pair in pairs]
    ends = np.cumsum(pixels)
    parts = -(-int(ends[-1]) // PIXELS)  # of about equal size: a small part would need as many calls as a large one
    part_of = (ends - 1) * parts // ends[-1]
    return [
        _packed([pair for pair, its in zip(pairs, part_of, strict=True) if its == part]) for part in np.unique(part_of)
    ]


def _packed(pairs: Sequence[DrawnPair]) -> Packed:
    places = np.argsort([-len(pair.layers) for pair in pairs], kind="stable")
    pairs = [pairs[place] for place in places]
    count, slots = len(pairs), len(pairs[0].layers)
    views = [
        (number, number + time * count, time + moment)
        for number, pair in enumerate(pairs)
        for time in (0, 1)
        for moment in (0.0, *pair.moments)
    ]
    layers = np.zeros((slots, count, OF_LAYER.count), np.float32)
    seen = np.zeros((slots, len(views), OF_VIEW.count), np.float32)
    kinds = np.zeros((slots, count), np.uint8)
    tattered, bent = np.zeros((2, slots, count), np.bool_)
    for number, pair in enumerate(pairs):
        for slot, layer in enumerate(pair.layers):
            kinds[slot, number] = _fill_layer(layers[slot, number], layer)
            tattered[slot, number] = layer.piece.tatters is not None
            bent[slot, number] = layer.bend is not None
    for place, (number, _, time) in enumerate(views):
        for slot, layer in enumerate(pairs[number].layers):
            _fill_view(seen[slot, place], layer, time)
    frame_of = np.array([frame for _, frame, _ in views])
    return Packed(
        height=pairs[0].height,
        width=pairs[0].width,
        bank=pairs[0].bank,
        layers=layers,
        views=seen,
        pair_of=np.array([number for number, _, _ in views]),
        frame_of=frame_of,
        main=np.unique(frame_of, return_index=True)[1],
        kinds=kinds,
        tattered=tattered,
        bent=bent,
        counts=np.array([len(pair.layers) for pair in pairs]),
        places=places,
        developments=tuple(pair.development for pair in pairs),
    )


def _fill_layer(row: npt.NDArray[np.float32], layer: DrawnLayer) -> int:
    """Fills the row and returns the kind of outline."""
    piece, outline = layer.piece, layer.outline
    OF_LAYER.fill(
        row,
        texture=piece.texture,
        level=piece.level,
        texels=piece.texels,
        corner=np.add(piece.corner, piece.origin),
        gain=piece.gain,
        wanted=piece.wanted,
        inverse=inverse(layer.pose(0.0)),
        pose=layer.pose(1.0),
        across=layer.pose(1.0) @ inverse(layer.pose(0.0)) - np.eye(3),
    )
    if layer.bend is not None:
        bend, blank = layer.bend, WAVES - len(layer.bend.phase)
        OF_LAYER.fill(
            row,
            wave=np.pad(bend.wave, ((0, blank), (0, 0))),
            phase=np.pad(bend.phase, (0, blank)),
            strength=_strength(layer, 1.0),
        )
    if piece.tatters is not None:
        number, top, left = piece.tatters
        OF_LAYER.fill(row, tatters=(number, *(np.add((left, top), piece.origin) % TATTER_SIZE)))
    if isinstance(outline, RadialOutline):
        OF_LAYER.fill(row, edge=outline.edge, lean=outline.lean, hole=outline.hole)
        return RADIAL
    if isinstance(outline, BarOutline):
        OF_LAYER.fill(row, bar=(outline.half_length, outline.half_width, 0))
        return BAR
    if isinstance(outline, GratingOutline):
        OF_LAYER.fill(row, bar=(outline.radius, outline.half_width, outline.pitch))
        return GRATING
    return PLAIN


def _fill_view(row: npt.NDArray[np.float32], layer: DrawnLayer, t: float) -> None:
    back = inverse(layer.pose(t))
    OF_VIEW.fill(
        row, inverse=back / back[2, 2], sharpness=sharpness(layer.pose(t), layer.softness), strength=_strength(layer, t)
    )


def _strength(layer: DrawnLayer, t: float) -> Matrix:
    """(WAVES, 2) amplitudes of a layer's bend at time t, padded with zeros."""
    if layer.bend is None:
        return np.zeros((WAVES, 2))
    strength = layer.bend.strength * layer.bend.amount(t)
    return np.pad(strength, ((0, WAVES - len(strength)), (0, 0)))
