"""FlowClips: the right flows in the right channels, from every kind of source, in every kind of loader."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import flowreel
from flowreel.engine import clips
from flowreel.engine.clip_view import ViewRule
from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import (
    DeviceError,
    SourceChangedError,
    SourceNotFoundError,
    StoreError,
    UsageError,
    WeightsMismatchError,
)
from flowreel.sinks import open_sink
from flowreel.sinks.store_files import StoreFiles

Clip = Callable[..., Path]
Make = Callable[..., flowreel.FlowClips]


@pytest.fixture(scope="module")
def videos(clip: Clip) -> list[Path]:
    """13 and 8 flows."""
    return [clip("clips-a.mp4", count=14), clip("clips-b.mp4", count=9)]


@pytest.fixture
def make(videos: list[Path], tiny_weights: str) -> Make:
    return lambda **options: flowreel.FlowClips(videos, **{"weights": tiny_weights, "batch": 4, "length": 3} | options)


def stored(path: Path, count: int = 7, width: int = 8, *, complete: bool = True, **options: Any) -> Path:
    """Flows of height 6, two less than announced if not complete: flow n is (n, -n) px, but for an unknown vector in
    flow 4."""
    flows = torch.arange(count)[:, None, None, None] * torch.tensor([1.0, -1.0])[:, None, None]
    flows = flows.repeat(1, 1, 6, width)
    flows[4, :, 1, 2] = torch.nan
    sink = open_sink(path, SinkConfig(**options))
    sink.open(FlowInfo(6, width, Fraction(25), count + (1 if complete else 3), SourceId("clip.mp4")))
    frame = np.arange(count)
    sink.write(FlowBatch(flows, 0, frame, frame + 1, frame / 25, (frame + 1) / 25))
    sink.commit(complete)
    return Path(sink.path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("clips") / "X.zarr")


def places(dataset: Any) -> list[tuple[int, int]]:
    return [(item["source"], item["first"]) for item in (dataset[index] for index in range(len(dataset)))]


class TestStacks:
    def test_x_and_y_alternate_in_units_of_the_bound(self, store: Path) -> None:
        dataset = flowreel.FlowClips(store, 3, bound=4.0)
        assert len(dataset) == 2
        assert dataset.shape == (6, 6, 8)
        item = dataset[1]  # flows 3, 4, 5
        assert item["flow"].shape == (6, 6, 8)
        assert item["flow"].dtype == torch.float32
        assert item["flow"][:, 5, 5].tolist() == [0.75, -0.75, 1, -1, 1, -1]  # 5 px are clipped
        assert item["flow"][:, 1, 2].tolist() == [0.75, -0.75, 0, 0, 1, -1]  # unknown: no motion
        assert (item["source"], item["first"], item["timestamp_s"]) == (0, 3, 0.12)
        assert set(item) == {"flow", "source", "first", "timestamp_s"}

    @pytest.mark.parametrize("max_error", [0.0, 1 / 64])
    def test_unknown_vectors_of_flo_files_are_no_motion(self, tmp_path: Path, max_error: float) -> None:
        flow = np.ones((16, 16, 2), np.float32)
        flow[2, 3], flow[4, 5], flow[6, 7] = 1e10, np.inf, (np.nan, 0)
        for number in range(2):
            flowreel.write_flo(tmp_path / "flo" / f"{number}.flo", flow)
        flowreel.export(tmp_path / "flo", tmp_path / "a.zarr", max_error=max_error)
        seen = flowreel.FlowClips(tmp_path / "a.zarr", 2, bound=None)[0]["flow"]
        assert seen[:, [2, 4, 6], [3, 5, 7]].abs().max() == 0
        assert seen.sum() == 4 * (16 * 16 - 3)
        assert flowreel.FlowClips(tmp_path / "a.zarr", 2, bound=None, size=8)[0]["flow"].max() <= 0.5

    @pytest.mark.parametrize("value", [1e10, -1e10, np.inf, -np.inf, np.nan])
    def test_one_unknown_component_is_no_motion(self, store: Path, value: float) -> None:
        dataset = flowreel.FlowClips(store, 1, bound=None)
        flow = np.ones((1, 2, 6, 8), np.float32)
        flow[0, 1, 2, 3] = value
        seen = dataset._stack(flow, dataset._rule.middle(6, 8))
        assert seen[:, 2, 3].tolist() == [0, 0]
        assert seen.sum() == 2 * (6 * 8 - 1)

    def test_in_pixels(self, store: Path) -> None:
        assert flowreel.FlowClips(store, 2, bound=None)[2]["flow"][:, 0, 0].tolist() == [4, -4, 5, -5]

    def test_resized_and_cut(self, store: Path) -> None:
        dataset = flowreel.FlowClips(store, 2, bound=None, size=(12, 4), crop=(5, 3))
        assert dataset.shape == (4, 5, 3)
        np.testing.assert_allclose(dataset[1]["flow"][:, 0, 0], [1, -4, 1.5, -6])

    def test_they_are_the_flow_of_open(self, make: Make, videos: list[Path], tiny_weights: str) -> None:
        dataset = make(bound=None, frames_mb=1)
        flow = flowreel.open(videos[1], weights=tiny_weights, batch=4)
        item = dataset[5]
        assert (item["source"], item["first"]) == (1, 3)
        torch.testing.assert_close(item["flow"], flow[3:6].flatten(0, 1), rtol=0, atol=1e-4)
        assert item["timestamp_s"] == flow.timestamps_s[3]

    def test_the_frame_beside_it(self, make: Make, videos: list[Path], tiny_weights: str) -> None:
        flow = flowreel.open(videos[0], weights=tiny_weights)
        item = make(rgb=True, crop=(40, 50))[2]
        assert torch.equal(item["rgb"], flow.rgb(6)[:, 4:44, 7:57])
        mirrored = make(rgb=True, random=True, mirror=True, seed=0)
        for index in range(6):
            item, view = mirrored[index], mirrored._chosen(mirrored._extents[0 if index < 4 else 1], index, 0)[1]
            whole = flowreel.open(videos[item["source"]], weights=tiny_weights).rgb(item["first"])
            assert torch.equal(item["rgb"], whole.flip(-1) if view.mirrored else whole)

    def test_labels_and_transform(self, make: Make) -> None:
        labelled = make(labels=["a", "b"])
        assert [labelled[index]["label"] for index in range(len(labelled))] == ["a"] * 4 + ["b"] * 2
        assert make(labels=[0, 1], transform=lambda item: (item["flow"].shape, item["label"]))[5] == ((6, 48, 64), 1)

    def test_gradients_flow_from_a_loss_on_them(self, make: Make) -> None:
        net = torch.nn.Conv2d(6, 2, 3)
        item = next(iter(DataLoader(make(), batch_size=2)))
        net(item["flow"]).square().mean().backward()
        assert net.weight.grad is not None
        assert net.weight.grad.abs().sum() > 0


class TestPlaces:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [(0, 0), (0, 3), (0, 6), (0, 9), (1, 0), (1, 3)]),
            ({"stride": 5}, [(0, 0), (0, 5), (0, 10), (1, 0), (1, 5)]),
            ({"stride": 1 << 63}, [(0, 0), (1, 0)]),
            ({"clips": 3}, [(0, 0), (0, 5), (0, 10), (1, 0), (1, 2), (1, 5)]),
            ({"clips": 1}, [(0, 5), (1, 2)]),
            ({"length": 8}, [(0, 0), (1, 0)]),
            ({"length": 2, "stride": 1, "stop": 4}, [(0, 0), (0, 1), (1, 0), (1, 1)]),
        ],
    )
    def test_fixed(self, make: Make, options: dict[str, Any], expected: list[tuple[int, int]]) -> None:
        dataset = make(**options)
        assert places(dataset) == expected
        assert len(dataset) == len(expected)
        assert dataset[-1]["first"] == expected[-1][1]

    def test_random_ones_reach_every_place(self, make: Make) -> None:
        dataset = make(random=True, clips=150, seed=1)
        chosen = [
            (number, dataset._chosen(dataset._extents[number], index, 0)[0])
            for index in range(300)
            for number in [index // 150]
        ]
        assert {first for number, first in chosen if number == 0} == set(range(11))
        assert {first for number, first in chosen if number == 1} == set(range(6))

    def test_a_seed_and_an_epoch_make_the_same_clips(self, make: Make) -> None:
        one, other = (make(random=True, clips=6, seed=3, crop=32) for _ in range(2))
        first = places(one)
        assert places(other) == first
        assert torch.equal(one[2]["flow"], other[2]["flow"])
        one.set_epoch(1)
        assert places(one) != first
        one.set_epoch(0)
        assert places(one) == first
        assert places(make(random=True, clips=6, seed=4)) != first
        for epoch in (-1, 1.5, True):
            with pytest.raises(UsageError, match="epoch must be a whole number from 0 on"):
                one.set_epoch(epoch)
        with pytest.raises(UsageError, match="epoch must be below 2"):
            one.set_epoch(1 << 63)
        assert places(one) == first

    def test_numbers_of_other_libraries_are_numbers(self, make: Make) -> None:
        n = np.int64
        one = make(random=True, clips=n(6), seed=n(3), length=torch.tensor(3), size=n(40), crop=(n(32), n(24)))
        other = make(random=True, clips=6, seed=3, length=3, size=40, crop=(32, 24))
        for index in torch.randperm(len(one)):
            assert torch.equal(one[index]["flow"], other[int(index)]["flow"])
        one.set_epoch(n(2))
        other.set_epoch(2)
        assert places(one) == places(other)
        for index in (1.0, slice(0, 2), "1"):
            with pytest.raises(TypeError):
                one[index]

    def test_without_a_seed_chance_is_torchs(self, make: Make) -> None:
        dataset = make(random=True, clips=6)
        torch.manual_seed(0)
        first = places(dataset)
        assert places(dataset) != first
        torch.manual_seed(0)
        assert places(dataset) == first

    @pytest.mark.parametrize("index", [6, -7, 100])
    def test_indices_out_of_range(self, make: Make, index: int) -> None:
        with pytest.raises(IndexError, match=rf"clip {index} of 6"):
            make()[index]

    def test_each_place_takes_no_memory(self, make: Make) -> None:
        assert make(length=2, stride=1)._extents[0].starts == range(12)


class TestSources:
    def test_videos_stores_and_what_was_opened_before(self, videos: list[Path], store: Path, tiny_weights: str) -> None:
        options = {"weights": tiny_weights, "batch": 4}
        opened = flowreel.open(videos[1], **options)
        dataset = flowreel.FlowClips([videos[0], store, opened, flowreel.open_store(store)], 4, **options)
        assert dataset.shape is None
        assert places(dataset) == [(0, 0), (0, 4), (0, 8), (1, 0), (2, 0), (2, 4), (3, 0)]
        assert opened.statistics.computed == 8
        assert repr(dataset) == "<FlowClips 7 fixed clips of 4 flows, of different sizes, from 4 sources>"

    def test_a_cache_a_video(self, make: Make, tmp_path: Path, videos: list[Path], tiny_weights: str) -> None:
        first = [item["flow"] for item in make(cache=tmp_path)]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["clips-a.mp4", "clips-b.mp4"]
        with flowreel.open(videos[0], weights=tiny_weights, cache=tmp_path / "clips-a.mp4") as flow:
            assert flow.cached == 12
            flow[:]
        again = make(cache=tmp_path)
        assert all(torch.equal(one, other["flow"]) for one, other in zip(first, again, strict=True))
        assert all(flow.statistics.computed == 0 for flow in again._opened.values())  # type: ignore[union-attr]
        alone = flowreel.FlowClips(tmp_path / "clips-a.mp4", 3)
        assert torch.equal(alone[2]["flow"], first[2])
        with pytest.raises(StoreError, match=r"clips-b\.mp4 is a cache with 6 of 8 flows in it: give the video"):
            flowreel.FlowClips(tmp_path / "clips-b.mp4", 3)

    def test_synthetic_scenes_get_caches_too(self, tiny_weights: str, tmp_path: Path) -> None:
        scene = "synthetic:objects?size=64x48&frames=5"
        assert len(flowreel.FlowClips(scene, 2, weights=tiny_weights, cache=tmp_path)) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["synthetic_objects_size_64x48_frames_5"]

    def test_only_so_many_are_open(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[str] = []
        open_path = clips.FlowClips._open_path
        monkeypatch.setattr(
            clips.FlowClips, "_open_path", lambda self, path: opened.append(path) or open_path(self, path)
        )
        dataset = make(open_at_once=1)
        assert len(opened) == 2
        for index in (4, 5, 0, 1, 4):
            dataset[index]
        assert len(opened) == 4
        assert len(dataset._opened) == 1

    def test_stores_take_no_videos_place(
        self, videos: list[Path], store: Path, tmp_path: Path, tiny_weights: str
    ) -> None:
        other = shutil.copytree(store, tmp_path / "Y.zarr")
        sources = [videos[0], store, other, videos[1]]
        dataset = flowreel.FlowClips(sources, 3, weights=tiny_weights, clips=1, open_at_once=1)
        assert list(dataset._opened) == [2, 3]
        video = dataset._opened[3]
        for index in (1, 2):
            dataset[index]
        assert dataset._opened[3] is video
        assert list(dataset._opened) == [3, 2]

    def test_the_one_used_last_stays_open(self, store: Path) -> None:
        dataset = flowreel.FlowClips([store] * 3, 3, clips=1, open_at_once=2)
        assert list(dataset._opened) == [1, 2]
        for index in (1, 0):
            dataset[index]
        assert list(dataset._opened) == [1, 0]

    def test_of_an_unfinished_store_what_is_there(self, tmp_path: Path) -> None:
        partial = stored(tmp_path / "X.zarr", shard_bytes=1, complete=False)
        assert places(flowreel.FlowClips(partial, 3)) == [(0, 0), (0, 3)]

    def test_they_outlast_the_working_folder(
        self, videos: list[Path], tmp_path: Path, tiny_weights: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for path in (videos[1], tiny_weights):
            shutil.copy(path, tmp_path)
        monkeypatch.chdir(tmp_path)
        dataset = flowreel.FlowClips(videos[1].name, 3, weights=Path(tiny_weights).name, cache="c", clips=1)
        copy = pickle.loads(pickle.dumps(dataset))
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        assert copy[0]["first"] == 2
        assert not os.listdir()  # the cache is where it was

    def test_a_clip_reads_the_times_of_its_own_shard_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With more stores than stay open, each clip may open one anew, which may have thousands of shards."""
        dataset = flowreel.FlowClips(stored(tmp_path / "X.zarr", shard_bytes=1), 2, bound=None)
        shards: set[int] = set()
        read = StoreFiles.coordinate_chunk
        monkeypatch.setattr(
            StoreFiles, "coordinate_chunk", lambda self, name, shard: shards.add(shard) or read(self, name, shard)
        )
        item = dataset[1]  # flows 2 and 3
        assert (item["first"], item["timestamp_s"]) == (2, 2 / 25)
        assert shards == {2, 3}

    def test_the_network_is_loaded_once(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        loads: list[Any] = []
        real = clips.load_network
        monkeypatch.setattr(clips, "load_network", lambda config: loads.append(config) or real(config))
        list(make(open_at_once=1))
        assert len(loads) == 1


class TestLoaders:
    def test_two_spawned_workers_that_stay(self, make: Make, tmp_path: Path) -> None:
        """In every epoch they give the same clips as a single process, which finds their flow in the cache."""
        dataset = make(random=True, clips=4, seed=7, crop=32, rgb=True, labels=[0, 1], cache=tmp_path, mirror=True)
        workers: dict[str, Any] = {
            "num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True,
        }  # fmt: skip
        loader = DataLoader(dataset, batch_size=3, **workers)
        alone = DataLoader(dataset, batch_size=3)
        epochs = []
        for epoch in range(2):
            dataset.set_epoch(epoch)
            got, expected = list(loader), list(alone)
            for one, other in zip(got, expected, strict=True):
                assert set(one) == set(other)
                assert all(torch.equal(one[name], other[name]) for name in one)
            epochs.append(torch.cat([batch["first"] for batch in got]))
        assert not torch.equal(*epochs)
        assert all(flow.statistics.computed == 0 for flow in dataset._opened.values())  # type: ignore[union-attr]

    def test_forked_workers(self, make: Make) -> None:
        """They follow the epoch, too, as those do that are spawned."""
        dataset = make(random=True, seed=1)
        dataset[0]
        loader = DataLoader(
            dataset, batch_size=6, num_workers=1, multiprocessing_context="fork", persistent_workers=True
        )
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                (batch,) = loader
            assert torch.equal(batch["flow"], torch.stack([item["flow"] for item in dataset]))

    def test_a_fork_on_a_gpu_is_refused(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        dataset = make(open_at_once=1)
        process, network = dataset._network or (0, None)
        monkeypatch.setattr(dataset, "_network", (process - 1, _On(torch.device("cuda:0"))))
        assert network is not None
        with pytest.raises(DeviceError, match=r"cuda:0 before this process was forked.*spawn"):
            dataset[0]

    def test_pickled(self, make: Make) -> None:
        dataset = make()
        copy = pickle.loads(pickle.dumps(dataset))
        assert not copy._opened
        assert torch.equal(copy[3]["flow"], dataset[3]["flow"])

    def test_pickled_it_knows_its_weights(
        self, videos: list[Path], tmp_path: Path, tiny_weights: str, tiniest_weights: str
    ) -> None:
        weights = tmp_path / "w.safetensors"
        shutil.copy(tiny_weights, weights)
        data = pickle.dumps(flowreel.FlowClips(videos[0], 3, weights=weights))
        shutil.copy(tiniest_weights, weights)
        copy = pickle.loads(data)
        for _ in range(2):
            with pytest.raises(WeightsMismatchError, match=r"w\.safetensors has been replaced"):
                copy[0]


class _On:
    """A network of which only the device is asked."""

    def __init__(self, device: torch.device) -> None:
        self.device = device


class TestWhatGoesWrong:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"length": 0}, "length must be a whole number from 1 on, got 0"),
            ({"length": 2.5}, "length must be"),
            ({"length": True}, "length must be"),
            ({"length": None}, "length must be"),
            ({"stride": 0}, "stride must be"),
            ({"clips": 0}, "clips must be"),
            ({"open_at_once": 0}, "open_at_once must be"),
            ({"stride": 2, "clips": 2}, "give one of them"),
            ({"bound": 0}, "bound must be"),
            ({"bound": float("nan")}, "bound must be"),
            ({"bound": "x"}, "bound must be a number, got 'x'"),
            ({"mirror": True}, "mirror is for random clips"),
            ({"labels": [1]}, "got 1 label for 2 sources"),
            ({"crop": 100}, "100x100 cannot be cut out of 64x48"),
            ({"size": "big"}, "size must be"),
            ({"colour": 3}, "colour"),
            ({"length": 9}, r"clips-b\.mp4 has 8 flows, a clip takes 9"),
        ],
    )
    def test_settings(self, make: Make, options: dict[str, Any], said: str) -> None:
        with pytest.raises(UsageError, match=said):
            make(**options)

    def test_a_misspelt_argument_for_stores_alone(self, store: Path) -> None:
        with pytest.raises(UsageError, match="unknown option mirorr"):
            flowreel.FlowClips(store, 3, mirorr=True)  # type: ignore[call-arg]

    def test_no_source(self) -> None:
        with pytest.raises(UsageError, match="at least one source"):
            flowreel.FlowClips([], 3)

    def test_frames_of_a_store(self, store: Path) -> None:
        with pytest.raises(UsageError, match=r"X\.zarr is a flow store, which holds no frames"):
            flowreel.FlowClips(store, 3, rgb=True)

    def test_two_of_one_name_cannot_share_a_cache(self, videos: list[Path], tmp_path: Path, tiny_weights: str) -> None:
        other = shutil.copy(videos[1], tmp_path / videos[0].name)
        with pytest.raises(UsageError, match=rf"{videos[0]} and {other} would share the cache .*clips-a\.mp4"):
            flowreel.FlowClips([videos[0], videos[0], other], 3, weights=tiny_weights, cache=tmp_path / "c")

    def test_stores_of_one_name_need_none(self, store: Path, tmp_path: Path) -> None:
        other = shutil.copytree(store, tmp_path / store.name)
        assert len(flowreel.FlowClips([store, other], 3, cache=tmp_path / "c")) == 4

    def test_a_source_that_changes_or_vanishes(self, videos: list[Path], tmp_path: Path, tiny_weights: str) -> None:
        path = tmp_path / "x.mp4"
        shutil.copy(videos[1], path)
        dataset = flowreel.FlowClips([path, videos[1]], 3, weights=tiny_weights, open_at_once=1)
        shutil.copy(videos[0], path)  # longer, of the same size
        with pytest.raises(SourceChangedError, match=r"x\.mp4 is not what it was when the clips were laid out"):
            dataset[0]
        path.unlink()
        with pytest.raises(SourceNotFoundError, match=r"x\.mp4"):
            dataset[0]
        assert dataset[-1]["source"] == 1

    @pytest.mark.parametrize("other", [{"count": 6}, {"width": 9}])
    def test_a_store_that_is_another_where_it_is_unpickled(self, tmp_path: Path, other: dict[str, int]) -> None:
        data = pickle.dumps(flowreel.FlowClips(stored(tmp_path / "X.zarr"), 3))
        stored(tmp_path / "X.zarr", overwrite=True)
        assert pickle.loads(data)[1]["first"] == 3
        stored(tmp_path / "X.zarr", overwrite=True, **other)
        with pytest.raises(SourceChangedError, match=r"X\.zarr is not what it was"):
            pickle.loads(data)[0]


def test_views_are_asked_of_the_rule(make: Make) -> None:
    assert make(size=24, crop=20)._rule == ViewRule(24, 20)
