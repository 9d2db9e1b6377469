"""Reading a store: indexing as in NumPy without needless decoding, and damage always reported, never hidden."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import (
    DamagedStoreError,
    FlowreelError,
    MissingDependencyError,
    StoreError,
    StoreNotFoundError,
    frame_of,
)
from flowreel.sinks import store_check, store_files, store_reader
from flowreel.sinks.chunk_pieces import crc32c
from flowreel.sinks.codecs import FlowCodec
from flowreel.sinks.compressors import compress
from flowreel.sinks.shard_file import pack_shard
from flowreel.sinks.store_check import StoreProblem
from flowreel.sinks.store_checksums import COVERED, flow_checksums, time_checksums
from flowreel.sinks.store_files import StoreFiles
from flowreel.sinks.store_layout import CHECKSUMS, COORDINATES, coordinate_chunk, flow_shard, open_file
from flowreel.sinks.store_reader import FlowStore, open_store
from flowreel.sinks.zarr_store import ZarrSink
from tests.sinks.waiting import flush

T, H, W = 7, 6, 9
SHARD = 3  # flows
ARRAYS = ("flow", *COORDINATES)


def moving(count: int = T, height: int = H, width: int = W) -> Any:
    """(N, 2, H, W) float32, multiples of 1/32 px, so that storing changes nothing; one hole and one border of NaN."""
    flows = np.random.default_rng(count).integers(-600, 600, (count, 2, height, width)) / np.float32(32)
    flows[1:2, :, 2, 3] = np.nan
    flows[:, :, :, 0] = np.nan
    return flows.astype(np.float32)


def make(
    path: Path,
    flows: Any,
    *,
    announced: int | None = None,
    complete: bool = True,
    backward: bool = False,
    **changes: Any,
) -> FlowStore:
    """A store of every second frame of a clip at 25 frames per second."""
    count, _, height, width = flows.shape
    sink = ZarrSink(str(path), SinkConfig(**{"shard_bytes": SHARD * 8 * height * width, **changes}))
    sink.open(
        FlowInfo(height, width, Fraction(25), (announced or count) + 1, SourceId("clip.mp4", 9, 1.0), {"batch": 2})
    )
    frame = 2 * np.arange(count)
    first, second = (frame + 2, frame) if backward else (frame, frame + 2)
    sink.write(FlowBatch(torch.from_numpy(flows), 0, first, second, first / 25, second / 25))
    sink.commit(complete)
    return open_store(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FlowStore:
    """A store that tests must not change."""
    return make(tmp_path_factory.mktemp("store") / "X.zarr", moving())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gains one entry, the thread's number, for each chunk that is decoded."""
    threads: list[int] = []
    real = FlowCodec.decode

    def decode(self: FlowCodec, chunk: bytes, out: Any) -> None:
        threads.append(threading.get_ident())
        real(self, chunk, out)

    monkeypatch.setattr(FlowCodec, "decode", decode)
    return threads


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other, equal_nan=True)


