"""From the network's own quarter-resolution flow, as a store keeps it, to flow of the frame.

The networks end in a prediction at a quarter of their input's size, which is upsampled and then cropped or resized to
the frame. A store that keeps the prediction itself is 16 times smaller before compression. This module does the
remaining steps in NumPy, equal to what the networks do within a few float32 roundings.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from flowreel.engine.data import Float32Array, Float64Array, NativeGrid


def enlarge(coarse: Float32Array, grid: NativeGrid, height: int, width: int) -> Float32Array:
    """Converts a stored prediction to the flow of the frame.

    Args:
        coarse: (2, h, w) float32, pixels of the source frame; NaN where there is no vector.
        grid: how it lies in the frame.
        height, width: of the frame's flow.

    Returns:
        (2, height, width) float32, pixels of the source frame; NaN where a vector it is computed from is missing.
    """
    network = (grid.height * grid.factor, grid.width * grid.factor)
    if grid.fit == "resize":
        whole = _resize(coarse, network, (0, 0), network, grid.upsampling)
        return _resize(whole, (height, width), (0, 0), (height, width), "bilinear")
    return _resize(coarse, network, (grid.top, grid.left), (height, width), grid.upsampling)


def vector_places(grid: NativeGrid, height: int, width: int) -> tuple[Float64Array, Float64Array]:
    """y (h,) and x (w,) of the prediction's vectors in the frame's pixels: the centre of the area each stands for."""

    def places(count: int, before: int, size: int) -> Float64Array:
        scale = size / (count * grid.factor) if grid.fit == "resize" else 1.0
        return np.asarray((np.arange(count) + 0.5) * grid.factor * scale - (before + 0.5), np.float64)

    return places(grid.height, grid.top, height), places(grid.width, grid.left, width)


def _resize(
    flow: Float32Array, size: tuple[int, int], corner: tuple[int, int], part: tuple[int, int], mode: str
) -> Float32Array:
    """``flow`` (2, h, w) resized to ``size``; only its ``part`` (rows, columns) from ``corner`` on is computed."""
    for axis in (0, 1):
        before, after, share = _places(flow.shape[axis + 1], size[axis], corner[axis], part[axis], mode)
        near = np.take(flow, before, axis + 1)
        if share is None:
            flow = near
            continue
        weight = share[:, None] if axis == 0 else share
        far = np.take(flow, after, axis + 1)
        far -= near
        far *= weight
        near += far
        flow = near
    return flow


@lru_cache(maxsize=16)
def _places(count: int, size: int, first: int, length: int, mode: str) -> tuple[Any, Any, Any]:
    """For ``length`` outputs from ``first`` on, along an axis resized from ``count`` to ``size``: the two neighbours of
    each, and the second's weight.

    Pixels are areas: centres lie at half-integers, and the border value is repeated beyond the outermost ones.
    """
    if mode == "nearest":
        return np.arange(first, first + length) * count // size, None, None
    half, step = np.float32(0.5), np.float32(count / size)  # in float32, as torch places its pixels
    place = np.clip((np.arange(first, first + length, dtype=np.float32) + half) * step - half, 0, count - 1)
    before = np.floor(place).astype(np.int64)
    return before, np.minimum(before + 1, count - 1), place - before.astype(np.float32)
