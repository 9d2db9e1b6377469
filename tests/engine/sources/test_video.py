"""Video files: counts, times, rotation, selection, streams, and what can be wrong with real files."""

from __future__ import annotations

import gc
import itertools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition

from flowreel.engine.config import SelectConfig
from flowreel.engine.data import Frame
from flowreel.engine.errors import (
    DeviceError,
    FrameSizeError,
    SourceNotFoundError,
    TooFewFramesError,
    UnsupportedSourceError,
    UsageError,
    frame_of,
)
from flowreel.engine.protocols import Source
from flowreel.engine.sources import open_source, pyav
from flowreel.engine.sources.picture import Turn
from flowreel.engine.sources.probe import VideoProbe, probe_video
from flowreel.engine.sources.video import VideoSource, open_video
from tests.fakes.fields import field, parameter_sets

Clip = Callable[..., Path]

# name: (frames, width, height, average rate, first and last time in seconds)
REAL = {
    "videos/bbb_1080p60.mp4": (120, 1920, 1080, Fraction(60), 0.0, 119 / 60),
    "videos/conveyor_640x360.mp4": (1189, 640, 360, Fraction(179, 6), 0.0, 455808 * 1 / 11456 + 384 / 11456),
    "videos/person_asl_walk_640x480.mkv": (89, 640, 480, Fraction(30), 0.0, 2.933),
    "videos/sintel_cave_1024x436.mp4": (50, 1024, 436, Fraction(10), 0.0, 4.9),
    "videos_corner/av1_640x360.mkv": (125, 640, 360, Fraction(25), 0.0, 4.96),
    "videos_corner/bbb_vfr_640x360.mp4": (72, 640, 360, Fraction(480, 13), 0.0, 118 / 60),
    "videos_corner/hevc_main10_320x240.mp4": (60, 320, 240, Fraction(30), 0.0, 59 / 30),
    "videos_corner/nasa_rotated90_480x270.mp4": (17, 270, 480, Fraction(30000, 1001), 0.0, 16016 / 30000),
    "videos_corner/non_zero_start_200x112.mp4": (12, 200, 112, Fraction(30), 127995 / 15360, 133627 / 15360),
    "videos_corner/odd_321x241_vp9.mp4": (25, 321, 241, Fraction(25), 0.0, 0.96),
}
SLOW = ("bbb_1080p60", "conveyor")


def numbers(source: Source) -> list[int]:
    return [frame.index for frame in source]


def pictured(frames: list[Frame]) -> list[int]:
    """The numbers that the pictures of a generated clip show."""
    digits = [frame.rgb[0, 12, 4:64:8] > 125 for frame in frames]
    return [sum(1 << place for place in range(8) if row[place]) for row in digits]


def joined(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def of_pictures(path: Path, pictures: list[tuple[bytes, int]], high: bool = False) -> Path:
    """A file of the pictures of ``fakes/fields.py``, each with how many fields it lasts."""
    pictures = [(parameter_sets(high) + pictures[0][0], pictures[0][1]), *pictures[1:]]
    raw = path.with_name("raw.h264")
    raw.write_bytes(b"".join(data for data, _ in pictures))
    at = 0
    with av.open(str(raw)) as read, av.open(str(path), "w") as write:
        stream = write.add_stream_from_template(read.streams.video[0])
        for data, fields in pictures:
            packet = av.Packet(data)
            packet.pts, packet.dts, packet.duration = at, at, fields
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 50), stream, at % 16 == 0
            write.mux(packet)
            at += fields
    return path


class TestRealClips:
    @pytest.mark.parametrize("name", REAL)
    def test_count_size_and_times(self, data_dir: Path, name: str) -> None:
        count, width, height, rate, first_s, last_s = REAL[name]
        slow = any(part in name for part in SLOW)
        with closing(open_video(str(data_dir / name), SelectConfig())) as source:
            info = source.info
            assert (info.frame_count, info.width, info.height, info.frame_rate) == (count, width, height, rate)
            assert info.source.name == Path(name).name
            frames = list(itertools.islice(source, 5 if slow else None))
        times = [frame.timestamp_s for frame in frames]
        assert all(later > earlier for earlier, later in itertools.pairwise(times))
        assert times[0] == pytest.approx(first_s)
        assert {tuple(frame.rgb.shape) for frame in frames} == {(3, height, width)}
        if not slow:
            assert [frame.index for frame in frames] == list(range(count))
            assert times[-1] == pytest.approx(last_s)
        assert source.losses == []

    def test_variable_rate_keeps_its_gaps(self, data_dir: Path) -> None:
        times = probe_video(str(data_dir / "videos_corner/bbb_vfr_640x360.mp4")).timeline.times_s
        gaps = np.round(np.diff(times) * 60).astype(int)
        assert np.bincount(gaps).tolist() == [0, 24, 47]

    def test_rotation_turns_the_right_way(self, data_dir: Path) -> None:
        path = data_dir / "videos_corner/nasa_rotated90_480x270.mp4"
        with av.open(str(path)) as container:
            stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
        with closing(open_video(str(path), SelectConfig())) as source:
            shown = next(iter(source)).rgb.permute(1, 2, 0).numpy()
        # the display matrix asks for a quarter turn counter-clockwise
        error = [np.abs(np.rot90(stored, turns).astype(int) - shown).mean() for turns in (1, 3)]
        assert error[0] < 2 < error[1]


