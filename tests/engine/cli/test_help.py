"""What ``--help``, ``--version`` and shell completion say."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, get_args

import pytest

from flowreel.engine.cli import call
from flowreel.engine.cli.app import command_line
from flowreel.engine.config import Codec
from flowreel.engine.models import MODELS

ROOT: Any = command_line
GROUP = ROOT.commands["weights"]
COMMANDS = [[], ["weights"], *([word] for word in ROOT.commands if word != "bench")]  # bench has a parser of its own
COMMANDS += [["weights", word] for word in GROUP.commands]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_speaks_of_values_only_where_there_are_some(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call([*words, "--help"]) == 0
    said = capsys.readouterr().out
    assert "<bool>" not in said
    assert "list[" not in said
    usage = next(line for line in said.splitlines() if "sage:" in line)
    assert "{" not in usage
    assert "..." not in usage.replace("...", "", 1)


@pytest.mark.parametrize("words", [words for words in COMMANDS if words], ids=" ".join)
def test_help_fits_a_narrow_terminal(words: list[str]) -> None:
    """Paragraphs wrap as a whole, and no example or list, which keep their lines, is wider than 80 columns."""
    command = (GROUP if len(words) == 2 else ROOT).commands[words[-1]]
    for paragraph in command.help.split("\n\n"):
        if paragraph.startswith("\b"):
            assert max(map(len, paragraph.splitlines())) < 80
        else:
            assert "\n" not in paragraph


def test_a_command_without_the_arguments_that_it_needs_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["run"], ["train"], ["weights", "convert"]):
        assert call(words) == 2
        shown = capsys.readouterr()
        assert f"Usage: flowreel {' '.join(words)} " in shown.out
        assert not shown.err


@pytest.mark.parametrize(
    ("command", "name", "choices"),
    [("run", "codec", get_args(Codec)), ("export", "codec", get_args(Codec)), ("run", "model", MODELS)],
)
def test_help_names_every_choice(command: str, name: str, choices: Iterable[str]) -> None:
    (option,) = (one for one in ROOT.commands[command].params if one.name == name)
    assert {*choices} <= {*re.findall(r"\w+", option.help)}


@pytest.mark.parametrize("command", ["export", "color"])
def test_help_tells_the_order_of_files(command: str) -> None:
    inputs = next(one for one in ROOT.commands[command].params if one.param_type_name == "argument")
    assert "natural order" in inputs.help


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"]) == 0
    assert capsys.readouterr().out == f"flowreel {version('flowreel')}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("flowreel ex", {"export"}), ("flowreel run --dir", {"--direction"}), ("flowreel weights c", {"convert"})],
)
def test_bash_is_told_how_a_word_can_end(typed: str, offered: set[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_FLOWREEL_COMPLETE": "complete_bash"}
    code = "from flowreel.engine.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=words, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == offered
    assert not done.stderr
