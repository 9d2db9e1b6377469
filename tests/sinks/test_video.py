"""Colour video: its decoded frames have the right size, times and colours; an unfinished one never looks finished."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import av.logging
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace

from flowreel.engine.config import Encoder, SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import (
    DeviceError,
    OutputBusyError,
    OutputExistsError,
    OutputWriteError,
    UnknownOutputError,
)
from flowreel.kernels.flow_color import flow_to_color
from flowreel.sinks import video, video_writer
from flowreel.sinks.video import ColorVideoSink
from flowreel.sinks.video_writer import VideoWriter

FIXED = SinkConfig(max_flow=4.0)


def info(height: int = 48, width: int = 64, rate: Fraction | None = Fraction(25)) -> FlowInfo:
    return FlowInfo(height=height, width=width, frame_rate=rate, frame_count=None, source=SourceId("test"))


def smooth_flow(number: int = 0, height: int = 48, width: int = 64, length: float = 3.0) -> np.ndarray:
    """(2, H, W): vectors that slowly turn across the picture and grow to ``length`` px.

    The colours change so slowly that 4:2:0 keeps them well, and each ``number`` gives a different flow.
    """
    across = np.linspace(0, 1, width)[None, :]
    angle = 2 * across + np.linspace(0, 1, height)[:, None] + number
    return (length * (0.5 + 0.5 * across) * np.stack([np.cos(angle), np.sin(angle)])).astype(np.float32)


def percentile_of(flows: list[np.ndarray]) -> float:
    return float(np.percentile([np.hypot(*flow) for flow in flows], 95))


def batch_of(flows: list[np.ndarray], index: int = 0, times_s: np.ndarray | None = None) -> FlowBatch:
    frames = np.arange(index, index + len(flows))
    times_s = frames / 25 if times_s is None else times_s
    return FlowBatch(torch.from_numpy(np.stack(flows)), index, frames, frames + 1, times_s, times_s + 0.04)


def record(
    path: Path, batches: list[FlowBatch], config: SinkConfig = FIXED, header: FlowInfo | None = None
) -> list[str]:
    sink = ColorVideoSink(str(path), config)
    sink.open(header or info(*batches[0].flow.shape[2:]))
    for batch in batches:
        sink.write(batch)
    sink.commit()
    assert sink.bytes_written == path.stat().st_size
    assert names(path.parent) == [path.name]
    return sink.notes


def play(path: Path) -> tuple[list[np.ndarray], list[float], float]:
    """Pictures (H, W, 3), their times in seconds, and the average rate a player reads."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.color_range == ColorRange.MPEG
        assert stream.codec_context.colorspace == Colorspace.ITU709
        frames = list(container.decode(stream))
        assert {frame.format.name for frame in frames} == {"yuv420p"}
        pictures = [
            frame.to_ndarray(format="rgb24", src_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.JPEG)
            for frame in frames
        ]
        return pictures, [frame.time for frame in frames], float(stream.average_rate)


def in_order(path: Path) -> bool:
    """Whether frames are decoded in the order in which they are shown, so that there are no B-frames."""
    with av.open(str(path)) as container:
        return all(packet.pts == packet.dts for packet in container.demux(video=0) if packet.size)


def refreshed(path: Path) -> list[int]:
    """The numbers of the IDR pictures in H.264: no frame behind one refers to frames before it."""
    found = []
    with av.open(str(path)) as container:
        for number, packet in enumerate(container.demux(video=0)):
            rest = bytes(packet)
            while rest:
                length = int.from_bytes(rest[:4], "big")
                if rest[4] & 31 == 5:
                    found.append(number)
                rest = rest[4 + length :]
    return found


def colors_of(flow: np.ndarray, max_flow: float) -> np.ndarray:
    return flow_to_color(flow.transpose(1, 2, 0), max_flow)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def automatic_scale(notes: list[str]) -> tuple[float, str]:
    """The colour scale in pixels according to the notes, and where it comes from."""
    (found,) = [match for note in notes if (match := re.search("full colour at (.*) px, the 95th (.*)", note))]
    return float(found[1]), found[2]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "X.MP4"])
