"""``python -m benchmarks gpu``: every part in a dry run on a CPU, and the command's summary of all parts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.gpu import main as gpu
from benchmarks.gpu import running, surroundings
from benchmarks.gpu.findings import Settings
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.processes import ROOT
from tests.fakes.fresh import Fresh
from tests.fakes.gpu_parts import part

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def result_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.fixture
def fast_start(monkeypatch: pytest.MonkeyPatch, fresh: Fresh) -> None:
    """Parts run in processes that start fast: ``running`` itself is tested with others."""

    def ran(argv: list[str], env: dict[str, str], limit_s: float) -> tuple[int, str]:
        return fresh(argv[2], argv[3:], ROOT, env)

    monkeypatch.setattr(running, "_ran", ran)


@pytest.mark.early
@pytest.mark.timeout(900)  # many parts, which take minutes on a slow machine
@pytest.mark.usefixtures("fast_start")
def test_a_dry_run_walks_through_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--dry-run", "--out", str(tmp_path)]) == 0
    result = result_in(tmp_path)
    statuses = {part["name"]: part["status"] for part in result["parts"]}
    assert list(statuses) == [part.name for part in PARTS]
    assert statuses["peers"] in ("done", "skipped")  # the test extra does not install torchvision
    assert {status for name, status in statuses.items() if name != "peers"} == {"done"}
    assert result["checks_failed"] == 0
    checks = [check for part in result["parts"] for check in part["checks"]]
    assert result["checks_passed"] == len(checks) > 60
    assert len({(check["name"], part["name"]) for part in result["parts"] for check in part["checks"]}) == len(checks)
    assert {"gpu", "versions", "commit"} <= set(result)
    assert result["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert result["dry_run"]
    assert [row["model"] for row in result["rows"]] == ["FlowNet2", "FlowNet2C"]
    (profile,) = tmp_path.glob("*-gpu-dry-run-profile.txt")
    assert profile.stat().st_size > 1000
    assert len(list(tmp_path.iterdir())) == 2
    said = capsys.readouterr().out.rstrip().splitlines()
    assert said[-1].startswith("a dry run, which proves nothing about a GPU")
    assert [line.split("|")[1].strip() for line in said[-2 - len(PARTS) : -2]] == list(statuses)


@no_gpu
@pytest.mark.usefixtures("fast_start")
def test_without_a_gpu_it_says_so_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--out", str(tmp_path), "--commit", "abc"]) == 2
    result = result_in(tmp_path)
    assert [part["name"] for part in result["parts"]] == ["machine"]
    assert (result["gpu"], result["commit"]) == (None, "abc")
    assert "no GPU that torch can use" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [["--only", "nothing"], ["--original", "none"], ["--seconds", "0"], ["--seconds", "nan"]], ids=" ".join
)
def test_wrong_usage(wrong: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path), *wrong])
    assert list(tmp_path.iterdir()) == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_failed_checks_count_and_fail_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever happens in a part, the parts after it still run."""
    monkeypatch.setattr(gpu, "PARTS", [part(name) for name in ("head", "wrong", "junk", "silent", "lacks", "fine")])
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out")]) == 1
    result = result_in(tmp_path / "out")
    assert (result["checks_passed"], result["checks_failed"]) == (4, 3)
    assert [part["status"] for part in result["parts"]] == ["done", "done", "failed", "empty", "skipped", "done"]
    said = capsys.readouterr().out
    assert "FAILED: it is so; px: 0.5; allowed_px: 0.1; said: ValueError: too far apart\n" in said
    assert "4 checks passed, 3 failed, 1 part failed, 1 part empty, 1 part skipped" in said
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".json"]
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "some"), "--only", "fine, lacks"]) == 0
    result = result_in(tmp_path / "some")
    assert [part["name"] for part in result["parts"]] == ["head", "lacks", "fine"]
    assert (result["gpu"], result["versions"]) == ("Abacus", {"beads": "1"})


def test_a_machine_that_cannot_be_described_may_have_a_gpu_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PARTS", [part("crashes"), part("head")])
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    result = result_in(tmp_path / "out")
    assert [part["status"] for part in result["parts"]] == ["failed", "done"]
    assert result["gpu"] == "Abacus"


def test_without_torch_there_is_no_gpu_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", [part("lacks"), part("fine")])
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert [part["status"] for part in result_in(tmp_path / "out")["parts"]] == ["skipped"]


def test_no_part_takes_the_time_of_those_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    now = [0.0]

    def taking_all(part: Part, settings: Settings, env: Any, limit_s: float) -> dict[str, Any]:
        limits.append(limit_s)
        now[0] += limit_s
        return {"name": part.name, "status": "stopped", "reason": "", "seconds": limit_s, **running.nothing_found()}

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "run_part", taking_all)
    monkeypatch.setattr(gpu, "DRY_TIMES", 1)
    monkeypatch.setattr(gpu, "PARTS", [Part("quick", "", "", 10, ""), *(part(name) for name in "abcd")])
    gpu.main(["--dry-run", "--out", str(tmp_path), "--seconds", "550"])
    assert limits == pytest.approx([10, 180, 120, 120, 120])  # at most a third of what is left, then equal shares
    assert result_in(tmp_path)["seconds"] == 550


def test_a_part_is_not_begun_just_to_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not PARTS[0].least_s  # left out, it would look like a machine without torch
    monkeypatch.setattr(gpu, "PARTS", [part("fine"), part("silent")])
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--seconds", "0.2"]) == 0
    assert [part["status"] for part in result_in(tmp_path)["parts"]] == ["skipped"] * 2


def test_a_second_run_on_a_day_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", [part("fine")])
    for _ in range(3):
        gpu.main(["--dry-run", "--out", str(tmp_path / "out")])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name.partition("-gpu-dry-run")[2] for name in names] == ["-2.json", "-3.json", ".json"]


def test_who_starts_the_parts_loads_neither_torch_nor_flowreel() -> None:
    """So it takes no GPU memory, and it works where flowreel is not installed."""
    code = "import sys, benchmarks.gpu.main; print({'torch', 'flowreel'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


def test_flowreel_need_not_be_installed(tmp_path: Path, fresh: Fresh) -> None:
    folder = surroundings._checkout(tmp_path / "made")
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r});"
        "import flowreel, flowreel.engine.errors, flowreel.kernels.cuda as c;"
        "print(flowreel.__version__, flowreel.__file__, list(c.__path__)[0])"
    )
    ended, said = fresh("-c", [code], tmp_path)
    assert ended == 0, said
    version, place, sources = said.split()
    assert version[0].isdigit()
    assert place.startswith(str(folder))
    assert Path(sources, "warp.cu").exists()
