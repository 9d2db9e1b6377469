"""The files of a flow store as arrays: shards with their indexes, and the arrays beside ``flow``.

No file is trusted: one that is truncated, longer than it can be, or not a regular file is a DamagedStoreError that says
what is wrong with it, before memory is allocated for what it claims to hold.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowreel.engine.errors import DamagedStoreError
from flowreel.sinks.chunk_pieces import CHECKSUM_BYTES
from flowreel.sinks.compressors import decompress
from flowreel.sinks.native import enlarge
from flowreel.sinks.shard_file import INDEX_MISSING, index_bytes, unpack_index
from flowreel.sinks.store_checksums import COVERED, flow_checksums, time_checksums
from flowreel.sinks.store_layout import (
    BESIDE_FLOW,
    StoreLayout,
    check_coordinate,
    coordinate_chunk,
    flow_shard,
    open_file,
    published_shards,
)

if TYPE_CHECKING:
    from flowreel.engine.data import Array, Float32Array

SPARE_BYTES = 4096  # no codec makes a chunk longer than twice its contents plus this


class StoreFiles:
    """Caches only the indexes and checksums of shards that only a repair can still change. Threads may share one."""

    def __init__(self, folder: Path, layout: StoreLayout, complete: bool) -> None:
        self._folder = folder
        self._layout = layout
        self._complete = complete
        self._indexes: dict[int, Array] = {}
        self._flow_checksums: dict[int, Array] = {}
        self._times_in_place: set[int] = set()  # shards found so

    def flow(self, number: int, out: Float32Array) -> bool:
        """Decodes one flow into out: (2, H, W) float32 pixels, NaN where there is no vector. False: it is not there."""
        if self._layout.native is None:
            return self.stored_flow(number, out) is not None
        coarse = np.empty(self._layout.stored_shape, np.float32)
        there = self.stored_flow(number, coarse) is not None
        if there:
            out[...] = enlarge(coarse, self._layout.native, *out.shape[1:])
        return there

    def stored_flow(self, number: int, out: Float32Array) -> bytes | None:
        """Decodes one flow as it is stored into out, (2, h, w) float32; returns its chunk. None: it is not there."""
        try:
            return self._stored_flow(number, out)
        except DamagedStoreError:  # perhaps only because the shard remembered has been replaced or removed
            for remembered in (self._indexes, self._flow_checksums):
                remembered.pop(number // self._layout.shard_length, None)
            return self._stored_flow(number, out)

    def _stored_flow(self, number: int, out: Float32Array) -> bytes | None:
        shard, place = divmod(number, self._layout.shard_length)
        index = self.index(shard)
        if index is None or index[place, 0] == INDEX_MISSING:
            return None
        try:
            chunk = self.chunk(shard, *(int(value) for value in index[place]))
        except OSError as error:
            raise DamagedStoreError(f"cannot be read ({error.strerror or error})") from error
        self._layout.codec.decode(chunk, out)
        checksums = self._checksums_of_flows(shard)
        if checksums is not None and checksums[place] != flow_checksums(number, [chunk])[0]:
            raise DamagedStoreError("another flow than was written here")
        return chunk

    def whole(self, shard: int) -> bool:
        """Whether a shard holds all its flows and they and their times are in their place, by a quick check.

        Reads only the last four bytes of each flow: damage inside one is for ``check`` to find.
        """
        length = self._layout.shard_length
        try:
            index = self.index(shard)
            if index is None or self.misplaced_times(shard):
                return False
            for name in self._layout.arrays:
                self.coordinate_chunk(name, shard)
            checksums = self._checksums_of_flows(shard)
            ends = [
                self.chunk(shard, offset + size - CHECKSUM_BYTES, CHECKSUM_BYTES) for offset, size in index.tolist()
            ]
        except (OSError, DamagedStoreError):
            return False
        return checksums is None or bool((checksums == flow_checksums(shard * length, ends)).all())

    def published(self, shard: int) -> int:
        """How many of a shard's flows are there, from its first one on."""
        try:
            index = self.index(shard)
        except DamagedStoreError:
            return self._layout.shard_length  # they count as present: reading them reports what is wrong
        return 0 if index is None else int(np.append(index[:, 0] == INDEX_MISSING, True).argmax())

    def index(self, shard: int) -> Array | None:
        """(S, 2) offset and length of the shard's chunks; None when there is no such file."""
        if shard in self._indexes:
            return self._indexes[shard]
        length = self._layout.shard_length
        size = index_bytes(length)
        try:
            with open_file(flow_shard(self._folder, shard)) as file:
                file.seek(-size, os.SEEK_END)
                index = unpack_index(file.read(size))
        except FileNotFoundError:
            return None
        except (OSError, DamagedStoreError) as error:
            raise DamagedStoreError(
                f"the index of shard {shard} is damaged: {self._flows_of(shard)} cannot be read"
            ) from error
        if self._complete or (index[:, 0] != INDEX_MISSING).all():  # a ragged one may yet be replaced by a resume
            self._indexes[shard] = index
        return index

    def coordinate(self, name: str) -> Array:
        """(N,) one of the arrays of times and frames, read-only; its fill value where an unfinished store has no flow.

        Raises DamagedStoreError when the array, or its value for a flow, is not as written.
        """
        dtype, fill = BESIDE_FLOW[name]
        count, length = self._layout.count, self._layout.chunk_length
        check_coordinate(self._folder, name, self._layout, self._complete)
        values = np.empty(count, dtype) if self._complete else np.full(count, fill, dtype)
        shards = range(math.ceil(count / length))
        for shard in shards if self._complete else published_shards(self._folder):
            if shard in shards:
                part = values[shard * length : (shard + 1) * length]
                part[:] = self.coordinate_part(name, shard)[: len(part)]
                self._require_times_in_place(shard)
        values.flags.writeable = False
        return values

    def value(self, name: str, number: int) -> Any:
        """The value for one flow in an array of times or frames. Raises DamagedStoreError as ``coordinate`` does."""
        shard, place = divmod(number, self._layout.chunk_length)
        value = self.coordinate_part(name, shard)[place].item()
        self._require_times_in_place(shard)
        return value

    def coordinate_part(self, name: str, shard: int) -> Array:
        """``coordinate_chunk``, with a DamagedStoreError that names the chunk and its flows."""
        try:
            return self.coordinate_chunk(name, shard)
        except FileNotFoundError as error:
            raise DamagedStoreError(f"chunk {shard} of {name} is missing ({self._flows_of(shard)})") from error
        except (OSError, DamagedStoreError) as error:
            raise DamagedStoreError(f"chunk {shard} of {name}: {error} ({self._flows_of(shard)})") from error

    def misplaced_times(self, shard: int) -> list[int]:
        """The flows of a shard whose times and frame numbers are readable but not those written."""
        if self._layout.cache or shard in self._times_in_place:
            return []
        first, length = shard * self._layout.shard_length, self._layout.shard_length
        count = min(length, self._layout.count - first)
        try:
            times = {name: self.coordinate_chunk(name, shard)[:count] for name in COVERED}
            written = self.coordinate_chunk("time_crc32c", shard)[:count]
        except (OSError, DamagedStoreError):
            return []  # not known
        differs = time_checksums(first, times) != written
        if not self._complete:  # after the last flow of a ragged shard there are no times
            differs &= (times["frame"] != -1) | (written != 0)
        if not differs.any() and (self._complete or shard in self._indexes):
            self._times_in_place.add(shard)
        return (first + np.flatnonzero(differs)).tolist()

    def chunk(self, shard: int, offset: int, length: int) -> bytes:
        with open_file(flow_shard(self._folder, shard)) as file:
            end = os.fstat(file.fileno()).st_size - index_bytes(self._layout.shard_length)
            if offset + length > end or length > 2 * self._layout.stored_bytes + SPARE_BYTES:
                raise DamagedStoreError(f"its {length} bytes at {offset} are not in the {end} bytes of its shard")
            file.seek(offset)
            return file.read(length)

    def coordinate_chunk(self, name: str, shard: int) -> Array:
        """(S,) the values of one shard's flows, with fill values after the last one; of a cache, those of all flows."""
        length = self._layout.chunk_length
        with open_file(coordinate_chunk(self._folder, name, shard)) as file:
            if os.fstat(file.fileno()).st_size > 16 * length + SPARE_BYTES:
                raise DamagedStoreError(f"it is longer than {length} values can be")
            return decompress(file.read(), "blosc", np.dtype(BESIDE_FLOW[name][0]), length)

    def _require_times_in_place(self, shard: int) -> None:
        if misplaced := self.misplaced_times(shard):
            raise DamagedStoreError(f"the times and frame numbers of flow {misplaced[0]} are not those written")

    def _checksums_of_flows(self, shard: int) -> Array | None:
        """(S,) checksums of one shard's flows; None: there are none, or they cannot be read."""
        if shard in self._flow_checksums or self._layout.cache:
            return self._flow_checksums.get(shard)
        try:
            checksums = self.coordinate_chunk("flow_crc32c", shard)
        except (OSError, DamagedStoreError):
            return None
        if shard in self._indexes:  # it is whole
            self._flow_checksums[shard] = checksums
        return checksums

    def _flows_of(self, shard: int) -> str:
        length = self._layout.chunk_length
        return f"flows {shard * length} to {min((shard + 1) * length, self._layout.count) - 1}"
