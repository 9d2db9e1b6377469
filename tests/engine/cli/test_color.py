"""``flowreel color`` as a user sees it, in particular one who is used to flow2image."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from flowreel.engine.cli import call
from flowreel.engine.cli.table import Live
from flowreel.engine.outputs import Progress

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """000001.flo to 000003.flo in the working folder."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        put_flo(Path(f"{number:06d}.flo"), number)


def put_flo(path: Path, value: float, height: int = 24, width: int = 32) -> None:
    """All vectors are (value, 0)."""
    flow = np.full((height, width, 2), (value, 0), np.float32)
    path.write_bytes(struct.pack("<f2i", 202021.25, width, height) + flow.tobytes())


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).split())


def names(folder: str) -> list[str]:
    return sorted(file.name for file in Path(folder).iterdir())


def test_as_flow2image_was_called(capsys: Capture) -> None:
    files = sorted(map(str, Path().glob("*.flo")))
    assert call(["color", *files, "-o", "DIR", "-v", "-r", "30"]) == 0
    assert names("DIR") == ["000001.flo.mp4", "000001.flo.png", "000002.flo.png", "000003.flo.png"]
    with av.open("DIR/000001.flo.mp4") as container:
        assert container.streams.video[0].average_rate == 30
        assert len(list(container.decode(video=0))) == 3
    out, err = capsys.readouterr()
    assert out == ""
    for words in ("3 flows painted", "DIR 3 pictures", "DIR/000001.flo.mp4", "full colour at"):
        assert words in plain(err)
    assert err.count("3 pictures") == 1  # not of the video too


def test_other_inputs_and_outputs(capsys: Capture) -> None:
    assert call(["export", ".", "-o", "dance.zarr", "-q"]) == 0
    assert call(["color", "dance.zarr@1:", "-o", "a", "--max-flow", "5", "-q"]) == 0
    assert names("a") == ["dance_000001.png", "dance_000002.png"]
    assert call(["color", "*.flo", "-o", "clip.mp4", "-q", "--max-flow", "auto"]) == 0
    assert call(["color", "000002.flo", "-o", "one.png", "-q"]) == 0
    assert Path("clip.mp4").exists()
    assert Path("one.png").exists()
    assert capsys.readouterr() == ("", "")
    assert call(["color", "000002.flo", "-o", "one.png", "--overwrite"]) == 0
    assert "1 flow painted" in plain(capsys.readouterr().err)


def test_options_of_a_video_that_is_not_made_are_noted(capsys: Capture) -> None:
    assert call(["color", "000001.flo", "-o", "a", "-r", "30", "--encoder", "cpu"]) == 0
    said = plain(capsys.readouterr().err)
    assert "note: frame-rate has no effect here: no video is made (-v makes one)" in said
    assert "note: encoder has no effect here: it is for X.mp4, X.mkv" in said
    assert call(["color", "000001.flo", "000002.flo", "-o", "b", "-v", "-r", "30", "--encoder", "cpu"]) == 0
    assert "no effect" not in plain(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.flo", "-o", "out"], 1, "nowhere.flo"),
        (["text.flo", "-o", "out"], 1, "text.flo"),
        (["*.tiff", "-o", "out"], 1, "*.tiff"),
        (["000001.flo"], 2, "output"),
        (["-o", "out"], 2, "IN"),
        (["000001.flo", "-o", "out.gif"], 2, "folder"),
        (["*.flo", "-o", "out.png"], 2, "one flow"),
        (["000001.flo", "-o", "out", "--max-flow", "0"], 2, "max-flow"),
        (["000001.flo", "-o", "out", "--max-flow", "big"], 2, "max-flow"),
        (["000001.flo", "-o", "out", "-v", "-r", "-1"], 2, "frame-rate"),
        (["000001.flo", "other/000001.flo", "-o", "out"], 2, "000001.flo.png"),
        (["000001.flo", "other/000009.flo", "-o", "out.mp4"], 1, "one size"),
    ],
)
def test_wrong_input_is_one_line_and_a_code(arguments: list[str], code: int, words: str, capsys: Capture) -> None:
    Path("text.flo").write_text("no flow")
    Path("other").mkdir()
    put_flo(Path("other/000001.flo"), 1)
    put_flo(Path("other/000009.flo"), 1, height=5)
    before = sorted(Path().rglob("*"))
    assert call(["color", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert words in err
    assert sorted(Path().rglob("*")) == before


def test_ctrl_c_ends_with_130_and_no_video(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: Live, progress: Progress) -> None:
        if progress.flows_done >= 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Live, "show", stop)
    assert call(["color", ".", "-o", "out", "-v"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "flowreel: interrupted"
    assert "000001.flo.png" in names("out")
    assert not [name for name in names("out") if not name.endswith(".flo.png")]


def test_help_has_examples(capsys: Capture) -> None:
    assert call(["color", "-h"]) == 0
    said = plain(capsys.readouterr().out)
    for words in ("flowreel color *.flo -o colors -v -r 30", "--max-flow", "30 for files"):
        assert words in said