def test_frames_times_and_colours(tmp_path: Path, name: str) -> None:
    flows = [smooth_flow(number) for number in range(7)]
    record(tmp_path / name, [batch_of(flows[:3]), batch_of(flows[3:], index=3)])
    pictures, times_s, rate = play(tmp_path / name)
    assert len(pictures) == 7
    assert times_s == pytest.approx([number / 25 for number in range(7)], abs=1e-9)
    assert rate == pytest.approx(25, rel=1e-3)
    for picture, flow in zip(pictures, flows, strict=True):
        assert picture.shape == (48, 64, 3)
        assert difference(picture, colors_of(flow, 4.0)) < 4
        # A mean, because 4:2:0 changes single pixels; a wrong matrix or range shifts whole areas by 8 levels or more.
        centre = np.s_[20:28, 28:36]
        assert np.abs(picture[centre].mean((0, 1)) - colors_of(flow, 4.0)[centre].mean((0, 1))).max() < 4
    assert difference(pictures[0], colors_of(flows[1], 4.0)) > 20  # the test can tell flows apart


@pytest.mark.parametrize("name", ["12:30.mp4", "file:x.mkv"])
def test_a_name_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    record(Path(name), [batch_of([smooth_flow(0, 16, 16)])])
    assert names(tmp_path) == [name]
    assert len(play(tmp_path / name)[0]) == 1


@pytest.mark.parametrize("direction", [(1, 0), (0, 1), (-1, 0), (0, -1), (0, 0)])
def test_flat_colours_are_the_wheels(tmp_path: Path, direction: tuple[int, int]) -> None:
    flow = np.empty((2, 32, 32), np.float32)
    flow[0], flow[1] = direction
    record(tmp_path / "x.mp4", [batch_of([flow])], SinkConfig(max_flow=1.0))
    (picture,), _, _ = play(tmp_path / "x.mp4")
    assert np.abs(picture.astype(int) - colors_of(flow, 1.0)).max() <= 4


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
@pytest.mark.parametrize("step", ["__init__", "_open_stream"])
def test_an_encoder_that_does_not_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    real = getattr(VideoWriter, step)

    def failing(*arguments: object, **options: object) -> None:
        if step == "_open_stream":  # fails after the file's header is written
            real(*arguments, **options)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(VideoWriter, step, failing)
    sink = ColorVideoSink(str(tmp_path / name), SinkConfig(max_flow=3))
    with pytest.raises(OutputWriteError, match="Input/output error"):
        sink.open(info())
    assert names(tmp_path) == []
    monkeypatch.undo()
    again = ColorVideoSink(str(tmp_path / name), SinkConfig(max_flow=3))
    again.open(info())
    again.abort()


def test_mp4_starts_with_its_index(tmp_path: Path) -> None:
    record(tmp_path / "x.mp4", [batch_of([smooth_flow(number) for number in range(3)])])
    contents = (tmp_path / "x.mp4").read_bytes()
    assert 0 < contents.index(b"moov") < contents.index(b"mdat")


