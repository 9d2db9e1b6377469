"""Odd values for every option of every command, and options that contradict each other.

The options are taken from the command line itself, so a new option is tested without being named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowreel.engine import api
from flowreel.engine.cli.app import command_line
from flowreel.sinks import open_store, write_flo

Answer = dict[str, Any]
Catalogue = Any  # the fixture of conftest.py
Command = Any  # typer's own copy of click's types is not public
Files = dict[str, bytes]

ROOT: Any = command_line
TEXT = ("", " ", "nan", "-1", "0", "1.5", "x", "AUTO", "None", "☃", "\x1b[31m", "a\nb", "\0", "[bold]", "{0}", "%s")
TEXT += ("\udcff", "é" * 2000)
NUMBERS = ("nan", "NaN", "inf", "-inf", "1e400", "-1", "0", "-0.0", "1.5", "1e-320", "1e308", "1,5", "1_0", "0x10", "٣")
NUMBERS += ("", " ", "x", "9" * 30, "9" * 5000, "2147483648", "-9223372036854775809", "1/0", "1e3", "\0", "\x1b[31m")
NUMBERS += ("--", "None", "²", "½", "+1", "1\0", "true")
DEVICES = ("cuda:99", "cuda:-1", "cuda:x", "cuda:" + "9" * 30, "cpu:0", "mps", "meta", "CPU", "cuda,cpu")
# No path outside the case's folder that could be written to.
PATHS = ("", ".", "./", "/proc", "/dev/null/x", "/proc/x", "x" * 300, "a/" * 3000, "\0", "\udcff", "frames", "x.flo")
PATHS += ("x.flo/y", "frames/0.png", "tiny.safetensors", "a.zarr", "a.zarr/zarr.json", "a.zarr/x", "x.zarr", "x.zarr/x")
HALF_NUMBERS = ("batch", "max_flow", "frame_rate", "start", "stop")  # texts that may be numbers: auto, 10s, 30000/1001
NEVER = ("", " ", "nan", "NaN", "inf", "-inf", "1e400", "x", "\0", "None", "\x1b[31m", "1,5", "1/0")  # never numbers

# A valid and fast command line for each command, to which options are added.
# bench is left out, because it passes all arguments on to the benchmarks' own command line.
LINES = {
    "run": "run frames -o a.zarr --weights tiny.safetensors",
    "demo": "demo x.flo --weights tiny.safetensors",  # fails after the options were checked, as x.flo is no folder
    "info": "info x.flo",
    "color": "color x.flo -o a",
    "export": "export x.flo -o a.zarr",
    "verify": "verify x.zarr",
    "repair": "repair x.zarr frames --weights tiny.safetensors",
    "train": "train x.flo --width 0.02 --steps 1 --batch 2 --height 64 --width-px 64",  # likewise
    "doctor": "doctor",
    "weights list": "weights list",
    "weights info": "weights info tiny.safetensors",
    "weights convert": "weights convert tiny.safetensors a.pth.tar",
    "weights download": "weights download FlowNet2-C --accept-licence",
}
SOUND = {name: line.split() for name, line in LINES.items()}


def commands(group: Command = ROOT, name: str = "") -> Iterator[tuple[str, Command]]:
    """Every command that has options, with its full name."""
    for word, command in group.commands.items():
        if word == "bench":
            continue
        full = f"{name} {word}".strip()
        yield from commands(command, full) if hasattr(command, "commands") else [(full, command)]


def values_of(option: Command) -> tuple[str, ...]:
    kind = option.type_descriptor.annotation
    if kind in (int, float):
        return NUMBERS
    if option.name == "device":
        return DEVICES + TEXT
    if kind is Path or option.name in ("output", "weights", "init"):
        return PATHS + TEXT
    return tuple(dict.fromkeys(TEXT + (NUMBERS if option.name in HALF_NUMBERS else ())))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Files:
    """Two frames, the weights, a store of their flow, and a .flo."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "frames").mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / "frames" / f"{number}.png")
    (folder / "tiny.safetensors").write_bytes(Path(tiny).read_bytes())
    api.run(folder / "frames", [folder / "x.zarr"], weights=tiny)
    write_flo(folder / "x.flo", np.ones((4, 6, 2), np.float32))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def needed(line: list[str], files: Files) -> Files:
    """The files that a command line mentions."""
    return {name: data for name, data in files.items() if any(name.split("/")[0] in word for word in line)}


