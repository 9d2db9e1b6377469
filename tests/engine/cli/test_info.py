"""``flowreel info`` for a user and for a script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from flowreel.engine.cli import call
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
    headings = [line for line in out.splitlines() if line.startswith("a.")]
    assert headings == ["a.flo: flow, Middlebury .flo", "a.mkv: video, Matroska / WebM"]
    nowhere, unforeseen = err.splitlines()
    assert nowhere.startswith("flowreel: nothing is at nowhere.mp4: expected a video")
    assert unforeseen.startswith("flowreel: File name too long: xxx")


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
