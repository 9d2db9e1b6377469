"""Checks whether a store is sound: reads every chunk, and reports what is wrong with each flow that cannot be used.

In order: whether the store is finished; whether its metadata is as written, and the group's copy agrees; whether times
and frame numbers can be read, are in order, are consistent and are those written; every flow; and files that do not
belong. Memory: the times and frame numbers, the shards' indexes and checksums, and a few flows.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flowreel.engine.errors import DamagedStoreError
from flowreel.sinks.compressors import decompress
from flowreel.sinks.native import vector_places
from flowreel.sinks.parallel import OrderedPool
from flowreel.sinks.shard_file import INDEX_MISSING
from flowreel.sinks.store_checksums import ATTRIBUTES_CHECKSUM, attributes_checksum
from flowreel.sinks.store_files import SPARE_BYTES
from flowreel.sinks.store_layout import (
    BESIDE_FLOW,
    COORDINATES,
    check_coordinate,
    coordinate_chunk,
    numbers_in,
    open_file,
    read_json,
)
from flowreel.sinks.store_reader import DECODE_THREADS

if TYPE_CHECKING:
    from flowreel.engine.data import Array
    from flowreel.sinks.store_reader import FlowStore


@dataclass(frozen=True)
class StoreProblem:
    """One thing that is wrong with a store."""

    what: str
    flow: int | None = None  # which flow is concerned, None: the store as a whole
    frame: int | None = None  # number of that flow's first frame in the source, None when that cannot be told

    def __str__(self) -> str:
        if self.flow is None:
            return self.what
        return f"flow {self.flow}{'' if self.frame is None else f' (frame {self.frame})'}: {self.what}"


def check_store(store: FlowStore, progress: Callable[[int], None] | None) -> Iterator[StoreProblem]:
    """Everything that is wrong with the store; nothing when it is sound.

    Args:
        progress: is called with the number of flows read so far.
    """
    is_cache = store.layout.cache  # which is sound whichever flows it holds
    if not store.complete and not is_cache:
        yield StoreProblem(store.state)
    try:
        yield from _check_metadata(store)
        yield from _check_coordinates(store)
        yield from (StoreProblem(what) for _, _, what in damaged_places(store))
        yield from _check_flows(store, progress or (lambda flows: None))
        if store.complete and not is_cache:
            yield from _check_files(store)
    except DamagedStoreError as error:  # a folder that cannot be listed: there is no going on
        yield StoreProblem(str(error))


def _check_metadata(store: FlowStore) -> Iterator[StoreProblem]:
    """The metadata that reading flow does not need, and that opening the store therefore did not check."""
    group = read_json(store.folder / "zarr.json")
    if group["attributes"].get(ATTRIBUTES_CHECKSUM) != attributes_checksum(store.attrs):
        yield StoreProblem("its attribute flowreel, which records where the flow comes from, is not what was written")
    for name in sorted(group.keys() - {"zarr_format", "node_type", "attributes", "consolidated_metadata"}):
        yield StoreProblem(f"zarr.json has an entry that Zarr does not know: {reprlib.repr(name)}")
    copies = group.get("consolidated_metadata")
    if copies is None or not store.complete:
        return
    if (copies.get("kind"), copies.get("must_understand")) != ("inline", False):
        yield StoreProblem("zarr.json does not say of its copies of the arrays' metadata that they are that")
    for name in ("flow", *store.layout.arrays, *(() if store.layout.native is None else ("y", "x"))):
        try:
            own = read_json(store.folder / name / "zarr.json")
        except DamagedStoreError as error:
            if name in ("y", "x"):  # the others are reported with their values
                yield StoreProblem(str(error))
            continue
        if differing := _differing(own, _entries(copies["metadata"], name)):
            yield StoreProblem(f"the metadata of {name} and the group's copy of it differ: {', '.join(differing)}")


def _differing(own: dict[str, Any], copy: dict[str, Any]) -> list[str]:
    """The entries that differ. Attributes that somebody added to an array need not be in the copy."""
    attributes, copied = _entries(own, "attributes"), _entries(copy, "attributes")
    differing = {key for key in own.keys() | copy.keys() if own.get(key) != copy.get(key)} - {"attributes"}
    return sorted(differing | {key for key in copied if attributes.get(key) != copied[key]})


def _entries(metadata: dict[str, Any], name: str) -> dict[str, Any]:
    """An object in a JSON object; an empty one when it is missing or something else."""
    value = metadata.get(name)
    return value if isinstance(value, dict) else {}


def _check_coordinates(store: FlowStore) -> Iterator[StoreProblem]:
    """Times and frame numbers of the flows that are there: readable, known, and in order."""
    count = len(store) if store.layout.cache else store.available
    shards = range(math.ceil(count / store.layout.chunk_length))
    arrays: dict[str, Array] = {}
    for name in store.layout.arrays:
        problems, values = _read_array(store, name, shards)
        yield from map(StoreProblem, problems)
        if name in COORDINATES and not problems:
            arrays[name] = values[:count]
    for name, values in arrays.items():
        unknown = ~np.isfinite(values) | (values < 0 if name.startswith("frame") else False)
        yield from _at(store, unknown, f"its {name} is not known")
        with np.errstate(invalid="ignore", over="ignore"):  # infinite times, or nearly so
            back = np.diff(values) < 0 if name.startswith("timestamp") else np.diff(values) <= 0
        back &= ~(unknown[1:] | unknown[:-1])  # reported above
        yield from _at(store, np.concatenate([[False], back]), f"its {name} is not after the one before")
    if len(arrays) == len(COORDINATES):
        yield from _check_pairs(
            store, *(arrays[name] for name in ("frame", "frame_to", "timestamp_s", "timestamp_to_s"))
        )
    misplaced = np.zeros(count, bool)
    for shard in shards:
        misplaced[[flow for flow in store.files.misplaced_times(shard) if flow < count]] = True
    yield from _at(store, misplaced, "its times and frame numbers are not those written")


def _read_array(store: FlowStore, name: str, shards: range) -> tuple[list[str], Array]:
    """One array beside ``flow``, and what is wrong with its metadata and with each chunk that cannot be read."""
    dtype, fill = BESIDE_FLOW[name]
    length = store.layout.chunk_length
    values = np.full(len(shards) * length, fill, dtype)
    problems = []
    try:
        check_coordinate(store.folder, name, store.layout, store.complete or store.layout.cache)
    except DamagedStoreError as error:
        return [str(error)], values
    for shard in shards:
        try:
            values[shard * length :][:length] = store.files.coordinate_part(name, shard)
        except DamagedStoreError as error:
            problems.append(str(error))
    return problems, values


def _check_pairs(
    store: FlowStore, frame: Array, frame_to: Array, time_s: Array, time_to_s: Array
) -> Iterator[StoreProblem]:
    """A flow joins two frames, times ordered as their numbers; and a frame has the same time in all its pairs."""
    yield from _at(store, (frame == frame_to) & (frame >= 0), "it leads nowhere")
    known = (frame >= 0) & (frame_to >= 0) & np.isfinite(time_s) & np.isfinite(time_to_s)
    with np.errstate(invalid="ignore", over="ignore"):
        ahead = np.sign(time_to_s - time_s) * np.sign(frame_to - frame) < 0
        same = np.zeros_like(known)
        for end, begin, end_s, begin_s in ((frame_to, frame, time_to_s, time_s), (frame, frame_to, time_s, time_to_s)):
            same[1:] |= (end[:-1] == begin[1:]) & (end_s[:-1] != begin_s[1:]) & known[:-1]
    yield from _at(store, ahead & known, "its times run the other way than its frames")
    yield from _at(store, same & known, "it begins at another time than the one before ends")


def damaged_places(store: FlowStore) -> Iterator[tuple[str, Array, str]]:
    """For a store of coarse predictions: the arrays that tell other readers where the vectors lie.

    Of each that is damaged its name, the values it should hold, and what is wrong with it.
    """
    layout = store.layout
    if layout.native is None:
        return
    for name, expected in zip(("y", "x"), vector_places(layout.native, layout.height, layout.width), strict=True):
        try:
            with open_file(coordinate_chunk(store.folder, name, 0)) as file:
                places = decompress(file.read(16 * len(expected) + SPARE_BYTES), "blosc", expected.dtype, len(expected))
        except FileNotFoundError:
            yield name, expected, f"chunk 0 of {name} is missing"
        except (OSError, DamagedStoreError) as error:
            yield name, expected, f"chunk 0 of {name}: {error}"
        else:
            if not np.array_equal(places, expected):
                yield name, expected, f"{name} does not say where the vectors lie"


def _at(store: FlowStore, wrong: Array, what: str) -> Iterator[StoreProblem]:
    for number in np.flatnonzero(wrong).tolist():
        yield StoreProblem(what, number, store.frame_of(number))


def _check_flows(store: FlowStore, progress: Callable[[int], None]) -> Iterator[StoreProblem]:
    """Decodes every flow that should be there, a few in parallel, and reports on them in order."""
    found: list[StoreProblem] = []
    done = 0

    def examine(number: int) -> tuple[int, str | None]:
        try:
            there = store.files.flow(number, np.empty(store.shape[1:], np.float32))
        except DamagedStoreError as error:
            return number, str(error)
        return number, None if there else "missing"

    def take(result: tuple[int, str | None]) -> None:
        nonlocal done
        number, what = result
        if what is not None:
            found.append(StoreProblem(what, number, store.frame_of(number)))
        done += 1
        progress(done)

    with closing(OrderedPool(take, DECODE_THREADS)) as pool:
        for number in _expected(store):
            pool.submit(examine, number, nbytes=store.flow_bytes)
            yield from found
            found.clear()
        pool.drain()
        yield from found


def _expected(store: FlowStore) -> Iterator[int]:
    """The flows to read: all; of an unfinished store or a cache, those that have been published."""
    if store.complete:
        yield from range(len(store))
        return
    if store.layout.cache:
        yield from (number for number in range(len(store)) if store.files.index(number) is not None)
        return
    length = store.shard_length
    for shard in numbers_in(store.folder / "flow" / "c"):
        numbers = np.arange(shard * length, min((shard + 1) * length, len(store)))
        try:
            index = store.files.index(shard)
        except DamagedStoreError:
            yield from numbers.tolist()  # each of them will be found damaged
            continue
        if index is not None:
            yield from numbers[index[: len(numbers), 0] != INDEX_MISSING].tolist()


def _check_files(store: FlowStore) -> Iterator[StoreProblem]:
    """A finished store holds no shards after its last flow, and nothing left by a killed run."""
    shards = math.ceil(len(store) / store.shard_length)
    for name in ("flow", *store.layout.arrays):
        surplus = [number for number in numbers_in(store.folder / name / "c") if number >= shards]
        yield from (StoreProblem(f"{name}/c/{number} lies behind the last flow") for number in surplus)
    for path in sorted(store.folder.rglob("*.partial")):
        yield StoreProblem(f"{path.relative_to(store.folder).as_posix()} is a leftover of a run that was cut short")
