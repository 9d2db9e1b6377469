"""Several sources on one command line: what is printed, exit codes, the manifest, and usage errors."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flowreel.engine import many
from flowreel.engine.cli import call
from flowreel.sinks import open_store

A, B = "synthetic:objects?size=64x64&frames=3", "synthetic:still?size=96x64&frames=4"
STORE = ["-o", "out/{stem}.zarr"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def tiny(tiny_weights: str) -> list[str]:
    return ["--weights", tiny_weights]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_done(tiny: list[str], capsys: Capture) -> None:
    assert call(["run", A, B, *STORE, *tiny, "--stats", "stats.json"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    for words in (f"source 1 of 2: {A}", f"source 2 of 2: {B}", "FlowNet2S", "2 done, 0 skipped, 0 failed"):
        assert words in err
    assert [len(open_store(f"out/{stem}.zarr")) for stem in ("objects", "still")] == [2, 3]
    stats = json.loads(Path("stats.json").read_text())
    assert [source["run"]["pairs"] for source in stats["sources"]] == [2, 3]
    assert call(["run", A, B, *STORE, *tiny]) == 0
    assert "0 done, 2 skipped, 0 failed" in capsys.readouterr().err


def test_default_outputs_and_quiet(tiny: list[str], capsys: Capture) -> None:
    assert call(["run", A, B, *tiny, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert {path.name for path in Path().iterdir()} == {
        "objects.flow.zarr",
        "still.flow.zarr",
        "flowreel-manifest.json",
    }


def test_what_is_noted_of_every_source_is_told_once(tiny: list[str], capsys: Capture) -> None:
    assert call(["run", A, B, *STORE, *tiny, "--bound", "3"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]
    assert told == ["note: bound has no effect here: it is for DIR/flow_x_%05d.jpg, DIR/flow_x_%05d.png"]


def test_a_failure_is_told_of_and_the_rest_done(tiny: list[str], capsys: Capture) -> None:
    assert call(["run", "no[where].mp4", B, *STORE, *tiny, "--manifest", "list.json", "--stats", "stats.json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    *table, last = err.splitlines()
    assert last.startswith("flowreel: 1 of 2 sources failed, the first no[where].mp4: ")
    assert "list.json" in last
    assert "Traceback" not in err
    assert any(line.split()[:2] == ["no[where].mp4", "failed"] for line in table)
    assert "1 done, 0 skipped, 1 failed" in err
    statuses = [entry["status"] for entry in json.loads(Path("list.json").read_text())["sources"]]
    assert statuses == ["failed", "done"]
    assert len(json.loads(Path("stats.json").read_text())["sources"]) == 2


def test_names_stay_whole_in_a_log(tiny: list[str], capsys: Capture) -> None:
    long = "x" * 150 + ".mp4"
    assert call(["run", long, B, *STORE, *tiny]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert any(line.split()[:2] == [long, "failed"] for line in lines), lines
    assert any(line.split() == ["source", "status", "flows", "time", "size"] for line in lines)


def test_a_store_among_the_sources_is_called_one(tiny: list[str], capsys: Capture) -> None:
    assert call(["run", B, "-o", "b.zarr", *tiny, "-q"]) == 0
    assert call(["run", "b.zarr", A, *STORE, *tiny, "-q"]) == 1
    assert "it is a flow store, which flowreel.open_store reads" in capsys.readouterr().err


def test_images_one_by_one_are_told_how_to_be_a_sequence(tiny: list[str], capsys: Capture) -> None:
    Path("frames").mkdir()
    for name in ("1.png", "2.png"):
        Image.new("RGB", (64, 64)).save(f"frames/{name}")
    for output in ("{stem}.zarr", "flow/%06d.flo"):
        assert call(["run", "frames/1.png", "frames/2.png", "-o", output, *tiny]) == 2
        assert "name their folder, or put the glob in quotes" in capsys.readouterr().err
    assert call(["run", "frames/1.png", *STORE, *tiny]) == 1
    assert "1.png is one image: flow needs at least two" in capsys.readouterr().err


def test_quiet_prints_the_error_alone(tiny: list[str], capsys: Capture) -> None:
    assert call(["run", "nowhere.mp4", B, *STORE, *tiny, "-q"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([A, B, "-o", "x.zarr"], 2, "{stem}"),
        ([A, A + "&seed=2", *STORE], 2, "'objects'"),
        ([A, B, "-o", "{stem}.gif"], 2, ".zarr"),
        ([A, B, *STORE, "--weights", "nowhere.pth"], 1, "nowhere.pth"),
        ([A, B, *STORE, "--step", "0"], 2, "step"),
        ([A, B, *STORE, "--manifest", "text"], 1, "text"),
        ([A, B, *STORE, "--stats", "out/flowreel-manifest.json"], 2, "flowreel-manifest.json"),
        ([], 2, ""),
    ],
)
def test_what_is_wrong_with_the_whole_is_one_line(
    arguments: list[str], code: int, words: str, tiny: list[str], capsys: Capture
) -> None:
    Path("text").write_text("no manifest")
    given = arguments if "--weights" in arguments or not arguments else [*arguments, *tiny]
    assert call(["run", *given]) == code
    if arguments:
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert words in err
    assert [path.name for path in Path().iterdir()] == ["text"]


def test_ctrl_c_ends_all_with_130(tiny: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = many.run_one, []

    def interrupted(source: str, *rest: object) -> object:
        calls.append(source)
        if source == B:
            raise KeyboardInterrupt
        return real(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(many, "run_one", interrupted)
    assert call(["run", A, B, "synthetic:parallax?size=64x64", *STORE, *tiny]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "flowreel: interrupted"
    assert calls == [A, B]
    manifest = json.loads(Path("out/flowreel-manifest.json").read_text())
    assert [entry["status"] for entry in manifest["sources"]] == ["done", "interrupted"]
    assert manifest["not_reached"] == ["synthetic:parallax?size=64x64"]


def test_a_terminal_shows_one_bar_for_all(terminal: Any, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.file)
    assert call(["run", A, "nowhere.mp4", B, *STORE, *tiny]) == 1
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.said())
    assert "source 3 of 3, 1 failed" in said
    assert "waits for input" in said
    assert "2 done, 0 skipped, 1 failed" in said