@pytest.mark.parametrize(
    "matrix", [m for m in itertools.product((-1, 0, 1), repeat=4) if abs(m[0] * m[3] - m[1] * m[2]) == 1 and 0 in m]
)
def test_turn_follows_the_display_matrix(matrix: tuple[int, int, int, int]) -> None:
    a, b, c, d = matrix
    raw = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], np.int32)
    frame: Any = SimpleNamespace(side_data={"DISPLAYMATRIX": raw.tobytes()})
    turn, notes = Turn.of(frame)
    if 0 not in (a * d, b * c) or (a and b) or (c and d) or (a and c) or (b and d):
        assert (turn, len(notes)) == (Turn(), 1)  # a shear: not applied, and noted
        return
    stored = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    shown = turn(stored)
    y, x = np.mgrid[:3, :5]
    to_x, to_y = a * x + c * y, b * x + d * y
    assert np.array_equal(shown[to_y - to_y.min(), to_x - to_x.min()], stored)
    assert notes == []
    assert shown.flags.c_contiguous


@pytest.mark.usefixtures("each_decoder")
class TestSelection:
    @pytest.mark.parametrize(
        ("select", "expected"),
        [
            (SelectConfig(), range(100)),
            (SelectConfig(start=3, stop=9), range(3, 9)),
            (SelectConfig(start=1, step=7, stop=500), range(1, 100, 7)),
            (SelectConfig(start="1s", stop="2s"), range(25, 50)),
            (SelectConfig(start="0:01.04", stop="1:30"), range(26, 100)),
            (SelectConfig(start="0.5s", stop=20, step=3), range(13, 20, 3)),
        ],
    )
    def test_takes_what_was_asked(self, long_clip: Path, select: SelectConfig, expected: range) -> None:
        with closing(open_video(str(long_clip), select)) as source:
            assert source.info.frame_count == len(expected)
            assert source.info.frame_rate == Fraction(25, select.step)
            frames = list(source)
        assert [frame.index for frame in frames] == list(expected) == pictured(frames)
        assert [frame.timestamp_s for frame in frames] == pytest.approx([number / 25 for number in expected])
        assert source.losses == []

    def test_seeking_gives_the_same_pictures(self, long_clip: Path) -> None:
        probe = probe_video(str(long_clip))
        whole = [frame.rgb for frame in VideoSource(probe, SelectConfig())]
        for start in range(30, 98, 3):
            frames = list(VideoSource(probe, SelectConfig(start=start, stop=start + 2)))
            assert [frame.index for frame in frames] == [start, start + 1]
            assert all(frame.rgb.equal(whole[frame.index]) for frame in frames)

    @pytest.mark.parametrize("select", [SelectConfig(start=99), SelectConfig(start=400), SelectConfig(step=100)])
    def test_fewer_than_two_are_refused_at_once(self, long_clip: Path, select: SelectConfig) -> None:
        with pytest.raises(TooFewFramesError, match=r"long\.mp4 has 100 frames"):
            open_video(str(long_clip), select)

    def test_single_frame_video(self, clip: Clip) -> None:
        with pytest.raises(TooFewFramesError, match="has 1 frame: flow needs"):
            open_source(clip("single.mp4", count=1))

    def test_nvdec_needs_a_gpu(self, long_clip: Path) -> None:
        with pytest.raises(DeviceError, match="NVDEC"):
            open_video(str(long_clip), SelectConfig(decoder="nvdec"))


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "libx264"), ("ts", "libx264"), ("mpg", "mpeg2video")])
def test_seeking_really_skips(clip: Clip, monkeypatch: pytest.MonkeyPatch, kind: str, codec: str) -> None:
    """Also where no index leads to the key frame, as in transport and program streams."""
    options = {"g": "20", "keyint_min": "20", "sc_threshold": "0"}
    probe = probe_video(str(clip(f"skipped.{kind}", count=100, codec=codec, b_frames=2, options=options)))
    whole = [frame.rgb for frame in VideoSource(probe, SelectConfig())]
    stamps: list[int | None] = []
    real = pyav._pass
    monkeypatch.setattr(pyav, "_pass", lambda *a, **k: (stamps.append(it.frame.pts) or it for it in real(*a, **k)))
    frames = list(VideoSource(probe, SelectConfig(start=90, stop=92)))
    assert [frame.index for frame in frames] == [90, 91]
    assert all(frame.rgb.equal(whole[frame.index]) for frame in frames)
    assert probe.timeline.number_of(stamps[0]) == probe.key_frames[probe.key_frames <= 90][-1] > 70


