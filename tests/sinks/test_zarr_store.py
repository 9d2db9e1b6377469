"""The store as a user sees it: it returns what was written, and an unfinished one never looks finished."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from threading import Event
from typing import Any, get_args

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec

from flowreel.engine import claims, publish
from flowreel.engine.config import Codec, SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import (
    DamagedStoreError,
    OutputExistsError,
    OutputWriteError,
    StoreError,
    StoreNotFoundError,
    frame_of,
)
from flowreel.sinks import store_target, store_writer, zarr_store
from flowreel.sinks.shards import ShardsInThreads
from flowreel.sinks.store_layout import BESIDE_FLOW, COORDINATES, flow_shard, published_shards
from flowreel.sinks.store_reader import FlowStore, open_store
from flowreel.sinks.store_target import LocalTarget
from flowreel.sinks.store_writer import StoreWriter
from flowreel.sinks.zarr_store import ZarrSink
from tests.sinks.waiting import flush

CODECS: tuple[Codec, ...] = get_args(Codec)
H, W = 6, 9
SHARD = 3  # flows


@pytest.fixture(scope="module", autouse=True)
def _no_threads() -> Iterator[None]:
    """Each flow is in its shard when ``write`` returns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr_store, "encode_workers", lambda *_: 0)
        yield


def moving(count: int, height: int = H, width: int = W) -> Any:
    """(N, 2, H, W) float32 within ±20 px, each flow different."""
    rng = np.random.default_rng(count)
    return rng.uniform(-20, 20, (count, 2, height, width)).astype(np.float32)


def config(**changes: Any) -> SinkConfig:
    return SinkConfig(**{"shard_bytes": SHARD * 8 * H * W, **changes})


def header(flows: int | None, height: int = H, width: int = W) -> FlowInfo:
    source = SourceId("clip.mp4", 4096, 1.5)
    made_by = {"model": "FlowNet2C", "batch": 2}
    return FlowInfo(height, width, Fraction(30000, 1001), None if flows is None else flows + 1, source, made_by)


def batches(flows: Any, size: int = 2) -> Iterator[FlowBatch]:
    """Every second frame of a source at 25 frames per second that begins at half a second."""
    for index in range(0, len(flows), size):
        part = torch.from_numpy(flows[index : index + size])
        frame = 2 * np.arange(index, index + len(part))
        yield FlowBatch(part, index, frame, frame + 2, 0.5 + frame / 25, 0.5 + (frame + 2) / 25)


def written(sink: ZarrSink, flows: Any, announced: int | None = -1, size: int = 2) -> ZarrSink:
    """The sink after ``open`` and every ``write``. announced -1: the true number of flows."""
    sink.open(header(len(flows) if announced == -1 else announced, *flows.shape[2:]))
    for batch in batches(flows, size):
        sink.write(batch)
    return sink


def go_on(sink: ZarrSink, coming: list[FlowBatch]) -> None:
    for batch in coming:
        sink.write(batch)
    sink.commit()