def finished(answer: Answer) -> bool:
    """A command that succeeded left nothing unfinished, and the stores it wrote are sound."""
    folder: Path = answer["folder"]
    stores = [path for path in folder.iterdir() if (path / "zarr.json").is_file()]
    return not list(folder.rglob("*.partial")) and not any(list(open_store(store).check()) for store in stores)


def test_every_command_has_a_sound_line(catalogue: Catalogue, files: Files) -> None:
    assert {name for name, _ in commands()} == SOUND.keys()
    for name, line in SOUND.items():
        right = None if name in ("demo", "train", "weights download") else finished
        code = None if name == "doctor" else 1 if right is None else 0
        catalogue.call(name, line, needed(line, files), right=right, code=code, wordy=name == "weights download")
    catalogue.judge(len(SOUND))


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_odd_values_of_options(name: str, catalogue: Catalogue, files: Files) -> None:
    command = dict(commands())[name]
    count, wordy = 0, name == "weights download"  # which prints its progress
    for option in command.params:
        if option.param_type_name != "option":
            continue
        flag = option.opts[0]
        count += 1
        if option.is_flag:
            for value in ("", "x", "nan", "true", "0", "\0"):
                line = [*SOUND[name], f"{flag}={value}"]
                catalogue.call(f"{flag}={value!r}", line, needed(line, files), code=2)
            continue
        catalogue.call(f"{flag} without a value", [*SOUND[name], flag], needed(SOUND[name], files), code=2)
        for value in values_of(option):
            never = value == "\0" or (option.type_descriptor.annotation in (int, float) and value in NEVER)
            line = [*SOUND[name], f"{flag}={value}"]
            catalogue.call(
                f"{flag}={value[:30]!r}",
                line,
                needed(line, files),
                right=finished,
                code=2 if never else None,
                wordy=wordy,
            )
    for odd in ("--nonsense", "--no-such=1", "-Z", "---", "-o", "--="):
        catalogue.call(odd, [*SOUND[name], odd], needed(SOUND[name], files), code=2)
    catalogue.judge(6 + 6 * count)


TIMES = (
    "-1",
    "-1s",
    "-0.5s",
    "s",
    ":",
    "1:",
    ":1",
    "::",
    "1:60",
    "1:-1",
    "-1:30",
    "1:2:3:4",
    "99:99:99",
    "1e9s",
    "nans",
)
TIMES += ("infs", "1e400s", "10 s", "10ms", "1_0", "0x10", "٣s", "1.5", "+1", "9" * 400, "9" * 400 + "s", "1:" * 3000)
TIMES += ("frame", "10s-", "--", "", " ", "None", "end", "1s:2", "1:2s", "1.2.3", "1e-400s", "½s", "9" * 5000 + ":0")


def test_where_to_start_and_stop(catalogue: Catalogue, files: Files) -> None:
    run, export = SOUND["run"], SOUND["export"]
    files = needed([*run, *export], files)
    for time in TIMES:
        for option in ("--start", "--stop"):
            catalogue.call(f"run {option} {time[:20]!r}", [*run, f"{option}={time}"], files, right=finished)
            catalogue.call(f"export {option} {time[:20]!r}", [*export, f"{option}={time}"], files, right=finished)
    for start, stop in (("5", "2"), ("2", "2"), ("1", "2"), ("0", "1"), ("10s", "5s"), ("1s", "1"), ("1", "0.001s")):
        line = [*run, "--start", start, "--stop", stop]
        catalogue.call(f"{start} to {stop}", line, files)
    for start, stop in (("5", "2"), ("-1", "-1"), ("0", "0"), ("-9", "-8"), ("1", "2"), ("0", "-1")):
        catalogue.call(f"export {start} to {stop}", [*export, f"--start={start}", f"--stop={stop}"], files)
    for step in ("2", "1000000", "9223372036854775807"):
        catalogue.call(f"step {step}", [*run, "--step", step], files)
    catalogue.judge(150)


