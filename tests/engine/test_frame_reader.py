"""Frames by number: correct in any order, decoded as few times as possible, with clear errors for missing ones."""

from __future__ import annotations

import itertools
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from flowreel.engine.config import SelectConfig
from flowreel.engine.errors import SourceChangedError, SourceNotFoundError, TruncatedSourceError, UsageError
from flowreel.engine.frame_reader import FrameReader
from flowreel.engine.protocols import Picture, RandomAccess
from flowreel.engine.sources import open_random_access, open_source, pyav
from flowreel.engine.sources.probe import probe_video

Clip = Callable[..., Path]
PLENTY = 1 << 40
REAL = (
    "videos/person_asl_walk_640x480.mkv",
    "videos/sintel_cave_1024x436.mp4",
    "videos_corner/av1_640x360.mkv",
    "videos_corner/bbb_vfr_640x360.mp4",
    "videos_corner/hevc_main10_320x240.mp4",
    "videos_corner/nasa_rotated90_480x270.mp4",
    "videos_corner/non_zero_start_200x112.mp4",
    "videos_corner/odd_321x241_vp9.mp4",
)
# Name, codec and options: frequent key frames, most of them crossed by frames that refer to both sides.
GENERATED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("open.mp4", "libx264", {"options": {"g": "20", "x264-params": "open-gop=1:scenecut=0:bframes=3:keyint=20"}}),
    ("short.mp4", "libx264", {"options": {"x264-params": "open-gop=1:scenecut=0:bframes=2:keyint=3:min-keyint=3"}}),
    ("short.mkv", "libx264", {"options": {"x264-params": "open-gop=1:scenecut=0:bframes=2:keyint=3:min-keyint=3"}}),
    ("short.ts", "libx264", {"options": {"x264-params": "open-gop=1:scenecut=0:bframes=2:keyint=3:min-keyint=3"}}),
    ("refresh.mp4", "libx264", {"options": {"x264-params": "intra-refresh=1:keyint=15:bframes=0:scenecut=0"}}),
    ("mpeg2.ts", "mpeg2video", {"options": {"g": "8"}, "b_frames": 2}),
    ("old.avi", "mpeg4", {"options": {"g": "8"}}),
    ("keys.mkv", "mjpeg", {"pix_fmt": "yuvj420p"}),
)  # fmt: skip


def reader_of(source: RandomAccess, most_bytes: int = PLENTY) -> FrameReader:
    return FrameReader(source, most_bytes)


@pytest.fixture
def keyed(clip: Clip) -> Path:
    """60 frames, a key frame every 20, nothing reordered."""
    return clip("keyed.mp4", count=60, options={"x264-params": "keyint=20:min-keyint=20:scenecut=0:bframes=0"})


def assert_any_order(path: Path, count: int, seed: int = 0) -> None:
    expected = [frame.rgb for frame in open_source(path)]
    numbers = random.Random(seed).choices(range(len(expected)), k=count)
    source = open_random_access(path)
    for number in numbers:
        alone = reader_of(source, 0)
        frame = alone.frame(number)
        assert torch.equal(frame.rgb, expected[number]), number
        assert (frame.index, frame.timestamp_s) == (number, source.times_s[number])
        alone.close()
    for most_bytes in (PLENTY, 3 * expected[0].nbytes):
        reader = reader_of(source, most_bytes)
        assert all(torch.equal(reader.frame(number).rgb, expected[number]) for number in numbers)
        assert reader.kept_bytes <= most_bytes
        reader.close()


@pytest.mark.parametrize("name", REAL)
def test_real_clips_in_any_order(data_dir: Path, name: str) -> None:
    assert_any_order(data_dir / name, 5)


@pytest.mark.parametrize(("name", "codec", "how"), GENERATED, ids=[name for name, _, _ in GENERATED])
def test_generated_clips_in_any_order(clip: Clip, name: str, codec: str, how: dict[str, Any]) -> None:
    assert_any_order(clip(f"any-{name}", count=60, codec=codec, **how), 25)


