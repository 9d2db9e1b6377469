"""``flowreel export`` as a user sees it."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from flowreel.engine.cli import call
from flowreel.sinks import open_store, read_flo

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``flows`` with 0.flo to 4.flo in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("flows").mkdir()
    for number in range(5):
        put_flo(Path("flows") / f"{number}.flo", number)


def put_flo(path: Path, value: float) -> None:
    """A field of 8x6 vectors, all (value, -value)."""
    flow = np.full((6, 8, 2), (value, -value), np.float32)
    path.write_bytes(struct.pack("<f2i", 202021.25, 8, 6) + flow.tobytes())


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).split())


def test_a_folder_to_a_store_and_a_slice_of_it_back(capsys: Capture) -> None:
    assert call(["export", "flows", "-o", "a.zarr", "--max-error", "0", "-r", "30"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "5 flows of 8x6 from flows" in plain(err)
    assert "as .flo 2.0 kB" in plain(err)
    assert re.search(r"a\.zarr \d+\.\d [kM]B, \d+\.\dx (smaller|larger) than \.flo", plain(err))
    assert "note" not in err
    assert open_store("a.zarr").timestamps_s[3] == 0.1
    arguments = ["-o", "b/%d.flo", "-o", "b.zarr", "--codec", "pcodec", "--stats", "new/stats.json"]
    assert call(["export", "a.zarr@1:", "--start", "1", "--stop", "-1", *arguments]) == 0
    assert [read_flo(f"b/{number}.flo")[0, 0, 0] for number in range(2)] == [2, 3]
    assert not Path("b/2.flo").exists()
    assert open_store("b.zarr").attrs["codec"] == "pcodec"
    stats = json.loads(Path("new/stats.json").read_text())
    assert (stats["flows"], len(stats["outputs"])) == (2, 2)


def test_many_files_as_a_shell_gives_them(capsys: Capture) -> None:
    files = sorted(map(str, Path("flows").glob("*.flo")), reverse=True)
    assert call(["export", *files, "-o", "a.zarr", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert [flow[0, 0, 0] for flow in open_store("a.zarr")] == [0, 1, 2, 3, 4]
    assert call(["export", "a.zarr", "-o", "c/%d.npz"]) == 0
    assert "note: the flow was stored within 0.015625 px" in plain(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.zarr", "-o", "a.zarr"], 1, "nowhere.zarr"),
        (["flows/*.png", "-o", "a.zarr"], 1, "flows/*.png"),
        (["flows", "-o", "a.gif"], 2, ".zarr"),
        (["flows", "-o", "flows/%d.flo"], 2, "replace"),
        (["flows", "-o", "flows/0.flo/x.zarr"], 1, "cannot write"),
        (["flows"], 2, "output"),
        (["-o", "a.zarr"], 2, "SOURCE"),
        (["flows", "-o", "a.zarr", "--start", "5"], 2, "no flow lies in 5:"),
        (["flows", "-o", "a.zarr", "--start", "10s"], 2, "start"),
        (["flows", "-o", "a.zarr", "-r", "0"], 2, "frame-rate"),
        (["flows", "-o", "a.zarr", "--codec", "rar"], 2, "codec"),
        (["flows", "-o", "a.mp4", "--max-flow", "big"], 2, "max-flow"),
        (["flows", "-o", "a.zarr", "--bound", "0"], 2, "bound"),
        (["flows", "-o", "a.zarr", "--queue-mb", "0"], 2, "queue-mb"),
        (["flows", "flows", "-o", "a.zarr"], 2, "folder"),
    ],
)
def test_wrong_input_is_one_line_and_a_code(arguments: list[str], code: int, words: str, capsys: Capture) -> None:
    before = sorted(Path().rglob("*"))
    assert call(["export", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert words.lower() in err.lower()
    assert sorted(Path().rglob("*")) == before


def test_overwrite_and_debug(capsys: Capture) -> None:
    assert call(["export", "flows", "-o", "a.zarr", "-q"]) == 0
    assert call(["export", "flows", "-o", "a.zarr", "-q"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert call(["export", "flows/3.flo", "-o", "a.zarr", "-q", "--overwrite"]) == 0
    assert len(open_store("a.zarr")) == 1
    assert call(["export", "flows", "-o", "a.zarr", "--debug"]) == 1
    assert "OutputExistsError" in capsys.readouterr().err


def test_help_has_examples(capsys: Capture) -> None:
    assert call(["export", "--help"]) == 0
    said = plain(capsys.readouterr().out)
    for words in ("flowreel export dance.zarr -o flows/%06d.flo", "--frame-rate", "--bound", "[default: 25]"):
        assert words in said
