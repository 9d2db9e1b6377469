"""A shard file: its chunks and its index."""

from __future__ import annotations

import pytest

from flowreel.engine.errors import DamagedStoreError
from flowreel.sinks.shard_file import INDEX_MISSING, index_bytes, pack_shard, unpack_index


def test_chunks_lie_in_order_and_the_rest_is_marked_missing() -> None:
    pieces = pack_shard([(b"a", b"aa"), (b"b",), (b"cc",)], 5)
    data = b"".join(pieces)
    assert data[:6] == b"aaabcc"
    index = unpack_index(data[-index_bytes(5) :])
    assert index[:3].tolist() == [[0, 3], [3, 1], [4, 2]]
    assert (index[3:] == INDEX_MISSING).all()
    with pytest.raises(DamagedStoreError, match="checksum"):
        unpack_index(data[-index_bytes(5) : -1] + bytes([data[-1] ^ 1]))
