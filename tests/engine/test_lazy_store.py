"""Zarr, xarray and dask read flow that is computed on demand: correct, without needless work, errors never hidden."""

from __future__ import annotations

import asyncio
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore

import flowreel
from flowreel.engine.errors import SourceNotFoundError, TruncatedSourceError
from flowreel.engine.lazy import LazyFlow, LazyStatistics
from flowreel.sinks import ComputedStore, computed_store
from flowreel.sinks.store_checksums import attributes_checksum

Clip = Callable[..., Path]
Open = Callable[..., LazyFlow]
CLOSE = 1e-4  # px, between batches of different composition in fp32


@pytest.fixture(scope="module")
def video(clip: Clip) -> Path:
    """40 frames, a key frame every 10, nothing reordered."""
    return clip("store.mp4", count=40, options={"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=0"})


@pytest.fixture
def opened(video: Path, tiny_weights: str) -> Open:
    return lambda **options: flowreel.open(video, **{"weights": tiny_weights, "batch": 4} | options)


@pytest.fixture(scope="module")
def expected(video: Path, tiny_weights: str) -> Any:
    return torch.cat([batch.flow for batch in flowreel.stream(video, weights=tiny_weights, batch=4)]).numpy()


def by_zarr(store: Any) -> Any:
    return zarr.open_group(store)["flow"]


def by_xarray(store: Any) -> Any:
    return xr.open_zarr(store)["flow"]


def by_dask(store: Any) -> Any:
    return dask.array.from_zarr(store, component="flow")


READERS = [by_zarr, by_xarray, by_dask]


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=CLOSE)


class TestReaders:
    @pytest.mark.parametrize("reader", READERS)
    def test_a_real_clip(self, data_dir: Path, tiny_weights: str, reader: Callable[[Any], Any]) -> None:
        flow = flowreel.open(data_dir / "videos/person_asl_walk_640x480.mkv", weights=tiny_weights, stop=21, batch=4)
        array = reader(flow.store())
        assert array.shape == (20, 2, 480, 640)
        assert array.dtype == np.float32
        assert flow.statistics == LazyStatistics()  # opening computes nothing
        got = np.asarray(array[4:12])
        assert flow.statistics.computed == 8
        close(got, flow[4:12])
        np.testing.assert_array_equal(np.asarray(array[17]), flow[17])
        close(np.asarray(array[3, 1, 100:200, 7]), flow[3, 1, 100:200, 7])

    @pytest.mark.parametrize("reader", READERS)
    def test_all_of_it(self, opened: Open, expected: Any, reader: Callable[[Any], Any]) -> None:
        flow = opened()
        close(reader(flow.store())[:], expected)
        assert flow.statistics.computed == 39

    def test_xarray_knows_times_and_frames(self, opened: Open) -> None:
        flow = opened(start=3, step=2)
        with xr.open_zarr(flow.store()) as dataset:
            np.testing.assert_array_equal(dataset.timestamp_s, flow.timestamps_s)
            np.testing.assert_array_equal(dataset.timestamp_to_s, flow.timestamps_to_s)
            np.testing.assert_array_equal(dataset.frame, flow.frame)
            np.testing.assert_array_equal(dataset.frame_to, flow.frame_to)
            assert dataset.flow.dims == ("time", "component", "y", "x")
            assert dataset.flow.attrs["units"] == "pixel"
            assert dataset.attrs["flowreel"]["model"] == "FlowNet2S"
        assert flow.statistics.computed == 0
        eager = xr.open_zarr(flow.store(), chunks=None)
        close(eager.flow.isel(time=[5, 2], component=0), flow[[5, 2], 0])

    def test_dask_computes_in_chunks(self, opened: Open, expected: Any) -> None:
        flow = opened()
        array = by_dask(flow.store())
        close(array[10:20].mean(axis=(1, 2, 3)).compute(scheduler="threads"), expected[10:20].mean(axis=(1, 2, 3)))
        assert flow.statistics.computed == 10

    def test_nothing_is_computed_for_what_is_not_flow(self, opened: Open) -> None:
        flow = opened()
        store = flow.store()
        group = zarr.open_group(store)
        assert sorted(name for name, _ in group.arrays()) == [
            "flow", "frame", "frame_to", "timestamp_s", "timestamp_to_s",
        ]  # fmt: skip
        np.testing.assert_array_equal(group["timestamp_s"][:], flow.timestamps_s)
        assert group["flow"].nchunks == 39
        assert group["flow"].nbytes_stored() > 39 * 8 * 48 * 64
        assert flow.statistics == LazyStatistics()

    def test_a_cache_beneath(self, opened: Open, tmp_path: Path) -> None:
        first = by_zarr(opened(cache=tmp_path / "cache").store())[3:7]
        flow = opened(cache=tmp_path / "cache")
        np.testing.assert_array_equal(by_zarr(flow.store())[3:7], first)
        assert flow.statistics == LazyStatistics(from_cache=4)

    def test_its_chunks_may_be_copied_elsewhere(self, opened: Open, expected: Any, tmp_path: Path) -> None:
        """Copying every listed key to another store gives the same flow."""
        store = opened(stop=6).store()

        async def copy() -> None:
            target = LocalStore(tmp_path / "copied")
            async for key in store.list():
                value = await store.get(key, default_buffer_prototype())
                assert value is not None
                assert len(value) == await store.getsize(key)
                await target.set(key, value)

        asyncio.run(copy())
        close(zarr.open_group(tmp_path / "copied", mode="r")["flow"][:], expected[:5])


