"""Chunks in the wrong place: each is intact by its own checksum, but not the flow that was written there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import DamagedStoreError
from flowreel.engine.verify import verify
from flowreel.sinks.compressors import compress
from flowreel.sinks.shard_file import pack_shard
from flowreel.sinks.store_layout import BESIDE_FLOW, CHECKSUMS, COORDINATES, coordinate_chunk, flow_shard
from flowreel.sinks.store_reader import FlowStore, open_store
from flowreel.sinks.zarr_store import ZarrSink

T, H, W, SHARD = 8, 5, 7, 3  # the last shard holds two flows
INFO = FlowInfo(H, W, Fraction(25), T + 1, SourceId("clip.mp4", 9, 1.0), {"batch": 2})
MISPLACED = "another flow than was written here"


def moving(seed: int = 0) -> Any:
    """(T, 2, H, W) float32, multiples of 1/32 px, so that storing changes nothing."""
    flows = np.random.default_rng(seed).integers(-600, 600, (T, 2, H, W)) / np.float32(32)
    return flows.astype(np.float32)


def make(path: Path, seed: int = 0, begin_s: float = 0.0, complete: bool = True, **changes: Any) -> FlowStore:
    """A store of every second frame of a clip at 25 frames per second."""
    sink = ZarrSink(str(path), SinkConfig(**{"shard_bytes": SHARD * 8 * H * W, **changes}))
    sink.open(INFO)
    frame = 2 * np.arange(T)
    times = begin_s + frame / 25, begin_s + (frame + 2) / 25
    sink.write(FlowBatch(torch.from_numpy(moving(seed)), 0, frame, frame + 2, *times))
    sink.commit(complete)
    return open_store(path)


def chunks_of(store: FlowStore, shard: int) -> list[bytes]:
    index = store.files.index(shard)
    assert index is not None
    return [store.files.chunk(shard, int(offset), int(size)) for offset, size in index if size < 1 << 32]


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def swap_shards(store: FlowStore, _: Path) -> list[int]:
    exchange(flow_shard(store.folder, 0), flow_shard(store.folder, 1))
    return [0, 1, 2, 3, 4, 5]


def swap_chunks(store: FlowStore, _: Path) -> list[int]:
    first, second, third = chunks_of(store, 1)
    flow_shard(store.folder, 1).write_bytes(b"".join(pack_shard([(third,), (second,), (first,)], SHARD)))
    return [3, 5]


def repeat_a_chunk(store: FlowStore, _: Path) -> list[int]:
    first, second, _third = chunks_of(store, 0)
    flow_shard(store.folder, 0).write_bytes(b"".join(pack_shard([(first,), (second,), (second,)], SHARD)))
    return [2]


def shard_of_another_store(store: FlowStore, folder: Path) -> list[int]:
    other = make(folder / "other.zarr", seed=1, codec=store.layout.codec.codec)
    shutil.copy(flow_shard(other.folder, 2), flow_shard(store.folder, 2))
    return [6, 7]


def shards_with_their_checksums(store: FlowStore, _: Path) -> list[int]:
    exchange(coordinate_chunk(store.folder, "flow_crc32c", 0), coordinate_chunk(store.folder, "flow_crc32c", 1))
    return swap_shards(store, _)


def shards_with_all_arrays(store: FlowStore, _: Path) -> list[int]:
    for name in BESIDE_FLOW:
        exchange(coordinate_chunk(store.folder, name, 0), coordinate_chunk(store.folder, name, 1))
    return swap_shards(store, _)


WAYS = [swap_shards, swap_chunks, repeat_a_chunk, shard_of_another_store, shards_with_their_checksums]


def test_the_checksums_are_those_the_module_describes(tmp_path: Path) -> None:
    store = make(tmp_path / "X.zarr")
    flow = np.concatenate([store.files.coordinate_chunk("flow_crc32c", shard) for shard in range(3)])
    time = np.concatenate([store.files.coordinate_chunk("time_crc32c", shard) for shard in range(3)])
    for shard in range(3):
        for place, chunk in enumerate(chunks_of(store, shard)):
            number = SHARD * shard + place
            assert int.from_bytes(chunk[-4:], "little") == google_crc32c.value(chunk[:-4])
            assert flow[number] == google_crc32c.value(np.int64(number).tobytes() + chunk[-4:])
            frames = np.array([number, 2 * number, 2 * number + 2], "<i8").tobytes()
            times = np.array([store.timestamps_s[number], store.timestamps_to_s[number]], "<f8").tobytes()
            assert time[number] == google_crc32c.value(frames + times)
    assert flow[T:].tolist() == time[T:].tolist() == [0]
    assert sorted(BESIDE_FLOW) == sorted(
        path.name for path in store.folder.iterdir() if path.name not in ("flow", "zarr.json")
    )


@pytest.mark.parametrize("codec", ["blosc", "pcodec2d"])
@pytest.mark.parametrize("way", WAYS)
def test_misplaced_flow_is_refused_and_named(
    tmp_path: Path, way: Callable[[FlowStore, Path], list[int]], codec: str
) -> None:
    wrong = way(make(tmp_path / "X.zarr", codec=codec), tmp_path)
    store = open_store(tmp_path / "X.zarr")
    for number in range(T):
        if number not in wrong:
            assert np.array_equal(store[number], moving()[number])
            continue
        for read in (lambda n: store[n], lambda n: store[n, 0, 1:2], lambda n: store.valid[n]):
            with pytest.raises(DamagedStoreError, match=rf"flow {number} \(frame {2 * number}\): {MISPLACED}"):
                read(number)
    assert np.array_equal(store.frame, 2 * np.arange(T))
    assert list(map(str, store.check())) == [f"flow {number} (frame {2 * number}): {MISPLACED}" for number in wrong]


def test_neighbours_are_one_finding_with_their_frames(tmp_path: Path) -> None:
    swap_shards(make(tmp_path / "X.zarr"), tmp_path)
    assert list(map(str, verify(tmp_path / "X.zarr").findings)) == [f"flows 0 to 5 (frames 0 to 10): {MISPLACED}"]


def test_a_shard_with_all_that_belongs_to_it_is_still_not_in_its_place(tmp_path: Path) -> None:
    wrong = shards_with_all_arrays(make(tmp_path / "X.zarr"), tmp_path)
    store = open_store(tmp_path / "X.zarr")
    for number in wrong:
        with pytest.raises(DamagedStoreError, match=f"flow {number}: {MISPLACED}"):
            store[number]
    with pytest.raises(DamagedStoreError, match="times and frame numbers of flow 0 are not those written"):
        _ = store.frame
    found = list(map(str, store.check()))
    for number in wrong:
        assert f"flow {number}: {MISPLACED}" in found
        assert f"flow {number}: its times and frame numbers are not those written" in found


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize("name", COORDINATES)
def test_times_of_elsewhere_are_refused_and_the_flow_is_not(tmp_path: Path, name: str, unfinished: bool) -> None:
    """Intact, plausible, increasing values that are only a little off: times of another store, frames shifted by one.

    Times are refused then, but the flow can still be read.
    """
    other = make(tmp_path / "other.zarr", begin_s=0.001)
    store = make(tmp_path / "X.zarr", complete=not unfinished)
    values = other.files.coordinate_chunk(name, 1) + (1 if name.startswith("frame") else 0)
    coordinate_chunk(store.folder, name, 1).write_bytes(compress(values, "blosc"))
    store = FlowStore(store.folder)
    with pytest.raises(DamagedStoreError, match="flow 3 are not those written"):
        getattr(store, {"timestamp_s": "timestamps_s", "timestamp_to_s": "timestamps_to_s"}.get(name, name))
    assert np.array_equal(store[:], moving())
    told = [f"flow {number}: its times and frame numbers are not those written" for number in (3, 4, 5)]
    assert [problem for problem in map(str, store.check()) if "not those" in problem] == told


def test_one_changed_value_of_any_array_is_found(tmp_path: Path) -> None:
    """Changes with a correct checksum around them: NaN, a repeated value, the smallest possible change, and others."""
    store = make(tmp_path / "X.zarr")
    for name in BESIDE_FLOW:
        for number in range(T):
            path = coordinate_chunk(store.folder, name, number // SHARD)
            sound = path.read_bytes()
            values = store.files.coordinate_chunk(name, number // SHARD).copy()
            before = values[number % SHARD]
            changes = [before + 1, values[(number + 1) % SHARD], 0]
            if values.dtype.kind == "f":
                changes += [np.nan, np.inf, -before - 1, np.nextafter(before, 99)]
            for change in changes:
                if change == before:
                    continue
                values[number % SHARD] = change
                path.write_bytes(compress(values, "blosc"))
                found = list(FlowStore(store.folder).check())
                assert number in {problem.flow for problem in found}, (name, number, change)
            path.write_bytes(sound)
    assert list(FlowStore(store.folder).check()) == []


@pytest.mark.parametrize("name", [*BESIDE_FLOW])
@pytest.mark.parametrize("length", [0, SHARD - 1, SHARD + 1, 500])
def test_chunks_of_another_length_are_found(tmp_path: Path, name: str, length: int) -> None:
    store = make(tmp_path / "X.zarr")
    values = np.resize(store.files.coordinate_chunk(name, 1), length)
    coordinate_chunk(store.folder, name, 1).write_bytes(compress(values, "blosc"))
    (problem,) = map(str, FlowStore(store.folder).check())
    assert problem.startswith(f"chunk 1 of {name}: ")
    assert problem.endswith("(flows 3 to 5)")


def test_every_damaged_chunk_is_told_not_the_first_alone(tmp_path: Path) -> None:
    store = make(tmp_path / "X.zarr")
    coordinate_chunk(store.folder, "frame", 0).unlink()
    coordinate_chunk(store.folder, "frame", 1).write_bytes(bytes(16 * SHARD + 4097))
    coordinate_chunk(store.folder, "frame", 2).unlink()
    assert list(map(str, store.check())) == [  # without an extra problem for each unknown frame in them
        "chunk 0 of frame is missing (flows 0 to 2)",
        "chunk 1 of frame: it is longer than 3 values can be (flows 3 to 5)",
        "chunk 2 of frame is missing (flows 6 to 7)",
    ]


@pytest.mark.parametrize("name", CHECKSUMS)
def test_lost_checksums_hide_nothing_and_are_missed(tmp_path: Path, name: str) -> None:
    store = make(tmp_path / "X.zarr")
    coordinate_chunk(store.folder, name, 1).unlink()
    store = open_store(store.path)
    assert np.array_equal(store[:], moving())
    assert np.array_equal(store.frame, 2 * np.arange(T))
    assert list(map(str, store.check())) == [f"chunk 1 of {name} is missing (flows 3 to 5)"]
    (store.folder / name / "zarr.json").unlink()
    assert any(f"{name} is not a Zarr v3 store" in problem for problem in map(str, open_store(store.path).check()))


def test_checksums_cannot_be_argued_away_in_the_metadata(tmp_path: Path) -> None:
    store = make(tmp_path / "X.zarr")
    for path in (store.folder / "zarr.json", store.folder / "flow" / "zarr.json"):
        path.write_text(path.read_text().replace("flow_crc32c time_crc32c", "other"))
    swap_shards(store, tmp_path)
    with pytest.raises(DamagedStoreError, match=MISPLACED):
        open_store(store.path)[0]
