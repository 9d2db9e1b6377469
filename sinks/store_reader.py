"""Reads a flow store: ``open_store("out.zarr")[5]`` is a NumPy array. The writer is ``zarr_store.py``.

Any Zarr v3 reader opens these stores. This one is small, starts at once, says which frames are damaged, and never
takes an unfinished store for a finished one: a flow that is not there is an error, not a field of fill values.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowreel.engine.errors import DamagedStoreError, StoreError, StoreNotFoundError
from flowreel.sinks.codecs import INDEX_MISSING, FlowCodec, codec_of, decompress, index_bytes, unpack_index
from flowreel.sinks.publish import partial_path

if TYPE_CHECKING:
    import numpy.typing as npt

    from flowreel.engine.data import Float64Array, Int64Array

    Float32Array = npt.NDArray[np.float32]
    Array = npt.NDArray[Any]

FORMAT_VERSION = 1

# Arrays beside ``flow``, one value a flow: dtype, and the value for "not there yet".
COORDINATES: dict[str, tuple[str, float]] = {
    "timestamp_s": ("<f8", math.nan),
    "timestamp_to_s": ("<f8", math.nan),
    "frame": ("<i8", -1),
    "frame_to": ("<i8", -1),
}


def flow_shard(folder: Path, number: int) -> Path:
    """The file of one shard of ``flow``."""
    return folder / "flow" / "c" / str(number) / "0" / "0" / "0"


def published_shards(folder: Path) -> list[int]:
    """Numbers of the flow shards that are there, ascending. Each is whole: it got its name when it was."""
    chunks = folder / "flow" / "c"
    names = [entry.name for entry in chunks.iterdir()] if chunks.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit() and flow_shard(folder, int(name)).is_file())


def open_store(path: str | os.PathLike[str]) -> FlowStore:
    """Opens a flow store, or the unfinished ``X.zarr.partial`` when there is no ``X.zarr``.

    Raises:
        StoreNotFoundError: neither is there.
        DamagedStoreError: what is there is not a flow store that this version can read.
    """
    final = Path(path)
    for folder in (final, partial_path(final)):
        if folder.is_dir():
            return FlowStore(folder)
    if final.exists():
        raise DamagedStoreError(f"{final} is a file: a flow store is a folder")
    raise StoreNotFoundError(f"no flow store at {final}, and none unfinished at {partial_path(final).name}")


class FlowStore:
    """A flow store, read on demand; nothing is kept but the shards' indexes.

    ``store[5]`` is (2, H, W) float32, pixels of the source frame, x then y, NaN where there is no vector.
    ``store[2:9]`` and ``store[[3, 1]]`` are (N, 2, H, W). Negative numbers count from the end.

    Raises, when read: IndexError; StoreError for a flow an unfinished store does not hold yet; DamagedStoreError
    naming the flow and its frame when a chunk is missing from a finished store or fails its checksum.
    """

    path: str
    complete: bool  # False: the run that wrote it was cut short or is still going on

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.path = str(folder)
        self.complete = folder.suffix != ".partial"
        self.attrs = _group_attributes(folder)
        try:
            self._read_layout(_read_json(folder / "flow" / "zarr.json"))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, DamagedStoreError):
                raise
            raise DamagedStoreError(
                f"{folder}: the array 'flow' is not laid out as flowreel does ({error!r})"
            ) from error
        self._indexes: dict[int, Array] = {}

    def _read_layout(self, array: dict[str, Any]) -> None:
        count, components, height, width = array["shape"]
        sharding = array["codecs"][0]["configuration"]
        if components != 2 or sharding["chunk_shape"] != [1, 2, height, width]:
            raise ValueError(f"chunks of {sharding['chunk_shape']} in an array of {array['shape']}")
        self.shape: tuple[int, int, int, int] = (count, 2, height, width)
        self.shard_length: int = array["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._codec = FlowCodec(
            height,
            width,
            np.dtype(array["data_type"]).newbyteorder("<"),
            float(array["attributes"].get("scale_factor", 1.0)),
            float(self.attrs["max_error"]),
            codec_of([step["name"] for step in sharding["codecs"]]),
        )

    def __len__(self) -> int:
        """Flows the store holds, or will hold when finished (those an unfinished store has: ``available``)."""
        return self.shape[0]

    def __repr__(self) -> str:
        state = "complete" if self.complete else f"unfinished, {self.available} flows available"
        return f"<FlowStore {self.path!r} {self.shape} {state}>"

    @property
    def available(self) -> int:
        """How many flows from the first on are there. Looks at the disk: an unfinished store may be growing."""
        if self.complete:
            return len(self)
        count = 0
        for shard in range(math.ceil(len(self) / self.shard_length)):
            present = self._index(shard)[:, 0] != INDEX_MISSING
            count += int(present.argmin()) if not present.all() else len(present)
            if not present.all():
                break
        return min(count, len(self))

    @cached_property
    def timestamps_s(self) -> Float64Array:
        """(N,) seconds, presentation time of each pair's first frame; NaN where not written yet."""
        return self._coordinate("timestamp_s")

    @cached_property
    def timestamps_to_s(self) -> Float64Array:
        """(N,) seconds, of each pair's second frame."""
        return self._coordinate("timestamp_to_s")

    @cached_property
    def frame(self) -> Int64Array:
        """(N,) number of each pair's first frame in the source; -1 where not written yet."""
        return self._coordinate("frame")

    @cached_property
    def frame_to(self) -> Int64Array:
        """(N,) number of each pair's second frame."""
        return self._coordinate("frame_to")

    def __getitem__(self, key: Any) -> Float32Array:
        if isinstance(key, slice):
            return self._read_many(range(*key.indices(len(self))))
        if isinstance(key, (Sequence, np.ndarray)) and not isinstance(key, str):
            if isinstance(key, np.ndarray) and (key.dtype.kind not in "iu" or key.ndim != 1):
                raise TypeError(f"an index array is 1-D and of integers, got {key.ndim}-D {key.dtype}")
            return self._read_many([self._position(number) for number in key])
        flow: Float32Array = np.empty(self.shape[1:], np.float32)
        self._read(self._position(key), flow)
        return flow

    def __iter__(self) -> Iterator[Float32Array]:
        return (self[number] for number in range(len(self)))

    def problems(self) -> Iterator[str]:
        """Reads every chunk and yields one line for each thing that is wrong; nothing when the store is sound."""
        if not self.complete:
            yield f"unfinished: {self.available} of {len(self)} flows are there"
        for name in COORDINATES:
            try:
                self._coordinate(name)
            except DamagedStoreError as error:
                yield str(error)
        flow: Float32Array = np.empty(self.shape[1:], np.float32)
        for number in range(self.available if self.complete else len(self)):
            try:
                self._read(number, flow)
            except DamagedStoreError as error:
                yield str(error)
            except StoreError:
                continue  # not written yet: said above

    def summary(self) -> dict[str, Any]:
        """What the store holds and what it costs: sizes in bytes, ``ratio`` against the same flows as ``.flo``."""
        _, _, height, width = self.shape
        available = self.available
        disk_bytes = sum(file.stat().st_size for file in self._folder.rglob("*") if file.is_file())
        flo_bytes = available * (12 + 8 * height * width)
        return {
            "path": self.path,
            "complete": self.complete,
            "flows": len(self),
            "available": available,
            "width": width,
            "height": height,
            "dtype": str(self._codec.dtype),
            "codec": self._codec.codec,
            "max_error": self._codec.max_error,
            "step": None if self._codec.lossless else self._codec.step,
            "shard_length": self.shard_length,
            "disk_bytes": disk_bytes,
            "flo_bytes": flo_bytes,
            "ratio": flo_bytes / disk_bytes,
        }

    def _position(self, key: Any) -> int:
        if isinstance(key, (bool, np.bool_)):
            raise TypeError("a flow's number is an integer, got a truth value")
        number = operator.index(key)
        if not -len(self) <= number < len(self):
            raise IndexError(f"flow {number} of a store of {len(self)}")
        return number % len(self)

    def _read_many(self, numbers: Sequence[int]) -> Float32Array:
        flows: Float32Array = np.empty((len(numbers), *self.shape[1:]), np.float32)
        for number, flow in zip(numbers, flows, strict=True):
            self._read(number, flow)
        return flows

    def _read(self, number: int, out: Float32Array) -> None:
        """Decodes one flow into out: (2, H, W)."""
        shard, place = divmod(number, self.shard_length)
        offset, length = (int(value) for value in self._index(shard)[place])
        if offset == INDEX_MISSING:
            if self.complete:
                raise DamagedStoreError(f"{self.path}: {self._name(number)} is missing")
            raise StoreError(
                f"{self.path} is unfinished: {self._name(number)} is not there yet, the first {self.available} are"
            )
        try:
            with open(flow_shard(self._folder, shard), "rb") as file:
                file.seek(offset)
                self._codec.decode(file.read(length), out)
        except DamagedStoreError as error:
            raise DamagedStoreError(f"{self.path}: {self._name(number)}: {error}") from error

    def _index(self, shard: int) -> Array:
        """(S, 2) offset and length of the shard's chunks; all missing when there is no such file."""
        if shard in self._indexes:
            return self._indexes[shard]
        size = index_bytes(self.shard_length)
        try:
            with open(flow_shard(self._folder, shard), "rb") as file:
                file.seek(-size, os.SEEK_END)
                index = unpack_index(file.read())
        except FileNotFoundError:
            return np.full((self.shard_length, 2), INDEX_MISSING, np.uint64)
        except (OSError, DamagedStoreError) as error:
            first, last = shard * self.shard_length, min((shard + 1) * self.shard_length, len(self)) - 1
            raise DamagedStoreError(
                f"{self.path}: the index of shard {shard} is damaged: flows {first} to {last} cannot be read"
            ) from error
        if self.complete or (index[:, 0] != INDEX_MISSING).all():  # a ragged one may yet be replaced by a resume
            self._indexes[shard] = index
        return index

    def _coordinate(self, name: str) -> Array:
        """One of the arrays beside ``flow``, whole: it has one number a flow."""
        dtype, fill = COORDINATES[name]
        length = self.shard_length
        values = np.full(math.ceil(len(self) / length) * length, fill, dtype)
        for shard in range(len(values) // length):
            try:
                chunk = (self._folder / name / "c" / str(shard)).read_bytes()
                values[shard * length : (shard + 1) * length] = decompress(chunk, "blosc", values.dtype, length)
            except FileNotFoundError as error:
                if self.complete:
                    raise DamagedStoreError(f"{self.path}: chunk {shard} of {name} is missing") from error
            except DamagedStoreError as error:
                raise DamagedStoreError(f"{self.path}: chunk {shard} of {name}: {error}") from error
        values = values[: len(self)]
        values.flags.writeable = False
        return values

    def _name(self, number: int) -> str:
        """ "flow 17 (frame 34)", or without the frame when that cannot be told."""
        try:
            frame = int(self.frame[number])
        except DamagedStoreError:
            frame = -1
        return f"flow {number}" if frame < 0 else f"flow {number} (frame {frame})"


def _group_attributes(folder: Path) -> dict[str, Any]:
    """The group's "flowreel" attribute. Raises DamagedStoreError when it is not there or from a newer version."""
    attributes = _read_json(folder / "zarr.json").get("attributes", {}).get("flowreel")
    if not isinstance(attributes, dict):
        raise DamagedStoreError(f"{folder} is a Zarr group, but not a flow store: it has no 'flowreel' attribute")
    if attributes.get("format_version") != FORMAT_VERSION:
        raise DamagedStoreError(
            f"{folder} has store format {attributes.get('format_version')}, this version reads {FORMAT_VERSION}: "
            "a newer flowreel may have written it"
        )
    return attributes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{path.parent} is not a Zarr v3 store: it has no zarr.json") from error
    except ValueError as error:
        raise DamagedStoreError(f"{path} is not readable metadata: {error}") from error
    if not isinstance(content, dict):
        raise DamagedStoreError(f"{path} is not readable metadata: expected an object")
    return content
