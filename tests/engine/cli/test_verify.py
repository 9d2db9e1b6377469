"""``flowreel verify``: exit code 0 for sound stores; 1 for others, with the flows and frames concerned."""

from __future__ import annotations

import json
import os
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowreel
from flowreel.engine import verify as verifying
from flowreel.engine.cli import call
from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.verify import Finding, merged, verify
from flowreel.sinks import open_sink
from flowreel.sinks.store_check import StoreProblem

H, W, SHARD, COUNT = 4, 6, 3, 8
Capture = pytest.CaptureFixture[str]


def make(name: str, announced: int = COUNT, complete: bool = True) -> None:
    """Flows of every second frame, in shards of three."""
    sink = open_sink(name, SinkConfig(shard_bytes=SHARD * 8 * H * W))
    sink.open(FlowInfo(H, W, Fraction(25), announced + 1, SourceId("clip.mp4")))
    frame = 2 * np.arange(COUNT)
    flow = torch.empty(COUNT, 2, H, W).uniform_(-9, 9, generator=torch.Generator().manual_seed(0))
    sink.write(FlowBatch(flow, 0, frame, frame + 2, frame / 25, (frame + 2) / 25))
    sink.commit(complete)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    make(str(folder / "a.zarr"))
    make(str(folder / "cut.zarr"), announced=20, complete=False)
    return folder


