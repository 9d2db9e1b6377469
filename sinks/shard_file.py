"""A shard file, Zarr's ``sharding_indexed``: the chunks, then an index of where each lies, and the index's checksum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from flowreel.sinks.chunk_pieces import CHECKSUM_BYTES, Chunk, crc32c, without_checksum

if TYPE_CHECKING:
    import numpy.typing as npt

INDEX_MISSING = 2**64 - 1  # offset and length of a chunk that is not in the shard


def pack_shard(chunks: Sequence[Chunk], length: int) -> list[bytes]:
    """The pieces of a shard file of ``length`` places: those of the chunks from place 0 on, then the index.

    Places after the last chunk are marked missing; so the last shard of a clip may be ragged.
    """
    index = np.full((length, 2), INDEX_MISSING, "<u8")
    sizes = np.array([sum(map(len, chunk)) for chunk in chunks], "<u8")
    index[: len(chunks), 0] = np.cumsum(sizes) - sizes
    index[: len(chunks), 1] = sizes
    body = index.tobytes()
    return [*chain.from_iterable(chunks), body, crc32c(body)]


def index_bytes(length: int) -> int:
    """Bytes at the end of a shard file that hold its index."""
    return 16 * length + CHECKSUM_BYTES


def unpack_index(data: bytes) -> npt.NDArray[np.uint64]:
    """(S, 2) uint64 (offset, length) of a shard's chunks. Raises DamagedStoreError when the checksum is wrong."""
    return np.frombuffer(without_checksum(data), "<u8").reshape(-1, 2)
