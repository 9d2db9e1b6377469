"""Zstandard alone: larger than Blosc, and the plainest codec there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numcodecs.zstd
import numpy as np

from flowreel.sinks.compressors import BYTES, Compressor

if TYPE_CHECKING:
    from flowreel.engine.data import Array

LEVEL = 3


class Zstd(Compressor):
    """See ``Compressor``."""

    def encode(self, values: Array) -> bytes:
        encoded: bytes = numcodecs.zstd.Zstd(LEVEL).encode(values)
        return encoded

    def decode(self, body: bytes, dtype: np.dtype[Any]) -> Array:
        return np.frombuffer(numcodecs.zstd.Zstd().decode(body), dtype)

    def in_zarr(self, _: np.dtype[Any]) -> list[dict[str, Any]]:
        return [BYTES, {"name": "zstd", "configuration": {"level": LEVEL, "checksum": False}}]
