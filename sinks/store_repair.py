"""Repairs a finished flow store: replaces damaged files with whole ones, and leaves the others alone.

A flow that can still be read keeps its bytes, although its shard's file is rewritten. It is recomputed along with its
damaged neighbours; comparing it with the stored one shows whether the neighbours come from the same pictures.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowreel.engine import publish
from flowreel.engine.claims import Claim
from flowreel.engine.data import SAME_TIME_S
from flowreel.engine.errors import DamagedStoreError, ResumeMismatchError, StoreError
from flowreel.engine.files import PathLike
from flowreel.sinks.chunk_pieces import Chunk
from flowreel.sinks.compressors import compress
from flowreel.sinks.shard_file import pack_shard
from flowreel.sinks.store_check import damaged_places
from flowreel.sinks.store_layout import COORDINATES, check_coordinate, coordinate_chunk, flow_shard, open_file
from flowreel.sinks.store_metadata import other_settings, other_source
from flowreel.sinks.store_reader import open_store
from flowreel.sinks.store_writer import pack_values, values_beside

if TYPE_CHECKING:
    from flowreel.engine.config import SinkConfig
    from flowreel.engine.data import Array, Float32Array, FlowBatch, FlowInfo, SourceId


# Largest mean difference allowed for a recomputed flow, for instance on another processor, relative to its mean
# magnitude: bf16 causes 0.01 to 0.02, another pair of pictures about 1.
MOST_DIFFERENCE = 0.1
ANEW = "remake the store with flowreel run --overwrite"


@dataclass(frozen=True)
class ShardDamage:
    """What cannot be read of one shard and of its chunks in the arrays beside it."""

    shard: int
    first_flow: int  # of the shard
    last_flow: int  # of the shard, inclusive
    flows: tuple[int, ...]  # those that cannot be read, or are not the ones written there
    arrays: tuple[str, ...]  # ``timestamp_s``, ``frame``, ...: those whose chunk cannot be read or does not fit

    def __len__(self) -> int:
        """Flows in the shard."""
        return self.last_flow - self.first_flow + 1

    def __str__(self) -> str:
        flows = f"{len(self.flows)} of {len(self)} flows" if self.flows else ""
        what = ", ".join(filter(None, (flows, *self.arrays)))
        return f"shard {self.shard}, flows {self.first_flow} to {self.last_flow}: {what}"


class ShardRewriter:
    """Takes recomputed flows of damaged shards, and replaces the damaged files.

    Errors: StoreNotFoundError; StoreError for a store that is unfinished, or that a run is about to replace or has
    replaced; DamagedStoreError for metadata that cannot be trusted; OutputWriteError.
    """

    def __init__(self, path: PathLike) -> None:
        try:
            self.store = open_store(path)
            if self.store.complete:
                for name in self.store.layout.arrays:
                    check_coordinate(self.store.folder, name, self.store.layout, complete=True)
        except DamagedStoreError as error:
            raise DamagedStoreError(f"{error}. Only shards and chunks can be repaired, not metadata: {ANEW}") from error
        if self.store.layout.cache:
            raise StoreError(
                f"{self.store.path} is a cache: what is damaged in it is computed again when it is next read by "
                "flowreel.open"
            )
        if not self.store.complete:
            raise StoreError(f"{self.store.path} is unfinished: complete it with flowreel run --resume, then repair it")
        self._unfinished = publish.partial_path(self.store.folder)
        self._require_nothing_unfinished()
        self._opened = os.stat(self.store.folder)
        self.flows = 0  # taken so far
        self.bytes_written = 0
        self.same = 0  # readable flows whose recomputed chunk is identical
        self.others = 0  # readable flows whose recomputed chunk differs a little: the stored ones are kept
        self.farthest = 0.0  # pixels, the largest difference among those
        self._damaged: dict[int, ShardDamage] = {}
        self._chunks: list[Chunk] = []  # of the shard being filled
        self._coordinates: dict[str, list[Any]] = {name: [] for name in COORDINATES}  # of the same shard

    def damage(self, suspected: Collection[int]) -> tuple[ShardDamage, ...]:
        """What is damaged: among the flows of the suspected shards, and in the arrays beside ``flow``."""
        count, length = len(self.store), self.store.shard_length
        for shard in range(math.ceil(count / length)):
            flows = range(shard * length, min((shard + 1) * length, count))
            unreadable = tuple(flow for flow in flows if shard in suspected and self._stored(flow) is None)
            arrays = tuple(name for name in self.store.layout.arrays if self._values(name, shard) is None)
            if unreadable or arrays:
                self._damaged[shard] = ShardDamage(shard, flows[0], flows[-1], unreadable, arrays)
        return tuple(self._damaged.values())

    def damaged_places(self) -> tuple[str, ...]:
        """Which arrays of vector places, ``y`` and ``x`` of a store of coarse predictions, are damaged."""
        return tuple(name for name, _, _ in damaged_places(self.store))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps runs and other repairs from writing this store: by the lock of a run, on the unfinished name beside it.

        Raises OutputBusyError while one of them does, and StoreError when a run has replaced the store since it was
        opened.
        """
        with publish.write_errors(self.store.path):
            claim = Claim.of_folder(self._unfinished, self.store.path)
        claim.made = True  # so that it is removed even where a killed repair had left it; only if it is empty
        try:
            self._require_nothing_unfinished()
            if not os.path.samestat(self._opened, os.stat(self.store.folder)):
                raise StoreError(f"{self.store.path} was replaced while it was being read: repair it again")
            yield
        finally:
            claim.withdraw()

    def _require_nothing_unfinished(self) -> None:
        path = self._unfinished
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise StoreError(
                f"beside {self.store.path} lies {path.name}, which is to replace it: end that run with flowreel run "
                "--resume, or remove it, and repair afterwards"
            )

    # -- Where the flow comes from ---------------------------------------------------------------------------------

    def frame_at(self, place: int, *, backward: bool, start: int | None, step: int) -> int | None:
        """Number in the source of the run's frame ``place``; flow n lies between the run's frames n and n + 1.

        As recorded; where the record is damaged, counted from the nearest intact one, or from the run's ``start``.
        None: there is nothing to count from.
        """
        earlier, later = map(self._known, ("frame_to", "frame") if backward else ("frame", "frame_to"))
        frames = np.append(earlier, -1)  # (N + 1,)
        ends = np.insert(later, 0, -1)  # a flow ends where the next one begins
        frames[frames < 0] = ends[frames < 0]
        known = np.flatnonzero(frames >= 0)
        if known.size:
            nearest = int(known[np.abs(known - place).argmin()])
            return int(frames[nearest]) + step * (place - nearest)
        return None if start is None else start + step * place

    def require_source(self, source: SourceId) -> None:
        """Raises ResumeMismatchError unless the store was made from this source, which may have grown since."""
        self._refuse(other_source(self.store.attrs.get("source") or {}, asdict(source)))

    def require_same(self, info: FlowInfo, config: SinkConfig) -> None:
        """Raises ResumeMismatchError naming what differs, unless a run with this header would write this store."""
        self._refuse(other_settings(self.store, info, config))

    def _refuse(self, differing: list[str]) -> None:
        if differing:
            raise ResumeMismatchError(
                f"cannot repair {self.store.path}: {'; '.join(differing)}. Give the source and the weights that it was "
                f"made with, or {ANEW}"
            )

    # -- Writing ---------------------------------------------------------------------------------------------------

    def write(self, batch: FlowBatch) -> None:
        """Takes flows of damaged shards, on the CPU, in order; replaces what is damaged once a shard is complete.

        Raises ResumeMismatchError when their frames are not those recorded, or they differ from what can be read.
        """
        shard, place = divmod(batch.index, self.store.shard_length)
        damage = self._damaged[shard]
        if place != len(self._chunks):
            raise ValueError(f"flows arrive in order: expected place {len(self._chunks)} of the shard, got {place}")
        flows = batch.flow if self.store.layout.native is None else batch.native
        if flows is None:
            raise ValueError("the store holds the network's own prediction, which did not come with the flow")
        self._require_recorded(batch, shard, place)
        for name, values in self._coordinates.items():
            values.extend(getattr(batch, name))
        for number, flow in enumerate(flows.detach().numpy(), batch.index):
            self._chunks.append((self._kept(number, flow),))
            self.flows += 1
        if batch.index + len(batch) == damage.last_flow + 1:
            self._publish(damage)
            self._chunks.clear()
            for values in self._coordinates.values():
                values.clear()

    def restore_places(self) -> None:
        """Writes damaged arrays of vector places again: their values follow from the metadata."""
        with publish.write_errors(self.store.path):
            for name, values, _ in damaged_places(self.store):
                path = coordinate_chunk(self.store.folder, name, 0)
                self.bytes_written += publish.publish_bytes(path, compress(values, "blosc"))

    def remove_leftovers(self) -> None:
        """Deletes what a killed run or repair left inside the store under a temporary name."""
        with publish.write_errors(self.store.path):
            for path in list(self.store.folder.rglob("*.partial")):
                if path.is_symlink() or not path.is_dir():
                    path.unlink(missing_ok=True)

    def _publish(self, damage: ShardDamage) -> None:
        """In the run's order: times and checksums first, then the flow. Intact files stay as they are."""
        folder, length = self.store.folder, self.store.shard_length
        times = {
            name: came if (stored := self._values(name, damage.shard)) is None else stored[: len(came)]
            for name, came in self._coordinates.items()
        }
        beside = values_beside(damage.first_flow, self._chunks, times)
        files = [
            (coordinate_chunk(folder, name, damage.shard), [pack_values(name, beside[name], length)])
            for name in self.store.layout.arrays
            if name in damage.arrays or not self._agrees(name, damage.shard, beside[name])
        ]
        if damage.flows:
            files.append((flow_shard(folder, damage.shard), pack_shard(self._chunks, length)))
        with publish.write_errors(self.store.path):
            for path, pieces in files:
                if not _holds(path, pieces):
                    self.bytes_written += publish.publish_bytes(path, *pieces)

    def _require_recorded(self, batch: FlowBatch, shard: int, place: int) -> None:
        """Raises ResumeMismatchError unless frames and times equal what can still be read of the shard's."""
        for name in COORDINATES:
            came, values = getattr(batch, name), self._values(name, shard)
            if values is None:
                continue
            recorded = values[place : place + len(batch)]
            off = ~(np.abs(recorded - came) <= SAME_TIME_S)  # also where none is recorded
            if off.any():
                first = int(off.argmax())
                raise ResumeMismatchError(
                    f"{name} of flow {batch.index + first} is {recorded[first]} in the store, but {came[first]} in the "
                    "source: it is another recording than the store was made of"
                )

    def _kept(self, number: int, flow: Float32Array) -> bytes:
        """The chunk of a flow: the stored one if it can be read, else the recomputed one."""
        chunk = self.store.layout.codec.encode(flow).chunk
        stored = self._stored(number)
        if stored is None or stored[0] == chunk:
            self.same += stored is not None
            return chunk
        with np.errstate(all="ignore"):
            off = np.abs(stored[1] - flow)
        off = off[np.isfinite(off)]
        length = np.abs(stored[1][np.isfinite(stored[1])])
        if off.size and off.mean() > self.store.layout.codec.max_error + MOST_DIFFERENCE * length.mean():
            raise ResumeMismatchError(
                f"{self.store.name_of(number)} can be read, and what comes of the source differs from it by "
                f"{off.mean():.3g} px on average, of {length.mean():.3g} px: the source, or what computes, is not what "
                "the store was made with"
            )
        self.others += 1
        self.farthest = max(self.farthest, float(off.max(initial=0)))
        return stored[0]

    # -- What is there ---------------------------------------------------------------------------------------------

    def _stored(self, number: int) -> tuple[bytes, Float32Array] | None:
        """A flow's chunk and what it holds, (2, h, w) float32; None: it cannot be read."""
        values = np.empty(self.store.layout.stored_shape, np.float32)
        try:
            chunk = self.store.files.stored_flow(number, values)
        except DamagedStoreError:
            return None
        return None if chunk is None else (chunk, values)

    def _values(self, name: str, shard: int) -> Array | None:
        """(S,) one shard's values of an array beside ``flow``; None: they cannot be read, or are not those written."""
        if name != "flow_crc32c" and self.store.files.misplaced_times(shard):
            return None
        try:
            return self.store.files.coordinate_chunk(name, shard)
        except (OSError, DamagedStoreError):
            return None

    def _agrees(self, name: str, shard: int, values: Array) -> bool:
        """Whether an array holds these values for the first flows of a shard."""
        stored = self._values(name, shard)
        return stored is not None and np.array_equal(stored[: len(values)], values, equal_nan=True)

    def _known(self, name: str) -> Array:
        """(N,) frame numbers, -1 where they cannot be read."""
        count, length = len(self.store), self.store.shard_length
        parts = [self._values(name, shard) for shard in range(math.ceil(count / length))]
        return np.concatenate([np.full(length, -1) if part is None else part for part in parts])[:count]


def _holds(path: Path, pieces: list[bytes]) -> bool:
    """Whether a file exists and holds exactly these pieces."""
    try:
        with open_file(path) as file:
            return all(file.read(len(piece)) == piece for piece in pieces) and not file.read(1)
    except (OSError, DamagedStoreError):
        return False