class TestWhatIsDecoded:
    def test_forward_each_frame_once(self, keyed: Path) -> None:
        reader = reader_of(open_random_access(keyed), 0)
        for number in range(60):
            reader.frame(number)
        assert (reader.decoded, reader.seeks) == (60, 0)

    @pytest.mark.parametrize("step", [2, 7, 25])
    def test_forward_by_steps_never_seeks(self, keyed: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        source = open_random_access(keyed, SelectConfig(step=step))
        monkeypatch.setattr(source, "reopening_frames", 1)  # as if seeking cost hardly anything
        reader = reader_of(source, 0)
        for number in source.wanted:
            reader.frame(number)
        assert (reader.decoded, reader.seeks) == (source.wanted[-1] + 1, 0)

    def test_from_the_key_frame_once(self, keyed: Path) -> None:
        reader = reader_of(open_random_access(keyed))
        reader.frame(50)
        assert (reader.decoded, reader.seeks) == (11, 1)  # 40 to 50
        for number in (45, 40, 49, 50):
            reader.frame(number)
        assert reader.decoded == 11
        reader.frame(53)
        assert (reader.decoded, reader.seeks) == (14, 1)  # 51 to 53
        reader.frame(5)
        assert (reader.decoded, reader.seeks) == (20, 2)  # 0 to 5

    def test_backwards_each_stretch_once(self, keyed: Path) -> None:
        reader = reader_of(open_random_access(keyed))
        for number in reversed(range(60)):
            reader.frame(number)
        assert (reader.decoded, reader.seeks) == (60, 3)

    def test_a_near_frame_is_read_on_to_a_far_one_is_sought(self, clip: Clip) -> None:
        path = clip("far.mp4", count=120, options={"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=0"})
        reader = reader_of(open_random_access(path))
        reader.frame(0)
        reader.frame(30)
        assert (reader.decoded, reader.seeks) == (31, 0)
        reader.frame(95)
        assert (reader.decoded, reader.seeks) == (37, 1)  # 90 to 95

    def test_pictures_are_read_alone(self, tmp_path: Path) -> None:
        for number in range(9):
            Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
        reader = reader_of(open_random_access(tmp_path))
        assert [int(reader.frame(number).rgb[0, 0, 0]) for number in (7, 2, 7, 3, 8)] == [7, 2, 7, 3, 8]
        assert (reader.decoded, reader.seeks) == (4, 0)
        reader = reader_of(open_random_access(tmp_path, SelectConfig(step=3)))
        assert [int(reader.frame(number).rgb[0, 0, 0]) for number in (0, 3, 6)] == [0, 3, 6]
        assert reader.decoded == 3

    def test_what_was_used_longest_ago_goes_first(self, keyed: Path) -> None:
        source = open_random_access(keyed)
        frame_bytes = next(iter(open_source(keyed))).rgb.nbytes
        reader = reader_of(source, 3 * frame_bytes)
        for number in (0, 1, 2, 0, 3):  # 1 makes room for 3
            reader.frame(number)
            assert reader.kept_bytes <= 3 * frame_bytes
        decoded = reader.decoded
        for number in (0, 2, 3):
            reader.frame(number)
        assert reader.decoded == decoded == 4
        reader.frame(1)
        assert reader.decoded == 6

    def test_nothing_is_kept_when_it_is_closed(self, keyed: Path) -> None:
        reader = reader_of(open_random_access(keyed))
        reader.frame(5)
        reader.close()
        assert reader.kept_bytes == 0
        reader.frame(5)
        assert reader.decoded == 12

    def test_stretches_are_of_different_clips(self, keyed: Path) -> None:
        reader = reader_of(open_random_access(keyed))
        frames = list(reader.stretches([range(3, 6), range(8, 10)]))
        assert [(frame.index, frame.clip) for frame in frames] == [(3, 0), (4, 0), (5, 0), (8, 1), (9, 1)]


class TestWhatGoesWrong:
    def test_stdin_is_refused(self) -> None:
        with pytest.raises(UsageError, match="only once"):
            open_random_access("-")

    def test_a_frame_that_does_not_decode_is_told_and_the_others_are_right(self, keyed: Path, tmp_path: Path) -> None:
        path = tmp_path / "hurt.mkv"
        expected = [frame.rgb for frame in open_source(keyed)]
        with av.open(str(keyed)) as read, av.open(str(path), "w") as write:
            stream = write.add_stream_from_template(read.streams.video[0])
            for number, packet in enumerate(read.demux(video=0)):
                if packet.size:
                    if number == 25:
                        packet.update(bytes(packet.size))
                    packet.stream = stream
                    write.mux(packet)
        whole = [frame.index for frame in open_source(path)]
        assert len(whole) < 60
        source = open_random_access(path)
        for number in random.Random(1).sample(range(60), 60):
            reader = reader_of(source)
            if number in whole:
                assert reader.frame(number).index == number
            else:
                with pytest.raises(TruncatedSourceError, match=f"frame {number} of hurt.mkv does not decode"):
                    reader.frame(number)
            if number < 25 or number >= 40:
                assert torch.equal(reader.frame(number).rgb, expected[number])

    def test_fewer_frames_than_the_packets_promise(self, keyed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = pyav._count
        monkeypatch.setattr(pyav, "_count", lambda *a: itertools.takewhile(lambda item: item[0] < 57, real(*a)))
        reader = reader_of(open_random_access(keyed))
        assert reader.frame(56).index == 56
        for number in (57, 59, 58):
            with pytest.raises(TruncatedSourceError, match=f"frame {number} of keyed.mp4 does not decode"):
                reader.frame(number)
        assert reader.frame(3).index == 3

    def test_ctrl_c_while_it_decodes_costs_no_frame(self, keyed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = open_random_access(keyed)
        reader, real = reader_of(source), source.pictures_from

        def stopped(number: int) -> Iterator[Picture]:
            yield from itertools.islice(real(number), 3)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(source, "pictures_from", stopped)
            with pytest.raises(KeyboardInterrupt):
                reader.frame(9)
        assert reader.frame(9).index == 9

    def test_a_source_that_vanishes(self, keyed: Path, tmp_path: Path) -> None:
        path = tmp_path / "gone.mp4"
        path.write_bytes(keyed.read_bytes())
        reader = reader_of(open_random_access(path))
        reader.frame(0)
        path.unlink()
        with pytest.raises(SourceNotFoundError, match=r"gone\.mp4 is gone"):
            reader.frame(50)
        path.write_bytes(keyed.read_bytes())
        os.utime(path, ns=(0, 0))
        with pytest.raises(SourceChangedError, match=r"gone\.mp4 is another file"):
            reader.frame(50)

    def test_a_picture_that_vanishes(self, tmp_path: Path) -> None:
        for number in range(3):
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
        reader = reader_of(open_random_access(tmp_path))
        (tmp_path / "2.png").unlink()
        with pytest.raises(SourceNotFoundError, match=r"2\.png is gone"):
            reader.frame(2)
        assert reader.frame(1).index == 1


def test_key_frames_are_where_the_encoder_put_them(keyed: Path) -> None:
    assert probe_video(str(keyed)).key_frames.tolist() == [0, 20, 40]
    source = open_random_access(keyed)
    assert [source.standing_before(number) for number in (0, 19, 20, 59)] == [0, 0, 20, 40]


def test_no_other_key_frame_will_do(keyed: Path) -> None:
    """A seek may lead to another one; from a later one, what is shown before it would come out wrong."""
    probe = probe_video(str(keyed))
    assert list(pyav._pass(probe, 39, "exact")) == []
    assert list(pyav._pass(probe, 41, "exact")) == []
    head = next(pyav._pass(probe, 40, "exact"))
    assert probe.timeline.number_of(head.frame.pts) == 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_leaves_the_parent_s_decoder_alone(keyed: Path) -> None:
    """Its threads are only in the parent: closing or dropping it in the child would wait for them for ever."""
    reader = reader_of(open_random_access(keyed))
    expected = reader.frame(5).rgb
    decoder = reader._decoder
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            assert reader._decoder is None
            assert torch.equal(reader.frame(5).rgb, expected)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert reader._decoder is decoder
    reader.close()
