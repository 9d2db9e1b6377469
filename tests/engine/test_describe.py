"""What ``describe`` reports for each kind of input: files with known contents made here, and real videos."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from flowreel.engine import describe as describing
from flowreel.engine import describe_video
from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.describe import describe
from flowreel.engine.errors import (
    FlowFileError,
    FlowreelError,
    SourceNotFoundError,
    UnsupportedSourceError,
    UsageError,
)
from flowreel.engine.models import build_model
from flowreel.engine.models.saving import save_weights
from flowreel.sinks import kitti, open_sink, write_flo
from flowreel.sinks.color_png import png_pieces

Facts = dict[str, Any]
MakeVideo = Callable[..., Path]


@pytest.fixture
def make_video(tmp_path: Path) -> MakeVideo:
    """``make_video("name.mkv", stamps, ...)``: grey MPEG-4 frames at these times, in 25ths of a second.

    With ``sound``, which Matroska takes, comes an attached font, for which FFmpeg has no decoder.
    """

    def make(
        name: str,
        stamps: list[int],
        *,
        sizes: tuple[tuple[int, int], ...] = ((64, 48),),
        sound: bool = False,
        options: dict[str, str] | None = None,
        codec: str = "mpeg4",
        colour: dict[str, int] | None = None,
        aspect: Fraction | None = None,
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            streams: list[Any] = [container.add_stream(codec, rate=25, options=options or {"g": "5"}) for _ in sizes]
            audio: Any = container.add_stream("aac", rate=44100) if sound else None
            if sound:
                audio.metadata["language"] = "deu"
                container.add_attachment("letters.ttf", "font/ttf", b"of subtitles")
            for stream, (width, height) in zip(streams, sizes, strict=True):
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.time_base = Fraction(1, 25)
                if aspect is not None:
                    stream.codec_context.sample_aspect_ratio = aspect
                for field, value in (colour or {}).items():
                    setattr(stream.codec_context, field, value)
            for stamp in stamps:
                for stream in streams:
                    frame = av.VideoFrame(stream.width, stream.height, "yuv420p")
                    for plane in frame.planes:
                        plane.update(bytes([100]) * plane.buffer_size)
                    frame.pts, frame.time_base = stamp, Fraction(1, 25)
                    for field, value in (colour or {}).items():
                        setattr(frame, field, value)
                    container.mux(stream.encode(frame))
            if sound:
                silence = av.AudioFrame("fltp", "stereo", 1024)
                for plane in silence.planes:
                    plane.update(bytes(plane.buffer_size))
                silence.rate, silence.pts = 44100, 0
                container.mux(audio.encode(silence))
                container.mux(audio.encode(None))
            for stream in streams:
                container.mux(stream.encode(None))
        return path

    return make


def told(path: object) -> Facts:
    """The facts, after a check that they survive a round trip through strict JSON."""
    facts = describe(str(path))
    text = json.dumps(facts, allow_nan=False)
    assert json.loads(text) == facts
    assert facts["path"] == str(path)
    return facts


def parts(facts: Facts, *names: str) -> list[Any]:
    return [facts[name] for name in names]


class TestVideos:
    def test_frames_rate_and_key_frames(self, make_video: MakeVideo) -> None:
        facts = told(make_video("a.mp4", list(range(12))))
        assert parts(facts, "kind", "width", "height", "frames", "flows") == ["video", 64, 48, 12, 11]
        assert parts(facts, "format_name", "cut_short", "stream_used") == ["QuickTime / MOV", False, 0]
        assert facts["duration_s"] == pytest.approx(0.48)
        assert facts["notes"] == ["no colour matrix is stated: BT601 is assumed, as players do at 48 rows"]
        (stream,) = facts["streams"]
        assert 0 < stream["bit_rate"] < facts["bit_rate"]
        assert parts(stream, "language", "cover") == [None, False]  # the file says "und"
        assert parts(stream, "codec", "pixel_format", "bit_depth", "used", "number") == ["mpeg4", "yuv420p", 8, True, 0]
        assert parts(stream, "frames", "flows", "key_frames", "average_rate") == [12, 11, 3, 25]
        assert stream["constant_rate"] is True
        assert parts(stream, "smallest_gap_s", "largest_gap_s") == pytest.approx([0.04, 0.04])
        assert stream["largest_key_gap_s"] == pytest.approx(0.2)
        assert parts(stream, "rotation", "mirrored", "sample_aspect_ratio") == [0, False, "1:1"]

    def test_key_frames_are_numbered_as_shown(self, make_video: MakeVideo) -> None:
        from flowreel.engine.sources.probe import probe_video

        options = {"x264-params": "keyint=10:min-keyint=10:open-gop=1:scenecut=0:bframes=3:b-adapt=0"}
        reordered = make_video("b.mp4", list(range(30)), codec="libx264", options=options)
        with av.open(str(reordered)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
        places = [place for place, packet in enumerate(packets) if packet.is_keyframe]
        ordered = sorted(packet.pts or 0 for packet in packets)
        expected = [ordered.index(packets[place].pts or 0) for place in places]
        assert len(expected) > 1
        assert expected != places
        assert probe_video(str(reordered)).key_frames.tolist() == expected
        assert told(make_video("c.avi", list(range(12))))["streams"][0]["key_frames"] == 3

    def test_variable_rate(self, make_video: MakeVideo) -> None:
        facts = told(make_video("a.mkv", [5, 6, 7, 9, 10, 13]))
        (stream,) = facts["streams"]
        assert (facts["start_time_s"], stream["bit_rate"]) == (0.2, None)
        assert parts(stream, "first_frame_s", "last_frame_s") == pytest.approx([0.2, 0.52])
        assert stream["constant_rate"] is False
        assert parts(stream, "smallest_gap_s", "largest_gap_s") == pytest.approx([0.04, 0.12])

    @pytest.mark.parametrize(
        ("gaps_ms", "tick_s", "steady"),
        [
            ([33, 34, 33], 0.001, True),  # 30 frames a second in a container of milliseconds
            ([33, 34, 33], 1 / 90000, True),  # the same, copied to a container with finer ticks
            ([40, 50, 40], 0.01, True),  # 24 frames a second in a GIF
            ([33, 36, 33], 1 / 90000, False),
            ([40, 80, 40], 0.04, False),  # gaps one tick apart, but a tick is as long as a frame
            ([0, 1, 1], 0.001, False),
            ([], 0.001, None),
        ],
    )
    def test_rounded_stamps_are_constant(self, gaps_ms: list[int], tick_s: float, steady: bool | None) -> None:
        assert describe_video._is_steady(np.array(gaps_ms) / 1e3, tick_s) is steady

    def test_every_stream(self, make_video: MakeVideo) -> None:
        path = make_video("two.mkv", list(range(6)), sizes=((64, 48), (128, 96)), sound=True)
        facts = told(path)
        kinds = [(stream["index"], stream["type"]) for stream in facts["streams"]]
        assert kinds == [(0, "video"), (1, "video"), (2, "audio"), (3, "attachment")]
        assert [stream["language"] for stream in facts["streams"]] == [None, None, "deu", None]
        assert parts(facts["streams"][3], "codec", "profile", "bit_rate") == [None, None, None]
        assert [stream["frames"] for stream in facts["streams"][:2]] == [6, 6]
        assert [stream["number"] for stream in facts["streams"][:2]] == [0, 1]
        (used,) = [stream for stream in facts["streams"] if stream.get("used")]
        assert (used["index"], used["width"]) == (facts["stream_used"], facts["width"])
        assert parts(facts["streams"][2], "codec", "sample_rate", "channels") == ["aac", 44100, 2]
        path.write_bytes(path.read_bytes().replace(b"A_AAC", b"A_ODD"))  # sound that FFmpeg has no decoder for
        sound = told(path)["streams"][2]
        assert (sound["type"], sound["codec"], "sample_rate" in sound) == ("audio", None, False)

    def test_a_tag_in_another_encoding_than_utf_8(self, make_video: MakeVideo) -> None:
        path = make_video("two.mkv", list(range(6)), sound=True)
        path.write_bytes(path.read_bytes().replace(b"deu", b"d\xfcu"))
        assert told(path)["streams"][1]["language"] == "d\N{REPLACEMENT CHARACTER}u"

    def test_a_cover_picture(self, tmp_path: Path) -> None:
        with av.open(str(tmp_path / "a.mp4"), "w") as container:
            video: Any = container.add_stream("mpeg4", rate=25, width=64, height=48, pix_fmt="yuv420p")
            cover: Any = container.add_stream("mjpeg", rate=25, width=64, height=48, pix_fmt="yuvj420p")
            cover.disposition = Disposition.attached_pic
            for stream in (video, video, cover):
                container.mux(stream.encode(av.VideoFrame(64, 48, stream.pix_fmt)))
            for stream in (video, cover):
                container.mux(stream.encode(None))
        facts = told(tmp_path / "a.mp4")
        assert (facts["frames"], len(facts["notes"])) == (2, 1)
        _, stream = facts["streams"]
        assert parts(stream, "codec", "used", "number", "cover") == ["mjpeg", False, None, True]
        assert "frames" not in stream

    def test_a_stream_that_does_not_decode_is_told_of(
        self, make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from flowreel.engine.sources import probe

        path = make_video("two.mkv", list(range(6)), sizes=((64, 48), (128, 96)))
        real, used = probe.probe_video, told(path)["stream_used"]

        def probe_one(name: str, stream: int | None = None) -> probe.VideoProbe:
            if stream is not None:
                raise UnsupportedSourceError("none of which could be decoded")
            return real(name)

        monkeypatch.setattr(describe_video, "probe_video", probe_one)
        other = told(path)["streams"][1 - used]
        assert "none of which" in other["problem"]
        assert "frames" not in other

    def test_colour(self, make_video: MakeVideo) -> None:
        stated = {"colorspace": 1, "color_range": 1, "color_primaries": 1, "color_trc": 13}
        (stream,) = told(make_video("a.mkv", [0, 1, 2], codec="libx264", colour=stated))["streams"]
        names = {"range": "limited", "matrix": "bt709", "primaries": "bt709", "transfer": "iec61966-2-1"}
        assert stream["colour"] == names | {"used_range": "limited", "used_matrix": "bt709"}
        (stream,) = told(make_video("b.mp4", [0, 1, 2], codec="libx264"))["streams"]
        assert stream["colour"] == dict.fromkeys(names) | {"used_range": "limited", "used_matrix": "bt601"}

    def test_pixels_that_are_not_square(self, make_video: MakeVideo) -> None:
        facts = told(make_video("a.mkv", [0, 1, 2], aspect=Fraction(3, 2)))
        (stream,) = facts["streams"]
        assert stream["sample_aspect_ratio"] == "3:2"
        assert parts(stream, "display_width", "display_height") == [96, 48]
        assert facts["width"] == 64
        assert any("not square" in note for note in facts["notes"])

    @pytest.mark.parametrize(
        ("turn", "rotation", "mirrored"),
        [
            ((False, False, False), 0, False),
            ((False, True, True), 180, False),
            ((True, True, False), -90, False),
            ((True, False, True), 90, False),
            ((False, True, False), 0, True),
            ((False, False, True), 180, True),
        ],
    )
    def test_rotation(self, turn: tuple[bool, bool, bool], rotation: int, mirrored: bool) -> None:
        """Compared with ``np.rot90``, which turns counterclockwise."""
        from flowreel.engine.sources.picture import Turn

        picture = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
        expected = np.rot90(picture[:, ::-1] if mirrored else picture, rotation // 90)
        assert (Turn(*turn)(picture) == expected).all()
        assert (describe_video._rotation(Turn(*turn)), describe_video._is_mirrored(Turn(*turn))) == (rotation, mirrored)

    def test_a_cut_file_says_so(self, make_video: MakeVideo) -> None:
        path = make_video("a.mkv", list(range(50)))
        path.write_bytes(path.read_bytes()[:-400])
        facts = told(path)
        assert facts["cut_short"] is True
        assert facts["frames"] < 50
        assert any("cut short" in note for note in facts["notes"])

    def test_a_single_frame_gives_no_flow(self, make_video: MakeVideo) -> None:
        facts = told(make_video("a.mkv", [0]))
        assert parts(facts, "frames", "flows") == [1, 0]
        assert parts(facts["streams"][0], "constant_rate", "largest_gap_s", "largest_key_gap_s") == [None, None, None]
        assert any("at least two" in note for note in facts["notes"])

    @pytest.mark.parametrize(
        ("name", "frames", "about"),
        [
            ("videos/bbb_1080p60.mp4", 120, {"codec": "h264", "profile": "High", "average_rate": 60}),
            ("videos/conveyor_640x360.mp4", 1189, {"constant_rate": True, "nominal_rate": 179 / 6}),
            ("videos/person_asl_walk_640x480.mkv", 89, {"pixel_format": "yuvj420p", "constant_rate": True}),
            ("videos/sintel_cave_1024x436.mp4", 50, {"codec": "mpeg4", "stored_height": 436}),
            ("videos_corner/av1_640x360.mkv", 125, {"codec": "av1"}),
            ("videos_corner/bbb_vfr_640x360.mp4", 72, {"constant_rate": False, "average_rate": 480 / 13}),
            ("videos_corner/hevc_main10_320x240.mp4", 60, {"bit_depth": 10, "profile": "Main 10"}),
            ("videos_corner/nasa_rotated90_480x270.mp4", 17, {"rotation": 90, "width": 270, "stored_width": 480}),
            ("videos_corner/non_zero_start_200x112.mp4", 12, {"sample_aspect_ratio": "224:225", "display_width": 199}),
            ("videos_corner/odd_321x241_vp9.mp4", 25, {"codec": "vp9", "width": 321, "height": 241}),
        ],
    )
    def test_real(self, data_dir: Path, name: str, frames: int, about: Facts) -> None:
        facts = told(data_dir / name)
        stream = facts["streams"][facts["stream_used"]]
        assert parts(facts, "frames", "flows", "cut_short") == [frames, frames - 1, False]
        assert {key: stream[key] for key in about} == about


class TestPictures:
    def test_folder_glob_and_single(self, tmp_path: Path) -> None:
        for number in range(3):
            Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.png")
        for name in (tmp_path, tmp_path / "*.png"):
            facts = told(name)
            assert parts(facts, "kind", "format", "mode", "width", "height") == ["images", "PNG", "RGB", 40, 30]
            assert parts(facts, "frames", "flows", "suffixes") == [3, 2, {".png": 3}]
        facts = told((tmp_path / "0.png").rename(tmp_path / "0.PNG"))
        assert parts(facts, "kind", "frames", "flows", "width") == ["images", 1, 0, 40]

    def test_synthetic(self) -> None:
        facts = told("synthetic:objects?size=96x64&frames=6")
        assert parts(facts, "kind", "width", "height", "frames", "flows") == ["synthetic", 96, 64, 6, 5]

    def test_folder_of_flow_names_what_it_holds(self, tmp_path: Path) -> None:
        write_flo(tmp_path / "0001.flo", np.zeros((2, 3, 2), np.float32))
        with pytest.raises(SourceNotFoundError, match=r"looked for .*0001\.flo"):
            describe(str(tmp_path))


class TestFlow:
    def field(self) -> np.ndarray:
        flow = np.full((3, 4, 2), 1, np.float32)
        flow[0, 0], flow[1, 1], flow[2, 3] = (1.5, -2), (3, 4), (-6, 8)
        return flow

    def check(self, facts: Facts, kind: str) -> None:
        assert parts(facts, "kind", "width", "height", "unknown") == [kind, 4, 3, 1]
        assert parts(facts, "first_vector", "min", "max") == [[1.5, -2], [-6, -2], [3, 8]]
        assert facts["max_length"] == 10
        assert facts["mean_length"] == pytest.approx((2.5 + 5 + 10 + 8 * 2**0.5) / 11)

    @pytest.mark.parametrize("block", [1 << 20, 8, 5, 1])
    @pytest.mark.parametrize("nobody_knows", [np.nan, np.inf, 2e9])
    def test_flo(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, nobody_knows: float) -> None:
        monkeypatch.setattr(describing, "BLOCK_VECTORS", block)
        flow = self.field()
        flow[0, 1, 0] = nobody_knows
        write_flo(tmp_path / "a.flo", flow)
        facts = told(tmp_path / "a.flo")
        self.check(facts, "flo")
        assert facts["tag"].startswith("PIEH")
        assert facts["size_bytes"] == 12 + 8 * 12
        (tmp_path / "a.flo").rename(tmp_path / "a.bin")
        assert told(tmp_path / "a.bin")["kind"] == "flo"

    def test_kitti_and_npz(self, tmp_path: Path) -> None:
        flow = self.field()
        flow[0, 1] = np.nan
        (tmp_path / "a.kitti.png").write_bytes(b"".join(png_pieces(kitti._to_samples(flow))))
        np.savez_compressed(tmp_path / "a.npz", flow=flow)
        self.check(told(tmp_path / "a.kitti.png"), "kitti")
        self.check(told(tmp_path / "a.npz"), "npz")
        (tmp_path / "a.kitti.png").rename(tmp_path / "000000_10.png")  # as KITTI itself names them
        self.check(told(tmp_path / "000000_10.png"), "kitti")

    def test_a_picture_of_16_bits_is_no_flow(self, tmp_path: Path) -> None:
        picture = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 30000, np.uint16), "rgb48be")
        with av.open(str(tmp_path / "photo.png"), "w", format="image2") as container:
            stream: Any = container.add_stream("png", rate=1)
            stream.width = stream.height = 16
            stream.pix_fmt = "rgb48be"
            container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        assert (tmp_path / "photo.png").read_bytes()[24] == 16
        assert told(tmp_path / "photo.png")["kind"] == "images"
        (tmp_path / "photo.png").rename(tmp_path / "photo.kitti.png")
        assert told(tmp_path / "photo.kitti.png")["kind"] == "kitti"  # of such a name nothing else is expected

    def test_nothing_known(self, tmp_path: Path) -> None:
        write_flo(tmp_path / "a.flo", np.full((2, 2, 2), np.nan, np.float32))
        facts = told(tmp_path / "a.flo")
        assert parts(facts, "first_vector", "min", "max", "mean_length") == [[None, None], None, None, None]
        assert facts["unknown"] == 4

    def test_real(self, data_dir: Path) -> None:
        facts = told(data_dir / "flo" / "flownet2_caffe_result_960x540.flo")
        assert facts["first_vector"] == pytest.approx([82.72547, 30.58087])
        assert facts["max"][0] == pytest.approx(163.30, abs=0.01)
        assert told(data_dir / "pairs" / "kitti2015" / "flow.png")["kind"] == "kitti"

    def test_memory_does_not_grow_with_the_field(self, tmp_path: Path) -> None:
        path = tmp_path / "huge.flo"
        with path.open("wb") as file:  # 128 MB, of which only the first page takes space on the disk
            file.write(b"PIEH" + np.array([4000, 4000], "<i4").tobytes())
            file.truncate(12 + 8 * 4000 * 4000)
        code = (
            "import re, sys; from flowreel.engine.describe import describe\n"
            # Not getrusage: a new process inherits the peak of the one that started it.
            "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
            "before = peak(); facts = describe(sys.argv[1]); print(facts['unknown'], peak() - before)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        unknown, grown_kb = map(int, done.stdout.split())
        assert unknown == 0
        assert grown_kb < 80_000


class TestStores:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Path:
        """A finished store of three flows of 8x6."""
        path = tmp_path / "a.zarr"
        about = {"model": "FlowNet2C", "weights": "baseline", "precision": "fp32"}
        sink = open_sink(path, SinkConfig())
        sink.open(FlowInfo(6, 8, Fraction(30000, 1001), 4, SourceId("dance.mp4", 99, 0.2), about))
        numbers = np.arange(3)
        sink.write(FlowBatch(torch.ones(3, 2, 6, 8), 0, numbers, numbers + 1, numbers / 30, (numbers + 1) / 30))
        sink.commit()
        return path

    def test_complete(self, store: Path) -> None:
        facts = told(store)
        assert parts(facts, "kind", "complete", "flows", "available") == ["store", True, 3, 3]
        assert parts(facts, "width", "height", "codec", "max_error") == [8, 6, "blosc", 1 / 64]
        assert parts(facts, "model", "weights", "made_by") == ["FlowNet2C", "baseline", {"precision": "fp32"}]
        assert facts["source"]["name"] == "dance.mp4"
        assert facts["frame_rate"] == pytest.approx(30000 / 1001)
        assert facts["software_version"]
        assert facts["notes"] == []

    def test_unfinished_is_found_by_its_future_name(self, store: Path) -> None:
        partial = store.rename(store.with_name("a.zarr.partial"))
        for name in (store, partial):
            facts = told(name)
            assert parts(facts, "complete", "available", "folder") == [False, 3, str(partial)]
            assert "unfinished: 3 flows so far; its source or its run was cut short" in facts["notes"][0]
        assert "a.zarr is not there yet" in told(store)["notes"][0]

    def test_a_store_of_another_name(self, store: Path) -> None:
        assert told(store.rename(store.with_name("flow")))["kind"] == "store"


class TestWeights:
    @pytest.mark.parametrize("half", [False, True])
    def test_stored_dtype(self, tmp_path: Path, half: bool) -> None:
        state = build_model("FlowNet2C", width=0.05).state_dict()
        save_weights(tmp_path / "w.safetensors", state, licence="none", made_by={"steps": 2}, width=0.05, half=half)
        facts = told(tmp_path / "w.safetensors")
        assert parts(facts, "kind", "model", "licence", "made_by") == ["weights", "FlowNet2C", "none", {"steps": 2}]
        assert facts["tensors"] == len(state)
        assert facts["dtypes"] == {"float16" if half else "float32": len(state)}
        assert facts["parameters"] == sum(tensor.numel() for tensor in state.values())
        capitals = (tmp_path / "w.safetensors").rename(tmp_path / "W.SAFETENSORS")
        assert told(capitals)["dtypes"] == facts["dtypes"]

    def test_checkpoint_and_shipped(self, tmp_path: Path) -> None:
        state = build_model("FlowNet2S", width=0.05).state_dict()
        torch.save({"state_dict": state, "epoch": 1}, tmp_path / "w.pth.tar")
        assert told(tmp_path / "w.pth.tar")["dtypes"] == {"float32": len(state)}
        assert told("baseline")["licence"] == "Apache-2.0"


class TestAnythingElse:
    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(SourceNotFoundError, match=r"nowhere: expected a video.*\.flo.*weights"):
            describe(str(tmp_path / "nowhere"))
        with pytest.raises(UsageError, match="address"):
            describe("http://nowhere/a.mp4")
        with pytest.raises(FileNotFoundError, match="flow store"):
            describe(str(tmp_path / "nowhere.zarr"))

    def test_text(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("Once upon a time\n" * 50)
        with pytest.raises(UnsupportedSourceError, match=r"notes\.txt.*looked for a video"):
            describe(str(tmp_path / "notes.txt"))

    @pytest.mark.parametrize("tag", ["PF", "Pf"])
    def test_pfm_is_no_video(self, tmp_path: Path, tag: str) -> None:
        (tmp_path / "0006.pfm").write_bytes(f"{tag}\n16 16\n-1.0\n".encode() + bytes(16 * 16 * 3 * 4))
        with pytest.raises(UnsupportedSourceError, match=r"0006\.pfm .*it is a PFM file.* to \.flo"):
            describe(str(tmp_path / "0006.pfm"))

    @pytest.mark.parametrize("name", ["a.flo", "a.kitti.png", "a.npz", "a.safetensors", "a.png", "a.mp4", "a"])
    @pytest.mark.parametrize("content", [b"", b"PI", b"\x89PNG\r\n\x1a\n" + bytes(16) + b"\x10\x02", bytes(300)])
    def test_damaged(self, tmp_path: Path, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FlowreelError):
            describe(str(tmp_path / name))

    def test_neither_file_nor_folder(self, tmp_path: Path) -> None:
        import os

        os.mkfifo(tmp_path / "pipe.flo")
        with pytest.raises(UnsupportedSourceError, match="neither a file nor a folder"):
            describe(str(tmp_path / "pipe.flo"))

    def test_a_damaged_flo_names_what_is_wrong(self, tmp_path: Path) -> None:
        (tmp_path / "a.flo").write_bytes(b"PIEH" + bytes(8))
        with pytest.raises(FlowFileError, match="0x0"):
            describe(str(tmp_path / "a.flo"))
