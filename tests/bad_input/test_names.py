"""Hostile names, which look like terminal control, shell code, format strings or globs; and names of non-files."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowreel.sinks import write_flo

Answer = dict[str, Any]
Catalogue = Any  # the fixture of conftest.py

NAMES = (
    *("a\nb", "a\rb", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\x00b", "a\tb", "a\x7fb", "a\x85b", "a\u2028b"),
    *("a\u202eb", "\udcff\udcfe", "-x", "--overwrite", "--debug=1", "-", "--", "~", "$HOME", "`id`", "$(id)", "a;b"),
    *("a|b", "a&b", "'", '"', "\\", "%s", "%d", "%n%n", "%999999999d", "%06d", "{}", "{0}", "{stem}", "{stem!r}"),
    *("{0.__class__}", "{", "[bold]red[/bold]", "[/]", "*", "?", "[", "[a-z", "**/*", "[!x]", "{a,b}", "x@1:2"),
    *("http://127.0.0.1:9/x", "file:x", "concat:x|y", "pipe:0", "fd:0", "synthetic:", "synthetic:\x1b[31m", "baseline"),
    *("synthetic:objects?size=1x1", "synthetic:objects?frames=999999999999", ".", "..", "../..", "/", "//", "", " "),
    *("CON", "a" * 256, "é" * 200, "a/" * 3000, "☃", "🎬" * 70, "x" * 100_000),
)
ENDINGS = ("", ".mp4", ".flo", ".zarr", ".safetensors", ".png")
COMMANDS = (
    ["info", "--", "NAME"],
    ["info", "--json", "--", "NAME"],
    ["run", "-o", "a.zarr", "-q", "--weights", "TINY", "--", "NAME"],
    ["export", "-o", "a.zarr", "--", "NAME"],
    ["color", "-o", "a", "--", "NAME"],
    ["run", "synthetic:objects?size=64x64&frames=2", "-o", "a.zarr", "--weights", "NAME"],
    ["weights", "info", "--", "NAME"],
    ["weights", "convert", "--", "NAME", "a.safetensors"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_nothing_is_there(command: list[str], catalogue: Catalogue, tiny: str) -> None:
    shipped = bool if "info" in command or "weights" in command or "--weights" in command else None
    for place, name in enumerate(NAMES):
        full = name + ENDINGS[place % len(ENDINGS)]
        arguments = [{"NAME": full, "TINY": tiny}.get(word, word) for word in command]
        catalogue.call(f"{full[:40]!r}", arguments, right=shipped if name == "baseline" else None)
    catalogue.judge(70)


def can_be(name: str) -> bool:
    return "\0" not in name and "/" not in name and name not in ("", ".", "..") and len(os.fsencode(name)) < 240


def test_files_of_hostile_names(catalogue: Catalogue, tmp_path: Path, tiny: str) -> None:
    """Sound files with such names are read like any others; errors of damaged ones show the name harmlessly."""
    write_flo(tmp_path / "x.flo", np.ones((4, 6, 2), np.float32))
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    flo, png = ((tmp_path / name).read_bytes() for name in ("x.flo", "x.png"))
    run = ["run", "-o", "a.zarr", "--weights", tiny]
    for name in filter(can_be, NAMES):
        sound = os.fsencode(name + ".flo").decode("utf-8", "surrogateescape")
        code = None if name == "-" or name.startswith("synthetic:") else 0  # these do not mean files
        catalogue.call(f"{name!r}, sound", ["info", "--", sound], {sound: flo}, right=bool, code=code)
        catalogue.call(f"{name!r}, cut", ["info", "--", sound], {sound: flo[:-1]})
        catalogue.call(f"{name!r}, color", ["color", "-o", "a", "--", sound], {sound: flo}, right=bool, code=0)
        folder = {f"{name}/0.png": png, f"{name}/1.png": png, f"{name}/2.png": png[:40]}
        catalogue.call(f"{name!r}, a folder", ["info", "--", name], folder)
        del folder[f"{name}/2.png"]
        catalogue.call(f"{name!r}, a run", [*run, "--", name], folder, right=bool, code=code)
    catalogue.judge(250)


def test_several_inputs_of_hostile_names(catalogue: Catalogue, tmp_path: Path, tiny: str) -> None:
    """Messages about several inputs and about stores show hostile names harmlessly too."""
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    png = (tmp_path / "x.png").read_bytes()
    for name in filter(can_be, NAMES):
        folder = {f"{name}/0.png": png, f"{name}/1.png": png}
        run = ["run", "-o", "{stem}.zarr", "--weights", tiny]
        may_write = ["flowreel-manifest.json"]
        for more in ((), ("-q",)):
            command = [*run, *more, "--", name, "nowhere"]
            may_write += list_of_store(f"{name}.zarr")
            catalogue.call(f"{name!r}, {more}", command, folder, may_write=may_write, wordy=True)
        catalogue.call(
            f"{name!r}, to", ["run", *run[3:], "-o", f"./{name}.zarr", "--", name], folder, right=bool, wordy=True
        )
        catalogue.call(f"{name!r}, info", ["info", "--", name, "nowhere"], folder, wordy=True)
        catalogue.call(f"{name!r}, verify", ["verify", "--", f"{name}.zarr", name], folder, wordy=True)
    catalogue.judge(200)


def list_of_store(name: str) -> list[str]:
    """The names of all files in a store of one flow."""
    arrays = ("flow", "frame", "frame_to", "timestamp_s", "timestamp_to_s", "flow_crc32c", "time_crc32c")
    chunks = [f"{array}/c/0{'/0/0/0' if array == 'flow' else ''}" for array in arrays]
    return [f"{name}/{file}" for file in ("zarr.json", *(f"{array}/zarr.json" for array in arrays), *chunks)]


def test_outputs_of_hostile_names(catalogue: Catalogue, tmp_path: Path) -> None:
    write_flo(tmp_path / "x.flo", np.ones((4, 6, 2), np.float32))
    flo = (tmp_path / "x.flo").read_bytes()
    for name, ending in itertools.product(NAMES, (".zarr", ".mp4", "/%06d.flo", "%06d.png", ".gif")):
        if not (name + ending).startswith(("/", "..")):  # nothing is to be written outside the case's folder
            files = {"x.flo": flo}
            catalogue.call(f"{name[:40]!r}{ending}", ["export", "x.flo", f"--output={name}{ending}"], files, right=bool)
    for output in (
        "a",
        "a/..",
        ".",
        "..",
        "",
        "x.flo",
        "./x.flo",
        "x.flo/a.zarr",
        ".zarr",
        "/.zarr/x",
        "a.zarr/b.zarr/",
    ):
        files = {"x.flo": flo}
        catalogue.call(f"{output!r}", ["export", "x.flo", "-o", output], files, right=bool)
    catalogue.judge(300)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        place = os.getcwd()
        os.chdir(path.parent)  # because a socket's path may have at most 107 bytes
        try:
            listening.bind(path.name)
        finally:
            os.chdir(place)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a socket": a_socket,
    "a folder": lambda path: path.mkdir(),
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: path.symlink_to("/dev/null"),
    "noise": lambda path: path.symlink_to("/dev/urandom"),
    "a full disk": lambda path: path.symlink_to("/dev/full"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to the root": lambda path: path.symlink_to("/"),
    "the memory": lambda path: path.symlink_to("/proc/self/mem"),
    "a listing of the process": lambda path: path.symlink_to("/proc/self/maps"),
}
FILES = ("x.flo", "x.kitti.png", "x.npz", "flow_x_1.png", "x.png", "x.mp4", "x.zarr", "x.safetensors", "x.pth.tar", "x")


@pytest.mark.parametrize("what", list(NO_FILES))
def test_what_is_no_file(what: str, catalogue: Catalogue, tiny: str) -> None:
    run = ["run", "synthetic:objects?size=64x64&frames=2", "-o", "a.zarr"]
    for name in FILES:
        as_weights = [[*run, "--weights", name]] if name.endswith(("safetensors", "tar")) else []
        for command in (
            ["info", name],
            ["run", name, "-o", "a.zarr", "--weights", tiny],
            ["export", name, "-o", "a.zarr"],
            ["color", name, "-o", "a"],
            *as_weights,
        ):
            NO_FILES[what](catalogue.place() / name)
            catalogue.call(f"{name} is {what}", command)
    for where in ("flow_y_1.png", "2.flo"):  # beside a sound file
        first = where.replace("y", "x").replace("2", "1")
        NO_FILES[what](catalogue.place() / where)
        sound = Image.new("L", (4, 4))
        path = catalogue.place() / first
        write_flo(path, np.ones((4, 6, 2), np.float32)) if first.endswith("flo") else sound.save(path)
        catalogue.call(f"{where} is {what}", ["export", ".", "-o", "a.zarr"], right=bool)
    catalogue.judge(40)


@pytest.mark.parametrize("what", [name for name in NO_FILES if name not in ("zeros", "nothing", "noise", "the memory")])
def test_outputs_where_something_else_is(what: str, catalogue: Catalogue, tmp_path: Path) -> None:
    write_flo(tmp_path / "x.flo", np.ones((4, 6, 2), np.float32))
    files = {"x.flo": (tmp_path / "x.flo").read_bytes()}
    for output in ("a.zarr", "a.mp4", "a.zarr.partial", "a.mp4.partial"):
        for more in ((), ("--overwrite",)):
            folder = catalogue.place()
            NO_FILES[what](folder / output)
            wanted = output.removesuffix(".partial")
            may_write = [output] if more or output != wanted else []  # leftovers of a killed run are replaced

            def right(answer: Answer, wanted: str = wanted) -> bool:
                path = answer["folder"] / wanted
                return not path.is_symlink() and (path.is_dir() if wanted.endswith("zarr") else path.is_file())

            command = ["export", "x.flo", "-o", wanted, "-q", *more]
            catalogue.call(f"{output} is {what}, {more}", command, files, right=right, may_write=may_write)
    catalogue.judge(8)
