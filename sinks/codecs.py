"""From one flow field to one compressed chunk and back, and from chunks to one shard file.

    flow (2, H, W) float32 -> quantise -> (2, H, W) int16 | int32 -> compress -> checksum -> bytes
    the chunks of a shard, in order -> their index (offset, length) -> the index's checksum -> one file

The bytes are those of the Zarr v3 specification (codecs ``bytes``, ``blosc``, ``zstd``, ``crc32c``,
``sharding_indexed`` and the registered ``numcodecs.pcodec``), so any Zarr reader opens them.

**Invalid vectors.** A vector is known or it is not: when one component is NaN, beyond 1e9 (the ``.flo`` mark of
"unknown") or outside the integers' range, both components get the fill value and read back as NaN.

Nothing here keeps state between calls, and the compressors release the GIL: a pool may encode flows side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import google_crc32c
import numcodecs.blosc
import numpy as np
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd

from flowreel.engine.config import Codec, SinkConfig
from flowreel.engine.data import UNKNOWN_ABOVE
from flowreel.engine.errors import DamagedStoreError, OutputError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    Float32Array = npt.NDArray[np.float32]
    BoolArray = npt.NDArray[np.bool_]
    Array = npt.NDArray[Any]

# Blosc's own threads order their blocks by chance; one thread a call makes equal input give equal bytes.
numcodecs.blosc.use_threads = False

# Measured on FlowNet2 output at 1/64 px, GB/s of float32 per core: level 1 4.55x 0.98, 2 4.63x 0.97, 3 4.73x 0.55,
# 5 4.77x 0.20. Level 2 loses 3 % of size and is five times as fast as blosc's default.
BLOSC_LEVEL = 2
ZSTD_LEVEL = 3
PCODEC_LEVEL = 8  # 12 is slower and hardly smaller, 4 costs a sixth of the size

BLOCK_VALUES = 1 << 16  # quantised at a time, so that the float32 scratch stays in a core's second-level cache
CHECKSUM_BYTES = 4
INDEX_MISSING = 2**64 - 1  # offset and length of a chunk that is not in the shard


def compress(values: Array, codec: Codec) -> bytes:
    """One chunk's bytes: the values in C order, compressed, with their crc32c behind."""
    if codec == "blosc":
        blosc = numcodecs.blosc.Blosc("zstd", BLOSC_LEVEL, numcodecs.blosc.BITSHUFFLE)
        return with_checksum(blosc.encode(values))
    if codec == "zstd":
        return with_checksum(Zstd(ZSTD_LEVEL).encode(values))
    return with_checksum(PCodec(PCODEC_LEVEL).encode(values))


def decompress(chunk: bytes, codec: Codec, dtype: np.dtype[Any], count: int) -> Array:
    """The ``count`` values of a chunk, flat. Raises DamagedStoreError saying what is wrong with it."""
    body = without_checksum(chunk)
    decoder = {"blosc": numcodecs.blosc.Blosc, "zstd": Zstd, "pcodec": PCodec}[codec]()
    try:
        values = np.frombuffer(decoder.decode(body), dtype)
    except (RuntimeError, ValueError, TypeError) as error:
        raise DamagedStoreError(f"does not decompress ({error})") from error
    if values.size != count:
        raise DamagedStoreError(f"holds {values.size} values instead of {count}")
    return values


def with_checksum(body: bytes) -> bytes:
    return body + int(google_crc32c.value(body)).to_bytes(CHECKSUM_BYTES, "little")


def without_checksum(data: bytes) -> bytes:
    """The bytes before the crc32c at the end. Raises DamagedStoreError when it does not fit them."""
    body, stored = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if len(data) < CHECKSUM_BYTES or int(google_crc32c.value(body)).to_bytes(CHECKSUM_BYTES, "little") != stored:
        raise DamagedStoreError("checksum is wrong")
    return body