class TestGathering:
    def test_what_is_read_at_once_is_computed_together(self, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        flow = opened()
        store = flow.store()
        reads: list[list[int]] = []
        real = LazyFlow.__getitem__

        def noted(self: LazyFlow, key: Any) -> Any:
            reads.append(key)
            return real(self, key)

        monkeypatch.setattr(LazyFlow, "__getitem__", noted)

        async def read() -> list[Any]:
            keys = [f"flow/c.{number}.0.0.0" for number in (7, 3, 3, 12, 8)]
            return await asyncio.gather(*(store.get(key, default_buffer_prototype()) for key in keys))

        seven, three, again, *_ = asyncio.run(read())
        assert reads == [[3, 7, 8, 12]]
        assert flow.statistics.computed == 4
        assert three.to_bytes() == again.to_bytes() != seven.to_bytes()

    def test_what_is_asked_for_meanwhile_goes_together_next(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flow = opened()
        store = flow.store()
        reads: list[list[int]] = []
        real = LazyFlow.__getitem__
        asked = threading.Event()
        monkeypatch.setattr(computed_store, "GATHER_S", 0)

        def held(self: LazyFlow, key: Any) -> Any:
            reads.append(key)
            assert asked.wait(60)
            return real(self, key)

        monkeypatch.setattr(LazyFlow, "__getitem__", held)

        async def read() -> None:
            def get(number: int) -> Any:
                return asyncio.create_task(store.get(f"flow/c.{number}.0.0.0", default_buffer_prototype()))

            first = get(1)
            while not reads:
                await asyncio.sleep(0.001)
            others = []
            for number in (9, 4, 5):
                others.append(get(number))
                for _ in range(5):  # time for what should wait to begin
                    await asyncio.sleep(0)
            asked.set()
            await asyncio.gather(first, *others)

        asyncio.run(read())
        assert reads == [[1], [4, 5, 9]]

    def test_who_is_cancelled_takes_nobody_along(self, opened: Open) -> None:
        flow = opened()
        store = flow.store()

        async def read() -> Any:
            def get(number: int) -> Any:
                return asyncio.create_task(store.get(f"flow/c.{number}.0.0.0", default_buffer_prototype()))

            kept, dropped, alone = get(3), get(3), get(20)
            await asyncio.sleep(0)
            dropped.cancel()
            alone.cancel()
            return await kept

        assert asyncio.run(read()).to_bytes() == flow[3].numpy().tobytes()
        assert flow.statistics.computed == 2  # not 20

    def test_nor_who_is_cancelled_while_it_is_computed(self, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        flow = opened()
        store = flow.store()
        real, computing, cancelled = LazyFlow.__getitem__, threading.Event(), threading.Event()

        def held(self: LazyFlow, key: Any) -> Any:
            computing.set()
            assert cancelled.wait(60)
            return real(self, key)

        monkeypatch.setattr(LazyFlow, "__getitem__", held)

        async def read() -> Any:
            dropped, kept = (
                asyncio.create_task(store.get("flow/c.3.0.0.0", default_buffer_prototype())) for _ in range(2)
            )
            while not computing.is_set():
                await asyncio.sleep(0.001)
            dropped.cancel()
            await asyncio.sleep(0)
            cancelled.set()
            return await kept

        assert asyncio.run(read()).to_bytes() == flow[3].numpy().tobytes()

    def test_whatever_ends_the_computing_leaves_nobody_waiting(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Ended(BaseException):
            pass

        computing, asked = threading.Event(), threading.Event()

        def ends(*_: Any) -> Any:
            computing.set()
            assert asked.wait(60)
            raise Ended

        store = opened().store()
        monkeypatch.setattr(LazyFlow, "__getitem__", ends)

        async def read() -> list[Any]:
            def get(number: int) -> Any:
                return asyncio.create_task(store.get(f"flow/c.{number}.0.0.0", default_buffer_prototype()))

            first = get(3)
            while not computing.is_set():
                await asyncio.sleep(0.001)
            later = get(4)
            await asyncio.sleep(0)
            asked.set()
            return await asyncio.wait_for(asyncio.gather(first, later, return_exceptions=True), 60)

        assert [type(one) for one in asyncio.run(read())] == [asyncio.CancelledError] * 2

    def test_parts_of_a_chunk(self, opened: Open) -> None:
        store = opened().store()
        requests = [
            None,
            RangeByteRequest(3, 50),
            OffsetByteRequest(20),
            SuffixByteRequest(7),
            SuffixByteRequest(30_000),  # more than there is
        ]

        async def read() -> list[bytes]:
            got = await store.get_partial_values(
                default_buffer_prototype(), [("flow/c.2.0.0.0", request) for request in requests]
            )
            return [value.to_bytes() for value in got if value is not None]

        whole, *parts = asyncio.run(read())
        assert parts == [whole[3:50], whole[20:], whole[-7:], whole]

    def test_readers_in_several_threads_and_loops(self, opened: Open, expected: Any) -> None:
        flow = opened()
        store = flow.store()
        got: dict[int, bytes] = {}

        async def read(number: int) -> None:
            value = await store.get(f"flow/c.{number}.0.0.0", default_buffer_prototype())
            assert value is not None
            got[number] = value.to_bytes()

        threads = [threading.Thread(target=lambda n=n: asyncio.run(read(n))) for n in range(6)]
        for thread in threads:
            thread.start()
        close(by_zarr(store)[20:30], expected[20:30])
        for thread in threads:
            thread.join()
        for number, data in got.items():
            close(np.frombuffer(data, np.float32).reshape(2, 48, 64), expected[number])
        assert len(got) == 6


class TestWhatGoesWrong:
    @pytest.mark.parametrize("reader", READERS)
    def test_a_source_that_vanishes_is_no_field_of_fill_values(
        self, tmp_path: Path, video: Path, tiny_weights: str, reader: Callable[[Any], Any]
    ) -> None:
        """Its error is a FileNotFoundError, which Zarr could take for a missing chunk and replace by fill values."""
        path = tmp_path / "gone.mp4"
        shutil.copy(video, path)
        flow = flowreel.open(path, weights=tiny_weights, batch=4, frames_mb=0)
        array = reader(flow.store())
        close(array[30], flow[30])
        path.unlink()
        for key in (5, slice(2, 12)):
            with pytest.raises(SourceNotFoundError, match=r"gone\.mp4 is gone"):
                np.asarray(array[key])

    @pytest.mark.parametrize("reader", READERS)
    @pytest.mark.parametrize("error", [KeyError, FileNotFoundError, RuntimeError, MemoryError])
    def test_no_error_becomes_fill_values(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch, reader: Callable[[Any], Any], error: type[Exception]
    ) -> None:
        def broken(*_: Any) -> Any:
            raise error("x")  # a new one each time: its traceback would keep every frame alive

        array = reader(opened().store())
        monkeypatch.setattr("flowreel.engine.inference.Inference.of_fitted", broken)
        with pytest.raises(error):
            np.asarray(array[2:9])

    def test_an_error_is_of_the_flow_it_concerns(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch, expected: Any
    ) -> None:
        from flowreel.engine.sources import pyav as decoding

        real = decoding._count
        monkeypatch.setattr(decoding, "_count", lambda *a: (item for item in real(*a) if item[0] != 25))
        flow = opened()
        store = flow.store()

        async def read() -> list[Any]:
            keys = [f"flow/c.{number}.0.0.0" for number in range(22, 28)]
            gets = (store.get(key, default_buffer_prototype()) for key in keys)
            return await asyncio.gather(*gets, return_exceptions=True)

        for number, got in enumerate(asyncio.run(read()), 22):
            if number in (24, 25):
                assert isinstance(got, TruncatedSourceError)
                assert "frame 25" in str(got)
            else:
                close(np.frombuffer(got.to_bytes(), np.float32).reshape(2, 48, 64), expected[number])

    def test_nothing_can_be_written(self, opened: Open) -> None:
        store = opened().store()
        array = by_zarr(store)
        with pytest.raises(ValueError, match=r"flow/c\.0\.0\.0\.0 cannot be written"):
            array[0] = 1
        with pytest.raises(ValueError, match=r"cannot be deleted|A group exists"):  # newer versions of Zarr check first
            zarr.open_group(store, mode="w")
        with pytest.raises(ValueError, match="cannot be written"):
            array.attrs["mine"] = 1
        with pytest.raises(ValueError, match="cannot be deleted"):
            del zarr.open_group(store)["frame"]
        for attempt in (store.clear(), store.set_partial_values([("zarr.json", 0, b"x")])):
            with pytest.raises(ValueError, match="cannot be deleted"):
                asyncio.run(attempt)
        assert not store.supports_writes
        assert not store.supports_deletes
        assert not store.supports_partial_writes
        assert zarr.open_group(store, mode="r").store.read_only

    def test_keys_that_are_none(self, opened: Open) -> None:
        store = opened().store()

        async def read(key: str) -> Any:
            return await store.get(key, default_buffer_prototype())

        wrong = ("c.39.0.0.0", "c.01.0.0.0", "c.0.1.0.0", "c.0.0.0.0/zarr.json", "c/0/0/0/0")
        for key in (*(f"flow/{name}" for name in wrong), "flow", ".zgroup", ""):
            assert asyncio.run(read(key)) is None
            assert not asyncio.run(store.exists(key))
            with pytest.raises(FileNotFoundError):
                asyncio.run(store.getsize(key))
        for number in (0, 38):
            assert asyncio.run(store.exists(f"flow/c.{number}.0.0.0"))

    def test_listing(self, opened: Open) -> None:
        store = opened(stop=4).store()
        assert store.supports_listing

        async def names(prefix: str) -> list[str]:
            return sorted([name async for name in store.list_dir(prefix)])

        assert asyncio.run(names("")) == ["flow", "frame", "frame_to", "timestamp_s", "timestamp_to_s", "zarr.json"]
        assert asyncio.run(names("flow")) == ["c.0.0.0.0", "c.1.0.0.0", "c.2.0.0.0", "zarr.json"]
        assert asyncio.run(names("frame/")) == ["c", "zarr.json"]
        assert asyncio.run(names("fra")) == []

    def test_closed(self, opened: Open) -> None:
        flow = opened()
        array = by_zarr(flow.store())
        flow.close()
        with pytest.raises(ValueError, match="is closed"):
            array[0]


class TestSharing:
    def test_a_pickled_one_opens_again(self, opened: Open) -> None:
        flow = opened()
        store = flow.store()
        copy = pickle.loads(pickle.dumps(store))
        assert isinstance(copy, ComputedStore)
        np.testing.assert_array_equal(by_zarr(copy)[5], flow[5])
        assert flow.statistics.computed == 1
        assert copy != store
        assert store == flow.store()
        assert hash(store) == hash(flow.store())
        assert "LazyFlow" in repr(store)

    def test_dask_in_processes(self, opened: Open, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONHASHSEED", "6640")  # dask sets the same value and would not restore it
        array = by_dask(opened().store())
        with dask.config.set(scheduler="processes", num_workers=1):
            close(array[5].compute(), expected[5])


def test_what_it_says_of_itself_has_its_checksum(opened: Open) -> None:
    attributes = zarr.open_group(opened().store()).attrs
    assert attributes["flowreel_crc32c"] == attributes_checksum(attributes["flowreel"])
    assert "codec" not in attributes["flowreel"]  # nothing is compressed