def spoil(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def test_names_of_flows_counted_from_the_end(store: FlowStore) -> None:
    assert [store.frame_of(number) for number in (1, -1)] == [2, 2 * (len(store) - 1)]
    assert store.name_of(-1) == store.name_of(len(store) - 1) == f"flow {len(store) - 1} (frame {2 * (len(store) - 1)})"


def test_what_is_damaged_concerns_its_own_frame(tmp_path: Path) -> None:
    """The error names the damaged flow's frame, not the frame that the reader had reached."""
    damaged = make(tmp_path / "X.zarr", moving())
    spoil(damaged.folder / "flow" / "c" / "0" / "0" / "0" / "0", 40)
    with pytest.raises(DamagedStoreError, match="flow 0") as caught:
        damaged[0:3]
    assert frame_of(caught.value, 99) == 0


def test_a_store_that_is_not_there_is_named_as_it_was(tmp_path: Path) -> None:
    for name, beside in (("X.zarr", True), ("X.zarr.partial", False)):
        with pytest.raises(StoreNotFoundError) as caught:
            open_store(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert (f"{tmp_path / 'X.zarr.partial'}" in str(caught.value)) if beside else "none" not in str(caught.value)


# Indexing


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=hnp.basic_indices((T, 2, H, W), allow_newaxis=False))
def test_basic_indexing_is_numpys(store: FlowStore, decoded: list[int], key: Any) -> None:
    decoded.clear()
    expected = moving()[key]
    assert same(store[key], expected)
    numbers = np.broadcast_to(np.arange(T)[:, None, None, None], (T, 2, H, W))[key]
    assert len(decoded) == len(np.unique(numbers))


@settings(max_examples=80, deadline=None)
@given(
    numbers=st.lists(st.integers(-T, T - 1), max_size=9),
    inside=hnp.basic_indices((2, H, W), allow_newaxis=False, allow_ellipsis=False),
    form=st.sampled_from([list, np.array, lambda numbers: np.array(numbers, np.int8), range]),
)
def test_flows_by_number_and_crops_of_them(store: FlowStore, numbers: list[int], inside: Any, form: Any) -> None:
    key = (
        range(len(numbers)) if form is range and len(numbers) <= T else form(numbers) if form is not range else numbers
    )
    if isinstance(key, np.ndarray) and not len(key):
        key = key.astype(int)
    inside = inside if isinstance(inside, tuple) else (inside,)
    assert same(store[(key, *inside)], moving()[np.array(key, int)][(slice(None), *inside)])


@pytest.mark.parametrize("form", [list, np.array, lambda mask: list(np.array(mask))])
def test_masks_pick_flows(store: FlowStore, decoded: list[int], form: Any) -> None:
    mask = form([False, True, False, False, True, True, False])
    assert same(store[mask], moving()[[1, 4, 5]])
    assert same(store[mask, 1, 2:4], moving()[[1, 4, 5], 1, 2:4])
    assert len(decoded) == 6
    assert store[form([False] * T)].shape == (0, 2, H, W)
    for wrong in ([True] * (T - 1), [True] * (T + 1)):
        with pytest.raises(IndexError, match="truth values for 7 flows"):
            store[form(wrong)]
    with pytest.raises(IndexError):
        store[np.zeros(0, bool)]


def test_what_is_named_twice_is_decoded_once(store: FlowStore, decoded: list[int]) -> None:
    assert same(store[[3, 1, 3, -4]], moving()[[3, 1, 3, 3]])
    assert len(decoded) == 2
    assert same(store[np.array([3, 1, 3], np.uint8)], moving()[[3, 1, 3]])


def test_keys_that_are_none(store: FlowStore) -> None:
    for outside in (T, -T - 1, (0, 2), (0, 0, H), (0, 0, 0, -W - 1), [0, T], (0, 0, 0, 0, 0), (..., 0, ...)):
        with pytest.raises(IndexError):
            store[outside]
    for strange in (True, 1.5, "1", b"1", None, (0, None), (0, [1]), (0, np.array([1])), [1.5], [[1]], [True, 2]):
        with pytest.raises(TypeError):
            store[strange]
    true = torch.tensor(True)  # torch takes its truth values, and arrays of one number, for integers
    for strange in (true, [true] * T, (0, true), (0, torch.tensor([1])), [torch.tensor([1])]):
        with pytest.raises(TypeError):
            store[strange]
    for array in (np.ones((2, 2), int), np.ones(2)):
        with pytest.raises(TypeError, match="an index array is 1-D"):
            store[array]


@pytest.mark.parametrize("max_error", [1 / 64, 0])
def test_valid_tells_where_there_is_a_vector(tmp_path: Path, decoded: list[int], max_error: float) -> None:
    flows = moving()
    if max_error == 0:
        flows[3, 1, 4, 5] = 2e9  # stored unchanged, but counts as unknown
    expected = ~(np.isnan(flows) | (flows > 1e9)).any(axis=1)
    valid = make(tmp_path / "X.zarr", flows, max_error=max_error).valid
    assert (valid.shape, len(valid)) == ((T, H, W), T)
    assert repr(valid) == f"<ValidVectors {(T, H, W)} bool of {str(tmp_path / 'X.zarr')!r}>"
    for key in (5, slice(1, 4), [3, 1, 3], (3, 4, 5), (slice(0, 5), slice(1, 4), slice(None, None, -2)), ...):
        assert same(valid[key], expected[key])
    decoded.clear()
    assert same(valid[1:3, 2], expected[1:3, 2])
    assert len(decoded) == 2
    with pytest.raises(IndexError):
        valid[0, H]


# Several threads


def test_threads_are_used_only_where_they_pay(
    store: FlowStore, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = threading.get_ident()
    monkeypatch.setattr(store_reader, "DECODE_THREADS", 3)
    assert same(store[::-1], moving()[::-1])
    assert set(decoded) == {here}
    decoded.clear()
    monkeypatch.setattr(store_reader, "PARALLEL_FROM_BYTES", 1)
    assert same(store[2], moving()[2])
    assert set(decoded) == {here}
    decoded.clear()
    assert same(store[[5, 0, 6, 0, 2, 1]], moving()[[5, 0, 6, 0, 2, 1]])
    assert here not in decoded
    assert 1 <= len(set(decoded)) <= 3
    assert len(decoded) == 5


def test_the_first_damaged_flow_is_the_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread is faster; and no thread stays behind."""
    monkeypatch.setattr(store_reader, "DECODE_THREADS", 3)
    monkeypatch.setattr(store_reader, "PARALLEL_FROM_BYTES", 1)
    store = make(tmp_path / "X.zarr", moving())
    for number in (2, 4, 5):
        index = store.files.index(number // SHARD)
        assert index is not None
        spoil(flow_shard(store.folder, number // SHARD), int(index[number % SHARD, 0]) + 9)
    before = set(threading.enumerate())
    for _ in range(5):
        with pytest.raises(DamagedStoreError, match=r"flow 4 \(frame 8\): checksum"):
            store[[6, 0, 4, 2, 5]]
    assert set(threading.enumerate()) <= before


def test_many_threads_may_read_one_store(tmp_path: Path) -> None:
    flows = moving(23)
    store = make(tmp_path / "X.zarr", flows, max_error=0)

    def read(seed: int) -> bool:
        numbers = np.random.default_rng(seed).integers(0, 23, 10)
        return same(store[numbers], flows[numbers]) and store.frame[numbers].tolist() == (2 * numbers).tolist()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(60)))


def test_pickled_stores_open_again_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = make(Path("X.zarr"), moving())
    assert same(store[0], moving()[0])
    data = pickle.dumps(store)
    assert len(data) < 500  # only the path is pickled, not the flow
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    assert same(again[:], moving())
    assert again.attrs == store.attrs
    assert same(store[1], moving()[1])  # the first one still works in another working folder
    assert same(next(iter(torch.utils.data.DataLoader(again, batch_size=None))).numpy(), moving()[0])


# xarray


def test_xarray_sees_what_open_zarr_sees(store: FlowStore) -> None:
    ours = store.to_xarray()
    assert ours.dims == ("time", "component", "y", "x")
    assert (ours.name, ours.dtype, ours.attrs["units"]) == ("flow", np.float32, "pixel")
    with xr.open_zarr(store.path) as data:
        theirs = data["flow"]
        assert set(ours.coords) == set(theirs.coords)
        for name in theirs.coords:
            assert np.array_equal(ours.coords[name], theirs.coords[name])
        assert np.array_equal(ours, theirs.astype(np.float32), equal_nan=True)
    assert np.isnan(ours[0, 0, 0, 0])


def test_xarray_reads_what_is_looked_at(store: FlowStore, decoded: list[int]) -> None:
    lazy = store.to_xarray()
    part = lazy.isel(time=slice(2, 6), component=0)[{"time": [3, 0], "y": slice(1, 4)}]
    assert part.shape == (2, 3, W)
    assert decoded == []
    assert np.array_equal(part, moving()[[5, 2], 0, 1:4], equal_nan=True)
    assert len(decoded) == 2
    moved = lazy.isel(time=[6, 1], component=1, y=[5, 0, 0], x=[3, 2])
    assert np.array_equal(moved, moving()[[6, 1], 1][:, [5, 0, 0]][:, :, [3, 2]], equal_nan=True)
    assert np.array_equal(lazy.isel(y=[2, 1], x=4), moving()[:, :, [2, 1], 4], equal_nan=True)
    by_time = lazy.swap_dims(time="timestamp_s").sel(timestamp_s=0.24, method="nearest")
    assert int(by_time.frame) == 6
    assert np.array_equal(pickle.loads(pickle.dumps(lazy))[-1], moving()[-1], equal_nan=True)


def test_xarray_of_an_unfinished_store_ends_where_the_flow_does(tmp_path: Path) -> None:
    lazy = make(tmp_path / "X.zarr", moving(4), announced=20, complete=False).to_xarray()
    assert lazy.shape == (4, 2, H, W)
    assert np.array_equal(lazy, moving(4), equal_nan=True)
    assert "flow" in repr(lazy)


def test_without_xarray_the_error_says_what_to_install(store: FlowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flowreel.sinks.store_xarray", raising=False)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(MissingDependencyError, match="pip install xarray"):
        store.to_xarray()


# Damage


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A finished and an unfinished store with the intact contents of every file; checked without threads, for speed."""
    folder = tmp_path_factory.mktemp("victims")
    stores = {
        "finished": make(folder / "whole.zarr", moving()),
        "unfinished": make(folder / "cut.zarr", moving(5), announced=9, complete=False, codec="zstd"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_check, "DECODE_THREADS", 0)
        yield {name: (store, contents(store.folder)) for name, store in stores.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def right_or_refused(folder: Path, flows: Any) -> int:
    """Reads every part of a store, which must be exactly right or a FlowreelError; returns how many were refused.

    Whenever a part was refused, ``check`` has to find something too.
    """
    count, refused = len(flows), 0
    try:
        store = FlowStore(folder)
    except FlowreelError:
        return 1
    there = count if store.complete else min(count, len(store))  # an unfinished store may be shorter
    frame = 2 * np.arange(there)
    parts: list[tuple[Callable[[], Any], Any]] = [
        (lambda: store[:count], flows[:there]),
        (lambda: store[1, :, 2:4], flows[1, :, 2:4]),
        (lambda: store.valid[count - 1], ~np.isnan(flows[-1, 0])),
        (lambda: store.frame[:count], frame),
        (lambda: store.frame_to[:count], frame + 2),
        (lambda: store.timestamps_s[:count], frame / 25),
        (lambda: store.timestamps_to_s[:count], (frame + 2) / 25),
    ]
    parts += [(partial(store.__getitem__, number), flows[number]) for number in range(count)]
    allowed = FlowreelError if len(store) >= count else (FlowreelError, IndexError)
    for read, expected in parts:
        try:
            assert same(read(), expected)
        except allowed:
            refused += 1
    repr(store)
    store.summary()
    found = list(store.check())
    assert found or not refused or not store.complete
    return refused


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_damage_to_any_file_is_told(victims: Any, data: st.DataObject) -> None:
    """Flipped bits, truncation, inserted or missing bytes; files that are missing, empty or replaced by another."""
    store, files = victims[data.draw(st.sampled_from(sorted(victims)))]
    name = data.draw(st.sampled_from(sorted(files)))
    sound, foreign = files[name], files["zarr.json" if name != "zarr.json" else "flow/zarr.json"]
    place = data.draw(st.integers(0, len(sound) - 1))
    flipped = sound[:place] + bytes([sound[place] ^ 1 << place % 8]) + sound[place + 1 :]
    cut, shorter, longer = sound[:place], sound[:place] + sound[place + 1 :], sound[:place] + b"\0" + sound[place:]
    damaged = data.draw(st.sampled_from([flipped, cut, shorter, longer, sound + sound, foreign, b"", None]))
    assume(store.complete or damaged is not None or not name.startswith("flow/c/"))  # else: not written yet, no damage
    path = store.folder / name
    try:
        path.unlink() if damaged is None else path.write_bytes(damaged)
        refused = right_or_refused(store.folder, moving(T if store.complete else 5))
        if name.startswith(tuple(CHECKSUMS)):  # flow can be read without them, but ``check`` reports them
            found = len(list(FlowStore(store.folder).check())) - (not store.complete)
            # An unfinished store has no second copy of the metadata yet, in which a changed optional entry would show.
            assert found or damaged != flipped or (name.endswith("zarr.json") and not store.complete)
        else:
            assert refused or damaged != flipped or name.endswith("zarr.json")
    finally:
        path.write_bytes(sound)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every part of a JSON document."""
    if path:
        yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_in(part, (*path, key))


STRANGE = [None, True, 0, 1, -1, 3, 10**6, 10**18, 10**400, 0.5, 1e308, "", "int32", "big", [], [1], {}, {"a": 1}]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_metadata_reads_right_or_is_refused(victims: Any, data: st.DataObject) -> None:
    store, files = victims[data.draw(st.sampled_from(sorted(victims)))]
    name = data.draw(st.sampled_from([name for name in sorted(files) if name.endswith("zarr.json")]))
    document = json.loads(files[name])
    *way, last = data.draw(st.sampled_from(list(paths_in(document))))
    parent = document
    for key in way:
        parent = parent[key]
    strange = data.draw(st.sampled_from([*STRANGE, "delete", "double"]))
    if strange == "delete":
        del parent[last]
    elif strange == "double":
        try:
            parent[last] = 2 * parent[last]
        except TypeError:
            parent[last] = [parent[last]] * 2
    else:
        parent[last] = strange
    path = store.folder / name
    try:
        path.write_text(json.dumps(document))
        right_or_refused(store.folder, moving(T if store.complete else 5))
    finally:
        path.write_bytes(files[name])


@pytest.mark.parametrize("length", [0, 1, 3, 4])
def test_an_unfinished_store_that_says_it_is_shorter_gives_what_it_says(victims: Any, length: int) -> None:
    """A run may end so: it lengthens the other arrays before the flow."""
    store, files = victims["unfinished"]
    path = store.folder / "flow" / "zarr.json"
    document = json.loads(files["flow/zarr.json"])
    document["shape"][0] = length
    try:
        path.write_text(json.dumps(document))
        right_or_refused(store.folder, moving(5))
        assert len(FlowStore(store.folder)) == length
    finally:
        path.write_bytes(files["flow/zarr.json"])


@pytest.mark.parametrize(
    ("array", "field", "value"),
    [
        ("flow", "attributes.scale_factor", 1 / 16),
        ("flow", "attributes.add_offset", 1.0),
        ("flow", "attributes._FillValue", 0),
        ("flow", "fill_value", 0),
        ("flow", "data_type", "uint16"),
        ("flow", "shape", [5, 3, H, W]),
        ("flow", "chunk_grid.configuration.chunk_shape", [SHARD, 2, W, H]),
        ("flow", "chunk_key_encoding.configuration.separator", "."),
        ("flow", "codecs.0.configuration.chunk_shape", [1, 2, W, H]),
        ("flow", "codecs.0.name", "sharding"),
        ("flow", "chunk_grid.name", "rectangular"),
        ("flow", "codecs.0.configuration.index_location", "start"),
        ("flow", "codecs.0.configuration.codecs.0.configuration.endian", "big"),
        ("flow", "codecs.0.configuration.index_codecs", [{"name": "crc32c"}]),
        ("flow", "storage_transformers", [{"name": "other"}]),
        ("flow", "node_type", "group"),
        ("frame", "data_type", "uint64"),
        ("frame", "fill_value", 0),
        ("frame", "chunk_grid.configuration.chunk_shape", [SHARD + 1]),
        ("frame", "codecs.0.configuration.endian", "big"),
    ],
)
def test_metadata_that_would_mislead_others_is_refused(tmp_path: Path, array: str, field: str, value: Any) -> None:
    """Our reader would still give the right numbers, but readers that rely on the metadata would not."""
    store = make(tmp_path / "X.zarr", moving(5), announced=9, complete=False)  # no second copy that would differ
    path = store.folder / array / "zarr.json"
    document = part = json.loads(path.read_text())
    *way, last = [int(key) if key.isdigit() else key for key in field.split(".")]
    for key in way:
        part = part[key]
    part[last] = value
    path.write_text(json.dumps(document))
    with pytest.raises(DamagedStoreError, match=f"array '{array}' is not laid out as flowreel does"):
        _ = open_store(tmp_path / "X.zarr").frame


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [10**15, 2, H, W]),
        ("shape", [T, 2, 10**9, 10**9]),
        ("shape", [T, 2, H, 2**62]),
        ("shape", [T, 2, 20_000, 20_000]),
        ("shape", [T, 2, 0, W]),
        ("shard", 10**15),
        ("shard", 0),
        ("shard", 2**26),
        ("flows", 2**26),
        ("side", 11_000),
    ],
)
def test_absurd_sizes_take_no_memory(tmp_path: Path, field: str, value: Any) -> None:
    """Even if all copies of the metadata agree on them."""
    store = make(tmp_path / "X.zarr", moving())
    group = json.loads((store.folder / "zarr.json").read_text())
    arrays = group["consolidated_metadata"]["metadata"]
    sharding = arrays["flow"]["codecs"][0]["configuration"]
    if field == "shape":
        arrays["flow"]["shape"], sharding["chunk_shape"] = value, [1, *value[1:]]
        arrays["flow"]["chunk_grid"]["configuration"]["chunk_shape"] = [SHARD, *value[1:]]
    elif field == "side":
        arrays["flow"]["shape"], sharding["chunk_shape"] = [T, 2, value, value], [1, 2, value, value]
        arrays["flow"]["chunk_grid"]["configuration"]["chunk_shape"] = [SHARD, 2, value, value]
    for name, array in arrays.items():
        if field == "shard":
            array["chunk_grid"]["configuration"]["chunk_shape"][0] = value
        if field == "flows":
            array["shape"][0] = value
        (store.folder / name / "zarr.json").write_text(json.dumps(array))
    (store.folder / "zarr.json").write_text(json.dumps(group))
    before = resident_bytes()
    for read in (
        lambda: open_store(store.path)[T - 1],
        lambda: open_store(store.path)[0, 0, 0, 0],
        lambda: open_store(store.path)[:],
        lambda: open_store(store.path).timestamps_s,
    ):
        try:
            result = read()
        except FlowreelError:
            continue
        assert field in ("side", "flows")
        assert same(result, moving()[T - 1]) or np.array_equal(result, 2 * np.arange(T) / 25) or np.isnan(result)
    assert resident_bytes() - before < 32 << 20
    if field == "shape" or value in (0, 10**15):
        with pytest.raises(DamagedStoreError, match="expected a whole number from"):
            open_store(store.path)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_sound_checksums_over_nonsense_are_no_trap(tmp_path: Path) -> None:
    """Correct checksums over nonsense: offsets and lengths outside the shard, and chunks of the wrong size."""
    store = make(tmp_path / "X.zarr", moving())
    chunk = compress(np.zeros(2 * H * W, "<i2"), "blosc")
    short = compress(np.zeros(5, "<i2"), "blosc")
    shard = flow_shard(store.folder, 1)
    places = compress(flow_checksums(SHARD, [chunk, short, chunk]), "blosc")
    coordinate_chunk(store.folder, "flow_crc32c", 1).write_bytes(places)
    shard.write_bytes(b"".join(pack_shard([(chunk,), (short,), (chunk,)], SHARD)))
    store = open_store(store.path)
    assert same(store[3], np.zeros((2, H, W), np.float32))
    with pytest.raises(DamagedStoreError, match=r"flow 4 \(frame 8\): holds 5 values instead of 108"):
        store[3:6]
    sizes = [(0, 2**63), (2**62, 9), (2**64 - 2, 2**64 - 1), (2**64 - 2, 2**63), (2**64 - 2, 40), (10**6, 10)]
    for offset, length in sizes:
        index = np.array([[0, len(chunk)], [offset, length], [0, len(chunk)]], "<u8").tobytes()
        shard.write_bytes(chunk + index + crc32c(index))
        with pytest.raises(DamagedStoreError, match=r"flow 4 \(frame 8\): its \d+ bytes"):
            open_store(store.path)[4]
        assert len(list(open_store(store.path).check())) == 1
        assert not open_store(store.path).files.whole(1)
    index = np.array([[0, len(chunk)], [0, 4529], [0, len(chunk)]], "<u8").tobytes()
    shard.write_bytes(chunk + bytes(5000) + index + crc32c(index))
    with pytest.raises(DamagedStoreError, match="its 4529 bytes at 0"):  # too long: no codec makes them from 216 bytes
        open_store(store.path)[4]


@pytest.mark.parametrize("place", ["zarr.json", "flow/zarr.json", "flow/c/1/0/0/0", "frame/c/1", "flow/c", "flow/c/1"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "file"])
def test_other_things_in_the_place_of_files(tmp_path: Path, place: str, kind: str) -> None:
    """A named pipe would block forever, a link may lead to itself, and a file may be where a folder should be."""
    store = make(tmp_path / "X.zarr", moving())
    path = store.folder / place
    path.rename(tmp_path / "aside")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(b"nothing of ours")
    assert right_or_refused(store.folder, moving()) or place == "frame/c/1"
    if place == "frame/c/1":
        with pytest.raises(DamagedStoreError, match=r"chunk 1 of frame.*flows 3 to 5"):
            _ = FlowStore(store.folder).frame


def test_a_store_that_goes_away_while_it_is_read(tmp_path: Path) -> None:
    unfinished = make(tmp_path / "X.zarr", moving(5), complete=False)
    assert same(unfinished[0], moving(5)[0])
    unfinished.folder.rename(tmp_path / "X.zarr")
    for number in (0, 3):  # in a shard whose index has been read already, and in another one
        with pytest.raises(StoreError, match="open it again"):
            unfinished[number]


def test_a_store_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    """The integers of the new one would be taken for multiples of the old one's step."""
    before = make(tmp_path / "X.zarr", moving(5))
    assert same(before[0], moving(5)[0])
    shutil.rmtree(before.folder)
    make(tmp_path / "X.zarr", moving(5), max_error=1.0)
    for number in (0, 3):  # in a shard whose index has been read already, and in another one
        with pytest.raises(StoreError, match="replaced since it was opened: open it again"):
            before[number]
    with pytest.raises(StoreError, match="replaced since it was opened: open it again"):
        _ = before.frame


def test_places_without_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (".", "/", ""):
        with pytest.raises(DamagedStoreError, match=r"zarr\.json"):
            open_store(place)
    for place in ("nothing", "x" * 5000, "nothing/deeper"):
        with pytest.raises(StoreNotFoundError):
            open_store(place)
    (tmp_path / "zarr.json").write_text("[" * 100_000)
    with pytest.raises(DamagedStoreError, match="not readable metadata"):
        open_store(".")


# Check


def test_check_names_flows_and_frames(tmp_path: Path) -> None:
    store = make(tmp_path / "X.zarr", moving())
    flow_shard(store.folder, 1).unlink()
    spoil(flow_shard(store.folder, 2), 3)
    seen: list[int] = []
    found = list(open_store(store.path).check(seen.append))
    missing = [StoreProblem("missing", number, 2 * number) for number in (3, 4, 5)]
    assert found == [*missing, StoreProblem("checksum is wrong", 6, 12)]
    assert str(found[0]) == "flow 3 (frame 6): missing"
    assert seen == list(range(1, T + 1))


BEGINS_ELSEWHERE = "it begins at another time than the one before ends"


@pytest.mark.parametrize(
    ("name", "place", "value", "problems"),
    [
        ("timestamp_s", 4, np.nan, ["flow 4 (frame 8): its timestamp_s is not known"]),
        ("timestamp_to_s", 1, np.inf, ["flow 1 (frame 2): its timestamp_to_s is not known"]),
        (
            "timestamp_s",
            3,
            0.01,
            ["flow 3 (frame 6): its timestamp_s is not after the one before", f"flow 3 (frame 6): {BEGINS_ELSEWHERE}"],
        ),
        ("timestamp_s", 3, 0.16, [f"flow 3 (frame 6): {BEGINS_ELSEWHERE}"]),  # the time of the frame before
        ("frame", 2, 2, ["flow 2 (frame 2): its frame is not after the one before"]),
        ("frame", 5, -1, ["flow 5: its frame is not known"]),
        ("frame_to", 5, -1, ["flow 5 (frame 10): its frame_to is not known"]),
        ("frame_to", 0, 0, ["flow 0 (frame 0): it leads nowhere"]),
        (
            "timestamp_to_s",
            6,
            0.3,
            [
                "flow 6 (frame 12): its timestamp_to_s is not after the one before",
                "flow 6 (frame 12): its times run the other way than its frames",
            ],
        ),
        ("timestamp_to_s", 2, 0.25, [f"flow 3 (frame 6): {BEGINS_ELSEWHERE}"]),
        ("timestamp_s", 2, 0.17, [f"flow 2 (frame 4): {BEGINS_ELSEWHERE}"]),
    ],
)
def test_check_looks_at_times_and_frames(
    tmp_path: Path, name: str, place: int, value: float, problems: list[str]
) -> None:
    """Each problem is reported once."""
    store = make(tmp_path / "X.zarr", moving())
    change(store, name, place, value)
    assert list(map(str, open_store(store.path).check())) == problems


def test_check_looks_at_frames_that_are_both_unknown(tmp_path: Path) -> None:
    """Two unknown frames (-1) are not reported as being the same frame."""
    store = make(tmp_path / "X.zarr", moving())
    for name in ("frame", "frame_to"):
        change(store, name, 5, -1)
    assert list(map(str, open_store(store.path).check())) == [
        f"flow 5: its {name} is not known" for name in ("frame", "frame_to")
    ]


def test_check_looks_at_times_too_far_apart_for_a_float(tmp_path: Path) -> None:
    store = make(tmp_path / "X.zarr", moving())
    for name, place, value in (
        ("timestamp_s", 2, -1.7e308),
        ("timestamp_to_s", 2, 1.7e308),
        ("timestamp_s", 3, 1.7e308),
    ):
        change(store, name, place, value)
    found = list(map(str, open_store(store.path).check()))
    assert found[0] == "flow 2 (frame 4): its timestamp_s is not after the one before"


def test_a_lossless_store_with_a_scale_is_refused(tmp_path: Path) -> None:
    store = make(tmp_path / "X.zarr", moving(), max_error=0, complete=False)
    path = store.folder / "flow" / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["scale_factor"] = 0.5
    path.write_text(json.dumps(document))
    with pytest.raises(DamagedStoreError, match="scaling"):
        open_store(tmp_path / "X.zarr")


def test_check_looks_at_flow_from_later_to_earlier_frames(tmp_path: Path) -> None:
    store = make(tmp_path / "X.zarr", moving(), backward=True)
    assert list(store.check()) == []
    change(store, "timestamp_s", 2, 0.23)
    assert list(map(str, open_store(store.path).check())) == [f"flow 3 (frame 8): {BEGINS_ELSEWHERE}"]


def change(store: FlowStore, name: str, place: int, value: float) -> None:
    """Changes one value of an array beside the flow, and corrects the checksums that cover it."""
    shard = place // SHARD
    arrays = {each: store.files.coordinate_chunk(each, shard).copy() for each in COVERED}
    arrays[name][place % SHARD] = value
    for each, values in (arrays | {"time_crc32c": time_checksums(shard * SHARD, arrays)}).items():
        coordinate_chunk(store.folder, each, shard).write_bytes(compress(values, "blosc"))


def test_check_finds_what_does_not_belong(tmp_path: Path) -> None:
    store = make(tmp_path / "X.zarr", moving())
    (store.folder / "notes.txt").write_text("mine")
    assert list(store.check()) == []
    (store.folder / "flow" / "c" / "7").mkdir()
    (store.folder / "flow" / "c" / "08").mkdir()  # not the name of a chunk
    (store.folder / "frame" / "c" / "3").touch()
    (store.folder / "flow" / "zarr.json.partial").touch()
    assert list(map(str, store.check())) == [
        "flow/c/7 lies behind the last flow",
        "frame/c/3 lies behind the last flow",
        "flow/zarr.json.partial is a leftover of a run that was cut short",
    ]


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    store = make(tmp_path / "X.zarr", moving())
    monkeypatch.setattr(os, "listdir", refused)
    assert list(map(str, store.check())) == [f"{store.folder / 'flow/c'} cannot be listed (Permission denied)"]


def test_what_is_no_file_is_not_left_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DamagedStoreError, match="is not a file"):
        open_file(tmp_path)
    assert os.listdir("/proc/self/fd") == before


def test_check_of_an_unfinished_store_reads_what_is_there(tmp_path: Path, decoded: list[int]) -> None:
    store = make(tmp_path / "X.zarr", moving(5), announced=40, complete=False)
    assert list(map(str, store.check())) == ["unfinished: 5 of 40 flows are there"]
    assert len(decoded) == 5
    (store.folder / "flow" / "c" / "9").mkdir()  # of a shard that is not written yet
    change(store, "frame", 5, 77)  # behind the last flow
    group = json.loads((store.folder / "zarr.json").read_text())
    group["consolidated_metadata"] = {"metadata": {}}  # as in a finished store that is being extended
    (store.folder / "zarr.json").write_text(json.dumps(group))
    assert list(map(str, store.check())) == ["unfinished: 5 of 40 flows are there"]
    spoil(flow_shard(store.folder, 0), -1)
    state, *damaged = map(str, FlowStore(store.folder).check())
    assert state == "unfinished: 5 of 40 flows are there"
    assert [line.split(":")[0] for line in damaged] == ["flow 0 (frame 0)", "flow 1 (frame 2)", "flow 2 (frame 4)"]
    flow_shard(store.folder, 0).unlink()
    assert FlowStore(store.folder).available == 0  # flows behind a missing shard do not count


def test_of_an_unfinished_store_each_whole_shard_is_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading asks for times and numbers with each batch: of a long store that took far longer than its flow."""
    store = make(tmp_path / "X.zarr", moving(3 * SHARD), announced=40, complete=False)
    looked, checked = [], []
    published, checksums = StoreFiles.published, store_files.time_checksums
    monkeypatch.setattr(StoreFiles, "published", lambda self, shard: looked.append(shard) or published(self, shard))
    monkeypatch.setattr(
        store_files, "time_checksums", lambda first, times: checked.append(first) or checksums(first, times)
    )
    for name in (*COORDINATES, *COORDINATES):
        assert store.available == 3 * SHARD
        assert len(getattr(store, name.replace("timestamp", "timestamps"))) == 40
    assert [looked.count(shard) for shard in (0, 1, 2)] == [1, 1, 1]
    assert checked == [0, SHARD, 2 * SHARD]


def test_metadata_copies_must_agree(tmp_path: Path) -> None:
    """A reader over a network uses the group's copy of the metadata, others may use the array's own."""
    store = make(tmp_path / "X.zarr", moving())
    path = store.folder / "zarr.json"
    group = json.loads(path.read_text())
    changed = copy.deepcopy(group)
    changed["consolidated_metadata"]["metadata"]["flow"]["shape"][0] = 6
    path.write_text(json.dumps(changed))
    with pytest.raises(DamagedStoreError, match="disagree"):
        open_store(store.path)
    own = json.loads((store.folder / "frame" / "zarr.json").read_text())
    changed = copy.deepcopy(group)
    changed["consolidated_metadata"]["metadata"]["frame"]["shape"][0] = own["shape"][0] = T + 1
    path.write_text(json.dumps(changed))
    with pytest.raises(DamagedStoreError, match="length in the group's copy: expected 7, found 8"):
        _ = open_store(store.path).frame
    (store.folder / "frame" / "zarr.json").write_text(json.dumps(own))
    with pytest.raises(DamagedStoreError, match="length: expected 7, found 8"):
        _ = open_store(store.path).frame
    own["shape"][0] = T
    (store.folder / "frame" / "zarr.json").write_text(json.dumps(own))
    del group["consolidated_metadata"]  # the copy is optional
    path.write_text(json.dumps(group))
    assert same(open_store(store.path)[:], moving())


def test_times_and_frames_of_a_growing_store_come_with_its_flows(tmp_path: Path) -> None:
    flows = moving(2 * SHARD + 1)
    sink = ZarrSink(str(tmp_path / "X.zarr"), SinkConfig(shard_bytes=SHARD * 8 * H * W))
    sink.open(FlowInfo(H, W, Fraction(25), len(flows) + 1, SourceId("clip.mp4")))
    store = open_store(tmp_path / "X.zarr")
    seen = []
    for first in range(0, len(flows), SHARD):
        part = slice(first, first + SHARD)
        frame = np.arange(len(flows))[part]
        sink.write(FlowBatch(torch.from_numpy(flows[part]), first, frame, frame + 1, frame / 25, (frame + 1) / 25))
        if first + SHARD <= len(flows):
            flush(sink)
        there = store.available
        seen.append(there)
        assert store.frame.tolist() == [*range(there), *[-1] * (len(flows) - there)]
        assert np.array_equal(store.timestamps_to_s[:there], np.arange(1, there + 1) / 25)
        assert store.to_xarray().frame_to.values.tolist() == list(range(1, there + 1))
        assert store.frame is store.frame  # kept until the store grows
        with pytest.raises(ValueError, match="read-only"):
            store.frame[0] = 5
    sink.abort()
    assert seen == [SHARD, 2 * SHARD, 2 * SHARD]
