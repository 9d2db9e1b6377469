"""Stored flow as pictures and videos: the right colours, file names and times."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from flowreel.engine.color import color
from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import (
    DeviceError,
    FlowFileError,
    FrameSizeError,
    OutputExistsError,
    OutputWriteError,
    SourceNotFoundError,
    StageError,
    UnknownOutputError,
    UsageError,
)
from flowreel.engine.export import export
from flowreel.kernels import flow_to_color
from flowreel.sinks import open_sink, reading

HEIGHT, WIDTH = 32, 48


def put_flo(path: Path, flow: np.ndarray) -> np.ndarray:
    """Writes a ``.flo`` without waiting for the disk. flow: (H, W, 2) float32."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(struct.pack("<f2i", 202021.25, flow.shape[1], flow.shape[0]) + flow.tobytes())
    return flow


def some_flow(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A smooth field, whose longest vector is ``seed + 1`` px long."""
    angle = np.linspace(0, 2, height)[:, None] + np.linspace(0, 3, width) + seed
    length = np.linspace(0, 1, width) * (seed + 1)
    return np.stack([np.cos(angle) * length, np.sin(angle) * length], -1).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``flows`` in the working folder: 8.flo to 11.flo, seeds 8 to 11."""
    monkeypatch.chdir(tmp_path)
    for number in range(8, 12):
        put_flo(Path("flows") / f"{number}.flo", some_flow(number))
    return Path("flows")


def names(folder: Path | str = ".") -> list[str]:
    return sorted(file.name for file in Path(folder).iterdir())


def picture(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        return np.array(image)


def play(path: str) -> tuple[list[np.ndarray], list[float]]:
    with av.open(path) as container:
        frames = list(container.decode(video=0))
        return [frame.to_ndarray(format="rgb24") for frame in frames], [frame.time for frame in frames]


def test_pictures_are_those_of_the_middlebury_program(data_dir: Path, tmp_path: Path) -> None:
    name = "flownet2_caffe_result_960x540.flo"
    color(data_dir / "flo" / name, tmp_path / "out")
    expected = picture(data_dir / "flo" / f"{name.removesuffix('.flo')}.middlebury_color_flow.png")
    assert names(tmp_path / "out") == [f"{name}.png"]
    assert np.abs(picture(tmp_path / "out" / f"{name}.png").astype(int) - expected).max() <= 1


def test_as_flow2image_did(folder: Path) -> None:
    report = color([str(path) for path in folder.glob("*.flo")], "out", video=True, frame_rate=30)
    assert names("out") == ["10.flo.png", "11.flo.png", "8.flo.mp4", "8.flo.png", "9.flo.png"]
    for number in range(8, 12):  # each scaled by its own longest vector
        assert np.array_equal(picture(f"out/{number}.flo.png"), flow_to_color(some_flow(number)))
    pictures, times_s = play("out/8.flo.mp4")
    assert times_s == pytest.approx([0, 1 / 30, 2 / 30, 3 / 30], abs=1e-4)
    scale = np.percentile([np.hypot(*some_flow(number).T) for number in range(8, 12)], 95)
    for shown, number in zip(pictures, range(8, 12), strict=True):  # all with the same scale, in natural order
        wanted = flow_to_color(some_flow(number), scale).astype(int)
        assert np.abs(shown - wanted).mean() < 6
        assert np.abs(shown - flow_to_color(some_flow(19 - number), scale).astype(int)).mean() > 10
    assert (report.flows, report.pictures) == (4, 4)
    assert [output.path for output in report.outputs] == ["out", "out/8.flo.mp4"]
    assert report.bytes_written == sum(file.stat().st_size for file in Path("out").iterdir())
    assert "full colour at" in report.outputs[1].notes[0]
    assert report.notes == ()


@pytest.mark.parametrize("given", ["flows", "flows/*.flo"])
def test_folders_and_globs(folder: Path, given: str) -> None:
    color(given, "out", max_flow=20)
    assert names("out") == ["10.flo.png", "11.flo.png", "8.flo.png", "9.flo.png"]
    for number in range(8, 12):
        assert np.array_equal(picture(f"out/{number}.flo.png"), flow_to_color(some_flow(number), 20.0))


def test_stores_and_slices_are_named_by_frame(folder: Path) -> None:
    export(folder, "dance.flow.zarr", max_error=0)
    color(["dance.flow.zarr@1:3", "flows/8.flo"], "out", video=True)
    assert names("out") == ["8.flo.png", "dance.flo.mp4", "dance_000001.png", "dance_000002.png"]
    assert np.array_equal(picture("out/dance_000002.png"), flow_to_color(some_flow(10)))


def test_files_of_several_kinds_with_one_suffix(folder: Path) -> None:
    export(folder, "kitti/%06d.kitti.png")
    export(folder, "two/flow_x_%05d.png")
    halves = [f"two/flow_{axis}_0000{number}.png" for number in (1, 0) for axis in "xy"]
    assert color(["kitti/000000.kitti.png", *halves], "out").flows == 3
    assert names("out") == ["000000.kitti.png.png", "flow_x_00000.png.png", "flow_x_00001.png.png"]


def test_unknown_vectors_are_black(folder: Path) -> None:
    flow = some_flow(1)
    flow[3, 4], flow[5, 6] = (1e10, 1e10), (np.nan, 0)
    put_flo(Path("x.flo"), flow)
    color("x.flo", "x.png")
    painted = picture("x.png")
    assert not painted[3, 4].any()
    assert not painted[5, 6].any()
    assert painted[7, 8].any()
    assert np.array_equal(painted, flow_to_color(flow))


def test_one_picture_or_only_the_video(folder: Path) -> None:
    color("flows/9.flo", "new/one.png")
    assert np.array_equal(picture("new/one.png"), flow_to_color(some_flow(9)))
    report = color("flows", "new/all.mkv", frame_rate=Fraction(10), max_flow=15)
    assert names("new") == ["all.mkv", "one.png"]
    assert len(play("new/all.mkv")[0]) == 4
    assert play("new/all.mkv")[1] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert (report.flows, report.pictures, [output.path for output in report.outputs]) == (4, 0, ["new/all.mkv"])
    assert "full colour at 15 px" in report.outputs[0].notes[0]


def test_a_store_plays_at_its_own_times_and_files_at_30_a_second(folder: Path) -> None:
    color("flows", "files.mkv")
    assert play("files.mkv")[1] == pytest.approx([0, 1 / 30, 2 / 30, 3 / 30], abs=1e-3)
    export("flows", "dance.zarr", frame_rate=10)
    color("dance.zarr", "store.mkv")
    assert play("store.mkv")[1] == pytest.approx([0, 0.1, 0.2, 0.3])
    color(["dance.zarr@2:", "flows/8.flo", "flows/9.flo", "dance.zarr@:2"], "many.mkv")  # one after another
    starts_s = [0, 0.1, 0.2, 0.2 + 1 / 30, 0.2 + 2 / 30, 0.3 + 2 / 30]
    assert play("many.mkv")[1] == pytest.approx(starts_s, abs=1e-3)
    color("dance.zarr", "asked.mkv", frame_rate=50)
    assert play("asked.mkv")[1] == pytest.approx([0, 0.02, 0.04, 0.06])


def test_uneven_times_and_backward_flow_stay_in_step(folder: Path) -> None:
    sink = open_sink("uneven.zarr", SinkConfig())
    sink.open(FlowInfo(HEIGHT, WIDTH, Fraction(25), None, SourceId("dance.mp4")))
    frame, times_s = np.array([1, 2, 3]), np.array([5.0, 5.5, 5.6])  # from frame 1 back to frame 0, and so on
    flow = torch.from_numpy(np.stack([some_flow(n).transpose(2, 0, 1) for n in frame]))
    sink.write(FlowBatch(flow, 0, frame, frame - 1, times_s, np.array([4.8, 5.0, 5.5])))
    sink.commit()
    color(["uneven.zarr", "flows/8.flo"], "uneven.mkv")
    assert play("uneven.mkv")[1] == pytest.approx([0, 0.5, 0.6, 0.7], abs=1e-3)


def test_sizes_may_differ_in_pictures_but_not_in_a_video(folder: Path) -> None:
    put_flo(folder / "10.flo", some_flow(0, 5, 7))
    color(folder, "out")
    assert picture("out/10.flo.png").shape == (5, 7, 3)
    assert picture("out/11.flo.png").shape == (HEIGHT, WIDTH, 3)
    for output, video in (("out2", True), ("only.mp4", False)):
        with pytest.raises(StageError, match=r"10\.flo is 7x5, but 8\.flo is 48x32: a video needs") as caught:
            color(folder, output, video=video)
        assert isinstance(caught.value.__cause__, FrameSizeError)
    assert not [name for name in (*names("out2"), *names()) if "mp4" in name or "partial" in name]


def test_what_is_there_is_kept_unless_asked(folder: Path) -> None:
    color("flows/8.flo", "out")
    Path("out/8.flo.mp4").write_text("old")
    Path("out/other.txt").write_text("kept")
    before = {file: file.read_bytes() for file in Path("out").iterdir()}
    for inputs, video in (("flows", False), ("flows/8.flo", True)):
        with pytest.raises(OutputExistsError, match=r"8\.flo\..*--overwrite"):
            color(inputs, "out", video=video)
    assert {file: file.read_bytes() for file in Path("out").iterdir()} == before
    color("flows", "out", video=True, overwrite=True, max_flow=99)
    assert len(names("out")) == 6
    assert np.array_equal(picture("out/8.flo.png"), flow_to_color(some_flow(8), 99.0))
    assert len(play("out/8.flo.mp4")[0]) == 4


@pytest.mark.parametrize(
    ("inputs", "output", "options", "error", "words"),
    [
        ([], "out", {}, UsageError, "at least one"),
        ("none.flo", "out", {}, SourceNotFoundError, "none.flo"),
        ("text.flo", "out", {}, FlowFileError, "text.flo"),
        ("flows", "out.png", {}, UsageError, "one flow, and here are 4"),
        ("flows/8.flo", "out.png", {"video": True}, UsageError, "one flow"),
        ("flows", "out/%06d.png", {}, UnknownOutputError, "expected a folder"),
        ("flows", "out.zarr", {}, UnknownOutputError, "expected a folder"),
        ("flows", "store.zarr", {}, UnknownOutputError, r"store\.zarr is a flow store"),
        ("flows", "store.zarr/out", {}, UsageError, "inside the store"),
        ("flows", "out.zarr.partial", {}, UnknownOutputError, r"out\.zarr\.partial is .* named like one"),
        ("flows", "out.gif", {}, UnknownOutputError, "expected a folder"),
        ("flows/8.flo", "out.kitti.png", {}, UnknownOutputError, "named like flow"),
        ("flows/8.flo", "flow_x_0.PNG", {}, UnknownOutputError, "named like flow"),
        ("flows/8.flo", "flow_y_0.png", {}, UnknownOutputError, "named like flow"),
        ("flows/8.flo", "out.flo", {}, UnknownOutputError, "named like flow"),
        ("flows", "", {}, UnknownOutputError, "expected a folder"),
        ("flows", "out", {"max_flow": 0}, UsageError, "max-flow"),
        ("flows", "out", {"frame_rate": "0"}, UsageError, "frame-rate"),
        ("flows", "out", {"model": "FlowNet2"}, UsageError, "model"),
        (["flows", "flows/8.flo"], "out", {}, UsageError, r"8\.flo\.png"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    folder: Path, inputs: object, output: str, options: dict[str, object], error: type[Exception], words: str
) -> None:
    Path("text.flo").write_text("no flow")
    export("flows", "store.zarr")
    before = sorted(Path().rglob("*"))
    with pytest.raises(error, match=words):
        color(inputs, output, **options)  # type: ignore[arg-type]
    assert sorted(Path().rglob("*")) == before


def test_nothing_that_is_read_is_painted_over(folder: Path) -> None:
    export("flows/8.flo", "x/%d.kitti.png")
    Path("x/0.kitti.png").rename("x/0.png")  # as KITTI names it
    before = Path("x/0.png").read_bytes()
    with pytest.raises(UsageError, match="being read"):
        color("x/0.png", "x/0.png", overwrite=True)
    color("x", "x")  # a new file beside it is allowed
    assert names("x") == ["0.png", "0.png.png"]
    assert Path("x/0.png").read_bytes() == before


def test_a_failure_on_the_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "11.flo").write_bytes(b"PIEH")
    real = reading.FileFlows.__iter__

    def one_by_one(self: reading.FileFlows) -> Iterator[FlowBatch]:
        for batch in real(self):
            yield batch
            while not list(Path("out").glob("*.png")):
                time.sleep(0.001)

    with monkeypatch.context() as patch:
        patch.setattr("flowreel.sinks.flow_readers.BATCH_FLOWS", 1)
        patch.setattr(reading.FileFlows, "__iter__", one_by_one)
        with pytest.raises(StageError, match=r"11\.flo"):
            color(folder, "out", video=True)
    assert "8.flo.png" in names("out")
    assert not any(name.endswith((".partial", ".mp4")) for name in names("out"))
    for name in names("out"):
        picture(Path("out") / name)
    Path("file").write_text("")
    with pytest.raises(StageError, match="file") as caught:
        color("flows/8.flo", "file")
    assert isinstance(caught.value.__cause__, OutputWriteError)
    assert caught.value.frame == 0


def test_progress_and_stages(folder: Path) -> None:
    done: list[tuple[int, int | None]] = []
    report = color(folder, "out", progress=lambda told: done.append((told.flows_done, told.flow_count)))
    assert done[-1] == (4, 4)
    assert [stage.name for stage in report.stages] == ["read", "write out"]
    assert [stage.items for stage in report.stages] == [4, 4]
    assert json.loads(json.dumps(report.as_json()))["pictures"] == 4


def test_the_encoder_asked_for_is_the_one_that_is_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowreel.sinks.video.why_no_nvenc", lambda *_: "it is busy")
    with pytest.raises(DeviceError, match="NVENC cannot encode 48x32 here: it is busy"):
        color(folder, "x.mp4", encoder="nvenc")
    assert names() == ["flows"]
    color(folder, "x.mp4", encoder="cpu")
    with pytest.raises(UsageError, match="encoder must be one of"):
        color(folder, "y.mp4", encoder="gpu")
