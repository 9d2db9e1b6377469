"""Waiting for the work that a sink does in threads of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

from flowreel.sinks.shards import ShardsInThreads
from flowreel.sinks.zarr_store import ZarrSink

Encoders = Callable[[], list[threading.Thread]]  # the fixture of that name


def flush(sink: ZarrSink) -> None:
    """Waits until every flow is compressed and every full shard is on the disk."""
    assert isinstance(sink._shards, ShardsInThreads)
    assert sink._files is not None
    sink._shards.drain()
    sink._files.flush()
