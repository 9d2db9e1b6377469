"""``flowreel weights`` as a user sees it. Downloads come from a server that the tests run."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from flowreel.engine.cli import call
from flowreel.engine.cli.weights import _Meter
from flowreel.engine.models import build_model, checkpoints
from flowreel.engine.models import download as downloads
from flowreel.engine.models.checkpoints import Checkpoint, Source
from flowreel.engine.models.web import Manners
from flowreel.engine.models.weights import read_weights

Capture = pytest.CaptureFixture[str]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWREEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with a narrow FlowNet2C's checkpoint, and the address it is served at."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    state = build_model("FlowNet2C", width=0.05).state_dict()
    torch.save({"epoch": 0, "state_dict": state, "best_EPE": 1e10}, folder / "c.pth.tar")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def table(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> list[Checkpoint]:
    """Two checkpoints are known: one that is served, and one whose only link is dead."""
    folder, address = served
    path = folder / "c.pth.tar"
    size, sha256 = path.stat().st_size, checkpoints.file_sha256(path)
    known = [
        Checkpoint(
            name, "FlowNet2C", f"{name}.pth.tar", size, size, sha256, (Source(f"at {file}", f"{address}/{file}"),)
        )
        for name, file in (("Here-C", "c.pth.tar"), ("Gone-C", "nothing"))
    ]
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tuple(known))
    monkeypatch.setattr(downloads, "MANNERS", Manners(schemes=("http",), sleep=lambda seconds: None))
    return known


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def facts(capsys: Capture, *arguments: str) -> object:
    assert call([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list(capsys: Capture) -> None:
    assert call(["weights", "list"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert len(lines) == 9
    shipped = read_weights("baseline")
    assert lines[1].split()[:2] == ["baseline", shipped.model]
    assert lines[1].split()[4] == "shipped"
    assert shipped.sha256 in lines[1]
    assert "bc30f54f76aa4c726faada81c9fe5e62da22bfe467f1d65bacd613ba6be53e73" in lines[2]
    assert lines[8].endswith("not known")
    assert " ~" in lines[8]  # nor its exact size
    listed = facts(capsys, "weights", "list")
    assert isinstance(listed, list)
    assert [one["name"] for one in listed][::7] == ["baseline", "FlowNet2-SD"]
    assert {one["downloaded"] for one in listed} == {False}


def test_info(capsys: Capture) -> None:
    assert call(["weights", "info", "baseline"]) == 0
    out = capsys.readouterr().out
    for words in ("FlowNet2C", "Apache-2.0", "sha256", "trained on"):
        assert words in out
    told = facts(capsys, "weights", "info", "baseline")
    assert isinstance(told, dict)
    assert (told["model"], told["also_runs"], told["batch_norm"]) == ("FlowNet2CSS", ["FlowNet2C", "FlowNet2CS"], False)
    assert told["parameters"] > 100_000


def test_each_stage_of_a_training_has_a_line(capsys: Capture) -> None:
    assert call(["weights", "info", "baseline"]) == 0
    said = capsys.readouterr().out
    lines = said[said.index("    stages ") + len("    stages ") : said.index("    note ")].splitlines()
    assert [line.split()[:2] for line in lines] == [[str(number), "model"] for number in range(1, len(lines) + 1)]
    assert len(lines) > 1
    assert call(["info", "baseline"]) == 0
    assert lines[1] in capsys.readouterr().out


def test_what_a_file_says_does_not_steer_the_terminal(capsys: Capture) -> None:
    from flowreel.engine.models.saving import save_weights

    state = build_model("FlowNet2S", width=0.05).state_dict()
    save_weights("x.safetensors", state, licence="\x1b[2Jnone", made_by={"\x1bby": ["\x07"]})
    assert call(["weights", "info", "x.safetensors"]) == 0
    out = capsys.readouterr().out
    assert r"\x1b[2Jnone" in out
    assert "\x1b" not in out
    assert "\x07" not in out


def test_convert(capsys: Capture) -> None:
    assert call(["weights", "convert", "baseline", "new/b.pth.tar"]) == 0
    assert "FlowNet2C" in capsys.readouterr().out
    assert set(torch.load("new/b.pth.tar", weights_only=True)) >= {"epoch", "state_dict", "best_EPE"}
    assert call(["weights", "convert", "new/b.pth.tar", "c.safetensors", "--half"]) == 0
    assert call(["weights", "convert", "new/b.pth.tar", "c.safetensors"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert call(["weights", "convert", "new/b.pth.tar", "c.safetensors", "--overwrite"]) == 0
    capsys.readouterr()
    told = facts(capsys, "weights", "info", "c.safetensors")
    assert isinstance(told, dict)
    assert told["licence"] == "Apache-2.0"
    assert [one["name"] for one in told["made_by"]["converted_from"]] == ["baseline", "b.pth.tar"]


def test_download_and_use(table: list[Checkpoint], capsys: Capture) -> None:
    source = "synthetic:still?size=64x64&frames=3"
    assert call(["run", source, "-o", "a.zarr", "--weights", "here-c", "-q"]) == 1
    assert "flowreel weights download Here-C" in capsys.readouterr().err
    assert call(["weights", "download", "Here-C", "--accept-licence"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{table[0].path}\n"
    for words in ("Here-C from at c.pth.tar", " kB of ", "sha256 are right"):
        assert words in plain(err)
    assert call(["run", source, "-o", "a.zarr", "--weights", "here-c", "-q"]) == 0
    listed = facts(capsys, "weights", "list")
    assert isinstance(listed, list)
    assert [one["downloaded"] for one in listed] == [False, True, False]
    told = facts(capsys, "weights", "info", "Here-C")
    assert isinstance(told, dict)
    assert (told["known_as"], told["licence"]) == ("Here-C", table[0].licence)
    assert call(["weights", "download", "Here-C", "--accept-licence", "-q", "-o", "mine.pth.tar"]) == 0
    assert capsys.readouterr() == ("mine.pth.tar\n", "")
    assert Path("mine.pth.tar").read_bytes() == table[0].path.read_bytes()
    assert call(["weights", "download", "Here-C", "--accept-licence", "-q", "-o", "new/"]) == 0
    assert capsys.readouterr() == ("new/Here-C.pth.tar\n", "")
    Path("mine.pth.tar").rename("mi:on:\x1bne.pth.tar")
    assert call(["weights", "download", "Here-C", "--accept-licence", "-o", "mi:on:\x1bne.pth.tar"]) == 0
    assert capsys.readouterr().err == "mi:on:\\x1bne.pth.tar is already there and right\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_shows_a_bar(
    quiet: bool, table: list[Checkpoint], terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.file)
    assert call(["weights", "download", "Here-C", "--accept-licence", *["-q"] * quiet]) == 0
    seen = terminal.said()
    if quiet:
        assert seen == ""
        return
    assert re.search(r"━ ([\d.]+)/\1 [kM]B ", plain(seen))
    assert " kB of " not in seen  # the bar says it
    assert seen.rfind("\x1b[1A\x1b[2K") > seen.rfind("━")  # the bar is gone at the end,
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")  # and the cursor back


def test_elsewhere_there_is_a_line_for_every_tenth(capsys: Capture) -> None:
    with _Meter(quiet=False) as meter:
        meter.show(5, None)  # how much there is to come is not known yet
        for done in range(0, 100_000, 3_000):
            meter.show(done, 100_000)
    (bar,) = meter.progress.tasks  # what a terminal would show
    assert (bar.completed, bar.total) == (99_000, 100_000)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{percent}.0 kB of 100.0 kB" for percent in (12, 24, 36, 48, 60, 72, 84, 96)]


def test_a_dead_link(table: list[Checkpoint], capsys: Capture) -> None:
    assert call(["weights", "download", "Gone-C", "--accept-licence", "-q"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    for words in ("HTTP 404", "at nothing", "By hand", str(table[1].sha256)):
        assert words in err
    assert not list(Path().rglob("*.pth.tar*"))


class Answer(io.StringIO):
    """Stands for a terminal at which somebody types this."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("typed", "code"), [("y\n", 0), ("Yes\n", 0), ("n\n", 1), ("\n", 1), ("", 130)])
