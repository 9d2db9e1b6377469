"""``flowreel info`` for a user and for a script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from flowreel.engine.cli import call
from flowreel.engine.cli.info import print_facts
from flowreel.engine.describe import describe
from flowreel.sinks import write_flo

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a video of six frames and a flow of 3x2, the last vector unknown."""
    monkeypatch.chdir(tmp_path)
    flow = np.full((2, 3, 2), 0.1, np.float32)
    flow[1, 2] = 2e9
    write_flo("a.flo", flow)
    with av.open("a.mkv", "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode(None))


def lines(capsys: Capture) -> dict[str, str]:
    """Label -> text of what was printed; headings, which have no text, left out."""
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert all(line == line.rstrip() for line in out.splitlines())
    pairs = (line.strip().partition("  ") for line in out.splitlines())
    return {label: text.strip() for label, _, text in pairs if text}


def test_video(capsys: Capture) -> None:
    assert call(["info", "a.mkv"]) == 0
    said = lines(capsys)
    assert said["frames"] == "6, giving 5 flows"
    assert said["rate"].startswith("25 frames/s (nominally 25), constant: frames are 40.000 ms apart")
    assert said["picture"] == "64x48 stored; square pixels"
    assert "matrix not stated (taken as bt601)" in said["colour"]
    assert said["flow"].startswith("5 flows of 64x48 from stream 0")


def test_flow_keeps_its_digits(capsys: Capture) -> None:
    assert call(["info", "a.flo"]) == 0
    said = lines(capsys)
    assert said["first vector"] == "0.1, 0.1"
    assert said["unknown"] == "1 of 6 vectors"


def test_a_store_of_little_flow_is_not_said_to_be_smaller(capsys: Capture) -> None:
    assert call(["export", "a.flo", "-o", "a.zarr", "-q"]) == 0
    assert call(["info", "a.zarr"]) == 0
    (stored, source) = (line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("size "))
    assert stored.endswith("x larger than .flo")
    assert source.endswith(" 60 bytes")


def test_flow_that_is_not_finite_is_shown_as_it_is(capsys: Capture) -> None:
    write_flo("odd.flo", np.array([[[-np.inf, np.nan]]], np.float32))
    assert call(["info", "odd.flo"]) == 0
    assert lines(capsys)["first vector"] == "-inf, NaN"
    assert call(["info", "--json", "odd.flo"]) == 0
    assert json.loads(capsys.readouterr().out)["first_vector"] == ["-inf", None]


def test_long_names_are_not_broken(capsys: Capture) -> None:
    name = f"{'very-' * 40}long.flo"
    Path("a.flo").rename(name)
    assert call(["info", name]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{name}: flow, Middlebury .flo"


@pytest.mark.parametrize(
    "name", ["a.mkv", "a.flo", "baseline", "synthetic:objects?size=96x64&frames=6", "a.zarr", "part.zarr", "pictures"]
)
def test_every_kind_for_person_and_script(name: str, capsys: Capture) -> None:
    if name.endswith(".zarr"):
        assert call(["run", "a.mkv", "-o", "a.zarr", "-q"]) == 0
        if name == "part.zarr":
            Path("a.zarr").rename("part.zarr.partial")
    if name == "pictures":
        Path(name).mkdir()
        with av.open("a.mkv") as container:
            for number, frame in enumerate(container.decode(video=0)):
                frame.to_image().save(f"{name}/{number}.png")
    assert call(["info", name]) == 0
    heading, *rest = capsys.readouterr().out.splitlines()
    assert heading.startswith(name)
    assert ("unfinished" in heading) == (name == "part.zarr")
    assert rest
    assert call(["info", name, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert facts["path"] == name


def test_several_go_on_after_a_failure(capsys: Capture) -> None:
    assert call(["info", "a.flo", "nowhere.mp4", "x" * 300, "a.mkv"]) == 1
    out, err = capsys.readouterr()
    first, second = out.split("\n\n")
    assert first.startswith("a.flo: flow, Middlebury .flo\n")
    assert second.startswith("a.mkv: video, Matroska / WebM\n")
    nowhere, unforeseen = err.splitlines()
    assert nowhere.startswith("flowreel: nothing is at nowhere.mp4: expected a video")
    assert unforeseen.startswith("flowreel: File name too long: xxx")


def test_notes_and_plain_facts(capsys: Capture) -> None:
    assert call(["export", "a.flo", "-o", "a.zarr", "-q"]) == 0
    for name in ("a.mkv", "a.zarr"):
        print_facts(describe(name) | {"notes": ["it was dark"]})
        said = lines(capsys)
        assert said["note"] == "it was dark"
        assert "model" not in said
    plain: Any = {"mode": None, "made_by": None, "rate": 29.97002997, "turned": False, "took_s": "long"}
    plain |= {"sizes": {"of": [{"a": 1}, {"b": 2}]}}
    print_facts({"path": "x\a", "kind": "images", "name": "x", "notes": ["it was dark"]} | plain)
    assert capsys.readouterr().out.splitlines() == [
        r"x\x07: images",
        "  rate    29.97",
        "  turned  no",
        "  took s  long",
        "  sizes   of a 1; b 2",
        "  note    it was dark",
    ]


def test_odd_streams(capsys: Capture) -> None:
    facts: Any = describe("a.mkv") | {"start_time_s": 1.5, "bit_rate": 2_500_000, "size_bytes": 3850, "cut_short": True}
    (stream,) = facts["streams"]
    stream |= {"rotation": -90, "mirrored": True, "width": 48, "height": 64, "language": "ger", "problem": "it is odd"}
    stream |= {"sample_aspect_ratio": "4:3", "display_width": 64, "constant_rate": False, "largest_gap_s": 0.08}
    stream |= {"key_frames": 2, "largest_key_gap_s": 0.2, "bit_rate": 7000}
    stream |= {"colour": stream["colour"] | {"transfer": "bt709"}}
    sound = {"index": 1, "type": "audio", "codec": None, "profile": None, "language": None, "bit_rate": None}
    sound |= {"sample_rate": 48000, "channels": 2, "layout": "stereo"}
    cover = {"index": 2, "type": "video", "codec": "png", "profile": "Main", "language": None, "bit_rate": None}
    print_facts(facts | {"streams": [stream, sound, cover | {"number": 1, "cover": True}], "notes": []})
    assert capsys.readouterr().out.splitlines() == [
        "a.mkv: video, Matroska / WebM",
        "  duration    0.240 s, starting at 1.500 s",
        "  size        3.9 kB, 2.5 Mbit/s",
        "  state       cut short",
        "  flow        5 flows of 64x48 from stream 0, 25 frames/s, decoded by PyAV (mpeg4)",
        "  stream 0: video, mpeg4 (Simple Profile), ger, the one that run takes",
        "    bit rate    7 kbit/s",
        "    problem     it is odd",
        "    pixels      yuv420p, 8 bits",
        "    picture     64x48 stored, mirrored left to right, turned by 90 degrees clockwise: 48x64; pixels of 4:3, "
        "which players show as 64x48",
        "    frames      6, giving 5 flows",
        "    rate        25 frames/s (nominally 25), variable: frames are 40.000 to 80.000 ms apart",
        "    shown       from 0.000 s to 0.200 s",
        "    key frames  2, at most 0.200 s apart",
        "    colour      range not stated (taken as limited), matrix not stated (taken as bt601), "
        "primaries not stated, transfer bt709",
        "  stream 1: audio, of a codec that FFmpeg cannot decode",
        "    sound       48000 Hz, 2 channels (stereo)",
        "  stream 2: video, png (Main), --stream 1, a cover picture",
    ]
    print_facts(facts | {"streams": [stream | {"constant_rate": None, "rotation": 180}]})
    said = lines(capsys)
    assert said["rate"] == "25 frames/s (nominally 25)"
    assert "turned by 180 degrees: 48x64" in said["picture"]


def test_several_as_json(capsys: Capture) -> None:
    assert call(["info", "a.flo", "nowhere.mp4", "a.mkv", "--json"]) == 1
    out, err = capsys.readouterr()
    first, second, third = json.loads(out)
    assert (first["kind"], third["kind"]) == ("flo", "video")
    assert set(second) == {"path", "error"}
    assert "nowhere.mp4" in err
    assert call(["info", "a.flo", "a.mkv", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_one_failure_is_one_line(capsys: Capture) -> None:
    assert call(["info", "nowhere.mp4", "--json"]) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert call(["info", "a.flo", "nowhere.mp4", "--debug"]) == 1
    assert "SourceNotFoundError" in capsys.readouterr().err
