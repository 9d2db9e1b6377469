"""``flowreel.open``: flow by number equals that of a run, costs no more than was asked for, and errors are clear."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import flowreel
from flowreel.engine import computed_flow, lazy
from flowreel.engine.errors import (
    DeviceError,
    SourceChangedError,
    SourceNotFoundError,
    TooFewFramesError,
    TruncatedSourceError,
    UsageError,
    WeightsMismatchError,
)
from flowreel.engine.lazy import LazyFlow, LazyStatistics
from flowreel.engine.pairing import planned

Clip = Callable[..., Path]
CLOSE = 1e-4  # px, between batches of different composition in fp32


@pytest.fixture(scope="module")
def video(clip: Clip) -> Path:
    """40 frames, a key frame every 10, nothing reordered."""
    return clip("lazy.mp4", count=40, options={"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=0"})


@pytest.fixture
def opened(video: Path, tiny_weights: str) -> Callable[..., LazyFlow]:
    return lambda **options: flowreel.open(video, **{"weights": tiny_weights, "batch": 4} | options)


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    others = ("zarr", "asyncio", "QueueFeederThread")  # zarr keeps its threads, and a DataLoader's end a moment later
    assert {thread for thread in threading.enumerate() if not thread.name.startswith(others)} <= before


def streamed(source: Path | str, **options: Any) -> Tensor:
    return torch.cat([batch.flow for batch in flowreel.stream(source, **options)])


def counts(flow: LazyFlow) -> tuple[int, int]:
    return flow.statistics.decoded, flow.statistics.computed


class TestEquality:
    @pytest.mark.parametrize(
        "options",
        [{}, {"step": 3}, {"start": 5, "stop": "1.2s"}, {"direction": "backward"}, {"fit": "resize"},
         {"shard_bytes": 6 * 8 * 48 * 64}, {"precision": "bf16"}],
    )  # fmt: skip
    def test_all_of_it_is_what_stream_gives(
        self, opened: Callable[..., LazyFlow], video: Path, tiny_weights: str, options: dict[str, Any]
    ) -> None:
        batches = list(flowreel.stream(video, weights=tiny_weights, batch=4, **options))
        expected = torch.cat([batch.flow for batch in batches])
        flow = opened(**options)
        assert flow.shape == tuple(expected.shape)
        assert torch.equal(flow[:], expected)
        assert torch.equal(torch.stack(list(flow)), expected)
        for name, mine in (("frame", flow.frame), ("frame_to", flow.frame_to),
                           ("timestamp_s", flow.timestamps_s), ("timestamp_to_s", flow.timestamps_to_s)):  # fmt: skip
            np.testing.assert_array_equal(mine, np.concatenate([getattr(batch, name) for batch in batches]))

    @pytest.mark.parametrize("cached", [False, True])
    def test_iterating_plans_a_few_of_a_run_s_batches_at_a_time(
        self, opened: Callable[..., LazyFlow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
    ) -> None:
        plans: list[list[list[int]]] = []

        def recorded(*arguments: Any) -> list[list[int]]:
            plans.append(planned(*arguments))
            return plans[-1]

        monkeypatch.setattr(computed_flow, "planned", recorded)
        monkeypatch.setattr(computed_flow, "_STRETCH_BATCHES", 4)
        monkeypatch.setattr(computed_flow, "_STRETCH_FLOWS", 16)
        flow = opened(shard_bytes=6 * 8 * 48 * 64, cache=tmp_path / "cache" if cached else None)
        assert sum(1 for _ in flow) == 39
        assert counts(flow) == (40, 39)
        assert len(plans) == 4
        assert list(itertools.chain(*plans)) == planned(range(39), 4, 6, 39)

    def test_it_is_what_run_stores(self, opened: Callable[..., LazyFlow], video: Path, tiny_weights: str) -> None:
        folder = video.parent / "run.zarr"
        flowreel.run(video, folder, weights=tiny_weights, batch=4, max_error=0, overwrite=True)
        np.testing.assert_array_equal(np.asarray(opened()), flowreel.open_store(folder)[:])

    def test_whole_batches_to_the_bit_others_closely(
        self, opened: Callable[..., LazyFlow], video: Path, tiny_weights: str
    ) -> None:
        expected = streamed(video, weights=tiny_weights, batch=4)
        part = opened()[6:17]
        assert torch.equal(part[2:10], expected[8:16])
        assert (part - expected[6:17]).abs().max() <= CLOSE

    @pytest.mark.parametrize(
        "key",
        [-1, 17, slice(3, 9), slice(None, None, -7), slice(30, 5), [3, 1, 3, -1], [], np.array([5, 6]), range(4, 6),
         (5, 0), (slice(2, 4), slice(None), slice(10, 20), slice(30, 40)), (..., slice(None, None, -4), 3),
         [number % 13 == 0 for number in range(39)], torch.tensor([4, 30])],
    )  # fmt: skip
    def test_keys_mean_what_they_mean_to_numpy(
        self, opened: Callable[..., LazyFlow], video: Path, tiny_weights: str, key: Any
    ) -> None:
        expected = streamed(video, weights=tiny_weights, batch=4).numpy()[
            np.asarray(key) if isinstance(key, Tensor) else key
        ]
        got = opened()[key]
        assert got.dtype == torch.float32
        np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=CLOSE)

    @pytest.mark.parametrize(
        "source",
        ["synthetic:objects?size=100x70&frames=9", "pictures", "rotated", "variable"],
    )
    def test_every_kind_of_source(self, tiny_weights: str, source: str, request: Any, tmp_path: Path) -> None:
        if source == "pictures":
            rng = np.random.default_rng(0)
            for number in range(7):
                Image.fromarray(rng.integers(0, 255, (40, 70, 3), np.uint8)).save(tmp_path / f"{number}.png")
            source = str(tmp_path)
        elif not source.startswith("synthetic"):
            names = {"rotated": "nasa_rotated90_480x270.mp4", "variable": "bbb_vfr_640x360.mp4"}
            source = str(request.getfixturevalue("data_dir") / "videos_corner" / names[source])
        options = {"weights": tiny_weights, "batch": 2, "stop": 7}
        expected = streamed(source, **options)
        flow = flowreel.open(source, **options)
        assert torch.equal(flow[:], expected)
        assert (flow[3] - expected[3]).abs().max() <= CLOSE

    def test_real_weights_on_a_real_clip(self, data_dir: Path) -> None:
        clip = data_dir / "videos/person_asl_walk_640x480.mkv"
        options = {"model": "FlowNet2C", "batch": 3, "stop": 11}
        expected = streamed(clip, **options)
        flow = flowreel.open(clip, **options)
        assert torch.equal(flow[3:9], expected[3:9])
        assert (flow[4:6] - expected[4:6]).abs().max() <= CLOSE


@given(
    numbers=st.sets(st.integers(0, 59)).map(sorted),
    batch=st.integers(1, 9),
    shard=st.integers(1, 25),
    count=st.just(60),
)
@example(numbers=[0, 56, 57, 58, 59], batch=7, shard=25, count=60)  # the last batch is whole, although short
def test_plans_hold_every_flow_once_in_order_and_whole_batches_as_they_are(
    numbers: list[int], batch: int, shard: int, count: int
) -> None:
    plan = planned(numbers, batch, shard, count)
    assert [number for part in plan for number in part] == numbers
    assert all(0 < len(part) <= batch for part in plan)
    for first in range(0, count, shard):
        for start in range(first, min(first + shard, count), batch):
            whole = list(range(start, min(start + batch, first + shard, count)))
            if set(whole) <= set(numbers):
                assert whole in plan
    assert all(len(one) + len(other) > batch for one, other in itertools.pairwise(plan)
               if not any(_is_whole(part, batch, shard, count) for part in (one, other)))  # fmt: skip


def _is_whole(part: list[int], batch: int, shard: int, count: int) -> bool:
    first = part[0] // shard * shard
    start = first + (part[0] - first) // batch * batch
    return part == list(range(start, min(start + batch, first + shard, count)))


class TestCost:
    def test_opening_decodes_and_computes_nothing(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened()
        assert len(flow) == 39
        assert flow.shape == (39, 2, 48, 64)
        assert flow.dtype == torch.float32
        assert flow.timestamps_s[[0, -1]].tolist() == [0.0, 38 / 25]
        assert "lazy.mp4" in repr(flow)
        assert "(39, 2, 48, 64) float32 on cpu: FlowNet2S (tiny.safetensors), fp32, batch 4" in repr(flow)
        flow.to_xarray()
        assert flow.statistics == LazyStatistics()

    @pytest.mark.parametrize(
        ("key", "decoded", "computed"),
        [
            (0, 2, 1),
            (25, 7, 1),  # key frame 20 to frame 26
            (slice(20, 30), 11, 10),
            (slice(13, 15), 6, 2),
            ((3, 0, 5, 5), 5, 1),
            ([31, 30, 31], 3, 2),
            ([2, 35], 37, 2),  # 0 to 3; key frame 30 is near enough to read on: 4 to 36
            (slice(None), 40, 39),
            (slice(5, 5), 0, 0),
            ((slice(None), 1, slice(0, 0)), 0, 0),
        ],
    )  # fmt: skip
    def test_exactly_what_is_asked_for(
        self, opened: Callable[..., LazyFlow], key: Any, decoded: int, computed: int
    ) -> None:
        flow = opened()
        assert flow[key].shape == flow_shape(key)
        assert counts(flow) == (decoded, computed)

    def test_forward_reading_never_seeks(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened(frames_mb=0.02)  # two frames
        for first in range(0, 39, 5):
            flow[first : first + 5]
        assert flow.statistics == LazyStatistics(decoded=40, seeks=0, computed=39)
        alone = opened(frames_mb=0.02)
        for number in range(39):
            alone[number]
        assert alone.statistics == LazyStatistics(decoded=40, seeks=0, computed=39)

    def test_iterating_decodes_and_computes_each_once(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened()
        assert sum(1 for _ in flow) == 39
        assert flow.statistics == LazyStatistics(decoded=40, seeks=0, computed=39)

    @pytest.mark.parametrize("options", [{}, {"frames_mb": np.int32(4096)}])
    def test_what_was_decoded_serves_again(self, opened: Callable[..., LazyFlow], options: dict[str, Any]) -> None:
        flow = opened(**options)
        flow[28]  # 20 to 29
        flow[[27, 21, 24]]
        assert flow.statistics == LazyStatistics(decoded=10, seeks=1, computed=4)

    def test_leaving_an_iteration_early_leaves_no_thread(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened()
        for number, _ in enumerate(flow):
            if number == 5:
                break
        assert flow.statistics.computed < 39


def flow_shape(key: Any) -> tuple[int, ...]:
    return np.broadcast_to(np.int8(0), (39, 2, 48, 64))[key].shape


class TestTime:
    def test_played_at(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened()
        for seconds, number in ((0.0, 0), (0.039, 0), (0.0401, 1), (1.53, 38), (1.5599, 38)):
            assert torch.equal(flow.played_at(seconds), flow[number]), seconds
        for seconds in (-0.01, 1.5601, float("nan")):
            with pytest.raises(IndexError, match=r"there is some from 0 to 1\.56 s"):
                flow.played_at(seconds)

    def test_backward_flow_goes_by_the_earlier_frame_too(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened(direction="backward")
        assert flow.timestamps_s[0] == pytest.approx(0.04)
        assert torch.equal(flow.played_at(0.0), flow[0])

    def test_in_range(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened()
        assert torch.equal(flow.in_range(0.08, 0.2), flow[2:5])
        assert torch.equal(flow.in_range(0.081, 0.21), flow[3:6])
        assert flow.in_range(5, 6).shape == (0, 2, 48, 64)

    def test_times_are_those_of_the_container(self, data_dir: Path, tiny_weights: str) -> None:
        flow = flowreel.open(data_dir / "videos_corner/non_zero_start_200x112.mp4", weights=tiny_weights)
        assert flow.timestamps_s[0] == pytest.approx(127995 / 15360)
        assert torch.equal(flow.played_at(127995 / 15360), flow[0])

    def test_xarray_computes_what_is_looked_at(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened()
        array = flow.to_xarray()
        np.testing.assert_array_equal(array.sel(component=1)[4:6].values, flow[4:6, 1].numpy())
        np.testing.assert_array_equal(array.frame.values, flow.frame)
        assert counts(flow)[1] == 4

    def test_the_frame_beside_a_flow(self, opened: Callable[..., LazyFlow], video: Path) -> None:
        flow = opened(start=3)
        with av.open(str(video)) as container:
            picture = list(container.decode(video=0))[8].to_ndarray(format="rgb24")
        rgb = flow.rgb(5)
        assert (rgb.shape, rgb.dtype) == ((3, 48, 64), torch.uint8)
        assert np.abs(rgb.permute(1, 2, 0).numpy().astype(int) - picture).max() <= 3
        assert flow.statistics.computed == 0
        with pytest.raises(IndexError):
            flow.rgb(36)


class TestTraining:
    def test_gradients_flow_from_a_loss_on_it(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened()
        net = torch.nn.Conv2d(2, 3, 3)
        for part in (flow[2:5], flow[3][None], next(iter(flow))[None]):
            assert not part.requires_grad
            assert not part.is_inference()
            net.zero_grad()
            net(part.requires_grad_()).square().mean().backward()
            assert net.weight.grad is not None
            assert net.weight.grad.abs().sum() > 0
            assert part.grad is not None

    def test_results_may_be_changed(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened()
        before = flow[4].clone()
        flow[4].zero_()
        next(iter(flow)).zero_()
        assert torch.equal(flow[4], before)

    def test_a_flow_that_is_kept_keeps_no_others_in_memory(self, opened: Callable[..., LazyFlow]) -> None:
        for one in (opened()[4], next(iter(opened()))):
            assert one.untyped_storage().nbytes() == one.nbytes

    def test_no_mode_leaks(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened()
        for _ in flow:
            assert torch.is_grad_enabled()
        with torch.inference_mode():
            flow[1]
        assert not flow[1].is_inference()

    def test_a_forked_worker_opens_its_own_decoder(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened(stop=8)
        expected = torch.stack([flow[number] for number in range(7)])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            loader = DataLoader(flow, batch_size=7, num_workers=1, multiprocessing_context="fork")  # type: ignore[arg-type]
            assert torch.equal(torch.cat(list(loader)), expected)

    def test_a_fork_on_a_gpu_is_refused(self, opened: Callable[..., LazyFlow], monkeypatch: pytest.MonkeyPatch) -> None:
        flow = opened()
        flow._flows._device = torch.device("cuda:0")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        for read in (lambda: flow[0], lambda: next(iter(flow)), lambda: flow.rgb(0)):
            with pytest.raises(DeviceError, match=r"cuda:0 before this process was forked.*spawn"):
                read()


class TestSharing:
    def test_threads_take_turns(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened()
        expected = {number: flow[number] for number in range(39)}
        numbers = random.Random(0).choices(range(39), k=30)
        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(lambda number: flow[number], numbers))
        assert all(torch.equal(flow, expected[number]) for number, flow in zip(numbers, got, strict=True))
        assert flow.statistics.computed == 39 + 30

    def test_reading_inside_an_iteration(self, opened: Callable[..., LazyFlow]) -> None:
        flow = opened()
        for number, one in enumerate(flow):
            if number % 10 == 0:
                assert (flow[number] - one).abs().max() <= CLOSE

    def test_a_pickled_one_opens_again(self, opened: Callable[..., LazyFlow], monkeypatch: pytest.MonkeyPatch) -> None:
        flow = opened(step=2)
        expected = flow[3]
        copy = pickle.loads(pickle.dumps(flow))
        monkeypatch.chdir("/")
        assert torch.equal(copy[3], expected)
        assert (copy.shape, copy.statistics.computed) == (flow.shape, 1)

    def test_a_pickled_one_knows_its_source(self, clip: Clip, tiny_weights: str, tmp_path: Path, video: Path) -> None:
        path = tmp_path / "x.mp4"
        shutil.copy(video, path)
        data = pickle.dumps(flowreel.open(path, weights=tiny_weights))
        shutil.copy(clip("other.mp4", count=12), path)
        with pytest.raises(SourceChangedError, match="not what it was"):
            pickle.loads(data)

    def test_a_pickled_one_knows_its_weights(
        self, tiny_weights: str, tiniest_weights: str, tmp_path: Path, video: Path
    ) -> None:
        weights = tmp_path / "w.safetensors"
        shutil.copy(tiny_weights, weights)
        data = pickle.dumps(flowreel.open(video, weights=weights))
        shutil.copy(tiniest_weights, weights)
        with pytest.raises(WeightsMismatchError, match=r"w\.safetensors has been replaced"):
            pickle.loads(data)

    def test_closing(self, opened: Callable[..., LazyFlow]) -> None:
        with opened() as flow:
            flow[0]
        flow.close()
        for read in (lambda: flow[0], lambda: next(iter(flow)), lambda: flow.rgb(0)):
            with pytest.raises(ValueError, match="is closed"):
                read()
        assert len(flow) == 39

    def test_what_another_thread_closes_is_not_opened_again(self, opened: Callable[..., LazyFlow]) -> None:
        """A thread that has begun to read waits for its turn, and then finds it closed."""
        flow = opened()
        flow.close()
        for read in (lambda: list(flow._flows.read([0])), lambda: flow._flows.frame(0)):
            with pytest.raises(ValueError, match="is closed"):
                read()
        assert flow._flows._reader._decoder is None

    def test_closing_in_a_forked_process_leaves_the_parent_s_decoder_alone(
        self, opened: Callable[..., LazyFlow], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flow = opened()
        flow[0]
        with monkeypatch.context() as forked:
            forked.setattr(os, "getpid", lambda: -1)
            flow.close()
            with pytest.raises(ValueError, match="is closed"):
                flow[0]
        assert flow._flows._reader._decoder is not None
        flow._flows._reader.close()


class TestWhatGoesWrong:
    @pytest.mark.parametrize("key", [39, -40, [3, 39], (0, 2), (0, 0, 48)])
    def test_indices_out_of_range(self, opened: Callable[..., LazyFlow], key: Any) -> None:
        flow = opened()
        with pytest.raises(IndexError):
            flow[key]
        assert counts(flow) == (0, 0)

    @pytest.mark.parametrize("key", ["3", 1.5, None, True, {}, (0, True)])
    def test_what_is_no_index(self, opened: Callable[..., LazyFlow], key: Any) -> None:
        with pytest.raises((IndexError, TypeError)):
            opened()[key]

    @pytest.mark.parametrize("key", [slice(3, 9), [3, 1], 1.5, "3"])
    def test_a_frame_is_asked_for_by_one_number(self, opened: Callable[..., LazyFlow], key: Any) -> None:
        with pytest.raises(TypeError):
            opened().rgb(key)

    def test_a_list_behind_the_flows_is_told_of(self, opened: Callable[..., LazyFlow]) -> None:
        with pytest.raises(TypeError, match="of each flow an index takes numbers, slices"):
            opened()[:, [1, 0]]

    def test_stdin(self) -> None:
        with pytest.raises(UsageError, match="stdin passes by only once"):
            flowreel.open("-")

    @pytest.mark.parametrize(
        "options",
        [{"resume": True}, {"overwrite": True}, {"resolution": "native"}, {"tolerate_truncation": True},
         {"frames_mb": -1}, {"frames_mb": 1e308}, {"frames_mb": "1"}, {"colour": 3}, {"batch": 0}],
    )  # fmt: skip
    def test_options(self, opened: Callable[..., LazyFlow], options: dict[str, Any]) -> None:
        (name,) = options
        with pytest.raises(UsageError, match=name.replace("_", "-")):
            opened(**options)

    def test_sources_that_cannot_be_opened(self, tmp_path: Path, tiny_weights: str, clip: Clip) -> None:
        with pytest.raises(SourceNotFoundError):
            flowreel.open(tmp_path / "none.mp4", weights=tiny_weights)
        with pytest.raises(TooFewFramesError):
            flowreel.open(clip("one.mp4", count=1), weights=tiny_weights)

    @pytest.mark.parametrize("key", [1, slice(1, 9)])
    def test_a_source_that_vanishes(self, video: Path, tmp_path: Path, tiny_weights: str, key: Any) -> None:
        path = tmp_path / "gone.mp4"
        shutil.copy(video, path)
        flow = flowreel.open(path, weights=tiny_weights, batch=4, frames_mb=0)
        flow[20]
        os.utime(path, ns=(0, 0))
        with pytest.raises(SourceChangedError, match=r"gone\.mp4 is another file"):
            flow[key]
        path.unlink()
        with pytest.raises(SourceNotFoundError, match=r"gone\.mp4 is gone"):
            flow[key]

    def test_a_name_means_the_same_from_another_folder(
        self, video: Path, tmp_path: Path, tiny_weights: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A relative name of weights, a file, or a glob in a folder with glob characters; also in a pickled copy."""
        here = tmp_path / "a[1]"
        (here / "frames").mkdir(parents=True)
        shutil.copy(video, here / "x.mp4")
        for number, frame in enumerate(itertools.islice(flowreel.open(video, weights=tiny_weights).frame, 4)):
            Image.new("RGB", (96, 64), (40 * number, int(frame), 0)).save(here / "frames" / f"{number}.png")
        monkeypatch.chdir(here)
        shutil.copy(tiny_weights, "w.safetensors")
        for name in ("x.mp4", "frames/*.png"):
            flow = flowreel.open(name, weights="w.safetensors", batch=2, frames_mb=0)
            clips = flowreel.FlowClips(name, 1, bound=None, weights="w.safetensors", stop=4)
            wanted, stream = flow[2], flowreel.stream(name, weights=tiny_weights, batch=2, stop=4)
            monkeypatch.chdir("/")
            assert torch.equal(flow[2], wanted)
            assert torch.equal(pickle.loads(pickle.dumps(flow))[2], wanted)
            assert torch.equal(pickle.loads(pickle.dumps(clips))[2]["flow"], wanted)
            assert sum(len(batch) for batch in stream) == 3
            monkeypatch.chdir(here)

    def test_an_image_that_is_replaced(self, tmp_path: Path, tiny_weights: str) -> None:
        """Nor is anything computed from the new image put into the cache."""
        frames = tmp_path / "frames"
        frames.mkdir()
        rng = np.random.default_rng(0)
        for number in range(8):
            Image.fromarray(rng.integers(0, 255, (64, 96, 3), np.uint8)).save(frames / f"{number}.png")
        sound = (frames / "6.png").read_bytes()
        with flowreel.open(frames, weights=tiny_weights, batch=2, cache=tmp_path / "cache") as flow:
            flow[0]
            Image.new("RGB", (96, 64)).save(frames / "6.png")
            with pytest.raises(SourceChangedError, match=r"6\.png is another file"):
                flow[6]
            assert flow.cached == 1
        (frames / "6.png").write_bytes(sound)
        with flowreel.open(frames, weights=tiny_weights, batch=2, cache=tmp_path / "cache") as flow:
            wanted = flowreel.open(frames, weights=tiny_weights, batch=2)[6]
            torch.testing.assert_close(flow[6], wanted, atol=1 / 64, rtol=0)

    def test_frames_that_the_packets_promise_and_the_decoder_does_not_give(
        self, opened: Callable[..., LazyFlow], video: Path, tiny_weights: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from flowreel.engine.sources import pyav as decoding

        expected = streamed(video, weights=tiny_weights, batch=4)
        real = decoding._count
        monkeypatch.setattr(decoding, "_count", lambda *a: (item for item in real(*a) if item[0] != 25))
        flow = opened()
        assert len(flow) == 39
        assert (flow[23] - expected[23]).abs().max() <= CLOSE
        assert (flow[26:30] - expected[26:30]).abs().max() <= CLOSE
        for key in (24, 25, slice(20, 26)):
            with pytest.raises(TruncatedSourceError, match=r"frame 25 of lazy\.mp4 does not decode"):
                flow[key]
        got = []
        with pytest.raises(TruncatedSourceError, match="frame 25") as failure:
            got.extend(flow)
        assert len(got) <= 24
        assert any("decode, frame" in note for note in failure.value.__notes__)

    def test_a_failing_model_is_told_as_it_is(
        self, opened: Callable[..., LazyFlow], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any) -> Any:
            raise RuntimeError("out of something")

        monkeypatch.setattr("flowreel.engine.inference.Inference.of_fitted", broken)
        flow = opened()
        for key in (3, slice(0, 9)):
            with pytest.raises(RuntimeError, match="out of something"):
                flow[key]


def test_star_import_leaves_open_alone() -> None:
    names: dict[str, Any] = {}
    exec("from flowreel import *", names)
    assert "open" not in names
    assert flowreel.open is lazy.open