def test_the_licence_is_asked_for(
    typed: str, code: int, table: list[Checkpoint], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Answer(typed))
    assert call(["weights", "download", "Here-C"]) == code
    out, err = capsys.readouterr()
    assert "research only" in err
    assert "CVPR 2017" in err
    assert table[0].path.exists() == (code == 0)
    assert out == (f"{table[0].path}\n" if code == 0 else "")


@pytest.mark.parametrize("closed", [False, True])
def test_nobody_to_ask(closed: bool, table: list[Checkpoint], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", None if closed else nobody)
        assert call(["weights", "download", "Here-C"]) == 2
    err = capsys.readouterr().err
    assert "--accept-licence" in err
    assert "research only" in err
    assert not table[0].path.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["info", "nowhere.pth"], 1, "nowhere.pth"),
        (["info", "FlowNet2"], 1, "weights download FlowNet2"),
        (["info", "text.pth"], 1, "text.pth"),
        (["convert", "nowhere.pth", "x.safetensors"], 1, "nowhere.pth"),
        (["convert", "baseline", "x.onnx"], 2, "X.safetensors or X.pth.tar"),
        (["convert", "baseline", "x.pth.tar", "--half"], 2, "half"),
        (["convert", "baseline", "text.pth/x.pth.tar"], 1, "cannot write"),
        (["download", "FlowNet3", "--accept-licence"], 2, "FlowNet2-CSS-ft-sd"),
        (["download", "baseline", "--accept-licence"], 2, "shipped"),
        (["download", "FlowNet2", "-o", "x.safetensors", "--accept-licence"], 2, "convert"),
        (["download", "FlowNet2", "-o", "text.pth", "--accept-licence"], 1, "650102505"),
        (["jump"], 2, "jump"),
    ],
)
def test_wrong_input_is_one_line_and_a_code(arguments: list[str], code: int, words: str, capsys: Capture) -> None:
    Path("text.pth").write_text("These are no weights.\n" * 20)
    assert call(["weights", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert words in err
    assert [path.name for path in Path().rglob("*")] == ["text.pth"]


@pytest.mark.parametrize("command", ["list", "info", "convert", "download"])
def test_help_has_examples(command: str, capsys: Capture) -> None:
    assert call(["weights", command, "--help"]) == 0
    assert f"flowreel weights {command}" in plain(capsys.readouterr().out)
