"""Whole runs on a fake GPU, whose streams and copies finish as late as CUDA allows.

The tests show that frames arrive before they are used, that flow is on the host before it is written, and what is
copied. They do not show what a real GPU computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

import flowreel
from flowreel.engine import api, compiled, device, run_report
from flowreel.engine.data import Frame
from flowreel.engine.errors import StageError
from flowreel.engine.inference import Inference, Made, Network
from flowreel.engine.run_report import RunReport
from flowreel.engine.sources.synthetic import SyntheticSource
from flowreel.sinks import VideoWriter, shard_processes
from flowreel.sinks.painting import yuv420
from flowreel.sinks.shard_processes import ShardsInProcesses
from tests.fakes.cuda_streams import GPU, Card, LateCopies, Stream

SOURCE = "synthetic:objects?size=100x70&frames=9"
PIXELS = 100 * 70


@pytest.fixture(scope="module", autouse=True)
def _the_network_as_it_is() -> Iterator[None]:
    """Runs the plain module: the compiled form for CPUs fills buffers that the fake GPU would take for host memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_BACKENDS", {})
        yield


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    """Makes runs use the fake GPU."""
    fitted = Network.fitted

    def on_card(self: Network, *arguments: Any, **options: Any) -> Inference:
        return replace(fitted(self, *arguments, **options), device=GPU)

    monkeypatch.setattr(Network, "fitted", on_card)
    monkeypatch.setattr(run_report, "device_name", lambda *devices: ", ".join(map(str, devices)))
    return LateCopies(Card(monkeypatch, devices=2))


