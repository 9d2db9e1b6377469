"""Decoding with NVDEC, on a fake PyNvVideoCodec: the same frames as on the CPU, surfaces that are only lent, seeks
that go wrong, sessions that fail, and notes on why the CPU decodes instead. Only TestOnACard needs a GPU."""

from __future__ import annotations

import copy
import itertools
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import pytest
import torch

from flowreel.engine.config import SelectConfig
from flowreel.engine.data import Frame
from flowreel.engine.errors import DeviceError, FrameSizeError, MissingDependencyError, TooFewFramesError
from flowreel.engine.protocols import Source
from flowreel.engine.sources import nvcodec, nvdec, nvsession, open_source, pyav
from flowreel.engine.sources.nvdec import NvdecDecoder
from flowreel.engine.sources.probe import probe_video
from flowreel.engine.sources.pyav import PyAVDecoder
from flowreel.engine.sources.video import VideoSource, open_video

Clip = Callable[..., Path]
GPU = "cuda:0"

CLIPS = {  # how many frames are compared; None: all
    "videos/bbb_1080p60.mp4": 4,
    "videos/sintel_cave_1024x436.mp4": 6,
    "videos/person_asl_walk_640x480.mkv": 12,  # full range
    "videos_corner/av1_640x360.mkv": 12,
    "videos_corner/bbb_vfr_640x360.mp4": None,
    "videos_corner/hevc_main10_320x240.mp4": None,  # 10 bits, BT.2020
    "videos_corner/nasa_rotated90_480x270.mp4": None,
    "videos_corner/non_zero_start_200x112.mp4": None,
}


def on_gpu(path: Path, **select: Any) -> VideoSource:
    """A source decoded by the fake NVDEC; an error where that is not possible."""
    return open_video(str(path), SelectConfig(decoder="nvdec", **select), GPU)


def on_cpu(path: Path, **select: Any) -> VideoSource:
    return open_video(str(path), SelectConfig(**select))


def levels_apart(got: list[Frame], expected: list[Frame]) -> int:
    """The largest difference of any colour value, after a check that numbers and times are equal."""
    assert [frame.index for frame in got] == [frame.index for frame in expected]
    assert [frame.timestamp_s for frame in got] == [frame.timestamp_s for frame in expected]
    assert [frame.rgb.shape for frame in got] == [frame.rgb.shape for frame in expected]
    pairs = zip(got, expected, strict=True)
    return max(int((one.rgb.int() - other.rgb.int()).abs().max()) for one, other in pairs)


class TestSameFramesAsOnTheCpu:
    @pytest.mark.parametrize("name", CLIPS)
    def test_real_clips(self, nvc: ModuleType, data_dir: Path, name: str) -> None:
        path, stop = data_dir / name, CLIPS[name]
        with closing(on_gpu(path, stop=stop)) as gpu, closing(on_cpu(path, stop=stop)) as cpu:
            assert (gpu.info.height, gpu.info.width) == (cpu.info.height, cpu.info.width)
            assert levels_apart(list(gpu), list(cpu)) <= 1
            assert gpu.decoder == cpu.decoder.replace("PyAV", "NVDEC").replace("libdav1d", "av1")
            assert (gpu.losses, gpu.notes) == (cpu.losses, cpu.notes)

    @pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv444p10le", "yuv420p10le", "yuvj420p"])
    def test_other_kinds_of_surfaces(self, nvc: ModuleType, clip: Clip, pix_fmt: str) -> None:
        path = clip(f"nv_{pix_fmt}.mp4", pix_fmt=pix_fmt, count=4)
        assert levels_apart(list(on_gpu(path)), list(on_cpu(path))) <= 1

    def test_ten_bits_over_the_full_range(self, nvc: ModuleType, clip: Clip) -> None:
        path = clip("nv_full.mp4", pix_fmt="yuv420p10le", count=4, colour={"color_range": 2, "colorspace": 9})
        assert probe_video(str(path)).pixel_format.used_range == "full"
        assert levels_apart(list(on_gpu(path)), list(on_cpu(path))) <= 1

    @pytest.mark.parametrize(
        "select",
        [{}, {"start": 3, "stop": 9}, {"start": 60, "step": 7}, {"start": "2s", "stop": "3s"}, {"start": 98}],
    )
    def test_selection(self, nvc: ModuleType, long_clip: Path, select: dict[str, Any]) -> None:
        assert levels_apart(list(on_gpu(long_clip, **select)), list(on_cpu(long_clip, **select))) <= 1

    def test_frames_that_an_edit_list_hides(self, nvc: ModuleType, clip: Clip) -> None:
        options = {"avoid_negative_ts": "disabled"}
        path = clip("nv_edited.mp4", count=30, stamps=lambda n: n - 7, container_options=options)
        assert len(list(on_cpu(path))) == 23
        assert levels_apart(list(on_gpu(path)), list(on_cpu(path))) <= 1

    @pytest.mark.parametrize("name", ["nv_raw.h264", "nv_packed.avi"])
    def test_no_stamps_to_tell_frames_by(self, nvc: ModuleType, clip: Clip, name: str) -> None:
        path = clip(name, count=20, b_frames=2)
        assert levels_apart(list(on_gpu(path)), list(on_cpu(path))) <= 1
        assert levels_apart(list(on_gpu(path, start=15)), list(on_cpu(path, start=15))) <= 1

    def test_stamps_that_start_over(self, nvc: ModuleType, clip: Clip, tmp_path: Path) -> None:
        path = tmp_path / "twice.ts"
        path.write_bytes(2 * clip("nv_part.ts", count=60).read_bytes())
        assert levels_apart(list(on_gpu(path)), list(on_cpu(path))) <= 1


