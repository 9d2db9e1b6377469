"""Reads a flow store: ``open_store("out.zarr")[5]`` is a NumPy array. The writer is ``zarr_store.py``.

    key -> which flows, which part of each (store_select) -> shard, index, chunk -> integers -> pixels

Any Zarr v3 reader opens these stores. This one is small, starts at once, says which frames are damaged, and never
takes an unfinished store for a finished one: a flow that is not there is an error, not a field of fill values.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowreel.engine.data import is_known
from flowreel.engine.errors import (
    DamagedStoreError,
    StoreError,
    StoreNotFoundError,
    concerning,
    counted,
)
from flowreel.engine.files import PathLike
from flowreel.engine.publish import partial_path
from flowreel.sinks.flo import flo_bytes
from flowreel.sinks.parallel import OrderedPool
from flowreel.sinks.store_files import StoreFiles
from flowreel.sinks.store_layout import StoreLayout, read_layout
from flowreel.sinks.store_select import Selection, select

if TYPE_CHECKING:
    import xarray

    from flowreel.engine.data import Array, BoolArray, Float32Array, Float64Array, Int64Array
    from flowreel.sinks.store_check import StoreProblem


DECODE_THREADS = min(4, os.cpu_count() or 1)  # a reader shares its machine with whatever uses the flow
PARALLEL_FROM_BYTES = 16 << 20  # of float32; below it, starting the threads takes longer than they save


def open_store(path: PathLike) -> FlowStore:
    """Opens a flow store, or the unfinished ``X.zarr.partial`` when there is no ``X.zarr``; also a cache of
    ``flowreel.open``, of which the flows that have been computed can be read.

    Raises:
        StoreNotFoundError: neither is there.
        DamagedStoreError: what is there is not a flow store that this version can read.
    """
    final = Path(path)
    if os.path.isdir(final):
        store = FlowStore(final)
        if not store.layout.cache:
            return store
        from flowreel.sinks.flow_cache import FlowCache

        return FlowCache(final)
    unfinished = partial_path(final)
    if os.path.isdir(unfinished):
        return FlowStore(unfinished)
    if os.path.lexists(final):
        raise DamagedStoreError(f"{final} is a file: a flow store is a folder")
    beside = "" if final.suffix == unfinished.suffix else f", and none unfinished at {unfinished}"
    raise StoreNotFoundError(f"no flow store at {final}{beside}")


class FlowStore:
    """A flow store, read on demand; only times, frame numbers and the shards' indexes and checksums are kept in memory.

    ``store[5]`` is (2, H, W) float32, pixels of the source frame, x then y. Where there is no vector it is NaN; a
    lossless store returns what was written there, such as a ``.flo``'s 1e10 (``valid`` tells).
    ``store[2:9]``, ``store[[3, 1]]`` and ``store[mask]`` with a boolean per flow are (N, 2, H, W). Further integers and
    slices select from each flow: ``store[5, :, 10:20, 30:40]``, ``store[2:6, 0]``, ``store[..., ::4, ::4]``.
    Negative numbers count from the end. Only the selected flows are decoded, each once, in parallel where that
    pays.

    Any number of threads may read one store. Pickling keeps only the path: the copy opens the store again.

    Raises, when read: IndexError; StoreError for a flow an unfinished store does not hold yet, and when the store has
    been removed, or a finished one replaced, since it was opened; DamagedStoreError naming the flow and its frame when
    a chunk is missing from a finished store, fails its checksum, or is another flow's.
    """

    path: str
    attrs: dict[str, Any]  # where the flow comes from and how it was made
    folder: Path  # absolute
    layout: StoreLayout
    files: StoreFiles
    dtype = np.dtype(np.float32)
    ndim = 4

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.path = str(folder)
        self._finished = self.folder.suffix != ".partial"
        self._identity = _identity(self.folder)  # before the metadata is read: it may be replaced meanwhile
        self.attrs, self.layout = read_layout(folder, self._finished)
        self.shape: tuple[int, int, int, int] = (self.layout.count, *self.layout.flow_shape)
        self.shard_length: int = self.layout.shard_length
        self.files = StoreFiles(self.folder, self.layout, self._finished)
        self._whole_shards = 0  # found so far in an unfinished store, from the first on
        self._coordinates: dict[str, tuple[Array, int]] = {}  # name -> values, and how many flows there were then

    def __reduce__(self) -> tuple[type[FlowStore], tuple[Path]]:
        return type(self), (self.folder,)

    @property
    def complete(self) -> bool:
        """Whether all its flows are there. If not, the run that wrote it was cut short or is still going on."""
        return self._finished

    def __len__(self) -> int:
        """Flows the store holds, or will hold when finished (those an unfinished store has: ``available``)."""
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<FlowStore {self.path!r} {self.shape} {self.state}>"

    @property
    def flow_bytes(self) -> int:
        """Bytes of one flow as float32: 2 x H x W x 4."""
        return 4 * math.prod(self.shape[1:])

    @property
    def available(self) -> int:
        """Flows present, from the first on without a gap. Looks at the disk: an unfinished store may be growing."""
        if self.complete:
            return len(self)
        for shard in range(self._whole_shards, math.ceil(len(self) / self.shard_length)):
            there = self.files.published(shard)
            if there < self.shard_length:
                return min(shard * self.shard_length + there, len(self))
            self._whole_shards = shard + 1
        return len(self)

    @property
    def state(self) -> str:
        """``complete``, or how far an unfinished store is, in words."""
        if self.complete:
            return "complete"
        if (available := self.available) < len(self):
            return f"unfinished: {available} of {len(self)} flows are there"
        there = counted(available, "flow")
        return f"unfinished: {there} so far; its source or its run was cut short, or it is being written"

    @property
    def stored(self) -> int:
        """How many flows are present in all; in a cache they may lie anywhere."""
        return self.available

    @property
    def timestamps_s(self) -> Float64Array:
        """(N,) seconds, presentation time of each pair's first frame; NaN where not written yet."""
        return self._coordinate("timestamp_s")

    @property
    def timestamps_to_s(self) -> Float64Array:
        """(N,) seconds, of each pair's second frame."""
        return self._coordinate("timestamp_to_s")

    @property
    def frame(self) -> Int64Array:
        """(N,) number of each pair's first frame in the source; -1 where not written yet."""
        return self._coordinate("frame")

    @property
    def frame_to(self) -> Int64Array:
        """(N,) number of each pair's second frame."""
        return self._coordinate("frame_to")

    @property
    def valid(self) -> ValidVectors:
        """Where there is a vector: ``store.valid[5]`` is (H, W) bool, ``store.valid[2:9, :20]`` (N, 20, W)."""
        return ValidVectors(self)

    def __getitem__(self, key: Any) -> Float32Array:
        chosen = select(key, self.shape)

        def take(number: int, out: Float32Array) -> None:
            if chosen.whole:
                self._read(number, out)
            else:
                out[...] = self._flow(number)[chosen.inside]

        return self._gather(chosen, np.dtype(np.float32), take)

    def __iter__(self) -> Iterator[Float32Array]:
        return (self[number] for number in range(len(self)))

    def to_xarray(self) -> xarray.DataArray:
        """The flow as a lazy xarray.DataArray, float32: only what is accessed is read.

        Dimensions time, component, y, x; the times and frame numbers are coordinates of time. Values are those
        of ``store[...]``. For an unfinished store it holds the flows present now.

        Raises:
            MissingDependencyError: xarray is not installed.
        """
        from flowreel.sinks.store_xarray import data_array

        return data_array(self)

    def check(self, progress: Callable[[int], None] | None = None) -> Iterator[StoreProblem]:
        """Reads everything and yields what is wrong, flow by flow; nothing when the store is sound.

        Memory does not grow with the store. ``progress`` is called with the number of flows read so far.
        """
        from flowreel.sinks.store_check import check_store

        return check_store(self, progress)

    def summary(self) -> dict[str, Any]:
        """What the store holds and what it costs: sizes in bytes, ``ratio`` against the same flows as ``.flo``."""
        _, _, height, width = self.shape
        available, codec = self.stored, self.layout.codec
        disk_bytes = sum(map(_file_bytes, self.folder.rglob("*")))
        as_flo = available * flo_bytes(height, width)
        return {
            "path": self.path,
            "complete": self.complete,
            "cache": self.layout.cache,
            "flows": len(self),
            "available": available,
            "width": width,
            "height": height,
            "dtype": str(codec.dtype),
            "codec": codec.codec,
            "max_error": codec.max_error,
            "resolution": "full" if self.layout.native is None else "native",
            "step": None if codec.lossless else codec.step,
            "shard_length": self.shard_length,
            "disk_bytes": disk_bytes,
            "flo_bytes": as_flo,
            "ratio": as_flo / disk_bytes,
        }

    def _gather(self, chosen: Selection, dtype: np.dtype[Any], take: Callable[[int, Array], None]) -> Array:
        """The selection in a new array. ``take(number, out)`` reads the selected part of one flow."""
        out = self._room((len(chosen.numbers), *chosen.inner_shape), dtype)
        places: dict[int, list[int]] = {}  # flow -> its places in ``out``, so that each is decoded once
        for place, number in enumerate(chosen.numbers if out.size else ()):
            places.setdefault(number, []).append(place)

        def bring(number: int) -> None:
            first, *others = places[number]
            take(number, out[first, ...])
            for place in others:
                out[place] = out[first]

        self._spread(bring, places)
        result: Array = out[0] if chosen.single else out
        return result

    def _spread(self, bring: Callable[[int], None], numbers: Collection[int]) -> None:
        """Calls ``bring`` for each flow, in parallel where that pays; of the errors, the first in order is raised."""
        if DECODE_THREADS < 2 or len(numbers) < 2 or len(numbers) * self.flow_bytes < PARALLEL_FROM_BYTES:
            for number in numbers:
                bring(number)
            return
        with closing(OrderedPool[None](lambda _: None, DECODE_THREADS)) as pool:
            for number in numbers:
                pool.submit(bring, number, nbytes=self.flow_bytes)
            pool.drain()

    def _flow(self, number: int) -> Float32Array:
        """(2, H, W) float32, pixels."""
        out = self._room(self.shape[1:], np.dtype(np.float32))
        self._read(number, out)
        return out

    def _room(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        try:
            return np.empty(shape, dtype)
        except (MemoryError, ValueError) as error:
            raise StoreError(f"{self.path}: an array of {shape} does not fit into memory: read less at once") from error

    def _read(self, number: int, out: Float32Array) -> None:
        """Decodes one flow into out: (2, H, W). Raises what the class docstring says, naming the flow."""
        try:
            there = self.files.flow(number, out)
        except DamagedStoreError as error:
            self._require_same()
            frame = self.frame_of(number)
            with nullcontext() if frame is None else concerning(frame):
                raise DamagedStoreError(f"{self.path}: {self.name_of(number)}: {error}") from error
        self._require_same()
        if not there:
            raise self._missing(number)

    def _require_same(self) -> None:
        """Raises StoreError if the store has been removed, or a finished one replaced, since it was opened.

        Call it after reading: the files of another store mean something else under the metadata of this one.
        """
        now = _identity(self.folder)
        if now is None:
            raise StoreError(f"{self.path} is gone since it was opened (finished, moved or removed): open it again")
        if self._finished and now != self._identity:
            raise StoreError(f"{self.path} has been replaced since it was opened: open it again")

    def _missing(self, number: int) -> StoreError:
        """The error for a flow that is not present."""
        if self.complete:
            return DamagedStoreError(f"{self.path}: {self.name_of(number)} is missing")
        return StoreError(
            f"{self.path} is unfinished: {self.name_of(number)} is not there yet, the first {self.available} are"
        )

    def _coordinate(self, name: str) -> Array:
        """One array of times or frame numbers, cached until more flows are present."""
        available = len(self) if self.layout.cache else self.available  # a cache has all of them from the start
        values, known = self._coordinates.get(name, (None, 0))
        if values is None or known < available:
            with self._naming_itself():
                values = self.files.coordinate(name)
            self._coordinates[name] = values, available
        return values

    @contextmanager
    def _naming_itself(self) -> Iterator[None]:
        """For reading something other than flow."""
        try:
            yield
        except DamagedStoreError as error:
            self._require_same()
            raise DamagedStoreError(f"{self.path}: {error}") from error
        self._require_same()

    def time_of(self, number: int) -> float:
        """``timestamps_s[number]``, for a number from 0 on, without reading the times of all other shards."""
        if self.layout.cache:  # it has them in one file
            return float(self.timestamps_s[number])
        with self._naming_itself():
            return float(self.files.value("timestamp_s", number))

    def name_of(self, number: int) -> str:
        """ "flow 17 (frame 34)", or without the frame when that cannot be told."""
        number += len(self) if number < 0 else 0
        frame = self.frame_of(number)
        return f"flow {number}" if frame is None else f"flow {number} (frame {frame})"

    def frame_of(self, number: int) -> int | None:
        """Number of a flow's first frame in the source, None when that cannot be told."""
        try:
            frame = int(self.files.value("frame", number + (len(self) if number < 0 else 0)))
        except DamagedStoreError:
            return None
        return None if frame < 0 else frame


class ValidVectors:
    """``store.valid``: (N, H, W) bool, True where there is a vector. Indexed like the store, without components."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store
        self.shape: tuple[int, int, int] = (store.shape[0], *store.shape[2:])

    def __repr__(self) -> str:
        return f"<ValidVectors {self.shape} bool of {self._store.path!r}>"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> BoolArray:
        chosen = select(key, self.shape)

        def take(number: int, out: BoolArray) -> None:
            known = is_known(self._store._flow(number)[(slice(None), *chosen.inside)])
            np.logical_and(known[0], known[1], out=out)

        return self._store._gather(chosen, np.dtype(np.bool_), take)


def _identity(folder: Path) -> tuple[int, ...] | None:
    """Tells a store from another one that has taken its place; None if there is none."""
    try:
        status = os.stat(folder / "flow" / "zarr.json")
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _file_bytes(path: Path) -> int:
    """Size of a file; 0 for a folder, and for a file removed meanwhile: an unfinished store may be growing."""
    try:
        status = path.lstat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