@pytest.mark.parametrize(
    "rate",
    [Fraction(24000, 1001), Fraction(120000, 1001), Fraction(179, 6), Fraction(60), Fraction(1, 2), None],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_players_see_the_average_rate(tmp_path: Path, rate: Fraction | None, suffix: str) -> None:
    true_rate = rate or Fraction(25)
    times_s = 1.4 + np.arange(10) / float(true_rate)  # a source's times need not start at zero
    flow = smooth_flow(0, 16, 16)
    record(tmp_path / f"x{suffix}", [batch_of([flow] * 10, times_s=times_s)], header=info(16, 16, rate))
    _, shown_s, average = play(tmp_path / f"x{suffix}")
    assert average == pytest.approx(float(true_rate), rel=1e-3)
    assert shown_s == pytest.approx(times_s - 1.4, abs=1e-3 if suffix == ".mkv" else 2e-5)  # mkv has whole milliseconds


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_a_frame_a_day(tmp_path: Path, name: str) -> None:
    times_s = 86400.0 * np.arange(3)
    record(
        tmp_path / name,
        [batch_of([smooth_flow(0, 16, 16)] * 3, times_s=times_s)],
        header=info(16, 16, Fraction(1, 86400)),
    )
    assert play(tmp_path / name)[1] == pytest.approx(times_s)


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_last_frame_is_shown_as_long_as_the_others(tmp_path: Path, name: str, count: int) -> None:
    record(tmp_path / name, [batch_of([smooth_flow(0, 16, 16)] * count)])
    assert len(play(tmp_path / name)[0]) == count
    with av.open(str(tmp_path / name)) as container:
        assert container.duration == pytest.approx(40_000 * count, abs=1000)  # microseconds


def test_variable_rate_stays_in_step(tmp_path: Path) -> None:
    times_s = np.array([5.0, 5.04, 5.2, 5.24, 6.5])
    record(tmp_path / "x.mp4", [batch_of([smooth_flow(0, 16, 16)] * 5, times_s=times_s)])
    assert play(tmp_path / "x.mp4")[1] == pytest.approx(times_s - 5.0, abs=2e-5)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_what_follows_a_long_pause_is_in_step_again(tmp_path: Path, suffix: str) -> None:
    """No frame of an .mp4 lasts ten hours: without care all those after such a pause would be shown at once."""
    times_s = np.array([0, 0.04, 40_000, 40_000.04, 40_000.08])
    record(tmp_path / f"x{suffix}", [batch_of([smooth_flow(0, 16, 16)] * 5, times_s=times_s)])
    before, start, first, *after = play(tmp_path / f"x{suffix}")[1]
    assert [before, start, *after] == pytest.approx([0, 0.04, 40_000.04, 40_000.08], abs=1e-3)
    assert 35_000 < first <= 40_000


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_times_that_make_no_sense_still_give_a_video(tmp_path: Path, suffix: str) -> None:
    times_s = np.array([np.nan, 0.04, 0.04, 0.02, np.inf, 0.2])
    record(tmp_path / f"x{suffix}", [batch_of([smooth_flow(0, 16, 16)] * 6, times_s=times_s)])
    shown_s = play(tmp_path / f"x{suffix}")[1]
    assert len(shown_s) == 6
    assert shown_s[0] == 0
    assert (np.diff(shown_s) > 0).all()
    assert shown_s[4] - shown_s[3] == pytest.approx(0.04, abs=1e-9)
    assert shown_s[5] == pytest.approx(0.2, abs=1e-9)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (5, 8), (8, 5), (33, 47)])
def test_odd_and_tiny_sizes_are_padded_to_even(tmp_path: Path, height: int, width: int) -> None:
    flow = np.empty((2, height, width), np.float32)
    flow[0], flow[1] = 0, 1
    notes = record(tmp_path / "x.mp4", [batch_of([flow] * 2)], SinkConfig(max_flow=1.0))
    told = f"x.mp4: {width + width % 2}x{height + height % 2}, as 4:2:0 has even sides"
    assert any(told in note for note in notes) == bool(height % 2 or width % 2)
    pictures, _, _ = play(tmp_path / "x.mp4")
    assert [picture.shape for picture in pictures] == [(height + height % 2, width + width % 2, 3)] * 2
    # The added row and column repeat the last ones, so everything is yellow, with no seam of another colour.
    assert np.abs(pictures[0].astype(int) - colors_of(flow, 1.0)[0, 0]).max() <= 6


def test_automatic_scale_comes_from_the_first_32_flows_and_stays(tmp_path: Path) -> None:
    lengths = [1.0] * 20 + [2.0] * 12 + [50.0] * 3
    flows = [smooth_flow(number, length=length) for number, length in enumerate(lengths)]
    notes = record(tmp_path / "x.mp4", [batch_of(flows[:30]), batch_of(flows[30:], index=30)], SinkConfig())
    scale, origin = automatic_scale(notes)
    assert scale == pytest.approx(percentile_of(flows[:32]), rel=2e-3)
    assert origin == "percentile of the first 32 flows"
    pictures, times_s, _ = play(tmp_path / "x.mp4")
    assert times_s == pytest.approx(np.arange(35) / 25, abs=1e-9)
    for number in (0, 19, 31, 32, 34):
        assert difference(pictures[number], colors_of(flows[number], scale)) < 6