@pytest.mark.parametrize("lands", ["at a later key frame", "at the end", "nowhere"])
def test_a_seek_that_lands_wrong_is_made_good_from_the_start(
    long_clip: Path, monkeypatch: pytest.MonkeyPatch, lands: str
) -> None:
    probe = probe_video(str(long_clip))
    assert probe.timeline.stamps is not None
    whole = [frame.rgb for frame in VideoSource(probe, SelectConfig())]
    later = probe.timeline.stamps[{"at a later key frame": 90, "at the end": 99, "nowhere": 99}[lands]]
    begun: list[int | None] = []
    real = pyav._pass

    def misled(probe: VideoProbe, key: int | None, mode: Any) -> Iterator[Any]:
        begun.append(key)
        frames: Iterator[Any] = real(probe, key, mode)
        if key is not None:
            frames = (frame for frame in frames if lands != "nowhere" and frame.frame.pts >= later)
        yield from frames

    monkeypatch.setattr(pyav, "_pass", misled)
    frames = list(VideoSource(probe, SelectConfig(start=85, stop=88)))
    assert begun == [80, None]
    assert [frame.index for frame in frames] == [85, 86, 87]
    assert all(frame.rgb.equal(whole[frame.index]) for frame in frames)


def test_a_key_frame_that_no_seek_finds_is_not_sought_up_to_the_end(
    clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Program streams with few time stamps give their frames others after a seek."""
    options = {"g": "20", "keyint_min": "20", "sc_threshold": "0"}
    probe = probe_video(str(clip("unfound.ts", count=200, options=options)))
    real, read = pyav.packets, [0]

    def restamped(*arguments: Any) -> Iterator[Any]:
        for place, packet in enumerate(real(*arguments)):
            if place == 0:
                sought = probe.timeline.number_of(packet.pts) != 0
            if sought and packet.pts is not None:
                packet.pts += 1
            read[0] += 1
            yield packet

    monkeypatch.setattr(pyav, "packets", restamped)
    assert numbers(VideoSource(probe, SelectConfig(start=70, stop=72))) == [70, 71]
    assert read[0] < 150  # packets, most of them on the way from the start; up to the end there would be 246


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_a_cut_leaves_out_what_references_the_part_before(clip: Clip, tmp_path: Path, suffix: str, before: int) -> None:
    """The last packets of a group, and B-frames that are shown before the first key frame and come after it."""
    options = {"g": "20", "keyint_min": "20", "x264-params": "open-gop=1:scenecut=0:bframes=3:b-adapt=0"}
    path, complete = tmp_path / f"cut.{suffix}", clip(f"open.{suffix}", count=100, options=options)
    with av.open(str(complete)) as whole, av.open(str(path), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        sent = [packet for packet in whole.demux(video=0) if packet.size]
        (key,) = [place for place, packet in enumerate(sent) if packet.is_keyframe][1:2]
        leading = sum(packet.pts < sent[key].pts for packet in sent[key:])
        for packet in sent[key - before :]:
            packet.stream = stream
            cut.mux(packet)
    assert leading > 0
    source = open_source(path)
    assert source.info.frame_count == 80
    frames = list(source)
    assert pictured(frames) == list(range(20, 100))
    assert source.losses == []
    assert any("what came before the start of the file" in note for note in source.notes)


def test_a_short_cut_leaves_out_more_than_the_groups_that_follow(clip: Clip, tmp_path: Path) -> None:
    """An encoder that begins a group at each change of scene makes groups of any length."""
    options = {"g": "20", "keyint_min": "20", "sc_threshold": "0"}
    path, complete = tmp_path / "cut.mkv", clip("closed.mkv", count=30, b_frames=0, options=options)
    with av.open(str(complete)) as whole, av.open(str(path), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        sent = [packet for packet in whole.demux(video=0) if packet.size]
        for packet in sent[12:26]:
            packet.stream = stream
            cut.mux(packet)
    source = open_source(path)
    assert source.info.frame_count == 6
    assert pictured(list(source)) == list(range(20, 26))
    assert source.losses == []
    assert any(note.startswith("8 frames reference what came before") for note in source.notes)


@pytest.mark.usefixtures("each_decoder")
class TestTimes:
    def test_edit_list_hides_frames(self, clip: Clip) -> None:
        path = clip("edited.mp4", count=30, stamps=lambda n: n - 7, container_options={"avoid_negative_ts": "disabled"})
        source = open_source(path)
        assert source.info.frame_count == 23
        frames = list(source)
        assert [frame.index for frame in frames] == list(range(23))
        assert pictured(frames) == list(range(7, 30))
        assert source.losses == []

    @pytest.mark.parametrize("kind", ["avi", "mxf"])
    def test_container_without_presentation_stamps(self, clip: Clip, kind: str) -> None:
        """FFmpeg stores only decoding stamps in these, which with B-frames are not in the order of presentation."""
        source = open_source(clip(f"packed.{kind}", count=30, b_frames=2))
        frames = list(source)
        assert [frame.index for frame in frames] == pictured(frames) == list(range(30))
        assert source.losses == []
        assert np.diff([frame.timestamp_s for frame in frames]) == pytest.approx(1 / 25)

    def test_missing_stamps_are_filled_and_said(self, clip: Clip) -> None:
        source = open_source(clip("raw.h264", count=12), SelectConfig(start="0.2s"))
        assert [frame.timestamp_s for frame in source] == pytest.approx([n / 25 for n in range(5, 12)])
        assert any("12 of 12 frames carry no time stamp" in note for note in source.notes)

    def test_a_bare_stream_runs_at_the_rate_that_it_states(self, clip: Clip) -> None:
        """Without time stamps FFmpeg reports an average rate of 25, which must not be used."""
        source = open_source(clip("fast.h264", count=12, rate=60))
        assert source.info.frame_rate == 60
        assert [frame.timestamp_s for frame in source] == pytest.approx([n / 60 for n in range(12)])

    def test_stamps_that_start_over(self, clip: Clip, tmp_path: Path) -> None:
        part = clip("part.ts", count=60)
        source = open_source(joined(tmp_path / "twice.ts", part, part))
        frames = list(source)
        assert [frame.index for frame in frames] == list(range(120))
        assert pictured(frames) == 2 * list(range(60))
        assert np.diff([frame.timestamp_s for frame in frames]).min() > 0
        assert any("jump back" in note for note in source.notes)

    def test_a_short_recording_after_one_with_later_stamps_is_not_left_out(self, clip: Clip, tmp_path: Path) -> None:
        """Its frames, too, come after the first key frame and have stamps before it."""
        later = clip("later.ts", count=20, stamps=lambda n: n + 100)
        source = open_source(joined(tmp_path / "short.ts", later, clip("short.ts", count=10)))
        frames = list(source)
        assert pictured(frames) == [*range(20), *range(10)]
        assert source.losses == []

    @pytest.mark.parametrize("back", [2, 15])
    def test_stamps_that_jump_back_a_little(self, clip: Clip, tmp_path: Path, back: int) -> None:
        """By less than frames may be reordered: still no frame is lost or takes the place of another."""
        first = clip("first.ts", count=40, b_frames=2)
        second = clip(f"second{back}.ts", count=40, b_frames=2, stamps=lambda n: n + 40 - back)
        source = open_source(joined(tmp_path / "both.ts", first, second))
        frames = list(source)
        assert [frame.index for frame in frames] == list(range(80))
        assert pictured(frames) == 2 * list(range(40))
        assert source.losses == []
        assert any("jump back" in note for note in source.notes)

    @pytest.mark.parametrize("high", [False, True])
    @pytest.mark.parametrize("kind", ["h264", "ts", "mp4"])
    def test_fields_coded_one_by_one_are_one_frame(self, tmp_path: Path, kind: str, high: bool) -> None:
        fields = [(field(number // 2, number % 2 == 1, 60 + number), 1) for number in range(48)]
        path = of_pictures(tmp_path / f"both.{kind}", fields, high)
        source = open_source(path, SelectConfig(start=11))
        frames = list(source)
        assert source.info.frame_rate == 25
        assert (source.losses, [frame.index for frame in frames]) == ([], list(range(11, 24)))
        assert np.diff([frame.timestamp_s for frame in frames]) == pytest.approx(1 / 25)
        greys = [int(frame.rgb.float().mean()) for frame in frames]
        assert greys == sorted(set(greys))

    def test_frames_never_shown_are_not_counted(self, clip: Clip) -> None:
        """A VP8 packet whose show bit is off gives no frame."""
        path = clip("shown.webm", codec="libvpx", count=12)
        with av.open(str(path)) as container:
            packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
        raw = path.read_bytes()
        hidden = bytes([packets[5][0] & ~0x10]) + packets[5][1:]
        assert raw.count(packets[5]) == 1
        changed = path.with_name("hidden.webm")
        changed.write_bytes(raw.replace(packets[5], hidden))
        source = open_source(changed)
        assert source.info.frame_count == 11
        assert numbers(source) == list(range(11))
        assert source.losses == []


def test_a_video_is_probed_with_one_thread(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more, FFmpeg may fail at a limit on threads, and a whole video would be one that cannot be decoded."""
    threads = []

    def watched(packet: Any) -> list[av.VideoFrame]:
        frames: list[av.VideoFrame] = packet.decode()
        threads.append(packet.stream.codec_context.thread_count)
        return frames

    monkeypatch.setattr("flowreel.engine.sources.probe.decoded", watched)
    probe_video(str(clip("probed.mp4")))
    assert set(threads) == {1}


def test_interlaced_video_is_told(clip: Clip) -> None:
    interlaced = clip("interlaced.mp4", options={"x264-params": "interlaced=1:tff=1"})
    assert any("two moments in each" in note for note in open_source(interlaced).notes)
    assert not any("two moments in each" in note for note in open_source(clip("progressive.mp4")).notes)


@pytest.mark.parametrize(
    ("codec", "options"),
    [("h264", {"x264-params": "interlaced=1:tff=1"}), ("mpeg2video", {"flags": "+ildct+ilme"})],
)
def test_a_video_that_becomes_interlaced_is_told_so_once(
    tmp_path: Path, clip: Clip, codec: str, options: dict[str, str]
) -> None:
    parts = [
        clip(f"{codec}.{kind}.ts", codec=codec, count=4, options=each) for kind, each in (("p", {}), ("i", options))
    ]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    source = open_source(joined)
    assert not any("two moments in each" in note for note in source.notes)
    list(source)
    assert sum("two moments in each" in note for note in source.notes) == 1


def test_a_video_with_fields_is_interlaced_though_it_begins_with_whole_frames(tmp_path: Path) -> None:
    frames = [(field(number, None, 60 + number), 2) for number in range(4)]
    fields = [(field(4 + number // 2, number % 2 == 1, 90 + number), 1) for number in range(8)]
    path = of_pictures(tmp_path / "mixed.ts", [*frames, *fields])
    assert any("two moments in each" in note for note in open_source(path).notes)
    assert numbers(open_source(path)) == list(range(8))


def test_fields_are_found_where_a_recording_of_them_was_joined_to_one_of_whole_frames(
    tmp_path: Path, clip: Clip
) -> None:
    """The first one's parameter sets allow no fields: each field was counted as a frame, half of them as missing."""
    frames = clip("frames.ts", size=(64, 64), count=8)
    fields = [(field(number // 2, number % 2 == 1, 90 + number), 1) for number in range(16)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(frames.read_bytes() + of_pictures(tmp_path / "fields.ts", fields).read_bytes())
    source = open_source(joined)
    assert any("two moments in each" in note for note in source.notes)
    assert numbers(source) == list(range(16))
    assert not source.losses


def test_h264_in_asf(clip: Clip) -> None:
    """Whose packets have presentation stamps in the order of decoding."""
    frames = list(open_source(clip("packed.asf", count=30, b_frames=2), SelectConfig(start=3, stop=28)))
    assert [frame.index for frame in frames] == pictured(frames) == list(range(3, 28))


class TestStreams:
    @pytest.fixture
    def two_streams(self, tmp_path: Path) -> Path:
        path = tmp_path / "two.mkv"
        with av.open(str(path), "w") as container:
            streams: list[Any] = [container.add_stream("mpeg4", rate=25) for _ in range(2)]
            for stream, (width, height) in zip(streams, [(64, 48), (128, 96)], strict=True):
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for number in range(4):
                for stream in streams:
                    frame = av.VideoFrame(stream.width, stream.height, "yuv420p")
                    frame.pts, frame.time_base = number, Fraction(1, 25)
                    container.mux(stream.encode(frame))
            for stream in streams:
                container.mux(stream.encode(None))
        return path

    @pytest.mark.parametrize(("number", "width"), [(0, 64), (1, 128)])
    def test_chosen_by_number(self, two_streams: Path, number: int, width: int) -> None:
        source = open_source(two_streams, SelectConfig(stream=number))
        assert source.info.width == width
        assert len(list(source)) == 4
        assert f"video stream {number} of 2 is used" in source.notes

    def test_left_to_ffmpeg(self, two_streams: Path) -> None:
        with av.open(str(two_streams)) as container:
            best: Any = container.streams.best("video")
            assert open_source(two_streams).info.width == best.width

    def test_number_out_of_range(self, two_streams: Path) -> None:
        with pytest.raises(UsageError, match="has 2 video streams"):
            open_source(two_streams, SelectConfig(stream=2))

    def test_cover_picture_is_no_video(self, tmp_path: Path) -> None:
        path = tmp_path / "song.mp4"
        with av.open(str(path), "w") as container:
            audio: Any = container.add_stream("aac", rate=44100)
            cover: Any = container.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
            cover.disposition = Disposition.attached_pic
            frame = av.VideoFrame(64, 48, "yuvj420p")
            frame.pts = 0
            container.mux(cover.encode(frame))
            container.mux(cover.encode(None))
            _silence(container, audio)
        with pytest.raises(UnsupportedSourceError, match=r"no video stream \(only a cover picture\)"):
            open_source(path)


def _silence(container: Any, audio: Any) -> None:
    sound = av.AudioFrame("fltp", "stereo", 1024)
    for plane in sound.planes:
        plane.update(bytes(plane.buffer_size))
    sound.rate, sound.pts = 44100, 0
    container.mux(audio.encode(sound))
    container.mux(audio.encode(None))


class TestWhatIsNoVideo:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(SourceNotFoundError, match="nowhere"):
            open_source(tmp_path / "nowhere.mp4")

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("empty.mp4", b"", "empty.mp4 is empty"),
            ("text.mp4", b"Once upon a time\n" * 50, "not a video that FFmpeg can read"),
            ("text.txt", b"Once upon a time\n" * 50, "looks like text"),
            ("frames.tar", bytes(10240), "not a video that FFmpeg can read: Invalid data found"),
            ("net.pth.tar", b"PK\x03\x04" + bytes(99), "weights are given by --weights; --resume takes no file"),
        ],
    )
    def test_other_files(self, tmp_path: Path, name: str, content: bytes, says: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnsupportedSourceError, match=says) as caught:
            open_source(tmp_path / name)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["frames/%04d.png", "frames/img%d.jpg"])
    def test_patterns_of_ffmpeg(self, tmp_path: Path, name: str) -> None:
        glob = name.replace("%04d", "*").replace("%d", "*")
        with pytest.raises(SourceNotFoundError, match=re.escape(f"by a quoted glob: '{tmp_path / glob}'")):
            open_source(tmp_path / name)

    def test_a_pipe_is_told_of_the_other_way(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UnsupportedSourceError, match=r"is read from -, as YUV4MPEG2: ffmpeg -i CLIP"):
            open_source(tmp_path / "pipe")

    def test_sound_only(self, tmp_path: Path) -> None:
        with av.open(str(tmp_path / "sound.m4a"), "w") as container:
            _silence(container, container.add_stream("aac", rate=44100))
        with pytest.raises(UnsupportedSourceError, match=r"holds no video stream$"):
            open_source(tmp_path / "sound.m4a")

    def test_index_lost(self, clip: Clip, tmp_path: Path) -> None:
        whole = clip("index_behind.mp4", count=50).read_bytes()
        (tmp_path / "lost.mp4").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UnsupportedSourceError, match="moov"):
            open_source(tmp_path / "lost.mp4")

    def test_nothing_decodes(self, clip: Clip, tmp_path: Path) -> None:
        whole = bytearray(clip("sound_header.mp4", count=20).read_bytes())
        start = whole.index(b"mdat") + 4
        end = whole.index(b"moov") - 4
        whole[start:end] = b"\xff" * (end - start)
        (tmp_path / "noise.mp4").write_bytes(whole)
        with pytest.raises(UnsupportedSourceError, match="none of which could be decoded"):
            open_source(tmp_path / "noise.mp4")

    def test_name_that_looks_like_an_address(
        self, long_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        odd = "http:take [2] %03d.mp4"
        (tmp_path / odd).write_bytes(long_clip.read_bytes())
        monkeypatch.chdir(tmp_path)
        assert open_source(odd).info.frame_count == 100


class TestDamage:
    @pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "wmv", "gif", "y4m"])
    def test_cut_file_says_so(self, clip: Clip, long_clip: Path, tmp_path: Path, kind: str) -> None:
        codec = {"wmv": "wmv2", "gif": "gif", "y4m": "wrapped_avframe"}.get(kind, "mpeg4")
        pixels = "rgb8" if kind == "gif" else "yuv420p"
        whole = long_clip if kind == "mp4" else clip(f"cuttable.{kind}", count=100, codec=codec, pix_fmt=pixels)
        intact = open_source(whole)
        assert (len(list(intact)), intact.losses) == (100, [])
        data = whole.read_bytes()
        cut = tmp_path / f"cut.{kind}"
        cut.write_bytes(data[: len(data) * 7 // 10])
        source = open_source(cut)
        given = numbers(source)
        assert 10 < len(given) < 90
        assert given == sorted(set(given))
        assert any("cut short" in loss for loss in source.losses)

    @pytest.mark.parametrize(
        ("stop", "missed"), [(8, False), ("0.32s", False), (90, True), ("3.6s", True), (None, True)]
    )
    def test_cut_matters_only_to_who_asks_for_more(
        self, long_clip: Path, tmp_path: Path, stop: int | str | None, missed: bool
    ) -> None:
        data = long_clip.read_bytes()
        (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 7 // 10])
        source = open_source(tmp_path / "cut.mp4", SelectConfig(stop=stop))
        assert numbers(source)[:8] == list(range(8))
        assert any("cut short" in loss for loss in source.losses) == missed

    def test_damage_inside_is_skipped_and_counted(self, long_clip: Path, tmp_path: Path) -> None:
        data = bytearray(long_clip.read_bytes())
        with av.open(str(long_clip)) as container:
            broken = [(p.pos, p.size, p.pts) for p in container.demux(video=0) if p.size][50:53]
        for position, size, _ in broken:
            data[position : position + size] = b"\xff" * size
        (tmp_path / "bad.mp4").write_bytes(data)
        timeline = probe_video(str(long_clip)).timeline
        lost = {timeline.number_of(stamp) for _, _, stamp in broken}
        source = open_source(tmp_path / "bad.mp4")
        frames = list(source)
        assert [frame.index for frame in frames] == [n for n in range(100) if n not in lost]
        assert [frame.timestamp_s for frame in frames] == pytest.approx([frame.index / 25 for frame in frames])
        assert source.losses == ["3 of 100 frames could not be decoded"]

    @pytest.mark.parametrize("place", [41, 45, 49])  # in the order of the file
    def test_what_leans_on_a_patched_frame_is_the_same_from_any_start(
        self, long_clip: Path, tmp_path: Path, place: int
    ) -> None:
        """One thread decodes it, wherever reading begins; several threads would conceal the damage differently."""
        data = bytearray(long_clip.read_bytes())
        with av.open(str(long_clip)) as container:
            packets = [(p.pos, p.size, p.pts) for p in container.demux(video=0) if p.size]
        position, size, stamp = packets[place]
        data[position + size // 2 : position + size // 2 + 12] = b"\xff" * 12
        (tmp_path / "patched.mp4").write_bytes(data)
        number = probe_video(str(long_clip)).timeline.number_of(stamp)
        assert number is not None
        whole = {frame.index: frame.rgb for frame in open_source(tmp_path / "patched.mp4")}
        for start in range(number, number + 6):
            frames = list(open_source(tmp_path / "patched.mp4", SelectConfig(start=start, stop=number + 8)))
            assert [frame.index for frame in frames] == [n for n in whole if start <= n < number + 8]
            assert all(torch.equal(frame.rgb, whole[frame.index]) for frame in frames), start

    @pytest.fixture
    def leaning(self, clip: Clip) -> Callable[[str], Path]:
        """Clips of a moving texture with B-frames, by the codec; encoded so that the bytes are always the same."""
        options = {
            "libx264": {"g": "20", "x264-params": "open-gop=1:scenecut=0:bframes=3:threads=1:no-mbtree=1"},
            "libx265": {"x265-params": "keyint=20:bframes=4:open-gop=1:log-level=none:frame-threads=1:pools=none"},
            "mpeg2video": {"g": "12", "bf": "2"},
        }
        texture = np.random.default_rng(0).integers(0, 255, (82, 98, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        shown = [np.ascontiguousarray(texture[n : n + 128, 2 * n : 2 * n + 192]) for n in range(45)]

        def write(codec: str) -> Path:
            pictures = [av.VideoFrame.from_ndarray(picture, "rgb24") for picture in shown]
            return clip(f"{codec}.mp4", size=(192, 128), codec=codec, pictures=pictures, options=options[codec])

        return write

    @pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video"])
    def test_nothing_that_several_threads_patched_up_is_given(
        self, leaning: Callable[[str], Path], tmp_path: Path, codec: str
    ) -> None:
        """Not even a B-frame shown before the damaged frame it refers to, nor what HEVC's decoder does not mark."""
        whole, path = leaning(codec), tmp_path / "patched.mp4"
        with av.open(str(whole)) as container:
            packets = [(p.pos, p.size, p.pts) for p in container.demux(video=0) if p.size > 24]
        found = 0  # an encoder's bytes differ from version to version, and not all damage can be seen
        for position, size, stamp in packets[3:35]:
            data = bytearray(whole.read_bytes())
            data[position + size // 2 : position + size // 2 + 12] = b"\xff" * 12
            path.write_bytes(data)
            probe = probe_video(str(path))
            decoder = pyav.PyAVDecoder(probe)
            # Converted at once, as in a run: what fills a damaged part depends on which memory was free.
            careful = {n: (it.damaged, decoder.rgb(it, n)) for n, it in pyav._from(probe, 0, "careful")}
            if [n for n, (damaged, _) in careful.items() if damaged] != [probe.timeline.number_of(stamp)]:
                continue
            found += 1
            given = {n: decoder.rgb(it, n) for n, it in decoder.pictures(0)}
            assert given.keys() == careful.keys()
            assert [n for n, rgb in given.items() if not rgb.equal(careful[n][1])] == []
            for _ in range(3):  # a race would show only in some of the passes
                source = open_source(path)
                list(source)
                damaged = probe.timeline.number_of(stamp)
                assert source.losses == [f"1 frame is damaged, and patched up by the decoder: {damaged}"]
            if found == 16:  # of frames of every kind, and of more than one group of pictures
                break
        assert found >= 3

    def test_a_picture_of_motion_jpeg_that_is_patched_up_is_told(self, clip: Clip, tmp_path: Path) -> None:
        whole = clip("motion.mkv", count=20, codec="mjpeg", pix_fmt="yuvj420p", size=(192, 128))
        with av.open(str(whole)) as container:
            (packet,) = [bytes(p) for p in container.demux(video=0) if p.size][9:10]
        data = whole.read_bytes()
        place = data.index(packet) + len(packet) // 2
        (tmp_path / "motion.mkv").write_bytes(data[:place] + b"\xff" * 12 + data[place + 12 :])
        source = open_source(tmp_path / "motion.mkv")
        assert numbers(source) == list(range(20))
        assert source.losses == ["1 frame is damaged, and patched up by the decoder: 9"]

    @pytest.fixture
    def patched(self, clip: Clip, tmp_path: Path) -> tuple[Path, int]:
        """A file with a damaged frame, which the decoder conceals, and the number of that frame."""
        whole = clip("patched.mp4", count=40, codec="mpeg4", options={"g": "10"})
        data = bytearray(whole.read_bytes())
        with av.open(str(whole)) as container:
            position, size = [(p.pos, p.size) for p in container.demux(video=0) if p.size][23]
        data[position + size // 2 : position + size // 2 + 12] = b"\xff" * 12
        (tmp_path / "patched.mp4").write_bytes(data)
        return tmp_path / "patched.mp4", 23

    def test_what_the_decoder_patches_up_is_told(self, patched: tuple[Path, int]) -> None:
        path, number = patched
        source = open_source(path)
        assert numbers(source) == list(range(40))
        assert source.losses == [f"1 frame is damaged, and patched up by the decoder: {number}"]
        assert numbers(open_source(path, SelectConfig(stop=number))) == list(range(number))

    def test_so_it_is_to_who_reads_in_any_order(self, patched: tuple[Path, int]) -> None:
        path, number = patched
        source = open_source(path)
        assert isinstance(source, VideoSource)
        assert not any("patched" in note for note in source.notes)
        with closing(source.pictures_from(number)) as pictures:
            assert number in {picture.number for picture in pictures}
        assert f"1 frame is damaged, and patched up by the decoder: {number}" in source.notes

    def test_that_matters_only_to_who_asks_for_it(self, patched: tuple[Path, int]) -> None:
        path, number = patched
        for select in (SelectConfig(stop=number), SelectConfig(start=number + 1)):
            source = open_source(path, select)
            list(source)
            assert source.losses == []

    @pytest.mark.parametrize(("codec", "pix_fmt"), [("mjpeg", "yuvj420p"), ("ffv1", "yuv420p"), ("cinepak", "rgb24")])
    def test_frames_of_an_avi_keep_their_numbers_where_one_is_lost(
        self, clip: Clip, tmp_path: Path, codec: str, pix_fmt: str
    ) -> None:
        """Its packets have no times, but where a codec never reorders, frames come in the order of the packets."""
        whole = clip(f"{codec}.avi", count=20, codec=codec, pix_fmt=pix_fmt, options={"g": "1"})
        data = bytearray(whole.read_bytes())
        with av.open(str(whole)) as container:
            position, size = [(p.pos, p.size) for p in container.demux(video=0) if p.size][9]
        data[position : position + size] = b"\xff" * size
        (tmp_path / "motion.avi").write_bytes(data)
        source = open_source(tmp_path / "motion.avi")
        frames = list(source)
        assert pictured(frames) == [frame.index for frame in frames] == [n for n in range(20) if n != 9]
        assert [frame.timestamp_s for frame in frames] == pytest.approx([frame.index / 25 for frame in frames])
        assert source.losses == ["1 of 20 frames could not be decoded"]

    def test_an_avi_without_its_index_is_not_begun_between_key_frames(self, clip: Clip, tmp_path: Path) -> None:
        whole = clip("indexed.avi", count=60, codec="msmpeg4", options={"g": "20"}).read_bytes()
        (tmp_path / "lost.avi").write_bytes(whole.replace(b"idx1", b"JUNK"))
        expected = [frame.rgb for frame in open_source(tmp_path / "lost.avi")]
        frames = list(open_source(tmp_path / "lost.avi", SelectConfig(start=50)))
        assert [frame.index for frame in frames] == list(range(50, 60))
        assert all(frame.rgb.equal(expected[frame.index]) for frame in frames)

    def test_sound_frames_survive_at_the_end(self, long_clip: Path, tmp_path: Path) -> None:
        """With several decoding threads, the frames still in them would be lost together with the last packet."""
        data = bytearray(long_clip.read_bytes())
        with av.open(str(long_clip)) as container:
            position, size, stamp = [(p.pos, p.size, p.pts) for p in container.demux(video=0) if p.size][-1]
        data[position : position + size] = b"\xff" * size
        (tmp_path / "bad_end.mp4").write_bytes(data)
        lost = probe_video(str(long_clip)).timeline.number_of(stamp)
        assert numbers(open_source(tmp_path / "bad_end.mp4")) == [n for n in range(100) if n != lost]

    def test_too_little_left(self, long_clip: Path, tmp_path: Path) -> None:
        data = bytearray(long_clip.read_bytes())
        with av.open(str(long_clip)) as container:
            packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
        for position, size in packets[1:]:
            data[position : position + size] = b"\xff" * size
        (tmp_path / "one.mp4").write_bytes(data)
        source = open_source(tmp_path / "one.mp4")
        with pytest.raises(TooFewFramesError, match="only 1 of 100 frames"):
            list(source)

    def test_size_that_changes(self, clip: Clip, tmp_path: Path) -> None:
        small, large = clip("small.ts", count=10), clip("large.ts", count=10, size=(96, 80))
        says = r"frame 10 .* is 96x80, but the first is 64x48.*--stop 10.*ffmpeg -ss"
        with pytest.raises(FrameSizeError, match=says) as caught:
            list(open_source(joined(tmp_path / "grown.ts", small, large)))
        assert frame_of(caught.value, None) == 10


@pytest.mark.usefixtures("each_decoder")
class TestLifetime:
    def test_satisfies_the_protocol(self, long_clip: Path, each_decoder: str) -> None:
        source = open_source(long_clip)
        assert isinstance(source, Source)
        assert source.decoder == f"{each_decoder} (h264)"

    def test_one_pass_only(self, long_clip: Path) -> None:
        source = open_source(long_clip)
        next(iter(source))
        with pytest.raises(RuntimeError, match="open it again"):
            iter(source)
        source.close()

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts open files in /proc")
    def test_closes_its_file(self, long_clip: Path) -> None:
        def open_here() -> int:
            links = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
            return sum(link == str(long_clip) for link in links)

        gc.collect()  # closes files that other tests left open
        before = open_here()
        source = open_source(long_clip)
        assert open_here() == before
        frames = iter(source)
        next(frames)
        assert open_here() == before + 1
        source.close()
        assert open_here() == before
        assert list(frames) == []
        source.close()

    def test_closed_while_a_frame_is_being_converted(self, long_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The picture is still in use, so the file is closed only after it, and no loss is reported."""
        source: Any = open_source(long_clip)
        rgb = source._decoder.rgb

        def closed_meanwhile(picture: Any, number: int) -> Any:
            if number == 3:
                closer = threading.Thread(target=source.close)
                closer.start()
                closer.join()
                assert source._pictures.gi_frame is not None  # still open
            return rgb(picture, number)

        monkeypatch.setattr(source._decoder, "rgb", closed_meanwhile)
        assert numbers(source) == [0, 1, 2, 3]
        assert source.losses == []
        assert source._pictures.gi_frame is None

    def test_closed_from_another_thread(self, long_clip: Path) -> None:
        source = open_source(long_clip)
        given: list[int] = []
        reader = threading.Thread(target=lambda: given.extend(numbers(source)))
        reader.start()
        source.close()  # before, during or after the reading: it must end by itself
        reader.join()
        assert given == list(range(len(given)))