def make(path: Path, flows: Any, **changes: Any) -> FlowStore:
    written(ZarrSink(str(path), config(**changes)), flows).commit()
    return open_store(path)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def spoil(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("max_error", [1 / 64, 0.25, 0])
@pytest.mark.parametrize("codec", CODECS)
def test_what_went_in_comes_out(tmp_path: Path, codec: Codec, max_error: float) -> None:
    flows = moving(8)
    store = make(tmp_path / "new" / "X.zarr", flows, codec=codec, max_error=max_error)
    assert store.complete
    assert (store.shape, len(store), store.available) == ((8, 2, H, W), 8, 8)
    assert store[:].dtype == np.float32
    assert np.abs(store[:].astype(np.float64) - flows).max() <= max_error
    assert np.array_equal(store.frame, 2 * np.arange(8))
    assert np.array_equal(store.frame_to, store.frame + 2)
    assert np.array_equal(store.timestamps_s, 0.5 + store.frame / 25)
    assert np.array_equal(store.timestamps_to_s, 0.5 + store.frame_to / 25)
    assert list(store.check()) == []
    assert names(tmp_path / "new") == ["X.zarr"]
    assert published_shards(Path(store.path)) == [0, 1, 2]
    assert not [file for file in Path(store.path).rglob("*") if file.name.endswith(".partial")]


def test_workers_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flows = moving(11)
    make(tmp_path / "one.zarr", flows)
    monkeypatch.setattr(zarr_store, "encode_workers", lambda *_: 3)
    make(tmp_path / "three.zarr", flows)
    one, three = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one.zarr", tmp_path / "three.zarr")
    )
    assert one == three


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 8), st.integers(1, 8)),
    shard=st.integers(1, 5),
    batch=st.integers(1, 4),
    codec=st.sampled_from(CODECS),
    max_error=st.sampled_from([0, 1 / 64, 1.0]),
    announced=st.one_of(st.none(), st.integers(0, 9)),
    holes=st.sets(st.integers(0, 63), max_size=5),
)
def test_any_shape_shard_batch_and_announcement(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    shard: int,
    batch: int,
    codec: Codec,
    max_error: float,
    announced: int | None,
    holes: set[int],
) -> None:
    count, height, width = shape
    flows = moving(count, height, width)
    flat = flows.reshape(count, 2, -1)
    for hole in holes:
        flat[hole % count, :, hole % flat.shape[2]] = np.nan
    path = tmp_path_factory.mktemp("store") / "X.zarr"
    settings_ = SinkConfig(codec=codec, max_error=max_error, shard_bytes=shard * 8 * height * width)
    sink = written(ZarrSink(str(path), settings_), flows, announced, batch)
    sink.commit()
    store = open_store(path)
    assert store.shape == flows.shape
    assert store.shard_length == shard
    assert np.array_equal(np.isnan(store[:]), np.isnan(flows))
    assert np.nan_to_num(np.abs(store[:] - flows)).max() <= max_error
    assert np.array_equal(store.frame, 2 * np.arange(count))
    assert bool(sink.notes) == bool(holes and max_error)
    assert list(store.check()) == []


def test_indexing_is_numpys(tmp_path: Path) -> None:
    flows = moving(7)
    store = make(tmp_path / "X.zarr", flows, max_error=0)
    for key in (0, 6, -1, -7, np.int64(3)):
        assert np.array_equal(store[key], flows[key])
    for key in (
        slice(2, 5),
        slice(None, None, -2),
        slice(5, 99),
        slice(3, 3),
        [3, 1],
        [-1, 3, 3],
        np.array([5, 0]),
        [],
    ):
        expected = flows[np.array(key, int) if isinstance(key, list) else key]
        assert store[key].shape == expected.shape
        assert np.array_equal(store[key], expected)
    assert np.array_equal(np.stack(list(store)), flows)
    for wrong in (7, -8, [0, 7]):
        with pytest.raises(IndexError):
            store[wrong]
    for strange in (True, 1.0, "1", None):
        with pytest.raises(TypeError):
            store[strange]


@pytest.mark.parametrize("max_error", [1 / 64, 0])
@pytest.mark.parametrize("codec", ["blosc", "zstd"])
def test_files_are_those_zarr_python_writes(tmp_path: Path, codec: Codec, max_error: float) -> None:
    """zarr-python, given the same integers and settings, writes the same bytes."""
    store = make(tmp_path / "X.zarr", moving(8), codec=codec, max_error=max_error)
    ours = zarr.open_group(store.path, mode="r")
    assert ours.metadata.consolidated_metadata is not None
    integers = ours["flow"][:]
    dtype, fill = ("int16", -32768) if max_error else ("float32", np.nan)
    block = (1 << 19) * np.dtype(dtype).itemsize
    blosc = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", blocksize=block)
    zstd = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
    theirs = zarr.create_array(
        tmp_path / "theirs",
        shape=(8, 2, H, W),
        dtype=dtype,
        chunks=(1, 2, H, W),
        shards=(SHARD, 2, H, W),
        compressors=[blosc if codec == "blosc" else zstd, Crc32cCodec()],
        fill_value=fill,
        dimension_names=("time", "component", "y", "x"),
        attributes=dict(ours["flow"].attrs),
    )
    theirs[:] = integers
    for shard in range(3):
        key = f"c/{shard}/0/0/0"
        assert (Path(store.path) / "flow" / key).read_bytes() == (tmp_path / "theirs" / key).read_bytes()
    metadata = [
        json.loads((folder / "zarr.json").read_text()) for folder in (Path(store.path) / "flow", theirs.store.root)
    ]
    assert metadata[0] == metadata[1]


def test_pcodec_shards_are_read_by_zarr_python_and_warn_nobody_at_writing(tmp_path: Path) -> None:
    flows = moving(8)
    store = make(tmp_path / "X.zarr", flows, codec="pcodec")  # warnings are errors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr-python's own, when it opens pcodec
        integers = zarr.open_group(store.path, mode="r")["flow"][:]
    assert np.array_equal(integers.astype(np.float32) / 32, store[:])


