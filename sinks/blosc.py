"""Blosc chunks of values whose bits are shuffled already, by a GPU: those of a whole batch in one call.

What is left to do on the host is Zstandard's, for many blocks at once, by threads of its own that never ask for
Python's lock: what else a fast run does in Python goes on beside it. The chunks are of the format of C-Blosc 1, which
every reader of ``blosc`` in Zarr takes; as this one writes it:

    16 bytes: versions, flags, bytes of a value, bytes of all values, of a block, of the chunk
    where in the chunk each block begins, 4 bytes each
    each block: how many bytes follow, in 4; a frame of Zstandard, or the bytes of the block where that is no shorter
"""

from __future__ import annotations

import struct
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import zstandard

from flowreel.sinks.chunk_pieces import Chunk, Piece, crc32c

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Measured on FlowNet2 output at 1/64 px: with Blosc's own choice of block, levels 1, 2, 3, 5 make it 4.55, 4.63, 4.73,
# 4.77 times smaller, the last at a fifth of the speed. With blocks of half a million values level 1 reaches 4.98 at its
# full speed; higher levels and larger blocks add next to nothing to that.
LEVEL = 1  # of Blosc, and the same of its Zstandard
BLOCK_VALUES = 1 << 19

_VERSIONS = 2, 1  # of the format, and of how a frame lies in it
_FLAGS = 4 << 5 | 1 << 4 | 1 << 2  # Zstandard; a block is one frame, not one for each byte of a value; bits shuffled


def chunks_of_shuffled(batch: npt.NDArray[np.uint8], value_bytes: int, threads: int) -> list[Chunk]:
    """A chunk of each row.

    Args:
        batch: (N, bytes) uint8, C order: what ``kernels.bitshuffle`` makes of values in blocks of ``BLOCK_VALUES``.
        value_bytes: of one of the values.
        threads: to compress with. The chunks are the same whatever their number.
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
