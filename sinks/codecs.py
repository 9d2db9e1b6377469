"""From one flow field to one compressed chunk and back, and from chunks to one shard file.

    flow (2, H, W) float32 -> quantise -> (2, H, W) int16 | int32 [-> predict] -> compress -> checksum -> bytes
    the chunks of a shard, in order -> their index (offset, length) -> the index's checksum -> one file

The bytes are those of the Zarr v3 specification (codecs ``bytes``, ``blosc``, ``zstd``, ``transpose``, ``crc32c``,
``sharding_indexed``), so any Zarr reader opens them; those of ``pcodec`` and ``pcodec2d`` need a reader that has
the registered ``numcodecs.pcodec``, or that and ``numcodecs.delta``, as zarr-python does.

**2-D prediction** (``pcodec2d``). Flow is smooth along both axes, pcodec looks along one. So the differences to the
left neighbour are taken first, and turned, so that pcodec finds the differences between rows of those itself. The
rest is the error of guessing a pixel as left + above - above left: a quarter to a third smaller than pcodec alone.

**Invalid vectors.** A vector is known or it is not: when one component is NaN, beyond 1e9 (the ``.flo`` mark of
"unknown") or outside the integers' range, both components get the fill value and read back as NaN.

Nothing here keeps state between calls, and the compressors release the GIL: a pool may encode flows side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numcodecs.blosc
import numpy as np
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd

from flowreel.engine.config import Codec, SinkConfig
from flowreel.engine.data import UNKNOWN_ABOVE
from flowreel.engine.errors import DamagedStoreError, OutputError, UsageError
from flowreel.sinks import blosc
from flowreel.sinks.chunk_pieces import CHECKSUM_BYTES, Chunk, crc32c

if TYPE_CHECKING:
    import numpy.typing as npt

    Float32Array = npt.NDArray[np.float32]
    BoolArray = npt.NDArray[np.bool_]
    Array = npt.NDArray[Any]


# Blosc's own threads order their blocks by chance; one thread a call makes equal input give equal bytes.
numcodecs.blosc.use_threads = False

ZSTD_LEVEL = 3
PCODEC_LEVEL = 8  # 12 is slower and hardly smaller, 4 costs a sixth of the size
# Of integers: no search for common factors, which flow has not, and small pages, which fit themselves to a still
# background. 5 % faster, and up to 6 % smaller (10 % with prediction). Floats keep the search: KITTI's are multiples.
PCODEC_PAGE_VALUES = 1 << 16
# After prediction it is known which differences pcodec is to take, those to the value before: not searching for better
# ones saves a quarter of its time. Of the fields measured, one became 1 % larger, the others stayed or shrank.
PCODEC_PREDICTED = {"delta_spec": "try_consecutive", "delta_encoding_order": 1}

CACHE_LINE_BYTES = 64

BLOCK_VALUES = 1 << 17  # quantised at a time, so that the float32 scratch stays in a core's second-level cache
INDEX_MISSING = 2**64 - 1  # offset and length of a chunk that is not in the shard


def compress(values: Array, codec: Codec) -> bytes:
    """One chunk: the values, an array in C order, compressed, with their crc32c behind."""
    return b"".join(chunk_of(values, codec))


def chunk_of(values: Array, codec: Codec) -> Chunk:
    """The same in pieces."""
    if codec == "blosc":
        block = blosc.BLOCK_VALUES * values.itemsize
        encoder = numcodecs.blosc.Blosc("zstd", blosc.LEVEL, numcodecs.blosc.BITSHUFFLE, block)
        return _checked(encoder.encode(values))
    if codec == "zstd":
        return _checked(Zstd(ZSTD_LEVEL).encode(values))
    options = _pcodec_options(codec, values.dtype)
    if _predicts(codec, values.dtype):
        values = differences(values)
    return _checked(PCodec(**options).encode(values))


def decompress(chunk: bytes, codec: Codec, dtype: np.dtype[Any], shape: int | tuple[int, ...]) -> Array:
    """The values of a chunk, in their shape; flat when that is a count, which is not enough for ``pcodec2d``.

    Raises DamagedStoreError saying what is wrong with the chunk.
    """
    body = without_checksum(chunk)
    decoder = {"blosc": numcodecs.blosc.Blosc, "zstd": Zstd, "pcodec": PCodec, "pcodec2d": PCodec}[codec]()
    try:
        values = np.frombuffer(decoder.decode(body), dtype)
    except (RuntimeError, ValueError, TypeError, SystemError, MemoryError) as error:
        raise DamagedStoreError(f"does not decompress ({error})") from error
    if values.size != (count := math.prod(shape) if isinstance(shape, tuple) else shape):
        raise DamagedStoreError(f"holds {values.size} values instead of {count}")
    if _predicts(codec, dtype):
        if not isinstance(shape, tuple):
            raise TypeError(f"{codec} needs the shape of the values, got their number {shape}")
        return from_differences(values, shape)
    return values.reshape(shape)


def _predicts(codec: Codec, dtype: np.dtype[Any]) -> bool:
    """Never floats: their differences would not add up to the same bits again."""
    return codec == "pcodec2d" and dtype.kind != "f"


def _pcodec_options(codec: Codec, dtype: np.dtype[Any]) -> dict[str, Any]:
    if dtype.kind == "f":
        return {"level": PCODEC_LEVEL}
    options = {"level": PCODEC_LEVEL, "mode_spec": "classic", "equal_pages_up_to": PCODEC_PAGE_VALUES}
    return options | PCODEC_PREDICTED if _predicts(codec, dtype) else options


def differences(steps: Array) -> Array:
    """(..., H, W) integers -> (..., W, H), C order: each minus the one before it in its row.

    "Before" the first of a row is the last of the row above, as ``numcodecs.delta`` has it. What goes over the
    integers' range wraps around, here and back.
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
    steps = np.cumsum(rows, dtype=np.int32)  # NumPy sums int16 four times slower; both wrap around to the same end
    return steps.astype(change.dtype, copy=False).reshape(shape)