def test_a_short_clip_uses_all_its_flows(tmp_path: Path) -> None:
    flows = [smooth_flow(number, length=6.0) for number in range(2)]
    scale, origin = automatic_scale(record(tmp_path / "x.mp4", [batch_of(flows)], SinkConfig()))
    assert scale == pytest.approx(percentile_of(flows), rel=2e-3)
    assert origin == "percentile of the first 2 flows"
    assert difference(play(tmp_path / "x.mp4")[0][1], colors_of(flows[1], scale)) < 6


def test_what_waits_for_the_scale_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "HELD_BYTES", 3 * 4 * 32 * 32)  # three flows as float16
    lengths = [1.0, 1.0, 1.0, 9.0, 9.0]
    flows = [smooth_flow(number, 32, 32, length) for number, length in enumerate(lengths)]
    scale, origin = automatic_scale(record(tmp_path / "x.mp4", [batch_of(flows)], SinkConfig()))
    assert scale == pytest.approx(percentile_of(flows[:3]), rel=2e-3)
    assert origin == "percentile of the first 3 flows, all that fit"
    monkeypatch.setattr(video, "HELD_BYTES", 1)
    scale, origin = automatic_scale(record(tmp_path / "x.mp4", [batch_of(flows)], SinkConfig(overwrite=True)))
    assert origin == "percentile of the first 1 flow, all that fit"


def test_holding_back_changes_no_colour_by_more_than_a_level() -> None:
    flow = 300 * np.random.default_rng(0).normal(size=(64, 64, 2)).astype(np.float32)
    flow[0, :4] = [(np.nan, 0), (0, 2e9), (np.inf, 0), (1e6, -1e6)]
    apart = flow_to_color(flow, 500.0).astype(int) - flow_to_color(video._pack(flow), 500.0)
    assert np.abs(apart).max() <= 1


def test_unknown_vectors_are_black_and_counted(tmp_path: Path) -> None:
    flow = smooth_flow(0, 32, 32)
    flow[0, :16] = 1e10
    flow[1, 20, 20] = np.nan
    notes = record(tmp_path / "x.mp4", [batch_of([flow, flow])], SinkConfig())
    assert any(f"{2 * (16 * 32 + 1)} unknown vectors painted black" in note for note in notes)
    assert play(tmp_path / "x.mp4")[0][0][2:12].max() < 16


def test_another_encoder_takes_over_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_writer, "ENCODERS", ("libnothing264", "mpeg4"))
    flows = [smooth_flow(number) for number in range(3)]
    notes = record(tmp_path / "x.mp4", [batch_of(flows)])
    assert any("encoded with mpeg4, as this FFmpeg has no libnothing264" in note for note in notes)
    pictures, times_s, _ = play(tmp_path / "x.mp4")
    assert times_s == pytest.approx([0, 0.04, 0.08], abs=1e-9)
    assert difference(pictures[2], colors_of(flows[2], 4.0)) < 6


