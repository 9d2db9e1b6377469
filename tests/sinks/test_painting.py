"""Picture outputs give the same result from flow as from pictures that were already painted on the flow's device."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import ColorBatch, FlowBatch, FlowInfo, SourceId
from flowreel.engine.protocols import DeviceSink
from flowreel.sinks import VideoWriter, open_sink, video
from flowreel.sinks.painting import packed, painted, yuv420
from flowreel.sinks.video import _pack

SIZE = (32, 48)


def flows(count: int) -> torch.Tensor:
    """(N, 2, H, W) flow that turns and grows, with some unknown vectors."""
    height, width = SIZE
    number = torch.arange(count).view(-1, 1, 1)
    angle = torch.linspace(0, 2, width) + torch.linspace(0, 1, height)[:, None] + number
    flow = torch.stack([angle.cos(), angle.sin()], 1) * (1 + number % 7)[:, None]
    flow[::3, 0, 2, 2] = torch.nan
    flow[::4, 1, :3, 5] = 1e10
    return flow


def batches(count: int, length: int) -> list[FlowBatch]:
    made = []
    for index, flow in zip(range(0, count, length), flows(count).split(length), strict=True):
        frames = np.arange(index, index + len(flow)) * 2
        made.append(FlowBatch(flow, index, frames, frames + 2, frames / 50, frames / 50 + 0.04))
    return made


def write(
    path: Path, config: SinkConfig, given: list[FlowBatch], *, paint: bool
) -> tuple[list[str], list[np.ndarray], list[float]]:
    """The sink's notes without its path, the pictures it encodes, and a video's times in seconds.

    Pictures of a video are given as YUV planes, whether the sink was given planes or converted them itself.
    """
    sink = open_sink(str(path), config)
    sink.open(FlowInfo(*SIZE, frame_rate=None, frame_count=None, source=SourceId("test")))
    pictures: list[np.ndarray] = []
    times: list[float] = []
    encode = VideoWriter.encode

    def noted(self: VideoWriter, picture: np.ndarray, time_s: float) -> None:
        assert (picture.ndim == 2) == paint
        planes = picture if paint else yuv420(torch.from_numpy(picture).permute(2, 0, 1)[None])[0].numpy()
        pictures.append(planes.astype(int))
        times.append(time_s)
        encode(self, picture, time_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoWriter, "encode", noted)
        if paint:
            assert isinstance(sink, DeviceSink)
            for painting in sink.prepare(iter(given)):
                sink.take(painting)
        else:
            for batch in given:
                sink.write(batch)
        sink.commit()
    if path.suffix == ".png":
        pictures = [np.asarray(Image.open(file)).astype(int) for file in sorted(path.parent.iterdir())]
    return [note.partition(": ")[2] for note in sink.notes], pictures, times


@pytest.mark.parametrize("max_flow", [None, 4.0])
@pytest.mark.parametrize(("count", "length"), [(1, 1), (7, 3), (32, 8), (40, 3), (33, 33)])
@pytest.mark.parametrize("name", ["x.mkv", "%03d.png"])
def test_the_same_either_way(tmp_path: Path, name: str, count: int, length: int, max_flow: float | None) -> None:
    given, config = batches(count, length), SinkConfig(max_flow=max_flow)
    notes, pictures, times = write(tmp_path / "flow" / name, config, given, paint=False)
    its_notes, its_pictures, its_times = write(tmp_path / "pictures" / name, config, given, paint=True)
    assert its_notes == notes
    assert any("unknown" in note for note in notes)
    assert its_times == times
    assert len(its_pictures) == count
    assert np.abs(np.stack(its_pictures) - np.stack(pictures)).max() <= 1


def test_what_waits_on_the_device_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "HELD_BYTES", 3 * 4 * SIZE[0] * SIZE[1])  # three flows as float16
    notes, _, _ = write(tmp_path / "x.mp4", SinkConfig(), batches(9, 2), paint=True)
    assert "percentile of the first 3 flows, all that fit" in notes[0]
    assert len([note for note in notes if "percentile" in note]) == 1


def test_flow_of_another_size(tmp_path: Path) -> None:
    sink = open_sink(str(tmp_path / "x.mp4"), SinkConfig())
    sink.open(FlowInfo(64, 64, frame_rate=None, frame_count=None, source=SourceId("test")))
    assert isinstance(sink, DeviceSink)
    with pytest.raises(ValueError, match="opened for"):
        next(sink.prepare(iter(batches(1, 1))))
    sink.abort()


def test_pictures_lie_as_an_encoder_takes_them() -> None:
    one = np.zeros(2)
    pictures = painted(flows(2), None, index=5, frame=one.astype(np.int64), timestamp_s=one)
    assert isinstance(pictures, ColorBatch)
    assert (pictures.pictures.shape, pictures.pictures.dtype) == ((2, *SIZE, 3), torch.uint8)
    assert pictures.pictures.is_contiguous()
    assert pictures.unknown.tolist() == [4, 0]


@pytest.mark.parametrize("size", [(48, 64), (33, 46), (48, 31), (1, 1)])
def test_planes_are_those_that_ffmpeg_makes(size: tuple[int, int]) -> None:
    """For noise, primary colours and ramps; at odd sizes the last row or column is repeated."""
    height, width = size
    noise = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(1))
    bright = torch.linspace(0, 255, width).expand(3, height, width)
    plain = [torch.tensor(color).view(3, 1, 1).expand(3, height, width) for color in np.eye(3) * 255]
    pictures = torch.stack([picture.to(torch.uint8) for picture in (noise, bright, *plain)])
    found = yuv420(pictures)
    assert (found.dtype, found.is_contiguous()) == (torch.uint8, True)
    assert found.shape == (5, -(-height // 2) * 3, -(-width // 2) * 2)
    for picture, planes in zip(pictures, found, strict=True):
        padded = np.pad(picture.permute(1, 2, 0).numpy(), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        wanted = av.VideoFrame.from_ndarray(padded, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.AREA,
        )
        assert np.abs(planes.numpy().astype(int) - wanted.to_ndarray()).max() <= 1


def test_a_video_of_planes_is_the_video_of_pictures(tmp_path: Path) -> None:
    """Compares decoded colours, at an odd size."""
    height, width = 63, 95
    down, right = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    given = [FlowBatch(torch.stack((right, down))[None] * 5, 0, *[np.zeros(1, int)] * 2, *[np.zeros(1)] * 2)]
    shown = []
    for name, paint in (("pictures.mp4", False), ("planes.mp4", True)):
        sink = open_sink(str(tmp_path / name), SinkConfig(max_flow=8.0))
        sink.open(FlowInfo(height, width, frame_rate=None, frame_count=None, source=SourceId("test")))
        assert isinstance(sink, DeviceSink)
        for batch in sink.prepare(iter(given)) if paint else given:
            sink.take(batch) if paint else sink.write(batch)  # type: ignore[arg-type]
        sink.commit()
        with av.open(tmp_path / name) as file:
            (frame,) = file.decode(video=0)
        assert (frame.colorspace, frame.color_range) == (Colorspace.ITU709, ColorRange.MPEG)
        shown.append(frame.to_ndarray(format="rgb24").astype(int))
    assert shown[0].std() > 40
    assert np.abs(shown[0] - shown[1]).mean() < 1  # planes differ by a level; the encoder can increase that locally


def test_held_flow_is_packed_as_on_a_cpu() -> None:
    flow = 300 * torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    flow[:, 0, :4] = torch.tensor([[torch.nan, 0, torch.inf, 1e6], [0, 2e9, 0, -1e6]])
    expected = _pack(flow.permute(1, 2, 0).numpy())
    assert np.array_equal(packed(flow).permute(1, 2, 0).numpy(), expected, equal_nan=True)
