"""The command line as a person meets it: exit codes, one line an error, help, and what each command prints."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flowreel.engine.cli import call
from flowreel.engine.models import build_model
from flowreel.engine.models.weights import save_weights
from flowreel.sinks import open_store, write_flo

SOURCE = "synthetic:objects?size=96x64&frames=6"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model = build_model("FlowNet2C", width=0.05)
    save_weights(path, model.state_dict(), licence="none", made_by={}, width=0.05)
    return str(path)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_run_says_what_it_did(tiny: str, capsys: Capture) -> None:
    code = call(["run", SOURCE, "-o", "a.zarr", "-o", "b.mp4", "--weights", tiny, "--stats", "new/stats.json"])
    out, err = capsys.readouterr()
    assert (code, out) == (0, "")
    said = " ".join(plain(err).split())
    for words in ("5 flows of 96x64", "FlowNet2C", "fp32", "on cpu", "decoded by synthetic", "smaller than .flo"):
        assert words in said
    stats = json.loads(Path("new/stats.json").read_text())
    assert stats["pairs"] == 5
    for name in ("seconds", "startup_s", "pairs_per_s", "bytes_written", "flo_bytes", "decoder", "device", "batch"):
        assert name in stats
    for name in ("items", "busy_s", "wait_in_s", "wait_out_s", "peak_queue"):
        assert name in stats["stages"][0]


def test_quiet_is_quiet(tiny: str, capsys: Capture) -> None:
    assert call(["run", SOURCE, "-o", "a.zarr", "--weights", tiny, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def one_line(capsys: Capture) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "nowhere.mp4"], 1, "nowhere.mp4"),
        (["run", "empty.mp4"], 1, "empty"),
        (["run", "text.mp4"], 1, "text.mp4"),
        (["run", "frames/*.png"], 1, "png"),
        (["run", SOURCE, "--weights", "nowhere.pth"], 1, "nowhere.pth"),
        (["run", SOURCE, "--weights", "text.mp4"], 1, "text.mp4"),
        (["run", SOURCE, "-o", "x.gif"], 1, ".zarr"),
        (["run", SOURCE, "-o", "text.mp4/x.zarr"], 1, "text.mp4"),
        (["run", SOURCE, "-o", "text.mp4"], 1, "--overwrite"),
        (["run", SOURCE, "--stop", "1"], 1, "two"),
        (["run", SOURCE, "--step", "0"], 2, "step"),
        (["run", SOURCE, "--start", "4", "--stop", "2"], 2, "stop"),
        (["run", SOURCE, "--start", "soon"], 2, "soon"),
        (["run", SOURCE, "--batch", "many"], 2, "batch"),
        (["run", SOURCE, "--max-error", "-1"], 2, "max-error"),
        (["run", SOURCE, "--max-flow", "0"], 2, "max-flow"),
        (["run", SOURCE, "--precision", "fp16", "--device", "cpu"], 2, "fp16"),
        (["run", SOURCE, "--fit", "stretch"], 2, "fit"),
        (["run", SOURCE, "--device", "gpu"], 2, "device"),
        (["run", SOURCE, "--codec", "rar"], 2, "codec"),
        (["run", SOURCE, "--nonsense"], 2, "nonsense"),
        (["run", "synthetic:nothing"], 2, "objects"),
        (["run", "synthetic:objects?speed=3"], 2, "speed"),
        (["jump"], 2, "jump"),
        (["info", "nowhere"], 1, "nowhere"),
        (["info", "text.mp4"], 1, "text.mp4"),
        (["train", "out", "--width", "0"], 2, "width"),
        (["train", "out", "--height", "100"], 2, "64"),
    ],
)
def test_wrong_input_is_one_line_and_a_code(
    arguments: list[str], code: int, words: str, tiny: str, capsys: Capture
) -> None:
    Path("text.mp4").write_text("This is no video.\n" * 20)
    Path("empty.mp4").touch()
    before = sorted(Path().rglob("*"))
    if arguments[0] == "run" and "--weights" not in arguments:
        arguments = [*arguments, "--weights", tiny]
    assert call(arguments) == code
    assert words in one_line(capsys)
    assert sorted(Path().rglob("*")) == before


def test_a_cut_video_fails_in_one_line_and_stays_unfinished(tiny: str, capsys: Capture) -> None:
    call(["run", SOURCE, "-o", "whole.mkv", "--weights", tiny, "-q"])
    whole = Path("whole.mkv").read_bytes()
    Path("cut.mkv").write_bytes(whole[: len(whole) * 4 // 5])
    assert call(["run", "cut.mkv", "-o", "a.zarr", "--weights", tiny, "-q"]) == 1
    assert "--tolerate-truncation" in one_line(capsys)
    assert not Path("a.zarr").exists()
    assert call(["run", "cut.mkv", "-o", "b.zarr", "--weights", tiny, "-q", "--tolerate-truncation"]) == 0
    assert Path("b.zarr").exists()


def test_debug_lets_the_error_through(capsys: Capture) -> None:
    with pytest.raises(FileNotFoundError):
        call(["run", "nowhere.mp4", "--debug"])


def test_help_has_examples_and_every_command(capsys: Capture) -> None:
    assert call(["--help"]) == 0
    said = plain(capsys.readouterr().out)
    for command in ("run", "demo", "info", "train"):
        assert command in said
        assert call([command, "--help"]) == 0
        assert "Usage" in capsys.readouterr().out
    assert call(["run", "--help"]) == 0
    assert "flowreel run dance.mp4" in plain(capsys.readouterr().out)


def test_version(capsys: Capture) -> None:
    assert call(["--version"]) == 0
    assert re.fullmatch(r"flowreel \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_info_of_everything(tiny: str, capsys: Capture) -> None:
    call(["run", SOURCE, "-o", "a.zarr", "-o", "b.mp4", "--weights", tiny, "--quiet"])
    flow = np.zeros((3, 4, 2), np.float32)
    flow[0, 0], flow[2, 3] = (1.5, -2), (2e9, 0)
    write_flo("x.flo", flow)
    facts = {}
    for path in ("a.zarr", "b.mp4", "x.flo", tiny):
        assert call(["info", path]) == 0
        assert capsys.readouterr().out
        assert call(["info", path, "--json"]) == 0
        facts[path] = json.loads(capsys.readouterr().out)
    assert [facts[path]["kind"] for path in facts] == ["store", "video", "flo", "weights"]
    assert (facts["a.zarr"]["flows"], facts["a.zarr"]["complete"]) == (5, True)
    assert (facts["b.mp4"]["width"], facts["b.mp4"]["height"], facts["b.mp4"]["frames"]) == (96, 64, 5)
    assert facts["x.flo"]["first_vector"] == [1.5, -2]
    assert (facts["x.flo"]["unknown"], facts["x.flo"]["min"]) == (1, [0, -2])
    assert facts[tiny]["model"] == "FlowNet2C"


def test_info_of_an_unfinished_store(tiny: str, capsys: Capture) -> None:
    call(["run", SOURCE, "-o", "a.zarr", "--weights", tiny, "--quiet"])
    Path("a.zarr").rename("a.zarr.partial")
    for name in ("a.zarr", "a.zarr.partial"):
        assert call(["info", name, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["complete"], facts["available"]) == (False, 5)


def test_demo(tiny: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowreel.engine import demo
    from flowreel.engine.sources.synthetic import SyntheticConfig

    monkeypatch.setattr(demo, "SCENE", SyntheticConfig("objects", width=128, height=64, frames=5))
    assert call(["demo", "shown", "--weights", tiny]) == 0
    said = capsys.readouterr().out
    assert "error against the truth" in said
    assert ".flo" in said
    for name in ("scene.mp4", "flow.mp4"):
        assert Path("shown", name).exists()
    assert len(open_store("shown/scene.zarr")) == 4
    assert call(["demo", "shown", "--weights", tiny, "--quiet"]) == 0


def test_train_and_use(capsys: Capture) -> None:
    tiny = ["--width", "0.05", "--batch", "2", "--height", "64", "--width-px", "64", "--workers", "0"]
    assert call(["train", "w", "--steps", "2", "--report-every", "1", *tiny]) == 0
    assert "step 2 of 2" in capsys.readouterr().err
    assert call(["train", "w", "--steps", "2", *tiny]) == 1
    assert "--resume" in one_line(capsys)
    assert call(["run", SOURCE, "-o", "a.zarr", "--weights", "w/weights.safetensors", "-q"]) == 0


def spawn(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flowreel", *arguments]
    return subprocess.Popen(command, cwd=Path.cwd(), **options)  # type: ignore[call-overload, no-any-return]


def test_ctrl_c_ends_with_130_and_nothing_finished(tiny: str) -> None:
    endless = "synthetic:still?size=64x64&frames=1000000"
    with spawn("run", endless, "-o", "a.zarr", "--weights", tiny, stderr=subprocess.PIPE) as process:
        while not Path("a.zarr.partial").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "flowreel: interrupted"
    assert b"Traceback" not in err
    assert not Path("a.zarr").exists()


def test_a_terminal_shows_the_live_table(tiny: str) -> None:
    parent, child = pty.openpty()
    source = "synthetic:still?size=64x64&frames=400"
    process = spawn("run", source, "-o", "a.zarr", "--weights", tiny, stderr=child, env={**os.environ, "TERM": "xterm"})
    os.close(child)
    seen = b""
    while True:
        try:
            seen += os.read(parent, 65536)
        except OSError:
            break
    os.close(parent)
    assert process.wait(timeout=120) == 0
    said = plain(seen.decode(errors="replace"))
    assert "waits for input" in said
    assert "decode" in said
    assert "399 flows" in said