class TestWhichEncoder:
    """Choosing between the GPU's encoder and the CPU's.

    No real GPU encoder has been tried. In its place mpeg4 is used, so that the file shows which encoder was chosen.
    """

    @pytest.fixture
    def nvenc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(video_writer, "NVENC", "mpeg4")

    @pytest.mark.usefixtures("nvenc")
    @pytest.mark.parametrize(
        ("asked", "device", "codec"),
        [
            ("auto", "cuda:1", "mpeg4"),
            ("auto", "cpu", "h264"),
            ("auto", None, "h264"),
            ("cpu", "cuda:1", "h264"),
            ("nvenc", "cuda:1", "mpeg4"),
            ("nvenc", None, "mpeg4"),
        ],
    )
    def test_a_gpus_own_where_it_computes_or_is_asked_for(
        self, tmp_path: Path, asked: Encoder, device: str | None, codec: str
    ) -> None:
        flows = [smooth_flow(number) for number in range(3)]
        config = SinkConfig(max_flow=4.0, encoder=asked)
        notes = record(tmp_path / "x.mp4", [batch_of(flows)], config, replace(info(), device=device))
        with av.open(str(tmp_path / "x.mp4")) as container:
            assert container.streams.video[0].codec_context.name == codec
        assert any("encoded by the GPU" in note for note in notes) == (codec == "mpeg4")
        pictures, times_s, _ = play(tmp_path / "x.mp4")
        assert times_s == pytest.approx([0, 0.04, 0.08], abs=1e-9)
        assert difference(pictures[2], colors_of(flows[2], 4.0)) < 6

    @pytest.mark.usefixtures("nvenc")
    @pytest.mark.parametrize(("device", "number"), [("cuda:1", "1"), ("cuda", "0")])
    def test_the_gpu_that_computes_is_the_one_that_encodes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, number: str
    ) -> None:
        given: list[dict[str, str]] = []

        def noted(gpu: int) -> dict[str, str]:
            given.append(options(gpu))
            return given[-1]

        options = video_writer._nvenc_options
        monkeypatch.setattr(video_writer, "_nvenc_options", noted)
        record(tmp_path / "x.mp4", [batch_of([smooth_flow()])], FIXED, replace(info(), device=device))
        assert [one["gpu"] for one in given] == [number, number]  # once for the trial, once to encode

    def test_it_is_asked_for_no_b_frames(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """NVENC's presets use B-frames. Here x264 takes its place, which also uses them unless told not to."""
        known = {name: value for name, value in video_writer._NVENC_OPTIONS.items() if name in ("qp", "bf")}
        monkeypatch.setattr(video_writer, "NVENC", "libx264")
        monkeypatch.setattr(video_writer, "_nvenc_options", lambda gpu: known)
        flows = [smooth_flow(number / 8) for number in range(12)]
        record(tmp_path / "x.mp4", [batch_of(flows)], FIXED, replace(info(), device="cuda:0"))
        assert in_order(tmp_path / "x.mp4")

    def test_without_one_the_cpu_encodes_and_says_why(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        level = av.logging.get_level()
        if video_writer.why_no_nvenc(0, 48, 64) is None:
            pytest.skip("this machine has NVENC")
        assert video_writer.why_no_nvenc(0, 48, 64) == video_writer.why_no_nvenc(0, 48, 64)  # the same reason each time
        assert (av.logging.get_level(), capfd.readouterr()) == (level, ("", ""))
        header = replace(info(), device="cuda:0")
        notes = record(tmp_path / "x.mp4", [batch_of([smooth_flow()])], FIXED, header)
        said = next(note for note in notes if "NVENC" in note)
        assert re.search("encoded on the CPU, as NVENC cannot: .*[a-z]", said)
        assert len(play(tmp_path / "x.mp4")[0]) == 1
        with pytest.raises(DeviceError, match="NVENC cannot encode 64x48 here: "):
            ColorVideoSink(str(tmp_path / "y.mp4"), replace(FIXED, encoder="nvenc")).open(header)
        assert names(tmp_path) == ["x.mp4"]

    def test_on_a_card_that_has_one(self, tmp_path: Path, gpu: torch.device) -> None:
        if (why := video_writer.why_no_nvenc(gpu.index, 240, 320)) is not None:
            pytest.skip(f"no NVENC: {why}")
        flows = [smooth_flow(number, 240, 320) for number in range(30)]
        header = replace(info(240, 320), device=str(gpu))
        notes = record(tmp_path / "x.mp4", [batch_of(flows)], FIXED, header)
        assert any("encoded by the GPU" in note for note in notes)
        pictures, times_s, _ = play(tmp_path / "x.mp4")
        assert times_s == pytest.approx(np.arange(30) / 25, abs=1e-9)
        assert in_order(tmp_path / "x.mp4")
        assert max(difference(*pair) for pair in zip(pictures, (colors_of(f, 4.0) for f in flows), strict=True)) < 6

    def test_trying_leaves_what_ffmpeg_logs_as_it_was(self) -> None:
        before = av.logging.get_level()
        try:
            for level in (av.logging.VERBOSE, None):
                av.logging.set_level(level)
                video_writer.why_no_nvenc(0, 48, 64)
                assert av.logging.get_level() == level
        finally:
            av.logging.set_level(before)

    def test_an_ffmpeg_without_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(video_writer, "NVENC", "h264_nothing")
        assert video_writer.why_no_nvenc(0, 48, 64) == "this FFmpeg has no h264_nothing"


class TestParts:
    """With several free threads, several encoders each encode a part of the video."""

    @pytest.fixture(autouse=True)
    def several_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(video, "encode_workers", lambda *_: 3)

    @pytest.mark.parametrize(("device", "in_parts"), [("cpu", False), ("cuda:0", True), (None, True)])
    def test_beside_a_model_on_the_cpu_one_thread_encodes_else_several_do(
        self, tmp_path: Path, device: str | None, in_parts: bool
    ) -> None:
        sink = ColorVideoSink(str(tmp_path / "x.mp4"), replace(FIXED, encoder="cpu"))
        sink.open(replace(info(), device=device))
        assert sink._encoder is not None
        assert (sink._encoder._parts is not None) == in_parts
        sink.abort()

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
    @pytest.mark.parametrize(("count", "height", "width"), [(40, 48, 64), (16, 33, 47), (33, 35, 64)])
    def test_they_are_one_video(self, tmp_path: Path, suffix: str, count: int, height: int, width: int) -> None:
        """Parts join to one video, here with irregular frame times."""
        times_s = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.3, count)).round(3)
        flows = [smooth_flow(number, height, width) for number in range(count)]
        batches = [
            batch_of(flows[first : first + 7], first, times_s[first : first + 7]) for first in range(0, count, 7)
        ]
        record(tmp_path / f"x{suffix}", batches)
        pictures, shown_s, _ = play(tmp_path / f"x{suffix}")
        assert shown_s == pytest.approx(times_s - times_s[0], abs=2e-5 if suffix == ".mp4" else 1e-9)
        assert len(pictures) == count
        for picture, flow in zip(pictures, flows, strict=True):
            assert difference(picture[:height, :width], colors_of(flow, 4.0)) < 6
        assert refreshed(tmp_path / f"x{suffix}") == list(range(0, count, 16))

    @pytest.mark.parametrize("rate", [Fraction(1, 2), Fraction(10), Fraction(60)])
    def test_no_two_key_frames_in_a_row(self, tmp_path: Path, rate: Fraction) -> None:
        """Each part has one key frame, at any rate and despite new scenes: H.264 forbids two of one id in a row."""
        flows = [smooth_flow(0)] * 8 + [smooth_flow(3)] * 7 + [smooth_flow(6)] * 20  # new scenes in the first part
        batch = batch_of(flows, times_s=np.arange(35) / float(rate))
        record(tmp_path / "x.mp4", [batch], header=info(rate=rate))
        assert refreshed(tmp_path / "x.mp4") == [0, 16, 32]

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
    @pytest.mark.parametrize("rate", [Fraction(1, 2), Fraction(30000, 1001), Fraction(240)])
    @pytest.mark.parametrize(("height", "width"), [(2, 2), (436, 1024), (1080, 1920)])
    def test_their_parameters_are_those_of_the_header(
        self, tmp_path: Path, suffix: str, rate: Fraction, height: int, width: int
    ) -> None:
        writer = VideoWriter(tmp_path / "x", suffix, height, width, rate, threads=12)
        part = writer._encoder_of_part()
        part.open()
        assert part.extradata == writer._stream.codec_context.extradata
        assert part.extradata is not None
        writer.discard()

    @pytest.mark.parametrize(
        ("threads", "height", "width", "in_parts"),
        [
            (1, 2, 2, False),
            (2, 80, 64, True),
            (2, 96, 64, False),
            (15, 436, 1024, True),
            (9, 436, 1024, False),
            (15, 720, 64, False),
            (16, 720, 64, True),
            (16, 720, 1280, False),  # 16 encoders would take too much memory
        ],
    )
    def test_where_pictures_have_many_rows_or_bytes_x264_shares_the_threads_out(
        self, tmp_path: Path, threads: int, height: int, width: int, in_parts: bool
    ) -> None:
        writer = VideoWriter(tmp_path / "x", ".mp4", height, width, None, threads=threads)
        assert (writer._parts is not None) == in_parts
        assert writer._stream.codec_context.thread_count == (1 if in_parts else threads)
        writer.discard()

    def test_an_encoder_that_fails_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sink = ColorVideoSink(str(tmp_path / "x.mp4"), FIXED)
        sink.open(info())
        monkeypatch.setattr(video_writer, "_X264", {"preset": "no such"})

        def whole_run() -> None:
            for first in range(0, 320, 16):
                sink.write(batch_of([smooth_flow()] * 16, first))

        with pytest.raises(OutputWriteError, match=r"cannot write .*x\.mp4"):
            whole_run()
        sink.abort()
        assert names(tmp_path) == []

    def test_one_that_is_given_up_leaves_nothing(self, tmp_path: Path) -> None:
        sink = ColorVideoSink(str(tmp_path / "x.mp4"), FIXED)
        sink.open(info())
        sink.write(batch_of([smooth_flow(number) for number in range(40)]))
        sink.abort()
        assert names(tmp_path) == []

    def test_an_incomplete_one_plays(self, tmp_path: Path) -> None:
        sink = ColorVideoSink(str(tmp_path / "x.mp4"), FIXED)
        sink.open(info())
        sink.write(batch_of([smooth_flow(number) for number in range(40)]))
        sink.commit(complete=False)
        assert names(tmp_path) == ["x.mp4.partial"]
        assert len(play(tmp_path / "x.mp4.partial")[0]) == 40