def zarr_codecs(codec: Codec, dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    """The same chain as ``compress``, in the words of Zarr's metadata."""
    checksum: dict[str, Any] = {"name": "crc32c"}
    if codec == "pcodec":
        return [{"name": "numcodecs.pcodec", "configuration": {"level": PCODEC_LEVEL}}, checksum]
    plain: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    if codec == "zstd":
        return [plain, {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}, checksum]
    blosc: dict[str, Any] = {"typesize": dtype.itemsize, "cname": "zstd", "clevel": BLOSC_LEVEL}
    blosc |= {"shuffle": "bitshuffle", "blocksize": 0}
    return [plain, {"name": "blosc", "configuration": blosc}, checksum]


def codec_of(names: Sequence[str]) -> Codec:
    """Which codec a chain of Zarr codec names stands for. Raises DamagedStoreError for one flowreel does not write."""
    chains: dict[tuple[str, ...], Codec] = {
        ("bytes", "blosc", "crc32c"): "blosc",
        ("bytes", "zstd", "crc32c"): "zstd",
        ("numcodecs.pcodec", "crc32c"): "pcodec",
    }
    if tuple(names) not in chains:
        raise DamagedStoreError(f"codecs {' + '.join(names)} are none that flowreel writes: open it with zarr-python")
    return chains[tuple(names)]


@dataclass(frozen=True)
class EncodedFlow:
    """One flow field as its chunk, and what could not be kept of it."""

    chunk: bytes
    unknown: int = 0  # vectors that were NaN, infinite or beyond 1e9 px
    beyond_range: int = 0  # vectors that were known but do not fit the integers


@dataclass(frozen=True)
class FlowCodec:
    """How every flow of one store is turned into a chunk. Fixed before the first one."""

    height: int  # pixels
    width: int  # pixels
    dtype: np.dtype[Any]  # int16 or int32; float32 when lossless
    step: float  # pixels of one integer step, a power of two; 1.0 when lossless
    max_error: float  # pixels; 0: lossless
    codec: Codec

    @property
    def lossless(self) -> bool:
        return self.dtype.kind == "f"

    @property
    def fill(self) -> int | float:
        """The stored value that means "no vector here"."""
        return math.nan if self.lossless else int(np.iinfo(self.dtype).min)

    @property
    def limit(self) -> float:
        """Largest integer step count that is stored, as a float32: neither the fill value nor an unknown vector."""
        largest = 32767.0 if self.dtype.itemsize == 2 else float(np.nextafter(np.float32(2**31), np.float32(0)))
        return min(largest, UNKNOWN_ABOVE / self.step)

    def encode(self, flow: Float32Array) -> EncodedFlow:
        """flow: (2, H, W) float32, any strides. Raises OutputError if the error bound were ever broken."""
        if flow.shape != (2, self.height, self.width):
            raise ValueError(f"this store's flows are (2, {self.height}, {self.width}), got {flow.shape}")
        if self.lossless:
            return EncodedFlow(compress(np.ascontiguousarray(flow, self.dtype), self.codec))
        steps, unknown, beyond_range = self.quantise(flow)
        return EncodedFlow(compress(steps, self.codec), unknown, beyond_range)

    def decode(self, chunk: bytes, out: Float32Array) -> None:
        """Writes the flow of ``chunk`` into out: (2, H, W) float32, NaN where there is no vector."""
        stored = decompress(chunk, self.codec, self.dtype, out.size).reshape(out.shape)
        if self.lossless:
            out[:] = stored
            return
        np.multiply(stored, np.float32(self.step), out=out, dtype=np.float32, casting="unsafe")
        invalid = stored == self.fill
        if invalid.any():
            out[invalid] = np.nan

    def quantise(self, flow: Float32Array) -> tuple[Array, int, int]:
        """The nearest steps of each vector; also how many vectors were unknown and how many beyond range.

        Goes row block by row block, so that the passes below run in the cache. Scaling by a power of two is exact,
        and so is rounding a float32 to an integer: the error is at most half a step, and each block proves it.
        """
        steps: Array = np.empty(flow.shape, self.dtype)
        rows = max(1, BLOCK_VALUES // (2 * self.width))
        scratch = np.empty((2, min(rows, self.height), self.width), np.float32)
        unknown = beyond_range = 0
        with np.errstate(all="ignore"):  # overflow and NaN are what the range check looks for
            for top in range(0, self.height, rows):
                part = flow[:, top : top + rows]
                scaled = scratch[:, : part.shape[1]]
                np.multiply(part, np.float32(1 / self.step), out=scaled)
                np.rint(scaled, out=scaled)
                invalid: BoolArray | None = None  # (rows, W)
                if not (scaled.min() >= -self.limit and scaled.max() <= self.limit):  # also when NaN
                    invalid = _outside(scaled, self.limit)
                    not_known = _outside(part, UNKNOWN_ABOVE)
                    unknown += int(not_known.sum())
                    beyond_range += int((invalid & ~not_known).sum())
                    scaled[:, invalid] = self.fill
                kept = steps[:, top : top + rows]
                np.copyto(kept, scaled, casting="unsafe")
                self._check_bound(part, kept, scaled, invalid)
        return steps, unknown, beyond_range

    def _check_bound(self, part: Float32Array, kept: Array, scratch: Float32Array, invalid: BoolArray | None) -> None:
        """Decodes what was kept and compares it with the original; the subtraction is exact this close to it."""
        np.multiply(kept, np.float32(self.step), out=scratch, dtype=np.float32, casting="unsafe")
        np.subtract(scratch, part, out=scratch)
        if invalid is not None:
            scratch[:, invalid] = 0
        worst = max(float(scratch.max()), -float(scratch.min()))
        if not worst <= self.max_error:
            raise OutputError(f"a stored vector is off by {worst} px, more than the promised {self.max_error} px")


def _outside(vectors: Float32Array, limit: float) -> BoolArray:
    """Which vectors of (2, rows, W) have a component beyond ±limit, or one that is NaN: (rows, W)."""
    within: BoolArray = np.abs(vectors) <= limit
    outside: BoolArray = ~(within[0] & within[1])
    return outside


def flow_codec(height: int, width: int, config: SinkConfig) -> FlowCodec:
    """The codec for flows of this size: step and integer type follow from the error bound and the longer side.

    Raises:
        UsageError: the bound is so fine that not even 32 bits reach across the frame.
    """
    if config.max_error == 0:
        return FlowCodec(height, width, np.dtype("<f4"), 1.0, 0.0, config.codec)
    step = math.ldexp(1.0, math.frexp(2 * config.max_error)[1] - 1)  # largest power of two <= 2 x max_error
    side = max(height, width)
    if 32767 * step >= side:
        return FlowCodec(height, width, np.dtype("<i2"), step, config.max_error, config.codec)
    if (2**31 - 1) * step >= side:
        return FlowCodec(height, width, np.dtype("<i4"), step, config.max_error, config.codec)
    raise UsageError(f"max-error {config.max_error} px is too fine for {width}x{height} frames: use 0 (lossless)")


def pack_shard(chunks: Sequence[bytes], length: int) -> list[bytes]:
    """The pieces of a shard file of ``length`` places: the chunks from place 0 on, then the index.

    Places behind the last chunk are marked missing; this is how the last shard of a clip is ragged.
    """
    index = np.full((length, 2), INDEX_MISSING, "<u8")
    sizes = np.array([len(chunk) for chunk in chunks], "<u8")
    index[: len(chunks), 0] = np.cumsum(sizes) - sizes
    index[: len(chunks), 1] = sizes
    return [*chunks, with_checksum(index.tobytes())]


def index_bytes(length: int) -> int:
    """Bytes at the end of a shard file that hold its index."""
    return 16 * length + CHECKSUM_BYTES


def unpack_index(data: bytes) -> Array:
    """(S, 2) uint64 (offset, length) of a shard's chunks. Raises DamagedStoreError when the checksum is wrong."""
    return np.frombuffer(without_checksum(data), "<u8").reshape(-1, 2)
