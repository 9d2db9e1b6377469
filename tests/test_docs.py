"""The Python code and the commands on the documentation pages are run unchanged and in order.

Commands that are not run, on any page and in any ``--help``, are at least such as the command line knows, and every
link leads somewhere.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

import flowreel
from flowreel.engine.cli import call
from flowreel.engine.cli.app import command_line
from flowreel.engine.models import weights
from flowreel.sinks import registry

ROOT = Path(__file__).resolve().parent.parent
LAZY = (ROOT / "docs/lazy.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FRAMES = 40
CLI: Any = command_line


@pytest.fixture(scope="module")
def dance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dance.mp4: 40 frames, a key frame every 12, no B-frames."""
    path = tmp_path_factory.mktemp("docs") / "dance.mp4"
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (20, 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    options = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=0"}
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(FRAMES):
            picture = np.ascontiguousarray(texture[number : number + 64, 3 * number : 3 * number + 96])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_lazy(
    dance: Path, tiny_flownetc: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "SHIPPED", Path(tiny_flownetc))  # the shipped network takes most of the time
    monkeypatch.chdir(dance.parent)
    names: dict[str, Any] = {"__name__": "__main__"}
    blocks = re.findall(r"```(python|sh)\n(.*?)```", LAZY, re.DOTALL)
    assert len(blocks) > 8
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "docs/lazy.md", "exec"), names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "flowreel"
            assert call(arguments) == 0
    told = capsys.readouterr().out
    assert "(39, 2, 64, 96)" in told
    assert "LazyStatistics(decoded=0, seeks=0, computed=0, from_cache=0)" in told
    assert "20 10 30" in told
    assert "fit was pad, is resize. Open it as before" in told
    assert flowreel.open_store("dance.zarr").complete
    assert flowreel.open_store("cache/dance.mp4").layout.cache
    assert names["batch"]["flow"].shape[1:] == (20, 48, 64)


def test_what_lazy_reading_costs(dance: Path) -> None:
    """The page's table of decoded frames and computed flows is true for each of its rows."""
    rows = re.findall(r"^\| `(flow\[.+\])` \| (\d+).* \| (\d+) \|$", LAZY, re.MULTILINE)
    assert len(rows) == 3
    for read, decoded, computed in rows:
        flow = flowreel.open(dance, model="FlowNet2C")
        eval(read, {"flow": flow})
        assert (flow.statistics.decoded, flow.statistics.computed) == (int(decoded), int(computed)), read


def test_the_page_names_all_that_a_store_holds(tmp_path: Path) -> None:
    page = (ROOT / "docs/store.md").read_text()
    arrays, attributes = (
        {name for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)}
        for table in page.split("The group's attribute `flowreel`")
    )
    seen_arrays, seen_attributes = set(), set()
    for resolution in ("full", "native"):
        path = tmp_path / f"{resolution}.zarr"
        flowreel.run("synthetic:still?size=64x64&frames=3", path, model="FlowNet2C", resolution=resolution)
        seen_arrays |= {folder.name for folder in path.iterdir() if folder.is_dir()}
        seen_attributes |= set(flowreel.open_store(path).attrs)
    exported = tmp_path / "exported.zarr"
    flowreel.export(path, exported)
    seen_attributes |= set(flowreel.open_store(exported).attrs)
    seldom = {"decoder", "source_losses", "first_loss", "imported_from", "cache"}
    assert arrays == seen_arrays
    assert attributes == seen_attributes | seldom


@pytest.mark.usefixtures("small_textures")
def test_training(dance: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's commands, made short by options appended to them: the last value of an option counts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dance.mp4").symlink_to(dance)
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) == 6
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "flowreel"
        short = ["--stop", "2"]
        if arguments[0] == "train":
            shutil.rmtree(tmp_path / arguments[1], ignore_errors=True)
            short = shlex.split("--steps 1 --batch 2 --height 64 --width-px 64 --workers 0 --device cpu")
            short += ["--minutes", "0.001"] if "--minutes" in arguments else []
        assert call([*arguments, *short]) == 0
    assert len(flowreel.open_store("dance.flow.zarr")) == 1


def test_python(
    dance: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's code runs, and the page mentions every public name and every field of the reports."""
    page = (ROOT / "docs/python.md").read_text()
    monkeypatch.chdir(tmp_path)
    shutil.copy(dance, tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), names)
    told = capsys.readouterr().out
    assert "(4, 2, 64, 96)" in told
    assert "True" in told
    assert len(list(tmp_path.glob("colours/*.png"))) == 4
    words = set(re.findall(r"\w+", page))
    assert set(flowreel.__all__) <= words
    for report in (flowreel.RunReport, flowreel.OutputReport, flowreel.StageStatistics):
        assert {field.name for field in fields(report)} <= words