def test_unfinished_never_looks_finished(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.mp4"
    sink = ColorVideoSink(str(path), FIXED)
    sink.abort()  # before open there is nothing to undo
    assert sink.bytes_written == 0
    sink.open(info())
    sink.write(batch_of([smooth_flow()]))
    assert names(path.parent) == ["x.mp4.partial"]
    sink.abort()
    assert names(path.parent) == []


def test_an_incomplete_video_keeps_its_unfinished_name_and_plays(tmp_path: Path) -> None:
    sink = ColorVideoSink(str(tmp_path / "x.mp4"), SinkConfig())
    sink.open(info())
    sink.write(batch_of([smooth_flow(number) for number in range(3)]))
    sink.commit(complete=False)
    assert names(tmp_path) == ["x.mp4.partial"]
    assert sink.path == str(tmp_path / "x.mp4")
    assert any("x.mp4.partial" in note for note in sink.notes)
    assert len(play(tmp_path / "x.mp4.partial")[0]) == 3


def test_existing_output_is_kept_until_its_successor_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    path.write_text("old")
    with pytest.raises(OutputExistsError, match=r"x\.mp4"):
        ColorVideoSink(str(path), FIXED).open(info())
    replacing = SinkConfig(max_flow=4.0, overwrite=True)
    for finish in (ColorVideoSink.abort, lambda sink: sink.commit(complete=False)):
        sink = ColorVideoSink(str(path), replacing)
        sink.open(info())
        sink.write(batch_of([smooth_flow()]))
        finish(sink)
        assert path.read_text() == "old"
    record(path, [batch_of([smooth_flow()])], replacing)
    assert len(play(path)[0]) == 1


def test_output_that_comes_up_during_the_run_is_not_replaced(tmp_path: Path) -> None:
    sink = ColorVideoSink(str(tmp_path / "x.mp4"), FIXED)
    sink.open(info())
    sink.write(batch_of([smooth_flow()]))
    (tmp_path / "x.mp4").write_text("somebody else's")
    with pytest.raises(OutputExistsError):
        sink.commit()
    kept = sink.abort()
    assert kept is not None
    assert "x.mp4.partial is the whole video" in kept
    assert (tmp_path / "x.mp4").read_text() == "somebody else's"
    assert names(tmp_path) == ["x.mp4", "x.mp4.partial"]
    assert len(play(tmp_path / "x.mp4.partial")[0]) == 1


def test_a_video_that_the_disk_refuses_at_the_end_is_not_called_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems find out only then that there is no room for it."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sink = ColorVideoSink(str(tmp_path / "x.mp4"), FIXED)
    sink.open(info())
    sink.write(batch_of([smooth_flow()]))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputWriteError, match="No space left"):
            sink.commit()
    assert sink.abort() is None
    assert names(tmp_path) == []