@pytest.fixture(autouse=True)
def _here(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of both stores in the working folder, to be damaged."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def damage() -> None:
    """Removes flows 3 to 5 and flips one bit of flow 7."""
    shutil.rmtree("a.zarr/flow/c/1")
    shard = Path("a.zarr/flow/c/2/0/0/0")
    data = bytearray(shard.read_bytes())
    offset, length = np.frombuffer(data, "<u8", 6, len(data) - 52).reshape(3, 2)[1]
    data[int(offset + length // 2)] ^= 16
    shard.write_bytes(data)


def test_on_a_terminal_the_bar_is_gone_before_the_result(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal.file)
    monkeypatch.setattr(sys, "stderr", terminal.file)
    name = "[/b]a.zarr"  # which looks like markup
    os.mkdir("[")
    os.rename("a.zarr", name)
    assert call(["verify", name, "-q"]) == 0
    assert call(["verify", name]) == 0
    before, _, _ = terminal.said().partition(f"{name}: sound, 8 flows")
    assert name in before  # the bar
    assert before.count("\x1b[?25l") == 1  # the cursor was hidden once: with -q there is no bar
    assert before.endswith("\x1b[2K")  # and its line was wiped


def test_sound_stores(capsys: Capture) -> None:
    shutil.copytree("a.zarr", "b.zarr")
    assert call(["verify", "a.zarr", "b.zarr"]) == 0
    assert capsys.readouterr() == ("a.zarr: sound, 8 flows of 6x4\nb.zarr: sound, 8 flows of 6x4\n", "")
    assert call(["verify", "a.zarr", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_damage_is_listed_with_flows_and_frames(capsys: Capture) -> None:
    damage()
    assert call(["verify", "a.zarr"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "a.zarr: 2 things wrong",
        "  flows 3 to 5 (frames 6 to 10): missing",
        "  flow 7 (frame 14): checksum is wrong",
    ]
    assert err == ""


def test_an_unfinished_store_says_how_far(capsys: Capture) -> None:
    for quiet in ([], ["-q"]):
        assert call(["verify", "cut.zarr", *quiet]) == 1
        assert capsys.readouterr().out == "cut.zarr: unfinished: 8 of 20 flows are there\n"


def test_a_cache_says_how_full_it_is(tiny_weights: str, capsys: Capture) -> None:
    with flowreel.open("synthetic:still?size=64x64&frames=5", weights=tiny_weights, cache="c", device="cpu") as flow:
        flow[1:3]
    assert call(["verify", "c"]) == 0
    assert capsys.readouterr().out == "c: sound, 2 of 4 flows of 64x64\n"


def test_one_bad_store_does_not_hide_the_others(capsys: Capture) -> None:
    damage()
    Path("metadata.zarr").mkdir()
    Path("metadata.zarr/zarr.json").write_text("{}")
    assert call(["verify", "nowhere.zarr", "metadata.zarr", "a.zarr", "cut.zarr", "--json"]) == 1
    out, err = capsys.readouterr()
    nowhere, metadata, damaged, unfinished = json.loads(out)
    assert err == ""
    assert "no flow store" in nowhere["findings"][0]["what"]
    assert "not a flow store" in metadata["findings"][0]["what"]
    assert (damaged["sound"], damaged["complete"], damaged["flows"], damaged["available"]) == (False, True, 8, 8)
    assert (damaged["width"], damaged["height"]) == (W, H)
    assert damaged["findings"] == [
        {"what": "missing", "first_flow": 3, "last_flow": 5, "first_frame": 6, "last_frame": 10},
        {"what": "checksum is wrong", "first_flow": 7, "last_flow": 7, "first_frame": 14, "last_frame": 14},
    ]
    assert (unfinished["folder"], unfinished["flows"], unfinished["available"]) == ("cut.zarr.partial", 20, 8)


@pytest.mark.parametrize(
    ("entry", "instead", "words"),
    [
        ('"scale_factor": 0.03125', '"scale_factor": 0.5', "(scaling: expected {'scale_factor': 0.03125,"),
        ('"fill_value"', '"empty_value"', "(no entry 'fill_value')"),
        ('"blosc"', '"gzip"', "(codecs 'bytes + gzip + crc32c' are not flowreel's: open it with zarr-python)"),
    ],
)
def test_edited_metadata_is_told_in_words(entry: str, instead: str, words: str, capsys: Capture) -> None:
    metadata = Path("a.zarr/flow/zarr.json")
    metadata.write_text(metadata.read_text().replace(entry, instead))
    assert call(["verify", "a.zarr"]) == 1
    said = capsys.readouterr().out
    assert f"the array 'flow' is not laid out as flowreel does {words}" in said
    assert "Error(" not in said


def test_a_folder_that_cannot_be_listed_ends_one_store_only(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    damage()
    real = os.listdir

    def listdir(folder: Any) -> list[str]:
        if Path(folder).parts[-3:] == ("a.zarr", "frame", "c"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    assert call(["verify", "a.zarr", "cut.zarr"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "flow 7 (frame 14): checksum is wrong" in lines[2]
    assert lines[3].endswith("a.zarr/frame/c cannot be listed (Permission denied)")
    assert lines[4].startswith("cut.zarr: unfinished")


def test_json_of_a_sound_store(capsys: Capture) -> None:
    assert call(["verify", "--json", "a.zarr"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["path"], one["sound"], one["findings"]) == ("a.zarr", True, [])


def test_wrong_usage_and_help(capsys: Capture) -> None:
    assert call(["verify", "--no-such-option", "a.zarr"]) == 2
    assert call(["verify", "--help"]) == 0
    assert "Exit code 0" in capsys.readouterr().out


def test_progress_counts_flows() -> None:
    seen: list[tuple[int, int]] = []
    assert verify("a.zarr", lambda *progress: seen.append(progress)).sound
    assert seen == [(number, COUNT) for number in range(1, COUNT + 1)]
    assert verifying.verify(Path("a.zarr")).path == "a.zarr"


def test_neighbours_with_the_same_trouble_are_one_finding() -> None:
    problems: Any = [
        StoreProblem("unfinished"),
        StoreProblem("missing", 0, None),
        StoreProblem("missing", 1, 2),
        StoreProblem("missing", 3, 6),
        StoreProblem("cut", 4, 8),
        StoreProblem("worn", 5, 10),
        StoreProblem("worn", 6, None),
        StoreProblem("elsewhere"),
    ]
    found = list(merged(iter(problems)))
    assert [str(finding) for finding in found] == [
        "unfinished",
        "flows 0 to 1: missing",
        "flow 3 (frame 6): missing",
        "flow 4 (frame 8): cut",
        "flows 5 to 6: worn",
        "elsewhere",
    ]
    assert found[1] == Finding("missing", 0, 1, None, 2)
