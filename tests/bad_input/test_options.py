"""Every option of run, export and color with values that nobody should give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flowreel.sinks import write_flo

Answer = dict[str, Any]
Catalogue = Any  # the fixture of conftest.py

ANY = (
    "",
    " ",
    "-1",
    "0",
    "nan",
    "9" * 400,
    "9" * 5000,
    "x" * 10_000,
    "\x1b[31m",
    "a\nb",
    "\0",
    "\udcff",
    "☃",
    "%s",
    "--",
)
NUMBERS = (
    *("-0", "0.5", "1e-320", "1e308", "1e999", "-1e999", "inf", "-inf", "1/0", "0/0", "1/3", "9" * 19, "-" + "9" * 19),
    *("1_000", "+1", "0x10", "1e3", "\u0967", "²", "½", "1,5", "true", "None", "AUTO", "1\0"),
)
TIMES = (
    "s",
    "-1s",
    "infs",
    "nans",
    "1:2:3:4",
    "99:99:99",
    "1e9s",
    "9" * 400 + "s",
    "9" * 400 + ":0:0",
    "9" * 5000 + ":0",
)
DEVICES = ("cuda:99", "cuda:-1", "cuda:x", "cuda:" + "9" * 30, "cpu:0", "mps", "meta", "CPU", "cuda,cpu")
PATHS = (
    "/",
    ".",
    "..",
    "/dev/null",
    "/dev/full",
    "/dev/zero",
    "/nowhere\0",
    "x.flo",
    "x.flo/y",
    "a.zarr",
    "a.zarr/x",
    "~",
)
OF_NUMBERS = ("batch", "step", "stream", "max-error", "max-flow", "bound", "queue-mb", "frame-rate", "start", "stop")
COMMANDS = {
    "run": ["run", "synthetic:objects?size=64x64&frames=2", "--weights", "TINY", "-q"],
    "export": ["export", "x.flo", "-q"],
    "color": ["color", "x.flo", "-q"],
}
OUTPUTS = {"run": "a.zarr", "export": "a.zarr", "color": "a"}


def options(command: str) -> Iterator[tuple[str, bool]]:
    """Every option of a command and whether it is a flag, from the command itself."""
    import typer.main

    from flowreel.engine.cli.app import app

    for parameter in typer.main.get_command(app).commands[command].params:  # type: ignore[attr-defined]
        if parameter.opts[0].startswith("-"):
            yield max(parameter.opts, key=len), bool(getattr(parameter, "is_flag", False))


def values(option: str) -> list[str]:
    name = option.removeprefix("--")
    more = NUMBERS if name in OF_NUMBERS else ()
    more += TIMES if name in ("start", "stop") else DEVICES if name == "device" else ()
    return [*ANY, *more, *(PATHS if name in ("stats", "manifest", "weights") else ())]


ALL = [(command, option, flag) for command in COMMANDS for option, flag in options(command) if option != "--output"]


def finished(answer: Answer) -> bool:
    """Whatever was made of the value: a command that ends well has written what it should."""
    return any((answer["folder"] / name).exists() for name in ("a.zarr", "a", "stem.zarr")) or bool(answer["out"])


@pytest.fixture(scope="module")
def flo(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("flow") / "x.flo"
    write_flo(path, np.ones((4, 6, 2), np.float32))
    return path.read_bytes()


@pytest.mark.parametrize(("command", "option", "flag"), ALL, ids=lambda value: str(value))
def test_values(command: str, option: str, flag: bool, catalogue: Catalogue, tiny: str, flo: bytes) -> None:
    base = [tiny if word == "TINY" else word for word in COMMANDS[command]]
    base += ["-o", OUTPUTS[command]]
    if flag:
        catalogue.call(option, [*base, f"{option}=1"], {"x.flo": flo})
        catalogue.call(option, [*base, f"{option}="], {"x.flo": flo})
        catalogue.judge(2)
        return
    for value in values(option):
        files = {"x.flo": flo}
        catalogue.call(f"{option} {value[:30]!r}", [*base, f"{option}={value}"], files, right=finished)
    catalogue.call(f"{option} without a value", [*base, option], {"x.flo": flo})
    catalogue.call(f"{option} twice", [*base, option, "1", option, "x"], {"x.flo": flo}, right=finished)
    catalogue.judge(17)


@pytest.mark.parametrize("option", ["--start", "--stop", "--step", "--stream"])
def test_values_for_a_stream(option: str, catalogue: Catalogue, tiny: str) -> None:
    """Of stdin nobody knows how long it is: there is nothing to hold a number against."""
    stream = b"YUV4MPEG2 W64 H64 F25:1 Cmono\n" + (b"FRAME\n" + bytes(4096)) * 2
    for value in values(option):
        command = ["run", "-", "-o", "a.zarr", "--weights", tiny, "-q", f"{option}={value}"]
        catalogue.call(f"{option} {value[:30]!r}", command, stdin=stream, right=finished)
    catalogue.judge(30)