def test_no_flow_is_no_video(tmp_path: Path) -> None:
    sink = ColorVideoSink(str(tmp_path / "x.mp4"), SinkConfig())
    sink.open(info())
    with pytest.raises(OutputWriteError, match="not one flow"):
        sink.commit()
    sink.abort()
    assert names(tmp_path) == []


def test_wrong_size_and_wrong_name(tmp_path: Path) -> None:
    with pytest.raises(UnknownOutputError, match=r"\.mp4 or \.mkv"):
        ColorVideoSink(str(tmp_path / "x.avi"), FIXED)
    sink = ColorVideoSink(str(tmp_path / "x.mp4"), FIXED)
    sink.open(info(48, 64))
    with pytest.raises(ValueError, match="opened for"):
        sink.write(batch_of([smooth_flow(0, 48, 62)]))
    sink.abort()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_run_on_the_same_video_is_refused(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "x.mp4"
    (tmp_path / "x.mp4.partial").write_text("of a run that was killed")
    config = SinkConfig(max_flow=4.0, overwrite=overwrite)
    first, second = ColorVideoSink(str(path), config), ColorVideoSink(str(path), config)
    first.open(info())
    first.write(batch_of([smooth_flow()]))
    with pytest.raises(OutputBusyError, match=r"x\.mp4 is being written by another run"):
        second.open(info())
    second.abort()
    first.write(batch_of([smooth_flow(1)], index=1))
    first.commit()
    assert len(play(path)[0]) == 2
    assert names(tmp_path) == ["x.mp4"]
    third = ColorVideoSink(str(path), SinkConfig(max_flow=4.0, overwrite=True))
    third.open(info())
    first.abort()  # as when another output of its run fails; the unfinished file now belongs to the third run
    third.write(batch_of([smooth_flow()]))
    third.commit()
    assert len(play(path)[0]) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_the_way_is_found_before_the_work(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "x.mp4").mkdir()
    with pytest.raises(OutputExistsError, match=r"x\.mp4"):
        ColorVideoSink(str(tmp_path / "x.mp4"), SinkConfig(overwrite=overwrite)).open(info())
    assert names(tmp_path) == ["x.mp4"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError, match=r"x\.mp4"):
        ColorVideoSink(str(tmp_path / "file" / "x.mp4"), FIXED).open(info())
    (tmp_path / "y.mp4.partial").mkdir()  # a folder stands where the file should go
    with pytest.raises(OutputWriteError, match=r"y\.mp4"):
        ColorVideoSink(str(tmp_path / "y.mp4"), FIXED).open(info())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("most_bytes", [0, 1000, 60_000, 150_000])
@pytest.mark.parametrize("threads", [1, 3])  # with three, the video is encoded in parts
def test_a_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path,
    files_up_to: Callable[[int], AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    most_bytes: int,
    threads: int,
) -> None:
    monkeypatch.setattr(video, "encode_workers", lambda *_: threads)
    noise = np.random.default_rng(0).normal(size=(16, 2, 96, 96)).astype(np.float32)
    sink = ColorVideoSink(str(tmp_path / f"x{suffix}"), FIXED)

    def whole_run() -> None:
        sink.open(info(96, 96))
        for number in range(6):
            sink.write(batch_of(list(noise), index=16 * number))
        sink.commit()

    with files_up_to(most_bytes), pytest.raises(OutputWriteError, match=f"cannot write .*x{suffix}"):
        whole_run()
    sink.abort()
    assert names(tmp_path) == []
