"""A chunk in pieces: joining them would copy it all once more, and nobody else's Python runs meanwhile."""

from __future__ import annotations

import google_crc32c

from flowreel.engine.errors import DamagedStoreError

Piece = bytes  # or what else can only be read, as a segment of a buffer of Zstandard's; no memoryview, says crc32c
Chunk = tuple[Piece, ...]  # its checksum is the last

CHECKSUM_BYTES = 4
IN_C = google_crc32c.implementation == "c"  # that in Python takes nothing but bytes


def crc32c(*pieces: Piece) -> bytes:
    """The checksum of the pieces, one after another, as Zarr puts it behind a chunk."""
    value = 0
    for piece in pieces:
        value = google_crc32c.extend(value, piece if IN_C else bytes(piece))
    return int(value).to_bytes(CHECKSUM_BYTES, "little")


def without_checksum(data: bytes) -> bytes:
    """The bytes before the crc32c at the end. Raises DamagedStoreError when it does not fit them."""
    body, stored = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if crc32c(body) != stored:
        raise DamagedStoreError("checksum is wrong")
    return body
