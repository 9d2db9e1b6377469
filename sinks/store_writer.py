"""Writes a store's files: metadata, then whole shards in order, each after its times and checksums.

Shards are written by several threads, which wait for the disk while the next shards are compressed; several, as the
system takes less from one thread than a GPU can deliver. Shards get their names in order, and none after one that
could not be written, so the flow of a store has no hole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from flowreel.engine import publish
from flowreel.engine.errors import OutputWriteError, concerning
from flowreel.sinks.chunk_pieces import Chunk
from flowreel.sinks.compressors import compress
from flowreel.sinks.parallel import OrderedPool
from flowreel.sinks.shard_file import pack_shard
from flowreel.sinks.store_checksums import ATTRIBUTES_CHECKSUM, attributes_checksum, flow_checksums, time_checksums
from flowreel.sinks.store_layout import BESIDE_FLOW, COORDINATES, FIRST_LOSS, consolidate
from flowreel.sinks.store_target import StoreTarget

WRITERS = 4  # threads; on two cores they write to a disk 1.4 times as fast as one does, to memory twice
MOST_BYTES = 128 << 20  # of compressed shards in flight


class StoreWriter:
    """Writes the arrays of one store into its target. Errors: OutputWriteError."""

    def __init__(
        self,
        target: StoreTarget,
        metadata: dict[str, dict[str, Any]],
        shard_length: int,
        writers: int | None = None,
        most_bytes: int | None = None,
    ) -> None:
        """metadata: ``zarr.json`` by the name of the array, "" for the group; published by ``start``.

        writers: shards written at once; None: ``WRITERS``. most_bytes: bound on the sum of the ``nbytes`` of shards in
        flight; None: ``MOST_BYTES``.
        """
        self._target = target
        self._metadata = metadata
        self._shard_length = shard_length
        self._length: int = metadata["flow"]["shape"][0]  # flows the arrays are declared to hold
        self._metadata_bytes: dict[str, int] = {}  # of each array's zarr.json as last written
        self._behind: OrderedPool[None] = OrderedPool(lambda _: None, writers or WRITERS, most_bytes or MOST_BYTES)
        self._failed: list[int] = []  # shards that could not be published: no later one may be
        self._loss_noted = False  # and not published yet
        self.bytes_written = 0

    def start(self, places: Mapping[str, Any]) -> None:
        """Publishes the metadata, and the arrays whose values are known from the start: ``places``, by name."""
        for name in self._metadata:
            self._publish_metadata(name)
        for name, values in places.items():
            self._put(f"{name}/c/0", compress(values, "blosc"))

    def submit(self, number: int, chunks: list[Chunk], times: Mapping[str, Sequence[Any]]) -> None:
        """Hands over a shard: its flows, compressed, and their times. Waits while too many are in flight.

        The error of an earlier one is raised here, in ``check`` or in ``flush``.
        """
        make = partial(prepare_shard, self._target, number, self._shard_length, chunks, times)
        self.submit_made(number, len(chunks), times, make, sum(map(len, chain.from_iterable(chunks))))

    def submit_made(
        self,
        number: int,
        count: int,
        times: Mapping[str, Sequence[Any]],
        make: Callable[[], tuple[list[str], int]],
        nbytes: int,
    ) -> None:
        """Hands over a shard of ``count`` flows whose files ``make`` prepares in the target: see ``prepare_shard``."""
        length, frame = number * self._shard_length + count, int(times["frame"][0])
        self._behind.submit_in_turn(
            partial(self._prepare, number, frame, make), partial(self._publish, number, frame, length), nbytes
        )

    def check(self) -> None:
        """Raises the error of a shard that failed, without waiting for any."""
        self._behind.take_ready()

    def flush(self) -> None:
        """Waits until every shard is on the disk."""
        self._behind.drain()

    def finish(self, count: int, losses: Sequence[str] = ()) -> None:
        """Trims the arrays to the flows received, records the source's losses and consolidates the metadata."""
        if losses:
            self._set_attribute("source_losses", list(losses))
        self._set_length(count)
        consolidate(self._metadata)
        self._publish_metadata("")

    def note_loss(self, frame: int) -> None:
        """Records the number of the source's first missing or damaged frame, published before the next shard."""
        if FIRST_LOSS not in self._metadata[""]["attributes"]["flowreel"]:
            self._set_attribute(FIRST_LOSS, frame)
            self._loss_noted = True

    def _set_attribute(self, name: str, value: Any) -> None:
        attributes = self._metadata[""]["attributes"]
        attributes["flowreel"][name] = value
        attributes[ATTRIBUTES_CHECKSUM] = attributes_checksum(attributes["flowreel"])

    def require_no_hole(self) -> None:
        if self._failed:
            raise OutputWriteError(f"cannot finish {self._target.name}: one of its shards could not be written")

    def close(self, *, in_haste: bool = False) -> None:
        """Ends the threads. In haste: full shards are still written where possible, and nothing is raised."""
        if in_haste:
            with suppress(Exception):  # the caller has its own reason to stop, which counts
                self._behind.drain()
        self._behind.close()

    def _prepare(self, number: int, frame: int, make: Callable[[], tuple[list[str], int]]) -> tuple[list[str], int]:
        with self._noting_failure(number, frame):
            return make()

    def _publish(self, number: int, frame: int, length: int, prepared: tuple[list[str], int]) -> None:
        """Publishes array lengths, then the shard's files. Called in order: those before are published or failed."""
        keys, nbytes = prepared
        with self._noting_failure(number, frame):
            try:
                if number - 1 in self._failed:  # and then every later one fails, too
                    raise OutputWriteError(
                        f"cannot write {self._target.name}: the shard before this one could not be written"
                    )
                if self._loss_noted:
                    self._loss_noted = False
                    self._publish_metadata("")
                self._set_length(max(self._length, length))
                self._target.publish(keys)
            except BaseException:
                self._target.withdraw(keys)
                raise
        self.bytes_written += nbytes

    @contextmanager
    def _noting_failure(self, number: int, frame: int) -> Iterator[None]:
        """Records that shard ``number`` failed, and names its first frame in the error."""
        try:
            with concerning(frame), publish.write_errors(self._target.name):
                yield
        except BaseException:
            self._failed.append(number)
            raise

    def _set_length(self, length: int) -> None:
        """Sets the length of every array, ``flow`` last: readers rely on its length."""
        if length != self._length:
            for name in [*BESIDE_FLOW, "flow"]:
                self._metadata[name]["shape"][0] = length
                self._publish_metadata(name)
            self._length = length

    def _publish_metadata(self, name: str) -> None:
        key = f"{name}/zarr.json" if name else "zarr.json"
        self.bytes_written -= self._metadata_bytes.get(name, 0)  # it is replaced
        self._metadata_bytes[name] = self._put(key, json.dumps(self._metadata[name], indent=2).encode())

    def _put(self, key: str, *pieces: bytes) -> int:
        written = self._target.put(key, *pieces)
        self.bytes_written += written
        return written