def _turned(planes: Array) -> Array:
    """(..., H, W) -> (..., W, H), C order, in strips of a cache line: whole lines are written, none twice."""
    *others, height, width = planes.shape
    turned: Array = np.empty((*others, width, height), planes.dtype)
    strip = CACHE_LINE_BYTES // planes.itemsize
    for top in range(0, height, strip):
        turned[..., top : top + strip] = planes[..., top : top + strip, :].swapaxes(-1, -2)
    return turned


def _checked(body: bytes) -> Chunk:
    return body, crc32c(body)


def without_checksum(data: bytes) -> bytes:
    """The bytes before the crc32c at the end. Raises DamagedStoreError when it does not fit them."""
    body, stored = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if len(data) < CHECKSUM_BYTES or crc32c(body) != stored:
        raise DamagedStoreError("checksum is wrong")
    return body


def zarr_codecs(codec: Codec, dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    """The same chain as ``compress``, in the words of Zarr's metadata."""
    checksum: dict[str, Any] = {"name": "crc32c"}
    if codec in ("pcodec", "pcodec2d"):
        pcodec: dict[str, Any] = {"name": "numcodecs.pcodec", "configuration": _pcodec_options(codec, dtype)}
        if not _predicts(codec, dtype):
            return [pcodec, checksum]
        delta: dict[str, Any] = {"name": "numcodecs.delta", "configuration": {"dtype": dtype.str}}
        return [delta, {"name": "transpose", "configuration": {"order": [0, 1, 3, 2]}}, pcodec, checksum]
    plain: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    if codec == "zstd":
        return [plain, {"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}}, checksum]
    settings: dict[str, Any] = {"typesize": dtype.itemsize, "cname": "zstd", "clevel": blosc.LEVEL}
    settings |= {"shuffle": "bitshuffle", "blocksize": blosc.BLOCK_VALUES * dtype.itemsize}
    return [plain, {"name": "blosc", "configuration": settings}, checksum]


def zarr_arguments(codec: Codec, dtype: np.dtype[Any]) -> dict[str, Any]:
    """The chain sorted into the three arguments by which zarr-python's ``create_array`` takes it."""
    chain = zarr_codecs(codec, dtype)
    serializer = next(place for place, step in enumerate(chain) if step["name"] in ("bytes", "numcodecs.pcodec"))
    return {"filters": chain[:serializer], "serializer": chain[serializer], "compressors": chain[serializer + 1 :]}


def codec_of(names: Sequence[str]) -> Codec:
    """Which codec a chain of Zarr codec names stands for. Raises DamagedStoreError for one flowreel does not write."""
    chains: dict[tuple[str, ...], Codec] = {
        ("bytes", "blosc", "crc32c"): "blosc",
        ("bytes", "zstd", "crc32c"): "zstd",
        ("numcodecs.pcodec", "crc32c"): "pcodec",
        ("numcodecs.delta", "transpose", "numcodecs.pcodec", "crc32c"): "pcodec2d",
    }
    if tuple(names) not in chains:
        raise DamagedStoreError(f"codecs {' + '.join(names)} are none that flowreel writes: open it with zarr-python")
    return chains[tuple(names)]


@dataclass(frozen=True)
class EncodedFlow:
    """One flow field as its chunk, and what could not be kept of it."""

    pieces: Chunk
    unknown: int = 0  # vectors that were NaN, infinite or beyond 1e9 px
    beyond_range: int = 0  # vectors that were known but do not fit the integers

    @property
    def chunk(self) -> bytes:
        """As one."""
        return b"".join(self.pieces)


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
    def flow_bytes(self) -> int:
        """Of one flow as it is stored, before compression."""
        return 2 * self.height * self.width * self.dtype.itemsize

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
            return EncodedFlow(chunk_of(np.ascontiguousarray(flow, self.dtype), self.codec))
        steps, unknown, beyond_range = self.quantise(flow)
        return EncodedFlow(chunk_of(steps, self.codec), unknown, beyond_range)

    @property
    def shuffles(self) -> bool:
        """Whether a device may shuffle the bits of its steps: ``encode_prepared`` wants that then."""
        return self.codec == "blosc" and not self.lossless

    def encode_prepared(self, steps: Array, threads: int = 1) -> list[Chunk]:
        """The chunks of flows that ``kernels.quantise`` has made steps of, where they were.

        Args:
            steps: (N, 2, H, W); where the codec ``shuffles``, what ``kernels.bitshuffle`` made of them in blocks of
                ``blosc.BLOCK_VALUES``: (N, bytes) uint8.
            threads: for a codec that has any of its own.
        """
        size = (2, self.height, self.width)
        shape, dtype = ((self.flow_bytes,), np.uint8) if self.shuffles else (size, self.dtype)
        if (steps.shape[1:], steps.dtype) != (shape, dtype):
            raise ValueError(f"this store's flows come as {dtype} {shape}, got {steps.dtype} {steps.shape[1:]}")
        if self.shuffles:
            return blosc.chunks_of_shuffled(steps, self.dtype.itemsize, threads)
        return [chunk_of(flow, self.codec) for flow in steps]

    def decode(self, chunk: bytes, out: Float32Array) -> None:
        """Writes the flow of ``chunk`` into out: (2, H, W) float32, NaN where there is no vector."""
        stored = decompress(chunk, self.codec, self.dtype, out.shape)
        if self.lossless:
            out[:] = stored
            return
        np.multiply(stored, np.float32(self.step), out=out, dtype=np.float32, casting="unsafe")
        if stored.min() == self.fill:  # the smallest integer there is
            out[stored == self.fill] = np.nan

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
        self.require_bound(max(float(scratch.max()), -float(scratch.min())))

    def require_bound(self, worst: float) -> None:
        """Raises OutputError if an error of so many pixels breaks the promise."""
        if not worst <= self.max_error:
            raise OutputError(f"a stored vector is off by {worst} px, more than the promised {self.max_error} px")


def _outside(vectors: Float32Array, limit: float) -> BoolArray:
    """Which vectors of (2, rows, W) have a component beyond ±limit, or one that is NaN: (rows, W)."""
    within: BoolArray = np.abs(vectors) <= limit
    outside: BoolArray = ~(within[0] & within[1])
    return outside


def flow_codec(height: int, width: int, config: SinkConfig, side: int | None = None) -> FlowCodec:
    """The codec for flows of this size: step and integer type follow from the error bound and the longer side.

    side: pixels of the frame's longer side, where what is stored is smaller than the frame.

    Raises:
        UsageError: the bound is so fine that not even 32 bits reach across the frame.
    """
    if config.max_error == 0:
        return FlowCodec(height, width, np.dtype("<f4"), 1.0, 0.0, config.codec)
    step = math.ldexp(1.0, math.frexp(2 * config.max_error)[1] - 1)  # largest power of two <= 2 x max_error
    side = side or max(height, width)
    if 32767 * step >= side:
        return FlowCodec(height, width, np.dtype("<i2"), step, config.max_error, config.codec)
    if (2**31 - 1) * step >= side:
        return FlowCodec(height, width, np.dtype("<i4"), step, config.max_error, config.codec)
    raise UsageError(f"max-error {config.max_error} px is too fine for {width}x{height} frames: use 0 (lossless)")


def pack_shard(chunks: Sequence[Chunk], length: int) -> list[bytes]:
    """The pieces of a shard file of ``length`` places: those of the chunks from place 0 on, then the index.

    Places behind the last chunk are marked missing; this is how the last shard of a clip is ragged.
    """
    index = np.full((length, 2), INDEX_MISSING, "<u8")
    sizes = np.array([sum(map(len, chunk)) for chunk in chunks], "<u8")
    index[: len(chunks), 0] = np.cumsum(sizes) - sizes
    index[: len(chunks), 1] = sizes
    return [*chain.from_iterable(chunks), *_checked(index.tobytes())]


def index_bytes(length: int) -> int:
    """Bytes at the end of a shard file that hold its index."""
    return 16 * length + CHECKSUM_BYTES


def unpack_index(data: bytes) -> Array:
    """(S, 2) uint64 (offset, length) of a shard's chunks. Raises DamagedStoreError when the checksum is wrong."""
    return np.frombuffer(without_checksum(data), "<u8").reshape(-1, 2)