class Late(NvdecDecoder):
    """A planted fault: the next picture is requested before the last one has been converted."""

    def pictures(self, first: int) -> Generator[tuple[int, Any], None, None]:
        ahead = super().pictures(first)
        held = next(ahead)
        for item in ahead:
            yield held
            held = item
        yield held


class TestSurfacesAreLent:
    def test_a_late_copy_is_found_out(self, nvc: ModuleType, long_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The fake overwrites lent surfaces, without which the tests above would prove little."""
        monkeypatch.setattr(nvdec, "NvdecDecoder", Late)
        assert levels_apart(list(on_gpu(long_clip)), list(on_cpu(long_clip))) > 20

    def test_no_frame_shares_memory_with_another(self, nvc: ModuleType, long_clip: Path) -> None:
        pictures = sorted((frame.rgb for frame in on_gpu(long_clip, stop=30)), key=torch.Tensor.data_ptr)
        assert len(pictures) == 30
        assert all(one.data_ptr() + one.nbytes <= other.data_ptr() for one, other in itertools.pairwise(pictures))

    @pytest.mark.parametrize(("most_bytes", "allocations"), [(16 << 20, 4), (0, 30)])
    def test_small_frames_share_their_allocations(
        self, nvc: ModuleType, long_clip: Path, most_bytes: int, allocations: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Eight frames share one, unless that would be too large."""
        monkeypatch.setattr(nvdec, "_TOGETHER_BYTES", most_bytes)
        frames = list(on_gpu(long_clip, stop=30))
        assert len({frame.rgb.untyped_storage().data_ptr() for frame in frames}) == allocations

    def test_the_decoder_works_on_our_stream_in_device_memory(self, nvc: ModuleType, long_clip: Path) -> None:
        list(open_video(str(long_clip), SelectConfig(decoder="nvdec"), "cuda:3"))
        assert nvc.behaviour.sessions == [{"gpuid": 3, "cudastream": 0x5EED, "usedevicememory": True}]


class TestSeeking:
    def started(self, nvc: ModuleType) -> list[str]:
        return [entry for entry in nvc.behaviour.log if entry.startswith("seek")]

    @pytest.mark.parametrize(("start", "sought"), [(90, ["seek 90"]), (58, ["seek 58", "seek 26"]), (10, [])])
    def test_to_the_key_frame_before(self, nvc: ModuleType, long_clip: Path, start: int, sought: list[str]) -> None:
        """Frame 60 is a key frame, the 57th packet of the file: a seek to frame 58 lands on it, which is too late."""
        frames = list(on_gpu(long_clip, start=start))
        assert levels_apart(frames, list(on_cpu(long_clip, start=start))) <= 1
        assert self.started(nvc) == sought
        assert len(nvc.behaviour.sessions) == 1

    @pytest.mark.parametrize("gop", ["open-gop=1", "open-gop=0"])
    def test_without_an_index_what_comes_before_is_read_but_not_decoded(
        self, nvc: ModuleType, clip: Clip, gop: str
    ) -> None:
        options = {"g": "20", "keyint_min": "20", "x264-params": f"{gop}:scenecut=0:bframes=3"}
        path = clip(f"nv_{gop}.ts", count=100, options=options)
        expected = list(on_cpu(path, start=90))
        nvc.behaviour.fail_at = 30  # of the packets that are decoded
        assert levels_apart(list(on_gpu(path, start=90)), expected) <= 1
        assert len(nvc.behaviour.sessions) == 1

    def test_gives_nothing_before_the_first(self, nvc: ModuleType, long_clip: Path) -> None:
        pictures = NvdecDecoder(probe_video(str(long_clip)), GPU, None, print).pictures(90)
        assert [number for number, _ in pictures] == list(range(90, 100))

    @pytest.mark.parametrize("fault", [{"seek_error": True}, {"seek_late": True}, {"seek_shift": 45}])
    def test_a_seek_that_goes_wrong_means_from_the_start(
        self, nvc: ModuleType, long_clip: Path, fault: dict[str, Any]
    ) -> None:
        """The seek raises, or lands after the wanted frame, or on a frame that is no key frame.

        The key frame cannot be read up to either: in this file only the header holds the parameter sets.
        """
        vars(nvc.behaviour).update(fault)
        frames = list(on_gpu(long_clip, start=70, stop=80))
        assert levels_apart(frames, list(on_cpu(long_clip, start=70, stop=80))) <= 1
        assert len(nvc.behaviour.sessions) == 1  # the start is decided on before a session is begun

    @pytest.mark.parametrize("start", [80, 85])
    def test_a_key_frame_that_the_chip_does_not_begin_with(self, nvc: ModuleType, long_clip: Path, start: int) -> None:
        nvc.behaviour.skips_to_idr = True
        source = on_gpu(long_clip, start=start)
        assert levels_apart(list(source), list(on_cpu(long_clip, start=start))) <= 1
        assert (source.losses, len(nvc.behaviour.sessions)) == ([], 2)
        assert nvc.behaviour.most_alive == 1

    def test_a_key_frame_that_does_not_come(self, nvc: ModuleType, long_clip: Path) -> None:
        """Frames after it could not be decoded, so decoding begins again from the start, where its loss is reported."""
        stamps = probe_video(str(long_clip)).timeline.stamps
        assert stamps is not None
        nvc.behaviour.dropped = frozenset({int(stamps[80])})
        assert [frame.index for frame in on_gpu(long_clip, start=84)] == list(range(84, 100))
        source = on_gpu(long_clip, start=79)
        assert [frame.index for frame in source] == [79, *range(81, 100)]
        assert source.losses == ["1 of 21 frames could not be decoded"]
        assert len(nvc.behaviour.sessions) == 2 + 1


class TestWhatDoesNotCome:
    def test_silent_drops_are_counted(self, nvc: ModuleType, long_clip: Path) -> None:
        stamps = probe_video(str(long_clip)).timeline.stamps
        assert stamps is not None
        nvc.behaviour.dropped = frozenset({int(stamps[5]), int(stamps[50])})
        source = on_gpu(long_clip)
        frames = list(source)
        assert [frame.index for frame in frames] == [n for n in range(100) if n not in (5, 50)]
        assert source.losses == ["2 of 100 frames could not be decoded"]
        expected = [frame for frame in on_cpu(long_clip) if frame.index not in (5, 50)]
        assert levels_apart(frames, expected) <= 1

    def test_a_cut_file(self, nvc: ModuleType, long_clip: Path, tmp_path: Path) -> None:
        data = long_clip.read_bytes()
        (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 7 // 10])
        nvc.behaviour.packets = 30
        source = on_gpu(tmp_path / "cut.mp4")
        given = len(list(source))
        assert 20 < given <= 30
        assert any("could not be decoded" in loss for loss in source.losses)
        assert any("cut short" in loss for loss in source.losses)

    def test_too_little(self, nvc: ModuleType, long_clip: Path) -> None:
        nvc.behaviour.packets = 1
        with pytest.raises(TooFewFramesError, match="only 1 of 100 frames"):
            list(on_gpu(long_clip))

    def test_the_cpu_reads_on_where_the_demuxer_stops(self, nvc: ModuleType, long_clip: Path) -> None:
        nvc.behaviour.packets = 30
        source = open_video(str(long_clip), SelectConfig(), GPU)
        frames = list(source)
        missing = sorted(set(range(100)) - {frame.index for frame in frames})
        assert missing == [29, 30, 31]  # shown before 32, which precedes them in the file and was the last packet
        assert source.losses == ["3 of 100 frames could not be decoded"]
        assert levels_apart(frames, [frame for frame in on_cpu(long_clip) if frame.index not in missing]) <= 1
        (note,) = [note for note in source.notes if "NVDEC" in note]
        assert note == "NVDEC failed at frame 33: no more frames came. From there on the CPU decoded"
        assert source.decoder == "NVDEC (h264), then PyAV (h264)"
        assert nvc.behaviour.alive == 0

    def test_what_the_cpu_does_not_find_either_is_lost(self, nvc: ModuleType, long_clip: Path, tmp_path: Path) -> None:
        data = long_clip.read_bytes()
        path = tmp_path / "cut.mp4"
        path.write_bytes(data[: len(data) * 7 // 10])
        source, cpu = open_video(str(path), SelectConfig(), GPU), on_cpu(path)
        assert levels_apart(list(source), list(cpu)) <= 1
        assert source.losses == cpu.losses != []

    def test_nothing_is_said_at_an_end_where_nothing_is_missing(self, nvc: ModuleType, long_clip: Path) -> None:
        probe, said = probe_video(str(long_clip)), []
        decoder = NvdecDecoder(probe, GPU, PyAVDecoder(probe), said.append)
        assert [number for number, _ in decoder.pictures(0)] == list(range(100))
        assert (said, decoder.name) == ([], "NVDEC (h264)")

    def test_time_stamps_that_the_demuxer_cannot_tell(self, nvc: ModuleType, clip: Clip) -> None:
        path = clip("nv_unstamped.mpg", codec="mpeg2video", b_frames=2, count=20)
        source = open_video(str(path), SelectConfig(), GPU)
        assert levels_apart(list(source), list(on_cpu(path))) <= 1
        assert source.losses == []
        assert any("cannot tell the time stamps of all frames. From there on the CPU" in note for note in source.notes)
        with pytest.raises(DeviceError, match=r"NVDEC failed at frame 0 of nv_unstamped\.mpg: its demuxer cannot tell"):
            list(on_gpu(path))

    def test_what_was_not_asked_for_is_not_missed(self, nvc: ModuleType, long_clip: Path) -> None:
        nvc.behaviour.packets = 40
        source = open_video(str(long_clip), SelectConfig(stop=20), GPU)
        assert len(list(source)) == 20
        assert source.decoder == "NVDEC (h264)"

    def test_a_damaged_picture_counts_as_good(self, nvc: ModuleType, clip: Clip) -> None:
        """NVDEC conceals the damage without a word; on the CPU the frame is lost and the loss is reported."""
        path = clip("nv_sound.webm", codec="libvpx-vp9", count=12, options={"lag-in-frames": "0"})
        with av.open(str(path)) as container:
            packet = bytes([packet for packet in container.demux(video=0) if packet.size][5])
        raw = path.read_bytes()
        assert raw.count(packet) == 1
        path = path.with_name("damaged.webm")
        path.write_bytes(raw.replace(packet, b"\0" + packet[1:]))
        source, cpu = on_gpu(path), on_cpu(path)
        assert [frame.index for frame in source] == list(range(12))
        assert source.losses == []
        assert 5 not in [frame.index for frame in cpu]
        assert cpu.losses != []


class TestSizesThatChange:
    """A new size is known from the stream's headers; the surfaces of a smaller picture do not show it."""

    @pytest.fixture(params=[(32, 32), (96, 80), (60, 48)], ids=["smaller", "larger", "cropped"])
    def changed(self, request: pytest.FixtureRequest, clip: Clip, tmp_path: Path) -> tuple[Path, str]:
        """A file whose 11th frame is of another size, and that size."""
        width, height = request.param
        parts = clip("nv_first.ts", count=10), clip(f"nv_{width}x{height}.ts", count=10, size=request.param)
        path = tmp_path / "changed.ts"
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        return path, f"{width}x{height}"

    @pytest.mark.parametrize("decoder", ["nvdec", "auto"])
    def test_all_before_come_and_then_the_error(self, nvc: ModuleType, changed: tuple[Path, str], decoder: Any) -> None:
        path, size = changed
        source = open_video(str(path), SelectConfig(decoder=decoder), GPU)
        frames = []
        with pytest.raises(FrameSizeError, match=f"is {size}, but the first is 64x48"):
            frames.extend(source)  # those before the error
        assert levels_apart(frames, list(itertools.islice(on_cpu(path), 10))) <= 1

    def test_what_is_stated_nowhere_may_show_in_the_surface(
        self, nvc: ModuleType, clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "cropped.ts"
        path.write_bytes(clip("nv_64.ts").read_bytes() + clip("nv_60.ts", size=(60, 48)).read_bytes())
        monkeypatch.setattr(nvsession, "stated_size", lambda codec, data: None)
        with pytest.raises(FrameSizeError, match=r"came as NV12 of \(72, 60\), not as NV12 of \(72, 64\)"):
            list(on_gpu(path))

    @pytest.mark.parametrize(
        ("name", "codec", "anywhere"), [("nv.webm", "libvpx-vp9", True), ("nv.mp4", "libx264", False)]
    )
    def test_only_vp9_is_looked_into_between_key_frames(
        self, nvc: ModuleType, clip: Clip, monkeypatch: pytest.MonkeyPatch, name: str, codec: str, anywhere: bool
    ) -> None:
        """VP9's size may change at any picture. No encoder here does that, so the stated size is faked."""
        path = clip(f"between_{name}", codec=codec)
        sizes = itertools.chain([(64, 48)], itertools.repeat((32, 32)))
        monkeypatch.setattr(nvsession, "stated_size", lambda codec, data: next(sizes))
        with pytest.raises(FrameSizeError, match="32x32") if anywhere else nullcontext():
            assert len(list(on_gpu(path))) == 12

    def test_a_size_that_is_stated_again_is_none_that_changes(self, nvc: ModuleType, clip: Clip) -> None:
        path = clip("nv_keys.mp4", options={"g": "4", "x264-params": "scenecut=0"})
        assert len(probe_video(str(path)).key_frames) == 3
        assert len(list(on_gpu(path))) == 12


class TestSessionsThatFail:
    @pytest.mark.parametrize("bare", [False, True])
    @pytest.mark.parametrize("packet", [0, 1, 40])
    def test_the_cpu_takes_over_and_it_is_said(self, nvc: ModuleType, long_clip: Path, packet: int, bare: bool) -> None:
        nvc.behaviour.fail_at, nvc.behaviour.fail_bare = packet, bare
        source = open_video(str(long_clip), SelectConfig(), GPU)
        frames = list(source)
        assert levels_apart(frames, list(on_cpu(long_clip))) <= 1
        assert source.losses == []
        (note,) = [note for note in source.notes if "NVDEC" in note]
        assert "From there on the CPU decoded" in note
        assert ("HW decoder faced error" if bare else "it is broken") in note
        assert source.decoder == "NVDEC (h264), then PyAV (h264)"
        assert len(nvc.behaviour.sessions) == 1  # and the fake asserts that it is not used again
        assert nvc.behaviour.alive == 0

    def test_asked_for_by_name_it_is_an_error(self, nvc: ModuleType, long_clip: Path) -> None:
        nvc.behaviour.fail_at = 40
        frames = iter(on_gpu(long_clip))
        with pytest.raises(DeviceError, match=r"NVDEC failed at frame \d+ of long\.mp4: it is broken"):
            list(frames)

    @pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p10le"])
    def test_surfaces_of_another_kind_than_was_asked_for(self, nvc: ModuleType, clip: Clip, pix_fmt: str) -> None:
        nvc.behaviour.plain_surfaces = True
        path = clip(f"nv_as_{pix_fmt}.mp4", pix_fmt=pix_fmt, count=4)
        source = open_video(str(path), SelectConfig(), GPU)
        assert levels_apart(list(source), list(on_cpu(path))) <= 1
        assert any("frame 0 of" in note and "came as NV12 of (72, 64)" in note for note in source.notes)
        with pytest.raises(DeviceError, match="came as NV12"):
            list(on_gpu(path))

    def test_too_little_memory(self, nvc: ModuleType, long_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nvsession, "free_bytes", lambda device: 300 << 20)
        with pytest.raises(DeviceError, match="300 MiB of device memory are free, a session needs 824"):
            list(on_gpu(long_clip))
        assert nvc.behaviour.sessions == []

    def test_the_last_work_is_waited_for_before_the_session_is_freed(self, nvc: ModuleType, long_clip: Path) -> None:
        list(on_gpu(long_clip, stop=5))
        assert nvc.behaviour.log == ["finished", "freed"]

    def test_the_session_stays_until_the_source_is_closed(self, nvc: ModuleType, long_clip: Path) -> None:
        """Freeing it takes long and blocks all threads, even those that still compute the last flows."""
        with closing(on_gpu(long_clip, stop=5)) as source:
            assert len(list(source)) == 5
            assert (nvc.behaviour.alive, nvc.behaviour.log) == (1, [])
        assert nvc.behaviour.log == ["finished", "freed"]

    def test_what_fails_when_it_is_freed_replaces_no_other_error(
        self, nvc: ModuleType, long_clip: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A device that has failed fails again when it is asked to finish."""

        def broken(self: object) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(nvdec.WorkStream, "finish", broken)

        def fail() -> None:
            with closing(on_gpu(long_clip)) as source:
                next(iter(source))
                raise KeyError("the model's own")

        with pytest.raises(KeyError, match="the model's own"):
            fail()
        assert nvc.behaviour.alive == 0

    def test_leaving_early_frees_the_session(self, nvc: ModuleType, long_clip: Path) -> None:
        source = on_gpu(long_clip)
        frames = iter(source)
        next(frames)
        assert nvc.behaviour.alive == 1
        source.close()
        assert nvc.behaviour.log == ["finished", "freed"]
        assert list(frames) == []

    def test_two_are_never_begun_at_once(self, nvc: ModuleType, long_clip: Path) -> None:
        given: list[int] = []

        def read() -> None:
            given.append(len(list(on_gpu(long_clip, stop=3))))

        other = threading.Thread(target=read)

        def slowly() -> None:
            nvc.behaviour.log.append("begins")
            if other.ident is None:
                other.start()
                other.join(timeout=0.3)  # enough to begin too, if nothing prevents it
            nvc.behaviour.log.append("has begun")

        nvc.behaviour.on_making = slowly
        read()
        other.join()
        assert given == [3, 3]
        assert [entry for entry in nvc.behaviour.log if "beg" in entry] == 2 * ["begins", "has begun"]


def put_aside(nvc: ModuleType, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """``import PyNvVideoCodec`` raises ``error``."""

    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "PyNvVideoCodec":
                raise copy.copy(error)  # the traceback of a parameter would outlive the test

    monkeypatch.delitem(sys.modules, "PyNvVideoCodec")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


@pytest.mark.parametrize("given", [None, "DEBUG"])
def test_its_warnings_stay_off_stdout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str | None) -> None:
    (tmp_path / "PyNvVideoCodec.py").write_text(
        "import os\n__version__ = '2.2.4'\nlevel = os.environ['LOGGER_LEVEL']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "PyNvVideoCodec", raising=False)
    monkeypatch.setenv("LOGGER_LEVEL", given or "")
    if given is None:
        monkeypatch.delenv("LOGGER_LEVEL")
    assert nvcodec.load().level == (given or "ERROR")
    monkeypatch.delitem(sys.modules, "PyNvVideoCodec")


class TestFallingBack:
    def refused(self, path: Path, stream: int | None = None) -> str:
        """The reason, after a check that the note of decoder auto and the error of decoder nvdec give the same one."""
        source = open_video(str(path), SelectConfig(stream=stream), GPU)
        assert source.decoder.startswith("PyAV")
        assert "decoder" not in source.info.made_by
        first = next(iter(source))
        assert first.rgb.equal(next(iter(on_cpu(path, stream=stream))).rgb)
        source.close()
        (note,) = [note for note in source.notes if "NVDEC" in note]
        with pytest.raises((DeviceError, MissingDependencyError)) as caught:
            on_gpu(path, stream=stream)
        assert note == f"decoded on the CPU, not with NVDEC: {caught.value}"
        assert "\n" not in note
        return note

    def test_an_odd_size(self, nvc: ModuleType, data_dir: Path) -> None:
        assert "odd size, 321x241" in self.refused(data_dir / "videos_corner/odd_321x241_vp9.mp4")

    @pytest.mark.parametrize(
        ("error", "says"),
        [
            (ModuleNotFoundError("No module named 'PyNvVideoCodec'", name="PyNvVideoCodec"), "is not installed: pip"),
            (ModuleNotFoundError("No module named 'numpy'", name="numpy"), "cannot load: No module named 'numpy'"),
            (RuntimeError("libnvidia-encode.so.1: cannot open\n\n=== STEPS ==="), "cannot load: libnvidia-encode.so.1"),
            (OSError("libcuda.so.1: cannot open shared object file"), "cannot load: libcuda.so.1"),
            (ImportError("undefined symbol: x"), "cannot load: undefined symbol"),
        ],
    )
    def test_a_package_that_does_not_load(
        self, nvc: ModuleType, long_clip: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
    ) -> None:
        put_aside(nvc, monkeypatch, error)
        assert says in self.refused(long_clip)

    @pytest.mark.parametrize(
        ("version", "good"), [("2.2.3", False), ("2.2", False), ("1.0", False), ("dev", False), ("2.2.4", True)]
    )
    def test_old_versions(self, nvc: ModuleType, long_clip: Path, version: str, good: bool) -> None:
        nvc.__version__ = version
        if good:
            assert on_gpu(long_clip).decoder == "NVDEC (h264)"
        else:
            assert f"PyNvVideoCodec {version} is too old, 2.2.4 is needed" in self.refused(long_clip)

    @pytest.mark.parametrize("version", ["2.2.10", "2.3.0", "3.0", "2.2.4.post1", "2.2.5rc1"])
    def test_newer_versions(self, nvc: ModuleType, version: str) -> None:
        nvc.__version__ = version
        assert nvcodec.load() is nvc

    @pytest.mark.parametrize(
        ("behaviour", "says"),
        [
            ({"engines_for": {("HEVC", "420", 8)}}, "this GPU decodes no h264 with 420 chroma and 8 bits"),
            ({"caps": {}}, "this GPU decodes no h264"),
            ({"caps": {"supported": 0, "num_decoder_engines": 7}}, "this GPU decodes no h264"),
            ({"caps_error": RuntimeError("libnvcuvid.so.1: cannot open")}, "cannot be asked about h264: libnvcuvid"),
            (
                {"caps": {"supported": 1, "num_decoder_engines": 1, "width_min": 144, "height_min": 48}},
                "smaller than the 144x48",
            ),
            (
                {"caps": {"supported": 1, "num_decoder_engines": 1, "width_max": 60, "height_max": 4096}},
                "larger than it goes (60x4096",
            ),
            ({"caps": {"supported": 1, "num_decoder_engines": 1, "mb_num_max": 11}}, "11 macroblocks"),
            ({"stream_id": 1}, "its demuxer takes stream 1 of the file, not 0"),
            ({"time_base": Fraction(1, 90000)}, "units of 1/90000 s"),
        ],
    )
    def test_what_the_gpu_or_the_demuxer_says(
        self, nvc: ModuleType, long_clip: Path, behaviour: dict[str, Any], says: str
    ) -> None:
        vars(nvc.behaviour).update(behaviour)
        assert says in self.refused(long_clip)

    def test_ten_bits_are_asked_for_as_ten(self, nvc: ModuleType, clip: Clip) -> None:
        """PyNvVideoCodec's demuxer would say eight."""
        nvc.behaviour.engines_for = {("H264", "420", 8)}
        assert "10 bits" in self.refused(clip("nv_ten.mp4", pix_fmt="yuv420p10le", count=3))

    def test_the_stream_is_named_and_not_its_decoder(self, nvc: ModuleType, data_dir: Path) -> None:
        nvc.behaviour.caps = {}
        assert "this GPU decodes no av1" in self.refused(data_dir / "videos_corner/av1_640x360.mkv")

    @pytest.mark.parametrize(("pix_fmt", "codec"), [("yuv422p", "libx264"), ("bgr0", "ffv1"), ("gray", "ffv1")])
    def test_surfaces_of_another_kind(self, nvc: ModuleType, clip: Clip, pix_fmt: str, codec: str) -> None:
        assert f"pictures of the kind {pix_fmt}" in self.refused(
            clip(f"nv_{pix_fmt}.mkv", pix_fmt=pix_fmt, codec=codec)
        )

    def test_a_codec_it_has_never_heard_of(self, nvc: ModuleType, clip: Clip) -> None:
        assert "decodes no ffv1" in self.refused(clip("nv_ffv1.mkv", codec="ffv1"))
        assert nvc.behaviour.asked == []  # PyNvVideoCodec would ask the driver about a wrong number

    def test_a_failed_question_leaves_no_context_here(self, nvc: ModuleType, long_clip: Path) -> None:
        nvc.behaviour.caps_error = nvc.PyNvVCException("no")
        self.refused(long_clip)
        assert len(nvc.behaviour.left_current) == 1
        assert threading.get_ident() not in nvc.behaviour.left_current

    def test_a_gpu_is_asked_once_about_each_kind(self, nvc: ModuleType, long_clip: Path, clip: Clip) -> None:
        for path in (long_clip, clip("nv_again.mp4"), clip("nv_deep.mp4", pix_fmt="yuv420p10le"), long_clip):
            assert on_gpu(path).decoder == "NVDEC (h264)"
        assert nvc.behaviour.asked == [("H264", "420", 8), ("H264", "420", 10)]

    @pytest.mark.parametrize("how", ["interlaced=1:tff=1", "fake-interlaced=1"])
    def test_interlaced(self, nvc: ModuleType, clip: Clip, how: str) -> None:
        assert "interlaced" in self.refused(clip(f"nv_{how[:4]}.mp4", options={"x264-params": how}))

    @pytest.mark.parametrize("suffix", ["ts", "mkv"])
    def test_mpeg2_that_may_become_interlaced(self, nvc: ModuleType, clip: Clip, suffix: str) -> None:
        path = clip(f"nv_whole.{suffix}", codec="mpeg2video")
        assert on_gpu(path).decoder == "NVDEC (mpeg2video)"
        progressive = b"\0\0\1\xb5\x14\x8a"  # the sequence extension, up to the byte that says so
        allowing = path.with_stem("nv_mixed")
        allowing.write_bytes(path.read_bytes().replace(progressive, progressive[:-1] + b"\x82"))
        assert not any("interlaced" in note for note in probe_video(str(allowing)).notes)
        assert "interlaced" in self.refused(allowing)

    def test_a_file_its_demuxer_cannot_open(
        self, nvc: ModuleType, long_clip: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nvsession, "plain", lambda path: "nowhere.mp4")
        assert "avformat_open_input" in self.refused(long_clip)


class TestChoosing:
    def test_auto_on_a_gpu_is_nvdec_and_a_store_records_it(self, nvc: ModuleType, long_clip: Path) -> None:
        source = open_source(long_clip, device=GPU)
        assert isinstance(source, Source)
        assert source.decoder == "NVDEC (h264)"
        assert source.info.made_by == {"decoder": "nvdec"}
        assert not any("NVDEC" in note for note in source.notes)
        assert nvc.behaviour.sessions == []  # before it is iterated

    @pytest.mark.parametrize(("decoder", "device"), [("auto", "cpu"), ("pyav", GPU)])
    def test_elsewhere_it_is_the_cpu_and_nothing_to_be_said(
        self, nvc: ModuleType, long_clip: Path, decoder: Any, device: str
    ) -> None:
        source = open_source(long_clip, SelectConfig(decoder=decoder), device)
        assert source.decoder == "PyAV (h264)"
        assert source.notes == open_source(long_clip).notes

    @pytest.mark.parametrize(("decoder", "device", "mode"), [("auto", "cpu", "exact"), ("pyav", GPU, "fast")])
    def test_for_a_network_on_a_gpu_the_cpu_decodes_on_all_its_cores(
        self, nvc: ModuleType, long_clip: Path, monkeypatch: pytest.MonkeyPatch, decoder: Any, device: str, mode: str
    ) -> None:
        modes: list[str] = []
        real = pyav._numbered
        monkeypatch.setattr(pyav, "_numbered", lambda *given: (modes.append(given[-1]), real(*given))[1])
        assert len(list(open_source(long_clip, SelectConfig(decoder=decoder, stop=3), device))) == 3
        assert modes == [mode]

    def test_names_that_look_like_addresses(
        self, nvc: ModuleType, long_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        odd = "http:take [2] %03d.mp4"
        (tmp_path / odd).write_bytes(long_clip.read_bytes())
        monkeypatch.chdir(tmp_path)
        assert len(list(open_source(odd, SelectConfig(decoder="nvdec", stop=3), GPU))) == 3


def test_the_layout_of_a_p016_surface_is_read_as_such(nvc: ModuleType, data_dir: Path) -> None:
    """The fake's surfaces have 16 bits and padded rows; read in another way they would look quite different."""
    path = data_dir / "videos_corner/hevc_main10_320x240.mp4"
    probe = probe_video(str(path))
    decoder = NvdecDecoder(probe, GPU, None, print)
    pictures = decoder.pictures(0)  # kept: it lends the surface
    number, surface = next(pictures)
    memory = torch.from_dlpack(surface)
    assert (memory.dtype, tuple(memory.shape)) == (torch.uint16, (360, 320))
    assert memory.stride(0) > 320
    cpu = PyAVDecoder(probe)
    expected: Iterator[tuple[int, Any]] = itertools.islice(cpu.pictures(0), 1)
    ((_, picture),) = expected
    assert (decoder.rgb(surface, number).int() - cpu.rgb(picture, 0).int()).abs().max() <= 1


class TestOnACard:
    @pytest.fixture
    def card(self, gpu: torch.device) -> str:
        try:
            nvcodec.load()
        except MissingDependencyError as error:
            pytest.skip(str(error))
        return f"cuda:{gpu.index}"

    def test_surfaces_outlast_a_long_backlog(self, card: str, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
        """The decoder is given packet after packet while the stream that converts is far behind: it must not overwrite
        a surface that is still to be read."""
        convert = NvdecDecoder._converted

        def late(self: NvdecDecoder, picture: Any) -> torch.Tensor:
            busy = torch.ones(4096, 4096, device=card)
            for _ in range(20):  # about ten milliseconds, where a picture takes less than one
                busy = busy @ busy
            return convert(self, picture)

        monkeypatch.setattr(NvdecDecoder, "_converted", late)
        path = clip("nv_backlog.mp4", size=(192, 144), count=60)
        with closing(open_video(str(path), SelectConfig(decoder="nvdec"), card)) as source:
            frames = [Frame(frame.rgb.cpu(), frame.index, frame.timestamp_s) for frame in list(source)]
        assert levels_apart(frames, list(on_cpu(path))) <= 2