def test_values_for_a_stream(catalogue: Catalogue, files: Files) -> None:
    """The length of stdin is unknown, so numbers cannot be checked against it."""
    stream = b"YUV4MPEG2 W64 H64 F25:1 Cmono\n" + (b"FRAME\n" + bytes(4096)) * 2
    run = ["run", "-", *SOUND["run"][2:]]
    files = needed(run, files)
    for option, values in {"start": TIMES, "stop": TIMES, "step": NUMBERS, "stream": NUMBERS}.items():
        for value in values:
            line = [*run, f"--{option}={value}"]
            catalogue.call(f"--{option}={value[:30]!r}", line, files, stdin=stream, right=finished)
    catalogue.judge(120)


CONTRADICTIONS = (  # (command line, exit code; None: failure of either kind)
    ("run frames -o a.zarr --resume --overwrite", 2),
    ("run frames -o a.zarr -o a.zarr", 2),
    ("run frames -o a.zarr -o ./a.zarr", 2),
    ("run frames -o a.zarr -o b/../a.zarr", 2),
    ("run frames -o a.mp4 -o A/../a.mp4", 2),
    ("run frames -o a.zarr -o a.zarr/%06d.flo", 2),
    ("run frames -o a.zarr -o a.zarr/b.mp4", 2),
    ("run frames -o a/%06d.flo -o a/%06d.flo", 2),
    ("run frames -o a/%06d.png -o a/%06d.kitti.png -o a/%06d.png", 2),
    ("run frames -o a.zarr --stats a.zarr", 2),
    ("run frames -o a.zarr --stats ./a.zarr/stats.json", 2),
    ("run frames -o a.mp4 --stats a.mp4", 2),
    ("run frames -o a.zarr --stats frames", 1),
    ("run frames -o a.zarr --stats tiny.safetensors", 1),
    ("run frames -o a.zarr --stats frames/0.png", 2),
    ("run x.y4m -o a.zarr --stats x.y4m", 2),
    ("run frames -o a.zarr --stats frames/0.png/x.json", None),
    ("run frames -o frames", None),
    ("run frames -o frames/0.png --overwrite", 2),
    ("run x.y4m -o x.y4m", None),
    ("run frames/*.png -o frames/%06d.png", 2),
    ("run frames -o ./frames/../frames/%06d.kitti.png", 2),
    ("run frames -o frames/%06d.flo", 0),
    ("run frames -o frames/%d.png --overwrite", 2),
    ("run frames -o a.txt", None),
    ("run frames -o a", None),
    ("run frames -o a.flo", None),
    ("run frames -o a/%d%d.flo", None),
    ("run frames -o a/%s.flo", None),
    ("run frames -o {stem}{stem}{x}.zarr", 0),
    ("run frames frames -o a.zarr", 2),
    ("run frames frames -o {stem}.zarr", 2),
    ("run frames ./frames -o {stem}.zarr", 2),
    ("run frames - -o {stem}.zarr --stats {stem}.json -o {stem}.zarr", None),
    ("run frames --manifest frames/0.png -o {stem}.zarr", 2),
    ("run frames --manifest a.zarr -o a.zarr", 2),
    ("run frames --manifest a.json --stats a.json -o a.zarr", 2),
    ("run frames --manifest /dev/zero -o a.zarr", 1),
    ("run frames --manifest /dev/full -o a.zarr", 1),
    ("run frames --manifest . -o a.zarr", None),
    ("run frames -o a.zarr --resolution native --model FlowNet2", None),
    ("run frames -o a.zarr --model FlowNet2C", None),
    ("run frames -o a.zarr --model FlowNet3", 2),
    ("run frames -o a.zarr --device cuda", 1),
    ("run frames -o a.zarr --device cuda:99", 1),
    ("run frames -o a.zarr --device cuda:-1", None),
    ("run frames -o a.zarr --device cuda:x", 2),
    ("run frames -o a.zarr --device mps", 2),
    ("run frames -o a.zarr --device meta", 2),
    ("run frames -o a.zarr --decoder nvdec", 0),
    ("run frames -o a.zarr --precision fp16", 2),
    ("run frames -o a.zarr --precision tf32", 2),
    ("run frames -o a.zarr --precision fp64", 2),
    ("run frames -o a.zarr --stream 7", None),
    ("run frames -o a.zarr --queue-mb 0", 2),
    ("run frames -o a.zarr --queue-mb -1", 2),
    ("run frames -o a.zarr --batch 0", 2),
    ("run frames -o a.zarr --bound 0", 2),
    ("run frames -o a.zarr --max-flow -1", 2),
    ("run frames -o a.zarr --max-error -1", 2),
    ("run frames -o a.zarr --codec lzma", 2),
    ("run frames -o a.zarr --fit stretch", 2),
    ("run frames -o a.zarr --direction both", 2),
    ("run frames -o a.zarr --resolution half", 2),
    ("run synthetic:nowhere -o a.zarr", None),
    ("run synthetic:objects?size=0x0 -o a.zarr", 2),
    ("run synthetic:objects?frames=1 -o a.zarr", None),
    ("run synthetic:objects?frames=-1 -o a.zarr", 2),
    ("run synthetic:objects?size=64x64&size=x -o a.zarr", 2),
    ("run synthetic:objects?colour=red -o a.zarr", 2),
    ("export x.zarr -o x.zarr", None),
    ("export x.zarr -o ./x.zarr --overwrite", 0),
    ("export x.zarr -o x.zarr/a.zarr", 2),
    ("export x.zarr -o a.zarr --stats a.zarr", 2),
    ("export x.zarr -o a.zarr --stats x.zarr/zarr.json", 2),
    ("export x.flo -o %06d.flo -o %06d.flo", 2),
    ("export x.flo -o a.zarr --frame-rate 0", 2),
    ("export x.flo -o a.zarr --frame-rate 1/0", 2),
    ("export x.flo -o a.zarr --frame-rate -25", 2),
    ("export x.flo -o a.zarr --frame-rate 1e308", 2),
    ("export x.flo -o a.zarr --frame-rate 1e-320", 2),
    ("export x.flo -o a.zarr --frame-rate 23.97602397602397602397602397", 0),
    ("export x.zarr@0:1 -o a.zarr --start 5", None),
    ("color x.flo -o x.flo", None),
    ("color x.flo -o a.txt", 2),
    ("color x.flo x.flo -o a.png", None),
    ("color x.flo -o a -v -r 0", 2),
    ("color x.flo -o a -v -r nan", 2),
    ("color x.flo -o a --max-flow 0", 2),
    ("color x.flo -o frames/0.png", None),
    ("verify x.flo", None),
    ("verify frames", None),
    ("repair x.zarr x.flo", 0),
    ("repair frames x.zarr", None),
    ("repair x.zarr synthetic:objects", 0),
    ("weights convert tiny.safetensors tiny.safetensors", 1),
    ("weights convert tiny.safetensors tiny.safetensors --overwrite", 0),
    ("weights convert tiny.safetensors a.txt", 2),
    ("weights convert tiny.safetensors a.pth.tar --half", 2),
    ("weights convert tiny.safetensors frames/0.png/a.safetensors", 1),
    ("weights download nowhere --accept-licence", 2),
    ("weights download baseline --accept-licence", 2),
    ("weights download FlowNet2", 2),
    ("weights download FlowNet2 --accept-licence -o a.safetensors", 2),
    ("weights download FlowNet2 --accept-licence -o x.flo", 1),
    ("train x.flo --width 0", 2),
    ("train x.flo --height 65", 2),
    ("train x.flo --height 64 --width-px 64 --batch 1", 2),
    ("train x.flo --model FlowNet3", 2),
    ("train x.flo --seed -1", 2),
    ("train x.flo --workers -1", 2),
    ("train x.flo --report-every 0", 2),
    ("train x.flo --init nowhere", None),
    ("nonsense", 2),
    ("weights", 2),
    ("weights nonsense", 2),
    ("run", 2),
    ("--nonsense", 2),
)


def test_contradictions(catalogue: Catalogue, files: Files) -> None:
    files = files | {"x.y4m": b"YUV4MPEG2 W16 H16 F25:1\n" + (b"FRAME\n" + bytes(384)) * 2}
    for line, code in CONTRADICTIONS:
        words = line.split()
        more = ["--weights", "tiny.safetensors"] if words[0] in ("run", "repair") and "--device" not in words else []
        more = [] if words == ["run"] else more
        wordy = words in (["run"], ["weights"]) or words[0] == "verify" or words[:2] == ["weights", "download"]
        right, may_write = (finished, files if "--overwrite" in words else ()) if code == 0 else (None, ())
        given = needed([*words, *more], files)
        catalogue.call(line, [*words, *more], given, code=code, wordy=wordy, right=right, may_write=may_write)
    catalogue.judge(len(CONTRADICTIONS))
