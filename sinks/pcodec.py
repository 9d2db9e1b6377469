"""pcodec, and pcodec after a prediction along rows: the smallest stores.

Readers need the registered ``numcodecs.pcodec``, for the second also ``numcodecs.delta``; zarr-python has both.

**2-D prediction** (``pcodec2d``). Flow is smooth along both axes, but pcodec predicts along one. So the differences
to the left neighbour are taken first, and transposed, so that pcodec itself takes the differences between their rows.
What remains is the error of predicting a pixel as left + above - above left: a quarter to a third smaller than pcodec
alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numcodecs.pcodec import PCodec

from flowreel.sinks.compressors import Compressor

if TYPE_CHECKING:
    from flowreel.engine.data import Array

LEVEL = 8  # 12 is slower and hardly smaller, 4 costs a sixth of the size
# For integers: no search for common factors, which flow does not have, and small pages, which adapt to a still
# background. 5 % faster, and up to 6 % smaller (10 % with prediction). Floats keep the search: KITTI's are multiples.
INTEGER_OPTIONS = {"mode_spec": "classic", "equal_pages_up_to": 1 << 16}
# After prediction it is known that pcodec should take differences to the value before: not searching for better ones
# saves a quarter of its time. Of the fields measured, one became 1 % larger, the others stayed or shrank.
PREDICTED_OPTIONS = {"delta_spec": "try_consecutive", "delta_encoding_order": 1}
CACHE_LINE_BYTES = 64


class Pcodec(Compressor):
    """See ``Compressor``."""

    def encode(self, values: Array) -> bytes:
        encoded: bytes = PCodec(**self._options(values.dtype)).encode(values)
        return encoded

    def decode(self, body: bytes, dtype: np.dtype[Any]) -> Array:
        return np.frombuffer(PCodec().decode(body), dtype)

    def in_zarr(self, dtype: np.dtype[Any]) -> list[dict[str, Any]]:
        return [{"name": "numcodecs.pcodec", "configuration": self._options(dtype)}]

    def _options(self, dtype: np.dtype[Any]) -> dict[str, Any]:
        return {"level": LEVEL} | ({} if dtype.kind == "f" else INTEGER_OPTIONS)


class Pcodec2d(Pcodec):
    """See ``Compressor``. Floats are never predicted: their differences would not add up to the same bits again."""

    def encode(self, values: Array) -> bytes:
        return super().encode(values if values.dtype.kind == "f" else differences(values))

    def arranged(self, decoded: Array, shape: int | tuple[int, ...]) -> Array:
        if decoded.dtype.kind == "f":
            return super().arranged(decoded, shape)
        if not isinstance(shape, tuple):
            raise TypeError(f"pcodec2d needs the shape of the values, got their number {shape}")
        return from_differences(decoded, shape)

    def in_zarr(self, dtype: np.dtype[Any]) -> list[dict[str, Any]]:
        if dtype.kind == "f":
            return super().in_zarr(dtype)
        delta: dict[str, Any] = {"name": "numcodecs.delta", "configuration": {"dtype": dtype.str}}
        return [delta, {"name": "transpose", "configuration": {"order": [0, 1, 3, 2]}}, *super().in_zarr(dtype)]

    def _options(self, dtype: np.dtype[Any]) -> dict[str, Any]:
        return super()._options(dtype) | ({} if dtype.kind == "f" else PREDICTED_OPTIONS)


def differences(steps: Array) -> Array:
    """(..., H, W) integers -> (..., W, H), C order: each minus the one before it in its row.

    The value before the first of a row is the last of the row above, as in ``numcodecs.delta``. Integer overflow
    wraps around, both here and on the way back.
    """
    flat = steps.reshape(-1)
    change = np.empty_like(flat)
    change[:1] = flat[:1]
    np.subtract(flat[1:], flat[:-1], out=change[1:])
    return _turned(change.reshape(steps.shape))


def from_differences(change: Array, shape: tuple[int, ...]) -> Array:
    """Undoes ``differences``: its values, flat or not, to the steps in their shape (..., H, W)."""
    *planes, height, width = shape
    rows = _turned(change.reshape(*planes, width, height))
    steps = np.cumsum(rows, dtype=np.int32)  # NumPy sums int16 four times slower; both wrap around to the same result
    return steps.astype(change.dtype, copy=False).reshape(shape)


def _turned(planes: Array) -> Array:
    """(..., H, W) -> (..., W, H), C order, in strips one cache line wide: each line is written whole and once."""
    *others, height, width = planes.shape
    turned: Array = np.empty((*others, width, height), planes.dtype)
    strip = CACHE_LINE_BYTES // planes.itemsize
    for top in range(0, height, strip):
        turned[..., top : top + strip] = planes[..., top : top + strip, :].swapaxes(-1, -2)
    return turned
