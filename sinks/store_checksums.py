"""Checksums that tell whether a flow is in its place. A chunk's own checksum tells only that it is intact.

Two swapped shards, or a shard of another store of the same size, contain only intact chunks. So two arrays beside
``flow`` hold, for each flow n,

    flow_crc32c[n]   crc32c of n and of the crc32c in which the chunk of flow n ends
    time_crc32c[n]   crc32c of n, frame[n], frame_to[n], timestamp_s[n] and timestamp_to_s[n]

each number as the 8 little-endian bytes that its array has, n as an integer, the chunk's crc32c as its 4 bytes. Reading
does not depend on them: without them the flow can still be read, but is no longer known to be in its place.

The group's attribute ``flowreel`` has its own crc32c beside it: ``flowreel_crc32c``, of the attribute as ASCII JSON
without spaces, with sorted keys. The arrays' own metadata needs none: a finished store has it twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from flowreel.sinks.chunk_pieces import CHECKSUM_BYTES

if TYPE_CHECKING:
    from flowreel.engine.data import Array

ATTRIBUTES_CHECKSUM = "flowreel_crc32c"  # its name among the group's attributes
COVERED = ("frame", "frame_to", "timestamp_s", "timestamp_to_s")


def attributes_checksum(attributes: Mapping[str, Any]) -> int:
    """The crc32c of the group's attribute ``flowreel``."""
    return int(google_crc32c.value(json.dumps(attributes, sort_keys=True, separators=(",", ":")).encode("ascii")))


def flow_checksums(first: int, chunks: Sequence[bytes]) -> Array:
    """(N,) uint32 of the flows from number ``first`` on; only the last four bytes of each chunk are used."""
    values = [
        google_crc32c.value(number.to_bytes(8, "little") + chunk[-CHECKSUM_BYTES:])
        for number, chunk in enumerate(chunks, first)
    ]
    return np.array(values, "<u4")


def time_checksums(first: int, times: Mapping[str, Any]) -> Array:
    """(N,) uint32 of the flows from number ``first`` on; times: the arrays in ``COVERED``, (N,) each."""
    columns = [np.asarray(times[name], "<i8" if name.startswith("frame") else "<f8").view("<i8") for name in COVERED]
    rows = np.stack([np.arange(first, first + len(columns[0]), dtype="<i8"), *columns], axis=1)
    return np.array([google_crc32c.value(row.tobytes()) for row in rows], "<u4")