def test_recipes(dance: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The page's commands and code run in order: a shell tells the words of each command, this process runs it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(dance, tmp_path)
    (tmp_path / "videos").mkdir()
    for name in ("dance.mp4", "with space.mp4"):
        shutil.copy(dance, tmp_path / "videos" / name)
    with av.open(str(dance)) as container:
        pictures = [frame.to_image() for frame in itertools.islice(container.decode(video=0), 2)]
    for name in ("pair/1.png", "pair/2.png", "frames/00088.png", "frames/00089.png"):
        Path(name).parent.mkdir(exist_ok=True)
        pictures[name[-5] in "29"].save(name)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL)
    shown = {**os.environ, "SLURM_ARRAY_TASK_ID": "1"}
    names: dict[str, Any] = {}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "docs/recipes.md", "exec"), names)
            continue
        for line in block.splitlines():
            words = subprocess.check_output(
                line.replace("flowreel ", r"printf '%s\0' "), shell=True, env=shown, text=True
            )
            faster = ["--model", "FlowNet2C"] if words.startswith("run\0") else []
            assert call([*words.split("\0")[:-1], *faster]) == 0, line
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"dance.zarr", "1.json"}
    assert len(flowreel.open_store("every-second.zarr")) == 19
    assert flowreel.open_store("part.zarr").frame[0] == 10
    assert (tmp_path / "tsn/flow_y_00038.jpg").exists()
    assert names["flow"].shape == (39, 2, 64, 96)
    assert np.array_equal(flowreel.read_flo("flows/000000.flo"), flowreel.read_flo("pair/000000.flo"))
    assert names["doubtful"].shape == (1, 64, 96)
    matlab = np.fromfile("flo/000000.flo", np.float32)[3:].reshape((2, 96, 64), order="F").transpose(2, 1, 0)
    assert np.array_equal(matlab, flowreel.read_flo("flo/000000.flo"))


def test_developing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example output works once its line is registered, and every file and table the page names exists."""
    page = (ROOT / "docs/developing.md").read_text()
    module, line = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    npy = types.ModuleType("flowreel.sinks.npy")
    exec(compile(module, "sinks/npy.py", "exec"), npy.__dict__)
    monkeypatch.setitem(sys.modules, npy.__name__, npy)
    monkeypatch.setattr(registry, "OUTPUTS", (eval(line, {"Output": registry.Output}), *registry.OUTPUTS))
    flowreel.run("synthetic:still?size=64x64&frames=3", tmp_path / "%06d.npy", model="FlowNet2C")
    assert [np.load(path).shape for path in sorted(tmp_path.iterdir())] == [(64, 64, 2)] * 2
    for name in re.findall(r"`((?:engine|kernels|sinks|tests|benchmarks)/[^`*]*)`", page):
        assert name == "sinks/npy.py" or (ROOT / name).exists(), name
    for table, name in re.findall(r"`(\w+)` in `(\S+\.py)`", page):
        assert re.search(rf"^{table}\b", (ROOT / name).read_text(), re.MULTILINE), table


def understood(command: str) -> None:
    """Fails unless the command line knows these words after ``flowreel``, and these options."""
    words, known = shlex.split(command, comments=True), CLI
    while hasattr(known, "commands"):
        known = known.commands[words.pop(0)]
    if known.name != "bench":  # it has a parser of its own
        known.make_parser(known.context_class(known)).parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_understood(page: Path) -> None:
    parts = page.read_text().split("```")
    code = [*re.findall(r"`([^`\n]+)`", " ".join(parts[::2])), *"\n".join(parts[1::2]).splitlines()]
    for line in code:
        if found := re.search(r"(?:^|\| )flowreel ([a-z].*)", line):
            understood(found[1].replace("\\|", "|"))


def test_every_example_in_a_help_text_is_understood() -> None:
    texts = [command.help for command in (*CLI.commands.values(), *CLI.commands["weights"].commands.values())]
    examples = re.findall(r"^  (?:.*\| )?flowreel ([a-z].*)$", "\n".join(texts), re.MULTILINE)
    assert len(examples) > 20
    for example in examples:
        understood(example)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link
