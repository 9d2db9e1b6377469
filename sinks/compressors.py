"""From the values of one chunk to its bytes and back: the codecs of a store. One codec = one class in this folder and
one line in ``COMPRESSORS``.

    values, an array in C order -> compress -> checksum -> a chunk

The bytes are those of the Zarr v3 specification, so any Zarr reader opens them that knows the codec. No state is
kept between calls, and compressing releases the GIL, so a pool may compress several chunks in parallel.
"""

from __future__ import annotations

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from flowreel.engine.config import Codec
from flowreel.engine.errors import DamagedStoreError
from flowreel.sinks.chunk_pieces import Chunk, crc32c, without_checksum

if TYPE_CHECKING:
    from flowreel.engine.data import Array


class Compressor(ABC):
    """One codec: what ``--codec`` chooses between."""

    @abstractmethod
    def encode(self, values: Array) -> bytes:
        """The values, an array in C order, compressed."""

    @abstractmethod
    def decode(self, body: bytes, dtype: np.dtype[Any]) -> Array:
        """The values that were compressed, flat.

        For a damaged body it may raise RuntimeError, ValueError, TypeError, SystemError or MemoryError.
        """

    def arranged(self, decoded: Array, shape: int | tuple[int, ...]) -> Array:
        """The values that ``decode`` returned, in their shape; flat if that is a count."""
        return decoded.reshape(shape)

    @abstractmethod
    def in_zarr(self, dtype: np.dtype[Any]) -> list[dict[str, Any]]:
        """The codec as Zarr's metadata: the steps applied to values of this type, in order."""


# By the names that users give: (module, class).
COMPRESSORS: dict[Codec, tuple[str, str]] = {
    "blosc": ("flowreel.sinks.blosc", "Blosc"),
    "zstd": ("flowreel.sinks.zstd", "Zstd"),
    "pcodec": ("flowreel.sinks.pcodec", "Pcodec"),
    "pcodec2d": ("flowreel.sinks.pcodec", "Pcodec2d"),
}
BYTES: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
CHECKSUM: dict[str, Any] = {"name": "crc32c"}
_SERIALIZERS = ("bytes", "numcodecs.pcodec")  # Zarr codecs that turn an array into bytes


@cache
def _compressor(codec: Codec) -> Compressor:
    module, name = COMPRESSORS[codec]
    compressor: Compressor = getattr(import_module(module), name)()
    return compressor


def compress(values: Array, codec: Codec) -> bytes:
    """One chunk: the values, an array in C order, compressed, followed by the crc32c of the compressed bytes."""
    return b"".join(chunk_of(values, codec))


def chunk_of(values: Array, codec: Codec) -> Chunk:
    """The same in pieces."""
    body = _compressor(codec).encode(values)
    return body, crc32c(body)


def decompress(chunk: bytes, codec: Codec, dtype: np.dtype[Any], shape: int | tuple[int, ...]) -> Array:
    """The values of a chunk, in their shape; flat when that is a count, which is not enough for ``pcodec2d``.

    Raises DamagedStoreError saying what is wrong with the chunk.
    """
    body, compressor = without_checksum(chunk), _compressor(codec)
    try:
        values = compressor.decode(body, dtype)
    except (RuntimeError, ValueError, TypeError, SystemError, MemoryError) as error:
        raise DamagedStoreError(f"does not decompress ({error})") from error
    if values.size != (count := math.prod(shape) if isinstance(shape, tuple) else shape):
        raise DamagedStoreError(f"holds {values.size} values instead of {count}")
    return compressor.arranged(values, shape)


def zarr_codecs(codec: Codec, dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    """The steps of ``compress`` as Zarr's metadata."""
    return [*_compressor(codec).in_zarr(dtype), CHECKSUM]


def zarr_arguments(codec: Codec, dtype: np.dtype[Any]) -> dict[str, Any]:
    """The same steps, split into the three arguments that zarr-python's ``create_array`` takes."""
    chain = zarr_codecs(codec, dtype)
    serializer = next(place for place, step in enumerate(chain) if step["name"] in _SERIALIZERS)
    return {"filters": chain[:serializer], "serializer": chain[serializer], "compressors": chain[serializer + 1 :]}


def codec_of(names: Sequence[str], dtype: np.dtype[Any], recorded: object = None) -> Codec:
    """Which codec a chain of Zarr codec names stands for, for values of this type.

    recorded: decides where several codecs have the same chain, as ``pcodec`` and ``pcodec2d`` have for floats.

    Raises ValueError for a chain that flowreel does not write.
    """
    fitting = [codec for codec in COMPRESSORS if [*names] == [step["name"] for step in zarr_codecs(codec, dtype)]]
    if not fitting:
        raise ValueError(f"codecs {reprlib.repr(' + '.join(names))} are not flowreel's: open it with zarr-python")
    return next((codec for codec in fitting if codec == recorded), fitting[0])
