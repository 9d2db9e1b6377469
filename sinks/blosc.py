"""Blosc, the default codec: Zstandard on shuffled bits, by C-Blosc or on bits that a GPU has already shuffled.

In the second case only Zstandard is left for the host. It compresses all blocks of a batch in one call, by threads of
its own that never take the GIL, so that the Python code of a fast run goes on meanwhile. The chunks have the format of
C-Blosc 1, which every reader of ``blosc`` in Zarr accepts; as ``chunks_of_shuffled`` writes it:

    16 bytes: versions, flags, bytes of a value, bytes of all values, of a block, of the chunk
    where in the chunk each block begins, 4 bytes each
    each block: its length, in 4 bytes; then a Zstandard frame, or the raw block where the frame is no shorter
"""

from __future__ import annotations

import struct
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numcodecs.blosc
import numpy as np
import zstandard

from flowreel.sinks.chunk_pieces import Chunk, Piece, crc32c
from flowreel.sinks.compressors import BYTES, Compressor

if TYPE_CHECKING:
    import numpy.typing as npt

    from flowreel.engine.data import Array

# C-Blosc's own threads write their blocks in any order; with one thread per call equal input gives equal bytes.
numcodecs.blosc.use_threads = False

# Measured on FlowNet2 output at 1/64 px: with Blosc's default block size, levels 1, 2, 3, 5 make it 4.55, 4.63, 4.73,
# 4.77 times smaller, the last at a fifth of the speed. With blocks of half a million values level 1 reaches 4.98 at its
# full speed; higher levels and larger blocks add next to nothing to that.
LEVEL = 1  # of Blosc, which is also level 1 of Zstandard
BLOCK_VALUES = 1 << 19

_VERSIONS = 2, 1  # of the format, and of how Zstandard frames are stored in it
_FLAGS = 4 << 5 | 1 << 4 | 1 << 2  # Zstandard; one frame per block, not one per byte of a value; bit shuffle


class Blosc(Compressor):
    """See ``Compressor``."""

    def encode(self, values: Array) -> bytes:
        block = BLOCK_VALUES * values.itemsize
        encoded: bytes = numcodecs.blosc.Blosc("zstd", LEVEL, numcodecs.blosc.BITSHUFFLE, block).encode(values)
        return encoded

    def decode(self, body: bytes, dtype: np.dtype[Any]) -> Array:
        return np.frombuffer(numcodecs.blosc.Blosc().decode(body), dtype)

    def in_zarr(self, dtype: np.dtype[Any]) -> list[dict[str, Any]]:
        settings: dict[str, Any] = {"typesize": dtype.itemsize, "cname": "zstd", "clevel": LEVEL}
        settings |= {"shuffle": "bitshuffle", "blocksize": BLOCK_VALUES * dtype.itemsize}
        return [BYTES, {"name": "blosc", "configuration": settings}]


def chunks_of_shuffled(batch: npt.NDArray[np.uint8], value_bytes: int, threads: int) -> list[Chunk]:
    """Compresses each row to one chunk.

    Args:
        batch: (N, bytes) uint8, C order: the output of ``kernels.bitshuffle`` in blocks of ``BLOCK_VALUES``.
        value_bytes: bytes per value.
        threads: to compress with. The chunks do not depend on their number.
    """
    count, total = batch.shape
    block = min(BLOCK_VALUES * value_bytes, total)
    starts = range(0, total, block)
    blocks: list[Any] = [memoryview(row[start : start + block]) for row in batch for start in starts]
    frames: Any = zstandard.ZstdCompressor(level=LEVEL).multi_compress_to_buffer(blocks, threads=threads)
    kept = [frame if len(frame) < len(raw) else bytes(raw) for frame, raw in zip(frames, blocks, strict=True)]
    rows = (kept[first : first + len(starts)] for first in range(0, count * len(starts), len(starts)))
    return [_chunk(row, value_bytes, total, block) for row in rows]


def _chunk(blocks: list[Piece], value_bytes: int, total: int, block: int) -> Chunk:
    *begins, end = accumulate((4 + len(piece) for piece in blocks), initial=16 + 4 * len(blocks))
    head = struct.pack("<4B3i", *_VERSIONS, _FLAGS, value_bytes, total, block, end)
    pieces: list[Piece] = [head + struct.pack(f"<{len(begins)}i", *begins)]
    for piece in blocks:
        pieces += [struct.pack("<i", len(piece)), piece]
    return (*pieces, crc32c(*pieces))
