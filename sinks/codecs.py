"""From one flow field to one chunk of a store, and back.

    flow (2, H, W) float32 -> quantise -> (2, H, W) int16 | int32 -> compress, checksum (``compressors.py``) -> a chunk

**Invalid vectors.** A vector is valid or invalid as a whole: when one component is NaN, beyond 1e9 (the ``.flo`` mark
of "unknown") or outside the integers' range, both components get the fill value and read back as NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flowreel.engine.config import Codec, SinkConfig
from flowreel.engine.data import UNKNOWN_ABOVE
from flowreel.engine.errors import OutputError, UsageError
from flowreel.sinks import blosc
from flowreel.sinks.chunk_pieces import Chunk
from flowreel.sinks.compressors import chunk_of, decompress

if TYPE_CHECKING:
    from flowreel.engine.data import Array, BoolArray, Float32Array

BLOCK_VALUES = 1 << 17  # quantised at a time, so that the float32 scratch stays in a core's L2 cache


@dataclass(frozen=True)
class EncodedFlow:
    """One flow field as its chunk, and what could not be kept of it."""

    pieces: Chunk
    unknown: int = 0  # vectors that were NaN, infinite or beyond 1e9 px
    beyond_range: int = 0  # vectors that were known but do not fit the integers

    @property
    def chunk(self) -> bytes:
        """The pieces, joined."""
        return b"".join(self.pieces)


@dataclass(frozen=True)
class FlowCodec:
    """How every flow of one store is turned into a chunk. Fixed before the first flow."""

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
        """Bytes of one flow as stored, before compression."""
        return 2 * self.height * self.width * self.dtype.itemsize

    @property
    def fill(self) -> int | float:
        """The stored value that means "no vector here"."""
        return math.nan if self.lossless else int(np.iinfo(self.dtype).min)

    @property
    def limit(self) -> float:
        """Largest number of steps stored, a float32 value that avoids the fill value and unknown vectors."""
        largest = 32767.0 if self.dtype.itemsize == 2 else float(np.nextafter(np.float32(2**31), np.float32(0)))
        return min(largest, UNKNOWN_ABOVE / self.step)

    def encode(self, flow: Float32Array) -> EncodedFlow:
        """flow: (2, H, W) float32, any strides. Raises OutputError should the error bound ever be broken."""
        if flow.shape != (2, self.height, self.width):
            raise ValueError(f"this store's flows are (2, {self.height}, {self.width}), got {flow.shape}")
        if self.lossless:
            return EncodedFlow(chunk_of(np.ascontiguousarray(flow, self.dtype), self.codec))
        steps, unknown, beyond_range = self.quantise(flow)
        return EncodedFlow(chunk_of(steps, self.codec), unknown, beyond_range)

    @property
    def shuffles(self) -> bool:
        """Whether the bits of the steps can be shuffled on a device: ``encode_prepared`` then expects them so."""
        return self.codec == "blosc" and not self.lossless

    def encode_prepared(self, steps: Array, threads: int) -> list[Chunk]:
        """The chunks of flows that ``kernels.quantise`` has quantised on their device.

        Args:
            steps: (N, 2, H, W); if the codec ``shuffles``, the output of ``kernels.bitshuffle`` in blocks of
                ``blosc.BLOCK_VALUES``: (N, bytes) uint8.
            threads: for a codec that is itself multi-threaded.
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
        if stored.min() == self.fill:  # the fill value is the dtype's smallest integer
            out[stored == self.fill] = np.nan

    def quantise(self, flow: Float32Array) -> tuple[Array, int, int]:
        """The nearest steps of each vector; also how many vectors were unknown and how many beyond range.

        Works on blocks of rows, so that the passes below run in the cache. Scaling by a power of two is exact, and so
        is rounding a float32 to an integer: the error is at most half a step, which is checked for each block.
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
        """Decodes what was kept and compares it with the original; the subtraction of values so close is exact."""
        np.multiply(kept, np.float32(self.step), out=scratch, dtype=np.float32, casting="unsafe")
        np.subtract(scratch, part, out=scratch)
        if invalid is not None:
            scratch[:, invalid] = 0
        self.require_bound(max(float(scratch.max()), -float(scratch.min())))

    def require_bound(self, worst: float) -> None:
        """Raises OutputError if ``worst``, in pixels, exceeds ``max_error``."""
        if not worst <= self.max_error:
            raise OutputError(f"a stored vector is off by {worst} px, more than the promised {self.max_error} px")


def _outside(vectors: Float32Array, limit: float) -> BoolArray:
    """Which vectors of (2, rows, W) have a component beyond ±limit, or one that is NaN: (rows, W)."""
    within: BoolArray = np.abs(vectors) <= limit
    outside: BoolArray = ~(within[0] & within[1])
    return outside


def flow_codec(height: int, width: int, config: SinkConfig, side: int | None = None) -> FlowCodec:
    """The codec for flows of this size: step and integer type follow from the error bound and the longer side.

    side: pixels of the frame's longer side, where the stored field is smaller than the frame.

    Raises:
        UsageError: the bound is so fine that not even 32 bits span the frame.
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