def test_consolidated_metadata_is_what_zarr_python_would_put_there(tmp_path: Path) -> None:
    store = make(tmp_path / "X.zarr", moving(4))
    root = Path(store.path) / "zarr.json"
    ours = json.loads(root.read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # consolidated metadata is not in the specification yet
        zarr.consolidate_metadata(store.path)
    assert json.loads(root.read_text()) == ours


@pytest.mark.parametrize("max_error", [1 / 64, 0])
def test_xarray_gives_pixels_and_coordinates_unaided(tmp_path: Path, max_error: float) -> None:
    flows = moving(5)
    flows[2, :, 1, 1] = np.nan
    store = make(tmp_path / "X.zarr", flows, max_error=max_error)
    with xr.open_zarr(store.path) as data:
        flow = data["flow"]
        assert flow.dims == ("time", "component", "y", "x")
        assert flow.dtype.kind == "f"
        assert set(flow.coords) == set(COORDINATES)
        assert flow.attrs["units"] == "pixel"
        assert np.array_equal(flow.values.astype(np.float32), store[:], equal_nan=True)
        assert np.array_equal(flow.coords["timestamp_s"].values, store.timestamps_s)
        assert np.array_equal(flow.coords["frame"].values, store.frame)


def test_attributes_tell_where_it_comes_from(tmp_path: Path) -> None:
    attrs = make(tmp_path / "X.zarr", moving(2)).attrs
    assert attrs["format_version"] == 1
    assert attrs["software_version"]
    source = {
        "name": "clip.mp4",
        "size_bytes": 4096,
        "duration_s": 1.5,
        "head_sha256": None,
        "heads_sha256": [],
        "sampled_sha256": None,
    }
    assert attrs["source"] == source
    assert (attrs["model"], attrs["batch"]) == ("FlowNet2C", 2)
    assert (attrs["frame_rate"], attrs["max_error"], attrs["codec"]) == ("30000/1001", 1 / 64, "blosc")
    array = json.loads((tmp_path / "X.zarr" / "flow" / "zarr.json").read_text())
    assert array["attributes"]["scale_factor"] == 1 / 32
    assert array["attributes"]["_FillValue"] == array["fill_value"] == -32768


def test_invalid_vectors_are_counted_and_the_first_frame_named(tmp_path: Path) -> None:
    flows = moving(5)
    flows[1, 0, 2, 3] = np.nan
    flows[3, :, 0, 0] = 2e9
    flows[4, 1, 5, 5] = -1500  # int16 at 1/32 px reaches 1023.97
    sink = written(ZarrSink(str(tmp_path / "X.zarr"), config()), flows)
    sink.commit()
    unknown, beyond = sink.notes
    assert "2 of 270 vectors are unknown" in unknown
    assert unknown.endswith("first in frame 2: stored as missing")
    assert "1 of 270 vectors are beyond the range of ±1023.97 px" in beyond
    assert "first in frame 8" in beyond
    missing = np.argwhere(np.isnan(open_store(tmp_path / "X.zarr")[:]).all(axis=1)).tolist()
    assert missing == [[1, 2, 3], [3, 0, 0], [4, 5, 5]]


def test_wide_frames_get_wide_integers(tmp_path: Path) -> None:
    flows = moving(2, 2, 1030)
    flows[0, 0, 0, 0] = 1029.0
    store = make(tmp_path / "X.zarr", flows)
    assert store.summary()["dtype"] == "int32"
    assert store[0][0, 0, 0] == 1029


def test_summary(tmp_path: Path) -> None:
    flows = np.zeros((7, 2, H, W), np.float32)
    store = make(tmp_path / "X.zarr", flows)
    summary = store.summary()
    disk = sum(file.stat().st_size for file in (tmp_path / "X.zarr").rglob("*") if file.is_file())
    assert summary["disk_bytes"] == disk
    assert summary["flo_bytes"] == 7 * (12 + 8 * H * W)
    assert summary["ratio"] == summary["flo_bytes"] / disk
    assert (summary["flows"], summary["available"], summary["complete"]) == (7, 7, True)
    assert (summary["width"], summary["height"], summary["codec"], summary["step"]) == (W, H, "blosc", 1 / 32)
    json.dumps(summary)


def test_bytes_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written twice except the group's metadata, which ``commit`` extends by copies of the arrays' own."""
    put: list[int] = []

    def counted(real: Callable[..., int]) -> Callable[..., int]:
        def counting(*arguments: Any) -> int:
            put.append(real(*arguments))
            return put[-1]

        return counting

    for way in ("put", "prepare"):
        monkeypatch.setattr(LocalTarget, way, counted(getattr(LocalTarget, way)))
    sink = written(ZarrSink(str(tmp_path / "X.zarr"), config()), moving(8))
    root = (tmp_path / "X.zarr.partial" / "zarr.json").stat().st_size
    sink.commit()
    assert sum(put) == open_store(tmp_path / "X.zarr").summary()["disk_bytes"] + root


@pytest.mark.parametrize("announced", [8, 9, None])
def test_bytes_written_are_those_on_disk(announced: int | None, tmp_path: Path) -> None:
    """Also where arrays grow or are shortened, and their metadata are written again."""
    sink = written(ZarrSink(str(tmp_path / "X.zarr"), config()), moving(8), announced)
    sink.commit()
    assert sink.bytes_written == open_store(tmp_path / "X.zarr").summary()["disk_bytes"]


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_never_holds_a_raw_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Only compressed flows wait for their shard to be full, besides the few raw ones that the workers hold."""
    monkeypatch.setattr(zarr_store, "encode_workers", lambda *_: workers)
    count, height, width = 200, 64, 128
    smooth = np.linspace(-20, 20, width, dtype=np.float32)
    sink = ZarrSink(str(tmp_path / "X.zarr"), config(shard_bytes=count * 8 * height * width))
    sink.open(header(count, height, width))
    tracemalloc.start()
    try:
        for number in range(count):
            flow = np.broadcast_to(smooth + number / 8, (1, 2, height, width)).copy()
            sink.write(next(replace(batch, index=number) for batch in batches(flow)))
        sink.commit()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    store = open_store(tmp_path / "X.zarr")
    assert store.shard_length == count
    assert peak < store.summary()["disk_bytes"] * 2 + 12 * store.flow_bytes < count * store.flow_bytes / 4


# Unfinished never looks finished


def test_until_commit_only_the_partial_is_there(tmp_path: Path) -> None:
    flows = moving(8)
    sink = written(ZarrSink(str(tmp_path / "X.zarr"), config(max_error=0)), flows)
    flush(sink)
    assert names(tmp_path) == ["X.zarr.partial"]
    store = open_store(tmp_path / "X.zarr")
    assert not store.complete
    assert (len(store), store.available) == (8, 6)  # two full shards; two flows wait for the third to be full
    assert np.array_equal(store[:6], flows[:6])
    for key in (6, -1, slice(5, 8), [0, 7]):
        with pytest.raises(StoreError, match=r"unfinished: flow [67].* is not there yet, the first 6 are"):
            store[key]
    with pytest.raises(StoreError):
        list(store)
    assert list(map(str, store.check())) == ["unfinished: 6 of 8 flows are there"]
    assert np.isnan(store.timestamps_s[6:]).all()
    assert store.frame.tolist() == [0, 2, 4, 6, 8, 10, -1, -1]
    assert "unfinished" in repr(store)
    sink.commit()
    assert names(tmp_path) == ["X.zarr"]


@pytest.mark.parametrize("announced", [None, 12])
def test_incomplete_commit_keeps_all_and_stays_partial(tmp_path: Path, announced: int | None) -> None:
    flows = moving(8)
    sink = written(ZarrSink(str(tmp_path / "X.zarr"), config(max_error=0)), flows, announced)
    sink.commit(complete=False)
    sink.abort()  # after ``commit``, this removes nothing
    assert names(tmp_path) == ["X.zarr.partial"]
    store = open_store(tmp_path / "X.zarr")
    assert (store.complete, store.available, len(store)) == (False, 8, announced or 8)
    assert np.array_equal(store[:8], flows)
    assert store.frame.tolist() == [*range(0, 16, 2), *[-1] * (len(store) - 8)]
    assert np.isnan(store.timestamps_s).tolist() == [False] * 8 + [True] * (len(store) - 8)
    past = (StoreError, "flow 8.* is not there yet, the first 8 are") if announced else (IndexError, "flow 8 of 8")
    with pytest.raises(past[0], match=past[1]):
        store[8]


@pytest.mark.parametrize(("count", "kept"), [(2, False), (3, True)])
def test_abort_keeps_only_what_a_resume_can_use(tmp_path: Path, count: int, kept: bool) -> None:
    sink = written(ZarrSink(str(tmp_path / "X.zarr"), config()), moving(count), 20)
    sink.abort()
    sink.abort()
    assert names(tmp_path) == (["X.zarr.partial"] if kept else [])
    if kept:
        assert open_store(tmp_path / "X.zarr").available == 3
    with pytest.raises(ValueError, match="not open"):
        sink.write(next(batches(moving(2))))


def test_abort_before_open_and_after_commit_touches_nothing(tmp_path: Path) -> None:
    ZarrSink(str(tmp_path / "X.zarr"), config()).abort()
    sink = written(ZarrSink(str(tmp_path / "X.zarr"), config()), moving(1))
    sink.commit()
    sink.abort()
    assert open_store(tmp_path / "X.zarr").available == 1


def test_a_store_that_cannot_get_its_name_keeps_its_last_shard_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of flows reported counts those really in that last, short shard."""
    sink = written(ZarrSink(str(tmp_path / "X.zarr"), config()), moving(8))
    monkeypatch.setattr(publish, "publish_folder", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no more")))
    with pytest.raises(OutputWriteError, match="no more"):
        sink.commit()
    assert sink.abort() == f"{tmp_path / 'X.zarr.partial'} holds 8 of 8 flows"
    assert open_store(tmp_path / "X.zarr").available == 8


def test_times_go_before_flow_and_lengths_before_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = os.replace

    def record(source: Path, path: Path) -> None:
        order.append(path.relative_to(tmp_path / "X.zarr.partial").as_posix())
        real(source, path)

    sink = ZarrSink(str(tmp_path / "X.zarr"), config())
    sink.open(header(None))
    monkeypatch.setattr(os, "replace", record)
    for batch in batches(moving(4)):
        sink.write(batch)
    flush(sink)
    lengths = [*(f"{name}/zarr.json" for name in BESIDE_FLOW), "flow/zarr.json"]
    assert order == [*lengths, *(f"{name}/c/0" for name in BESIDE_FLOW), "flow/c/0/0/0/0"]


@pytest.mark.parametrize("step", ["write_unfinished", "give_name"])
def test_no_shard_is_published_behind_one_that_failed(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the next shard is already on its way when the error is noticed, and the one before has no name yet."""
    sink = ZarrSink(str(tmp_path / "X.zarr"), config())
    sink.open(header(None))
    real, third_is_full, second_failed = getattr(publish, step), Event(), Event()

    def failing(what: object, *rest: object) -> Any:
        shard = int(re.findall(r"/c/(\d)", str(what))[0])
        if shard == 1:
            third_is_full.wait(60)
            second_failed.set()
            raise OSError(errno.EIO, "no more")
        if shard == 0 and step == "write_unfinished":
            second_failed.wait(60)
        return real(what, *rest)

    monkeypatch.setattr(publish, step, failing)
    for batch in batches(moving(3 * SHARD)):
        sink.write(batch)
    assert isinstance(sink._shards, ShardsInThreads)
    sink._shards.drain()
    third_is_full.set()
    with pytest.raises(OutputWriteError, match=r"cannot write .*X\.zarr: .*no more") as caught:
        sink.commit()
    assert frame_of(caught.value, None) == 2 * SHARD  # the first of its shard; every second frame is used here
    with pytest.raises(OutputWriteError, match="could not be written"):
        sink.commit()  # trying again does not help
    assert not (tmp_path / "X.zarr").exists()
    assert "holds 3 flows" in str(sink.abort())
    assert open_store(tmp_path / "X.zarr").available == SHARD
    assert [path.parent.parent.parent.name for path in (tmp_path / "X.zarr.partial").glob("flow/c/*/0/0/0")] == ["0"]
    assert not list((tmp_path / "X.zarr.partial").rglob("*.partial"))


@pytest.mark.parametrize("fails", [False, True])
def test_abort_waits_for_the_full_shards_on_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """One is being written, the other has not begun. An error in them is not raised: the run is aborted anyway."""
    monkeypatch.setattr(store_writer, "WRITERS", 1)
    sink = ZarrSink(str(tmp_path / "X.zarr"), config())
    sink.open(header(None))
    real_write, real_close, aborted = publish.write_unfinished, StoreWriter.close, Event()

    def writing(contents: dict[Path, Any], output: str) -> int:
        assert aborted.wait(60)
        if fails and any("c/1" in str(path) for path in contents):
            raise OSError(errno.EIO, "no more")
        return real_write(contents, output)

    def close(writer: StoreWriter, **options: bool) -> None:
        aborted.set()
        real_close(writer, **options)

    monkeypatch.setattr(publish, "write_unfinished", writing)
    monkeypatch.setattr(StoreWriter, "close", close)
    for batch in batches(moving(2 * SHARD), SHARD):
        sink.write(batch)
    assert f"holds {SHARD if fails else 2 * SHARD} flows" in str(sink.abort())


def test_shards_are_written_beside_each_other_and_named_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shard waits until the second is written, and still gets its name first."""
    sink = ZarrSink(str(tmp_path / "X.zarr"), config())
    sink.open(header(2 * SHARD))
    real, second_is_written, order = publish.write_unfinished, Event(), list[str]()

    def writing(contents: dict[Path, Any], output: str) -> int:
        if any("c/0" in str(path) for path in contents):
            assert second_is_written.wait(60)
        written = real(contents, output)
        second_is_written.set()
        return written

    def naming(path: Path) -> None:
        order.append(path.relative_to(tmp_path / "X.zarr.partial").as_posix())

    monkeypatch.setattr(publish, "write_unfinished", writing)
    monkeypatch.setattr(publish, "give_name", naming)
    for batch in batches(moving(2 * SHARD)):
        sink.write(batch)
    flush(sink)
    times = [[f"{name}/c/{shard}" for name in BESIDE_FLOW] for shard in (0, 1)]
    assert order == [*times[0], "flow/c/0/0/0/0", *times[1], "flow/c/1/0/0/0"]
    sink.abort()


@pytest.mark.parametrize("then", ["write", "commit"])
def test_what_goes_wrong_in_publishing_is_heard_next(
    then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = ZarrSink(str(tmp_path / "X.zarr"), config())
    sink.open(header(None))
    several = list(batches(moving(2 * SHARD), 1))
    monkeypatch.setattr(publish, "publish_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no more")))
    for batch in several[:SHARD]:
        sink.write(batch)
    assert sink._files is not None
    wait([call for call, _ in sink._files._behind._in_flight])
    steps = {"write": lambda: sink.write(several[SHARD]), "commit": sink.commit}
    with pytest.raises(OutputWriteError, match="no more"):
        steps[then]()
    sink.abort()


def test_failure_at_any_step_leaves_whole_shards_and_the_old_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Makes the n-th call that changes the disk fail, for every n until the run succeeds."""
    old, flows = moving(2), moving(5)
    make(tmp_path / "old.zarr", old, max_error=0)
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "mkdir")}
    left: dict[str, int] = {}

    def failing(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            left["calls"] -= 1
            if left["calls"] == 0:
                raise OSError(28, "No space left on device")
            return real[name](*args, **options)

        return call

    seen: set[tuple[bool, int]] = set()
    for calls in range(1, 1000):
        path = tmp_path / str(calls) / "X.zarr"
        shutil.copytree(tmp_path / "old.zarr", path)
        sink = ZarrSink(str(path), config(overwrite=True, max_error=0))
        left["calls"] = calls
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, failing(name))
            try:
                written(sink, flows, 6).commit()  # one fewer than announced: trimmed at the end
                failed = False
            except OutputWriteError:
                failed = True
        sink.abort()
        store = open_store(path)
        assert store.complete
        assert np.array_equal(store[:], flows) or (failed and np.array_equal(store[:], old))
        partial, available = publish.partial_path(path), 0
        if partial.exists():
            available = FlowStore(partial).available
            assert available in (3, 5)
            assert np.array_equal(FlowStore(partial)[:available], flows[:available])
            assert not list(partial.rglob("*.partial"))
        seen.add((len(store) == 5, available))
        if not failed:
            assert names(path.parent) == ["X.zarr"]
            break
        shutil.rmtree(path.parent)
    assert calls > 50
    assert {(False, 0), (False, 3), (False, 5), (True, 0)} <= seen


