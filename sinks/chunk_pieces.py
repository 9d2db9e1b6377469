"""A chunk in pieces: joining them would copy all of it once more, while holding the GIL."""

from __future__ import annotations

import google_crc32c

from flowreel.engine.errors import DamagedStoreError

Piece = bytes  # or another read-only buffer, such as a segment of Zstandard's; google_crc32c takes no memoryview
Chunk = tuple[Piece, ...]  # the last piece is its checksum

CHECKSUM_BYTES = 4
IN_C = google_crc32c.implementation == "c"  # the implementation in Python takes only bytes


def crc32c(*pieces: Piece) -> bytes:
    """The checksum of the concatenated pieces, as Zarr appends it to a chunk."""
    value = 0
    for piece in pieces:
        value = google_crc32c.extend(value, piece if IN_C else bytes(piece))
    return int(value).to_bytes(CHECKSUM_BYTES, "little")


def without_checksum(data: bytes) -> bytes:
    """The bytes before the crc32c at the end. Raises DamagedStoreError when it does not match them."""
    body, stored = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if crc32c(body) != stored:
        raise DamagedStoreError("checksum is wrong")
    return body
