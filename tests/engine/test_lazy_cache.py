"""The cache of lazy flow: what was computed once is read from then on, by other processes too, and after failures."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch.utils.data import DataLoader

import flowreel
from flowreel.engine.color import color
from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowInfo, SourceId
from flowreel.engine.errors import (
    CacheMismatchError,
    DamagedStoreError,
    OutputWriteError,
    ResumeMismatchError,
    StoreError,
)
from flowreel.engine.lazy import LazyFlow, LazyStatistics
from flowreel.engine.verify import verify
from flowreel.sinks.flow_cache import FlowCache, open_cache
from tests.fakes.disk import Disk
from tests.fakes.fresh import Fresh

Clip = Callable[..., Path]
Open = Callable[..., LazyFlow]
COUNT = 39  # flows


@pytest.fixture(scope="module")
def video(clip: Clip) -> Path:
    """40 frames, a key frame every 10, nothing reordered."""
    return clip("cached.mp4", count=COUNT + 1, options={"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=0"})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def opened(video: Path, tiny_weights: str, cache: Path) -> Open:
    return lambda **options: flowreel.open(video, **{"weights": tiny_weights, "batch": 4, "cache": cache} | options)


@pytest.fixture(scope="module")
def expected(video: Path, tiny_weights: str) -> torch.Tensor:
    """All flow, without a cache."""
    return torch.cat([batch.flow for batch in flowreel.stream(video, weights=tiny_weights, batch=4)])


def of_two_flows() -> tuple[FlowInfo, Any]:
    """What a cache is opened with, without a video."""
    times = {"timestamps_s": [0.0, 0.1], "timestamps_to_s": [0.1, 0.2], "frame": [0, 1], "frame_to": [1, 2]}
    flows = SimpleNamespace(**{name: np.array(values) for name, values in times.items()})
    return FlowInfo(6, 9, Fraction(25), 3, SourceId("clip.mp4", 100, 1.0, "abc")), flows


def empty_cache(folder: Path) -> FlowCache:
    info, flows = of_two_flows()
    return open_cache(folder, info, SinkConfig(), flows)


class TestReading:
    def test_the_first_reading_equals_the_second_and_nothing_is_computed_again(
        self, opened: Open, expected: torch.Tensor
    ) -> None:
        flow = opened()
        first = flow[:]
        assert (first - expected).abs().max() <= 1 / 64
        assert not torch.equal(first, expected)  # it was rounded for the cache
        assert flow.statistics == LazyStatistics(decoded=40, computed=39)
        again = opened()
        assert torch.equal(again[:], first)
        assert torch.equal(torch.stack(list(again)), first)
        assert again.statistics == LazyStatistics(from_cache=78)

    def test_lossless_it_is_what_stream_gives(self, opened: Open, expected: torch.Tensor) -> None:
        for _ in range(2):
            assert torch.equal(opened(max_error=0)[:], expected)

    def test_it_is_what_run_stores(self, opened: Open, video: Path, tiny_weights: str, tmp_path: Path) -> None:
        flowreel.run(video, tmp_path / "run.zarr", weights=tiny_weights, batch=4)
        np.testing.assert_array_equal(np.asarray(opened()), flowreel.open_store(tmp_path / "run.zarr")[:])

    @pytest.mark.parametrize("codec", ["zstd", "pcodec"])
    def test_other_codecs(self, opened: Open, codec: str) -> None:
        first = opened(codec=codec)[5:9]
        assert torch.equal(opened(codec=codec)[5:9], first)

    @pytest.mark.parametrize(
        ("key", "decoded", "computed", "from_cache"),
        [
            (25, 0, 0, 1),
            (slice(24, 32), 13, 4, 4),  # flows 28 to 31: from key frame 20 to frame 32
            ([25, 3, 25], 5, 1, 1),
            ((24, 0, 3), 0, 0, 1),
            (slice(0, 4), 5, 4, 0),
        ],
    )
    def test_only_what_is_missing_is_computed(
        self, opened: Open, key: Any, decoded: int, computed: int, from_cache: int
    ) -> None:
        opened()[24:28]
        flow = opened()
        flow[key]
        counted = flow.statistics
        assert (counted.computed, counted.from_cache) == (computed, from_cache)
        assert counted.decoded == decoded

    def test_iterating_over_a_partly_filled_one(self, opened: Open, expected: torch.Tensor) -> None:
        opened()[[0, 1, 7, 20, 21, 22, 38]]
        flow = opened(batch=1)  # 32 batches are looked up at a time: twice here
        got = torch.stack(list(flow))
        assert (got - expected).abs().max() <= 1 / 64 + 1e-4
        assert flow.statistics == LazyStatistics(decoded=39, seeks=0, computed=32, from_cache=7)

    def test_iterating_over_an_empty_one_never_seeks(self, opened: Open) -> None:
        flow = opened(batch=1)
        assert sum(1 for _ in flow) == COUNT
        assert flow.statistics == LazyStatistics(decoded=40, seeks=0, computed=39)

    def test_results_take_part_in_training(self, opened: Open) -> None:
        net = torch.nn.Conv2d(2, 3, 3)
        for _ in range(2):
            part = opened()[2:5]
            assert not part.is_inference()
            net.zero_grad()
            net(part.requires_grad_()).square().mean().backward()
            assert net.weight.grad is not None
            assert net.weight.grad.abs().sum() > 0

    def test_batches_that_come_in_halves_keep_their_numbers(
        self, opened: Open, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on a device with too little memory for a whole batch."""
        from flowreel.engine.inference import Inference

        whole = Inference.flows_that_fit
        monkeypatch.setattr(Inference, "flows_that_fit", lambda *a: None if len(a[1]) > 2 else whole(*a))
        flow = opened()
        for key in (slice(5, 11), [30, 2, 31, 3, 4]):
            assert (flow[key] - expected[key]).abs().max() <= 1 / 64 + 1e-4
        assert (flow[key] - expected[key]).abs().max() <= 1 / 64 + 1e-4
        assert flow.statistics.computed == flow.statistics.from_cache + 6

    def test_it_says_how_full_it_is(self, opened: Open, cache: Path) -> None:
        flow = opened()
        assert flow.cached == 0
        flow[3:8]
        assert flow.cached == 5
        (cache / f"flow/c.{COUNT}.0.0.0").touch()  # there is no flow of that number
        assert flow.cached == 5
        assert repr(flow).endswith(f"; 5 of 39 flows in {cache}>")

    def test_one_that_was_removed_holds_nothing(self, opened: Open, cache: Path) -> None:
        flow = opened(cache=cache)
        flow[0]
        shutil.rmtree(cache)
        assert flow.cached == 0
        assert "0 of " in repr(flow)

    def test_the_working_folder_is_no_place_for_one(
        self, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        with pytest.raises(CacheMismatchError, match="is the working folder"):
            opened(cache=".")


class TestSharing:
    def test_threads(self, opened: Open) -> None:
        one, other = opened(), opened()
        numbers = random.Random(0).choices(range(12), k=60)
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda item: (one, other)[item[0] % 2][item[1]], enumerate(numbers)))
        again = opened()
        assert all(torch.equal(flow, again[number]) for number, flow in zip(numbers, got, strict=True))
        assert one.statistics.computed <= 12
        assert other.statistics.computed <= 12

    def test_what_another_computes_while_one_waits_is_read(self, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        one, other = opened(), opened()

        @contextmanager
        def turn() -> Iterator[None]:
            other[3]
            yield

        monkeypatch.setattr(one._flows, "_turn", turn())
        assert torch.equal(one[3], other[3])
        assert one.statistics == LazyStatistics(from_cache=1)

    def test_two_spawned_workers_fill_one(self, opened: Open, expected: torch.Tensor) -> None:
        flow = opened(stop=14)
        workers = {"num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True}
        loader: Any = DataLoader(flow, batch_size=3, **workers)  # type: ignore[arg-type]
        first, second = torch.cat(list(loader)), torch.cat(list(loader))
        assert (first - expected[:13]).abs().max() <= 1 / 64 + 1e-4
        assert torch.equal(first, second)
        assert torch.equal(flow[:], first)
        assert flow.statistics == LazyStatistics(from_cache=13)

    def test_a_pickled_one_keeps_its_cache(self, opened: Open) -> None:
        flow = opened()
        flow[5:7]
        copy = pickle.loads(pickle.dumps(flow))
        copy[5:7]
        assert copy.statistics == LazyStatistics(from_cache=2)

    def test_the_same_flow_by_two_at_once_is_one_flow(self, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second one to finish takes what the first one has published, whatever it computed itself."""
        slow, fast = opened(batch=1), opened()
        wait = slow._cache
        assert wait is not None
        keep = wait.keep

        def kept_late(numbers: list[int], flows: Any) -> Any:
            first = fast[numbers].numpy()
            late = keep(numbers, flows + 1)
            np.testing.assert_array_equal(late, first)
            return late

        monkeypatch.setattr(wait, "keep", kept_late)
        assert torch.equal(slow[3], fast[3])


class TestProcesses:
    def test_two_fill_one_and_one_of_them_is_killed(
        self, fresh: Fresh, opened: Open, video: Path, tiny_weights: str, cache: Path, expected: torch.Tensor
    ) -> None:
        code = """
import signal, sys, flowreel
from pathlib import Path
if __name__ == "__main__":
    flow = flowreel.open(sys.argv[1], weights=sys.argv[2], batch=3, cache=sys.argv[3])
    Path("open").touch()
    for _ in flow:
        Path("begun").touch()
    signal.pause()
"""
        fresh.start("-c", [code, str(video), tiny_weights, str(cache)], cache.parent)
        fresh.until(cache.parent / "open")
        mine = enumerate(opened())
        for _ in range(6):
            next(mine)  # while the other process fills the same part of it
        fresh.until(cache.parent / "begun")
        assert fresh.stop(signal.SIGKILL) == (-signal.SIGKILL, "")
        assert [number for number, _ in mine] == list(range(6, COUNT))
        flow = opened()
        assert (flow[:] - expected).abs().max() <= 1 / 64 + 1e-4
        assert flow.statistics == LazyStatistics(from_cache=COUNT)
        assert list(flowreel.open_store(cache).check()) == []

    @pytest.mark.parametrize("moment", ["in the file", "before its name", "with its name"])
    def test_killed_while_it_keeps_a_flow(
        self, opened: Open, cache: Path, video: Path, tiny_weights: str, fresh: Fresh, moment: str
    ) -> None:
        """Flows published before are still there, the others are computed, and nothing half-written is read."""
        spot = {"in the file": "sync_file", "before its name": "os.link", "with its name": "sync_folder"}[moment]
        code = f"""
import os, signal, sys, flowreel
from flowreel.engine import publish
if __name__ == "__main__":
    flow = flowreel.open(sys.argv[1], weights=sys.argv[2], batch=4, cache=sys.argv[3])
    flow[:2]
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    publish.{spot} = die
    flow[5]
"""
        assert fresh.code(code, str(video), tiny_weights, str(cache)) == (-signal.SIGKILL, "")
        flow = opened()
        published = 3 if moment == "with its name" else 2
        assert flow.cached == published
        flow[[0, 1, 5]]
        counted = flow.statistics
        assert (counted.from_cache, counted.computed) == (published, 3 - published)
        left = list((cache / "flow").glob("*.partial"))
        assert len(left) == (0 if moment == "with its name" else 1)
        assert list(flowreel.open_store(cache).check()) == []
        for path in left:
            os.utime(path, (0, 0))  # long ago
        assert opened()[[0, 1, 5]].shape == (3, 2, 48, 64)
        assert not list((cache / "flow").glob("*.partial"))

    def test_killed_while_it_makes_the_cache(
        self, cache: Path, video: Path, tiny_weights: str, opened: Open, fresh: Fresh
    ) -> None:
        code = """
import os, signal, sys, flowreel
from flowreel.engine import publish
if __name__ == "__main__":
    real = publish.publish_bytes
    def dies(path, *pieces):
        if path.name == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, *pieces)
    publish.publish_bytes = dies
    flowreel.open(sys.argv[1], weights=sys.argv[2], batch=4, cache=sys.argv[3])
"""
        assert fresh.code(code, str(video), tiny_weights, str(cache)) == (-signal.SIGKILL, "")
        assert not cache.exists()
        assert opened()[0].shape == (2, 48, 64)
        (left,) = cache.parent.glob("*.partial")
        users = cache / "flow" / "mine.partial"  # no process of ours makes a folder there
        users.mkdir()
        (users / "notes.txt").touch()
        for path in (left, users):
            os.utime(path, (0, 0))  # long ago
        opened()
        assert not left.exists()
        assert (users / "notes.txt").exists()


class TestRefusal:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"precision": "bf16"}, "precision was fp32, is bf16"),
            ({"fit": "resize"}, "fit was pad, is resize"),
            ({"max_error": 0.1}, "max error was 0.015625, is 0.1"),
            ({"max_error": 0}, "max error was 0.015625, is 0"),
            ({"codec": "pcodec"}, "codec was blosc, is pcodec"),
            ({"direction": "backward"}, "direction was forward, is backward"),
            ({"start": 3}, "start was 0, is 3"),
            ({"stop": 20}, "stop was None, is 20"),
            ({"step": 2}, "step was 1, is 2"),
            ({"weights": "baseline", "model": "FlowNet2C"}, "model was FlowNet2S, is FlowNet2C; "),
            ({"weights": "baseline", "model": "FlowNet2C"}, "weights sha256 was "),
        ],
    )
    def test_made_in_another_way(self, opened: Open, cache: Path, options: dict[str, Any], said: str) -> None:
        opened()
        with pytest.raises(CacheMismatchError, match="Open it as before, or choose another cache") as refusal:
            opened(**options)
        assert str(cache) in str(refusal.value)
        assert said in str(refusal.value)

    def test_another_source(self, opened: Open, clip: Clip, cache: Path, video: Path, tiny_weights: str) -> None:
        opened()
        options = {"weights": tiny_weights, "batch": 4, "cache": cache}
        other = clip("other.mp4", count=COUNT + 1)
        with pytest.raises(CacheMismatchError, match=r"source was cached\.mp4, is other\.mp4"):
            flowreel.open(other, **options)
        folder = cache.parent / "elsewhere"
        folder.mkdir()
        shutil.copy(other, folder / video.name)
        with pytest.raises(CacheMismatchError, match=r"cached\.mp4 is another file than it was"):
            flowreel.open(folder / video.name, **options)
        shutil.copy(video, folder / video.name)
        flowreel.open(folder / video.name, **options)  # the same file in another folder

    @pytest.mark.parametrize("size_bytes", [99, 101])
    def test_a_source_of_the_same_beginning(self, cache: Path, size_bytes: int) -> None:
        info, flows = of_two_flows()
        open_cache(cache, info, SinkConfig(), flows)
        other = replace(info, source=replace(info.source, size_bytes=size_bytes))
        with pytest.raises(CacheMismatchError, match=rf"clip\.mp4 had 100 bytes, has {size_bytes}"):
            open_cache(cache, other, SinkConfig(), flows)
        flows.timestamps_s = flows.timestamps_s + 1
        with pytest.raises(CacheMismatchError, match="its frames or their times were others"):
            open_cache(cache, info, SinkConfig(), flows)

    def test_other_words_for_the_same(self, opened: Open, tiny_weights: str, tmp_path: Path) -> None:
        opened()[:2]
        shutil.copy(tiny_weights, tmp_path / "renamed.safetensors")
        for options in (
            {"stop": COUNT + 1},
            {"start": "0s"},
            {"batch": 7},
            {"weights": tmp_path / "renamed.safetensors"},
        ):
            assert opened(**options).cached == 2

    def test_what_is_no_cache(self, opened: Open, tmp_path: Path, video: Path, tiny_weights: str) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(CacheMismatchError, match="is a file: a cache is a folder"):
            opened(cache=tmp_path / "file")
        flowreel.run(video, tmp_path / "run.zarr", weights=tiny_weights, batch=4, stop=5)
        with pytest.raises(CacheMismatchError, match=r"a flow store, not a cache: flowreel\.open_store"):
            opened(cache=tmp_path / "run.zarr")
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos/cat.png").write_bytes(b"")
        with pytest.raises(CacheMismatchError, match="is not a cache and not empty"):
            opened(cache=tmp_path / "photos")
        (tmp_path / "empty").mkdir()
        assert opened(cache=tmp_path / "empty").cached == 0

    def test_a_run_does_not_go_on_with_a_cache(self, opened: Open, cache: Path, video: Path, tiny_weights: str) -> None:
        folder = cache.with_suffix(".zarr")
        opened(cache=folder)[3]
        with pytest.raises(ResumeMismatchError, match=r"is a cache of flowreel\.open"):
            flowreel.run(video, folder, weights=tiny_weights, batch=4, resume=True)
        assert opened(cache=folder).cached == 1


class TestAsAStore:
    def test_open_store_reads_what_is_there(self, opened: Open, cache: Path) -> None:
        flow = opened()
        part = flow[4:7]
        store = flowreel.open_store(cache)
        assert isinstance(store, FlowCache)
        assert "3 flows computed" in repr(store)
        np.testing.assert_array_equal(store[4:7], part)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(store))[4:7], part)
        for name in ("frame", "frame_to", "timestamps_s", "timestamps_to_s"):
            np.testing.assert_array_equal(getattr(store, name), getattr(flow, name))
        with pytest.raises(StoreError, match=r"is a cache, and flow 9 \(frame 9\) has not been computed yet"):
            store[9]

    def test_other_readers_see_it_too(self, opened: Open, cache: Path) -> None:
        part = opened()[4:7].numpy()
        group = zarr.open_group(cache, mode="r")
        step = group["flow"].attrs["scale_factor"]
        np.testing.assert_array_equal(group["flow"][4:7] * np.float32(step), part)
        with xr.open_zarr(cache, consolidated=False) as dataset:
            np.testing.assert_array_equal(dataset["flow"][4:7].values, part)
            assert np.isnan(dataset["flow"][8].values).all()

    def test_info_and_verify_show_how_full_it_is(
        self, opened: Open, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from flowreel.engine.cli import call

        opened()[:13]
        assert call(["info", str(cache)]) == 0
        shown = capsys.readouterr().out
        assert f"{cache}: cache of lazy flow, 33% full" in shown
        assert "13 of 39, 64x48" in shown
        assert "unfinished" not in shown
        assert call(["info", "--json", str(cache)]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["cache"], facts["complete"], facts["available"], facts["flows"]) == (True, False, 13, 39)
        assert call(["verify", str(cache)]) == 0
        capsys.readouterr()
        opened()[:]
        assert call(["info", str(cache)]) == 0
        assert "cache of lazy flow, full" in capsys.readouterr().out

    def test_painting_a_full_one_does_not_list_its_files_for_each_picture(
        self, opened: Open, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As many pictures as files: the time would grow with the square of their number."""
        opened()[:]
        listed: list[str] = []
        real = os.listdir
        monkeypatch.setattr(os, "listdir", lambda folder=".": listed.append(str(folder)) or real(folder))
        assert color(cache, tmp_path / "pictures").pictures == COUNT
        assert listed.count(str(cache / "flow")) < 5

    def test_export_packs_a_full_one(self, opened: Open, cache: Path, tmp_path: Path) -> None:
        flow = opened()
        flow[:20]
        with pytest.raises(StoreError, match=r"a cache with 20 of 39 flows in it: only a full one can be exported"):
            flowreel.export(cache, tmp_path / "packed.zarr")
        flow[:]
        flowreel.export(cache, tmp_path / "packed.zarr")
        store = flowreel.open_store(tmp_path / "packed.zarr")
        np.testing.assert_array_equal(store[:], flow[:])
        np.testing.assert_array_equal(store.timestamps_s, flow.timestamps_s)
        assert list(store.check()) == []
        assert "cache" not in store.attrs
        assert store.attrs["weights_sha256"] == flowreel.open_store(cache).attrs["weights_sha256"]
        assert len([path for path in (tmp_path / "packed.zarr/flow").rglob("*") if path.is_file()]) == 2


class TestDamage:
    @pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
    def test_a_damaged_flow_is_told_and_computed_again(self, opened: Open, cache: Path, how: str) -> None:
        before = opened()[4:8]
        path = cache / "flow/c.5.0.0.0"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes({"flipped": data, "cut": data[:-9], "empty": b""}[how])
        store = flowreel.open_store(cache)
        assert [(problem.flow, problem.frame) for problem in store.check()] == [(5, 5)]
        with pytest.raises(DamagedStoreError, match="flow 5"):
            store[5]
        flow = opened()
        assert torch.allclose(flow[4:8], before, atol=1 / 32, rtol=0)
        assert (flow.statistics.from_cache, flow.statistics.computed) == (3, 1)
        assert list(flowreel.open_store(cache).check()) == []
        path.write_bytes(b"")
        assert torch.allclose(torch.stack(list(opened())[4:8]), before, atol=1 / 32, rtol=0)

    @pytest.mark.timeout(60)
    def test_reading_inside_an_iteration_over_a_damaged_flow(self, opened: Open, cache: Path) -> None:
        """The iteration holds a lock while it computes that flow again; the body of the loop needs that lock."""
        opened()[:8]
        (cache / "flow/c.5.0.0.0").write_bytes(b"")
        flow = opened()
        for number, one in zip(range(8), flow, strict=False):
            assert torch.equal(one, flow[number])
            assert flow.rgb(number).shape == (3, 48, 64)

    def test_one_that_is_longer_than_any_flow_takes_no_memory(self, cache: Path) -> None:
        store = empty_cache(cache)
        (cache / "flow/c.1.0.0.0").touch()
        os.truncate(cache / "flow/c.1.0.0.0", 256 << 20)
        tracemalloc.start()
        try:
            with pytest.raises(DamagedStoreError, match=r"flow 1 \(frame 1\): its file is longer than 4528 bytes"):
                store[1]
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()

    def test_one_that_somebody_else_has_removed_meanwhile(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store, path, flow = empty_cache(cache), cache / "flow/c.1.0.0.0", np.ones((1, 2, 6, 9), np.float32)
        path.touch()
        monkeypatch.setattr(store, "find", lambda *_: (path.unlink(), False)[1])
        assert np.array_equal(store.keep([1], flow), flow)
        assert np.array_equal(empty_cache(cache)[1], flow[0])

    def test_damaged_times(self, opened: Open, cache: Path) -> None:
        opened()
        path = cache / "frame/c/0"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DamagedStoreError, match=r"chunk 0 of frame: checksum is wrong \(flows 0 to 38\)"):
            opened()
        assert len(list(flowreel.open_store(cache).check())) == 1

    def test_repair_is_not_for_caches(self, opened: Open, cache: Path) -> None:
        from flowreel.sinks import ShardRewriter

        opened()
        with pytest.raises(StoreError, match="is a cache: what is damaged in it is computed again"):
            ShardRewriter(cache)

    def test_a_full_disk(
        self, opened: Open, cache: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
    ) -> None:
        flow = opened(max_error=0)
        flow[0]
        with files_up_to(200), pytest.raises(OutputWriteError, match=r"cannot write .*c\.7\.0\.0\.0"):
            flow[7]
        assert flow.cached == 1
        assert not list((cache / "flow").glob("*.partial"))
        assert flow[7].shape == (2, 48, 64)
        assert flow.cached == 2

    def test_several_are_encoded_side_by_side(
        self, opened: Open, cache: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on a machine with more cores. When one fails, the error is raised and those before it are kept."""
        monkeypatch.setattr("flowreel.sinks.flow_cache.encode_workers", lambda: 4)
        flow = opened()
        assert (flow[:16] - expected[:16]).abs().max() <= 1 / 64
        real = FlowCache._keep_one

        def fails(self: FlowCache, number: int, *others: Any) -> None:
            if number == 22:
                raise OutputWriteError("no more room")
            real(self, number, *others)

        monkeypatch.setattr(FlowCache, "_keep_one", fails)
        with pytest.raises(OutputWriteError, match="no more room"):
            flow[20:24]
        store = flowreel.open_store(cache)
        assert isinstance(store, FlowCache)
        assert [number for number in range(16, COUNT) if store.has(number)] in ([20, 21], [20, 21, 23])

    def test_a_cache_that_goes_away(self, opened: Open, cache: Path) -> None:
        flow = opened()
        flow[0]
        shutil.rmtree(cache)
        with pytest.raises(OutputWriteError, match=r"cannot write .*c\.0\.0\.0\.0"):
            flow[0]


def test_what_is_kept_is_on_the_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    store = empty_cache(cache)
    assert not disk.waiting
    store.keep([0, 1], np.ones((2, 2, 6, 9), np.float32))
    assert not disk.waiting


def test_a_cache_that_another_process_makes_meanwhile_is_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def second(source: Path, path: Path) -> None:
        monkeypatch.setattr(os, "rename", real)
        empty_cache(cache).keep([1], np.ones((1, 2, 6, 9), np.float32))
        real(source, path)

    monkeypatch.setattr(os, "rename", second)
    assert empty_cache(cache).stored == 1
    assert os.listdir(cache.parent) == [cache.name]


def test_what_a_cache_says_of_its_flow_is_verified(opened: Open, cache: Path) -> None:
    opened()[3]
    assert verify(cache).sound
    path = cache / "zarr.json"
    path.write_text(path.read_text().replace("cached.mp4", "cachet.mp4"))
    (finding,) = verify(cache).findings
    assert "is not what was written" in finding.what