def prepare_shard(
    target: StoreTarget, number: int, length: int, chunks: Sequence[Chunk], times: Mapping[str, Sequence[Any]]
) -> tuple[list[str], int]:
    """Prepares one shard's files in the target. Returns their keys and their size in bytes.

    The keys are in the order of publishing: times and checksums, then the flow. length: flows of a full shard.
    """
    files: dict[str, Sequence[bytes]] = {
        f"{name}/c/{number}": [pack_values(name, values, length)]
        for name, values in values_beside(number * length, chunks, times).items()
    }
    files[f"flow/c/{number}/0/0/0"] = pack_shard(chunks, length)
    return list(files), target.prepare(files)


def values_beside(first: int, chunks: Sequence[Chunk], times: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the arrays beside ``flow`` for the flows of one shard, the first of which has number ``first``."""
    checksums = {
        "flow_crc32c": flow_checksums(first, [chunk[-1] for chunk in chunks]),
        "time_crc32c": time_checksums(first, times),
    }
    return {name: times[name] for name in COORDINATES} | checksums


def pack_values(name: str, values: Sequence[Any], length: int) -> bytes:
    """One chunk of an array beside ``flow``: the values, padded with the array's fill value."""
    dtype, fill = BESIDE_FLOW[name]
    padded = np.full(length, fill, dtype)
    padded[: len(values)] = values
    return compress(padded, "blosc")