@pytest.fixture
def twice(late: LateCopies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes runs use two fake GPUs."""
    fitted = Network.fitted

    def on_both(self: Network, *arguments: Any, **options: Any) -> Inference:
        inference = fitted(self, *arguments, **options)
        return replace(inference, others=(replace(inference, device=torch.device("cuda", 1), made=Made()),))

    monkeypatch.setattr(Network, "fitted", on_both)


@pytest.fixture(params=["late", "twice"])
def lanes(request: pytest.FixtureRequest) -> None:
    """The test runs with one GPU and with two."""
    request.getfixturevalue(request.param)


def run(folder: Path, weights: str, *names: str, **options: Any) -> RunReport:
    paths = [folder / name for name in names]
    return flowreel.run(SOURCE, paths, weights=weights, device="cpu", **{"max_error": 0.0, "batch": 3} | options)


@contextmanager
def encoded() -> Iterator[list[np.ndarray]]:
    """The pictures that the video encoder is given, as 4:2:0 planes, whether a GPU or the CPU converted them."""
    pictures: list[np.ndarray] = []
    encode = VideoWriter.encode

    def noted(self: VideoWriter, picture: np.ndarray, time_s: float) -> None:
        as_planes = picture.ndim == 2
        planes = picture if as_planes else yuv420(torch.from_numpy(picture).permute(2, 0, 1)[None])[0].numpy()
        pictures.append(planes.astype(int))
        encode(self, picture, time_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoWriter, "encode", noted)
        yield pictures


def pictures_in(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]).astype(int)


def flow_files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.glob("flow/c/**/*") if path.is_file()}


def flo_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "flo").iterdir()}


NAMES = ("x.zarr", "x.mp4", "png/%06d.png", "flo/%06d.flo")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, tiny_weights: str) -> Path:
    folder = tmp_path_factory.mktemp("cpu")
    with encoded() as pictures:
        run(folder, tiny_weights, *NAMES)
    np.save(folder / "video.npy", np.stack(pictures))
    for resolution in ("full", "native"):
        run(folder, tiny_weights, f"{resolution}.zarr", max_error=1 / 64, resolution=resolution)
    return folder


def test_flow_and_pictures_are_those_of_a_cpu(
    late: LateCopies, on_cpu: Path, tmp_path: Path, tiny_weights: str
) -> None:
    with encoded() as pictures:
        report = run(tmp_path, tiny_weights, *NAMES)
    assert report.device == "cuda:0"
    stages = [stage.name for stage in report.stages if "write" not in stage.name]
    assert stages == ["decode", "batches", "model"]  # no common download: each output copies what it needs
    expected, got = (flowreel.open_store(folder / "x.zarr")[:] for folder in (on_cpu, tmp_path))
    assert np.array_equal(got, expected)
    assert np.abs(np.stack(pictures) - np.load(on_cpu / "video.npy")).max() <= 1
    assert np.abs(pictures_in(tmp_path / "png") - pictures_in(on_cpu / "png")).max() <= 1
    assert flo_files(tmp_path) == flo_files(on_cpu)


def test_what_is_decoded_on_the_card_is_paired_in_the_decoders_thread(
    late: LateCopies, on_cpu: Path, tmp_path: Path, tiny_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = SyntheticSource.__iter__

    def there(self: SyntheticSource) -> Iterator[Frame]:
        return (replace(frame, rgb=late.put(frame.rgb.clone())) for frame in frames(self))

    monkeypatch.setattr(SyntheticSource, "__iter__", there)
    monkeypatch.setattr(SyntheticSource, "on_device", True, raising=False)
    report = run(tmp_path, tiny_weights, "x.zarr")
    assert [stage.name for stage in report.stages[:-1]] == ["decode", "model", "download"]
    expected, got = (flowreel.open_store(folder / "x.zarr")[:] for folder in (on_cpu, tmp_path))
    assert np.array_equal(got, expected)


def test_what_fails_in_the_decoders_thread_names_its_stage_and_frame(
    late: LateCopies, tmp_path: Path, tiny_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = SyntheticSource.__iter__

    def broken(self: SyntheticSource) -> Iterator[Frame]:
        yield from itertools.islice(frames(self), 5)
        raise OSError("a bad sector")

    monkeypatch.setattr(SyntheticSource, "__iter__", broken)
    monkeypatch.setattr(SyntheticSource, "on_device", True, raising=False)
    with pytest.raises(StageError, match="decode, frame 4: a bad sector") as failed:
        run(tmp_path, tiny_weights, "x.zarr")
    assert (failed.value.stage, failed.value.frame) == ("decode", 4)

    def unpaired(*_: object, **__: object) -> Iterator[object]:
        raise ValueError("no pair")
        yield

    monkeypatch.setattr(SyntheticSource, "__iter__", frames)
    monkeypatch.setattr(api, "pairs", unpaired)
    with pytest.raises(StageError, match="pairs: no pair"):
        run(tmp_path, tiny_weights, "x.zarr", overwrite=True)


def test_over_several_gpus_flow_is_the_same(twice: None, on_cpu: Path, tmp_path: Path, tiny_weights: str) -> None:
    report = run(tmp_path, tiny_weights, "x.zarr", "flo/%06d.flo")
    assert report.device == "cuda:0, cuda:1"
    expected, got = (flowreel.open_store(folder / "x.zarr")[:] for folder in (on_cpu, tmp_path))
    assert np.array_equal(got, expected)
    assert flo_files(tmp_path) == flo_files(on_cpu)


def test_a_short_batch_goes_through_a_full_ones_work(
    late: LateCopies, on_cpu: Path, tmp_path: Path, tiny_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight flows in batches of five: the last three pairs are filled up to five, and three flows are kept."""
    lengths: list[int] = []
    flow = Inference.of_fitted

    def noted(self: Inference, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        lengths.append(len(first))
        return flow(self, first, second)

    monkeypatch.setattr(Inference, "of_fitted", noted)
    report = run(tmp_path, tiny_weights, "x.zarr", batch=5)
    assert (lengths, report.pairs) == ([5, 5], 8)
    expected, got = (flowreel.open_store(folder / "x.zarr")[:] for folder in (on_cpu, tmp_path))
    assert got.shape == expected.shape
    assert np.allclose(got, expected, atol=1e-3)


def test_pictures_alone_bring_pictures_alone_to_the_host(late: LateCopies, tmp_path: Path, tiny_weights: str) -> None:
    run(tmp_path, tiny_weights, "x.mp4", max_flow=5.0)
    assert sum(late.brought) == 8 * (PIXELS * 3 // 2 + 8)  # 8 flows; a count of unknown vectors goes with each
    late.brought.clear()
    run(tmp_path, tiny_weights, "png/%06d.png")
    assert sum(late.brought) == 8 * (3 * PIXELS + 8)


def test_flow_alone_is_brought_once_for_all_outputs(late: LateCopies, tmp_path: Path, tiny_weights: str) -> None:
    report = run(tmp_path, tiny_weights, "x.zarr", "flo/%06d.flo")
    assert "download" in [stage.name for stage in report.stages]
    assert sum(late.brought) == 8 * 8 * PIXELS


@pytest.mark.parametrize("fit", ["pad", "resize"])
def test_no_thread_waits_for_the_network_unless_it_needs_the_result(
    fit: str, late: LateCopies, tmp_path: Path, tiny_weights: str
) -> None:
    run(tmp_path, tiny_weights, "x.zarr", fit=fit, resolution="native", max_error=1 / 64)
    assert late.stalls == []


@pytest.mark.parametrize("made_by", ["threads", "processes"])
@pytest.mark.parametrize("resolution", ["full", "native"])
def test_a_store_brings_steps_alone_to_the_host_and_is_that_of_a_cpu(
    resolution: str,
    made_by: str,
    late: LateCopies,
    on_cpu: Path,
    tmp_path: Path,
    tiny_weights: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[torch.device] = []

    def pin(memory: np.ndarray, device: torch.device) -> Callable[[], None]:
        pinned.append(device)
        return lambda: pinned.append(GPU)

    monkeypatch.setattr(device, "pin", pin)
    monkeypatch.setattr(shard_processes, "are_worth_it", lambda *_: made_by == "processes")
    run(tmp_path, tiny_weights, "x.zarr", max_error=1 / 64, resolution=resolution)
    assert pinned == (2 * [GPU] if made_by == "processes" else [])  # pinned, then released
    stored: Any = zarr.open_group(tmp_path / "x.zarr", mode="r")["flow"]
    assert stored.dtype == np.int16
    assert sum(late.brought) == 2 * stored.size + 8 * 12  # and 12 bytes of statistics a flow
    assert flow_files(tmp_path / "x.zarr") == flow_files(on_cpu / f"{resolution}.zarr")


def test_memory_that_processes_share_is_used_again(
    late: LateCopies, tmp_path: Path, tiny_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard of two batches is handed on only after its copies have ended, and its memory serves a later shard."""
    pieces: list[int] = []

    def pin(memory: np.ndarray, device: torch.device) -> Callable[[], None]:
        memory[:] = 77
        pieces.append(memory.nbytes)
        return lambda: None

    is_full = ShardsInProcesses._is_full

    def handed_over(shards: ShardsInProcesses) -> None:
        assert not late.card.current.late, "a copy to the shard is still under way"
        is_full(shards)

    monkeypatch.setattr(device, "pin", pin)
    monkeypatch.setattr(ShardsInProcesses, "_is_full", handed_over)
    stores = []
    for made_by in ("threads", "processes"):
        monkeypatch.setattr(shard_processes, "are_worth_it", lambda *_, by=made_by: by == "processes")
        path = tmp_path / f"{made_by}.zarr"
        flowreel.run(
            SOURCE.replace("frames=9", "frames=42"),
            path,
            weights=tiny_weights,
            device="cpu",
            batch=2,
            shard_bytes=4 * 8 * PIXELS,
        )
        stores.append(flow_files(path))
    assert len(stores[0]) == 11
    assert stores[0] == stores[1]
    assert len(pieces) <= shard_processes.how_many(2) + 1


def test_a_hand_off_that_is_forgotten_is_found_out(
    lanes: None, on_cpu: Path, tmp_path: Path, tiny_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so few frames no buffer is used twice, so that only the hand-off, which is broken here, waits for a copy."""
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)  # the planted fault
    monkeypatch.setattr(device._Sender, "finish", lambda self: None)
    run(tmp_path, tiny_weights, "x.zarr", stop=device.MOST_UPLOADS)
    expected, got = (flowreel.open_store(folder / "x.zarr")[:3] for folder in (on_cpu, tmp_path))
    assert not np.array_equal(got, expected)


def test_memory_that_ends_on_the_card_loses_no_flow(
    lanes: None, on_cpu: Path, tmp_path: Path, tiny_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = Inference.of_fitted

    def for_two(self: Inference, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if len(first) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return flow(self, first, second)

    monkeypatch.setattr(Inference, "of_fitted", for_two)
    run(tmp_path, tiny_weights, "x.zarr")
    expected, got = (flowreel.open_store(folder / "x.zarr")[:] for folder in (on_cpu, tmp_path))
    assert np.allclose(got, expected, atol=1e-3)