# What is there already


def test_existing_store_is_kept_unless_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "X.zarr"
    old, new = moving(2), moving(4)
    make(path, old, max_error=0)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        ZarrSink(str(path), config()).open(header(4))
    sink = written(ZarrSink(str(path), config(overwrite=True, max_error=0)), new)
    assert np.array_equal(open_store(path)[:], old)
    sink.commit()
    assert np.array_equal(open_store(path)[:], new)
    assert names(tmp_path) == ["X.zarr"]


def test_unfinished_store_of_a_killed_run(tmp_path: Path) -> None:
    path = tmp_path / "X.zarr"
    killed = written(ZarrSink(str(path), config()), moving(5))  # never committed
    flush(killed)
    killed._target.let_go()  # releases the claim, as the system does for a killed process
    with pytest.raises(OutputExistsError, match=r"unfinished store.*--resume.*--overwrite"):
        ZarrSink(str(path), config()).open(header(5))
    assert open_store(path).available == 3
    assert make(path, moving(2), overwrite=True).available == 2
    assert names(tmp_path) == ["X.zarr"]


def test_overwrite_spares_what_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "X.zarr"
    path.mkdir()
    (path / "thesis.txt").write_text("the only copy")
    with pytest.raises(OutputExistsError, match="not a Zarr store"):
        ZarrSink(str(path), config(overwrite=True)).open(header(5))
    assert names(tmp_path) == ["X.zarr"]
    assert names(path) == ["thesis.txt"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sink = ZarrSink(str(tmp_path / "file" / "X.zarr"), config())
    with pytest.raises(OutputWriteError, match=r"cannot write .*X\.zarr"):
        sink.open(header(5))
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("before", [4, 6])
@pytest.mark.parametrize("what", ["removed", "moved", "another working folder"])
def test_a_store_that_is_lost_on_the_way_does_not_end_as_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, before: int
) -> None:
    """It did, under its final name and with the last shards only. ``before``: of its six flows, two shards."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    sink = ZarrSink("X.zarr", config())
    sink.open(header(6))
    coming = list(batches(moving(6)))
    for batch in coming[: before // 2]:
        sink.write(batch)
    flush(sink)
    if what == "removed":
        shutil.rmtree("X.zarr.partial")
    elif what == "moved":
        Path("X.zarr.partial").rename("kept.zarr.partial")
    else:
        monkeypatch.chdir("elsewhere")
    with pytest.raises(OutputWriteError, match="moved or removed meanwhile, or the working folder changed"):
        go_on(sink, coming[before // 2 :])
    sink.abort()
    left = {"removed": [], "moved": ["kept.zarr"], "another working folder": ["X.zarr"]}[what]
    assert names(tmp_path) == sorted(["elsewhere", *(f"{name}.partial" for name in left)])  # nothing is made anew
    assert names(tmp_path / "elsewhere") == []
    for name in left:
        assert open_store(tmp_path / name).available == before // SHARD * SHARD


def test_what_a_process_prepared_in_another_runs_folder_gets_no_name(tmp_path: Path) -> None:
    """A process that makes shards holds no lock of its own, so it does not see that its folder was moved."""
    target = LocalTarget(str(tmp_path / "X.zarr"))
    target.hold()
    target.start(overwrite=False)
    target.folder.rename(tmp_path / "kept")
    LocalTarget(str(tmp_path / "X.zarr")).prepare({"flow/c/0/0/0/0": [b"shard"]})
    with pytest.raises(OutputWriteError, match="moved or removed meanwhile"):
        target.publish(["flow/c/0/0/0/0"])
    target.let_go()
    assert not published_shards(target.folder)


def test_a_disk_that_is_gone_does_not_hide_why_a_run_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = ZarrSink(str(tmp_path / "X.zarr"), config())
    sink.open(header(6))

    def gone(*_: object) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for module in (store_target, claims):
        monkeypatch.setattr(module, "still_named", gone)
    assert sink.abort() is None


def test_a_name_too_long_to_be_replaced_is_told_at_once(tmp_path: Path) -> None:
    """The old store steps aside under a longer name than the unfinished one has, at the end of the run."""
    path = tmp_path / f"{'x' * 242}.zarr"
    make(path, moving(5))
    for how in ("overwrite", "resume"):
        sink = ZarrSink(str(path), config(**{how: True}))
        if how == "resume":
            sink.resume_point()
        with pytest.raises(OutputWriteError, match="File name too long"):
            sink.open(header(9))
    assert names(tmp_path) == [path.name]
    assert open_store(path).complete


def test_flow_out_of_order_or_of_another_size_is_refused(tmp_path: Path) -> None:
    sink = ZarrSink(str(tmp_path / "X.zarr"), config())
    with pytest.raises(ValueError, match="not open"):
        sink.commit()
    sink.open(header(8))
    first, second, *_ = batches(moving(8))
    with pytest.raises(ValueError, match="expected number 0, got 2"):
        sink.write(second)
    sink.write(first)
    with pytest.raises(ValueError, match="expected number 2, got 0"):
        sink.write(first)
    wrong = next(batches(moving(1, H, W + 1)))
    with pytest.raises(ValueError, match=r"\(2, 6, 9\)"):
        sink.write(FlowBatch(wrong.flow, 2, wrong.frame, wrong.frame_to, wrong.timestamp_s, wrong.timestamp_to_s))
    with pytest.raises(ValueError, match="used once"):
        sink.open(header(8))


def test_flow_may_have_any_strides_and_a_gradient(tmp_path: Path) -> None:
    flows = torch.from_numpy(moving(3, H + 2, W + 4)).requires_grad_()[:, :, 1:-1, 2:-2]
    batch = next(batches(moving(3), 3))
    sink = ZarrSink(str(tmp_path / "X.zarr"), config(max_error=0))
    sink.open(header(3))
    sink.write(FlowBatch(flows, 0, batch.frame, batch.frame_to, batch.timestamp_s, batch.timestamp_to_s))
    sink.commit()
    assert np.array_equal(open_store(tmp_path / "X.zarr")[:], flows.detach().numpy())


# Damage


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="no flow store"):
        open_store(tmp_path / "X.zarr")
    (tmp_path / "X.zarr").touch()
    with pytest.raises(DamagedStoreError, match="is a file"):
        open_store(tmp_path / "X.zarr")
    with pytest.raises(DamagedStoreError, match=r"no zarr\.json"):
        open_store(tmp_path)
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(DamagedStoreError, match="not a flow store"):
        open_store(tmp_path / "other.zarr")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("zarr.json", '"format_version": 1', '"format_version": 2'),
        ("zarr.json", "{", ""),
        ("flow/zarr.json", "shape", "form"),
        ("flow/zarr.json", '"blosc"', '"gzip"'),
        ("flow/zarr.json", "int16", "int17"),
    ],
)
def test_metadata_that_cannot_be_read(tmp_path: Path, file: str, old: str, new: str) -> None:
    path = Path(make(tmp_path / "X.zarr", moving(2)).path) / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DamagedStoreError):
        open_store(tmp_path / "X.zarr")


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_names_its_frame(tmp_path: Path, codec: Codec) -> None:
    store = make(tmp_path / "X.zarr", moving(8), codec=codec)
    shard = flow_shard(tmp_path / "X.zarr", 1)
    offset, length = (int(value) for value in store.files.index(1)[1])
    spoil(shard, offset + length // 2)
    assert store[3].shape == (2, H, W)
    with pytest.raises(DamagedStoreError, match=r"flow 4 \(frame 8\): checksum is wrong"):
        store[2:6]
    (problem,) = map(str, store.check())
    assert "flow 4 (frame 8)" in problem


def test_a_damaged_or_missing_shard_names_its_flows(tmp_path: Path) -> None:
    make(tmp_path / "X.zarr", moving(8))
    spoil(flow_shard(tmp_path / "X.zarr", 2), -1)
    with pytest.raises(DamagedStoreError, match="index of shard 2 is damaged: flows 6 to 7"):
        open_store(tmp_path / "X.zarr")[7]
    flow_shard(tmp_path / "X.zarr", 0).unlink()
    store = open_store(tmp_path / "X.zarr")
    with pytest.raises(DamagedStoreError, match=r"flow 1 \(frame 2\) is missing"):
        store[1]
    problems = list(map(str, store.check()))
    assert len(problems) == 5
    for number in (0, 1, 2):
        assert sum(f"flow {number} " in problem for problem in problems) == 1


def test_damaged_times_are_found_and_do_not_hide_the_flow(tmp_path: Path) -> None:
    flows = moving(4)
    store = make(tmp_path / "X.zarr", flows, max_error=0)
    spoil(tmp_path / "X.zarr" / "timestamp_s" / "c" / "1", 3)
    (tmp_path / "X.zarr" / "frame" / "c" / "0").unlink()
    with pytest.raises(DamagedStoreError, match="chunk 1 of timestamp_s: checksum"):
        _ = store.timestamps_s
    with pytest.raises(DamagedStoreError, match="chunk 0 of frame is missing"):
        _ = store.frame
    assert np.array_equal(store[:], flows)
    assert len(list(store.check())) == 2
