"""``python -m benchmarks gpu``: every part on a CPU, and what becomes of parts that fail, hang, or lack something."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def result_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_a_dry_run_walks_through_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--dry-run", "--out", str(tmp_path)]) == 0
    result = result_in(tmp_path)
    statuses = {part["name"]: part["status"] for part in result["parts"]}
    assert list(statuses) == [part.name for part in PARTS]
    assert statuses["peers"] in ("done", "skipped")  # torchvision is not among what the tests install
    assert {status for name, status in statuses.items() if name != "peers"} == {"done"}
    assert result["checks_failed"] == 0
    checks = [check for part in result["parts"] for check in part["checks"]]
    assert result["checks_passed"] == len(checks) > 60
    assert len({(check["name"], part["name"]) for part in result["parts"] for check in part["checks"]}) == len(checks)
    assert {"gpu", "versions", "commit"} <= set(result)
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in torch.__version__
    assert result["dry_run"]
    assert [row["model"] for row in result["rows"]] == ["FlowNet2", "FlowNet2C"]
    (profile,) = tmp_path.glob("*-gpu-dry-run-profile.txt")
    assert profile.stat().st_size > 1000
    assert len(list(tmp_path.iterdir())) == 2
    said = capsys.readouterr().out.rstrip().splitlines()
    assert said[-1].startswith("a dry run, which proves nothing about a GPU")
    assert [line.split("|")[1].strip() for line in said[-2 - len(PARTS) : -2]] == list(statuses)


@no_gpu
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


# --- parts that go wrong ----------------------------------------------------------------------------------------------

MADE_UP = """
import os, signal, subprocess, sys, time, warnings
import benchmarks.gpu.findings

def head(findings, settings):
    findings.add(head={"gpu": "Abacus", "versions": {"beads": "1"}})
    findings.check("it is so", True)

def fine(findings, settings):
    findings.check("it is so", True, px=0.5)
    findings.check("so is this", settings.device == "cpu")

def wrong(findings, settings):
    findings.check("it is so", False)

def silent(findings, settings):
    findings.row(number=1)

def crashes(findings, settings):
    findings.check("before", True)
    raise RuntimeError("the card fell off")

def junk(findings, settings):
    findings.check("before", True)
    os.write(1, bytes(range(256)) * 1000)
    os.write(2, b"\\xff\\xfe the last words")
    sys.exit(7)

def hangs(findings, settings):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    findings.row(child=child.pid, part=os.getpid())
    findings.check("before", True)
    time.sleep(1000)

def lacks(findings, settings):
    import nothing_like_it

def lacks_ours(findings, settings):
    import flowreel.nothing_like_it

def warns(findings, settings):
    for _ in range(2):
        warnings.warn("slower than it could be")
    findings.check("it is so", True)

def fails(): raise ValueError("not a number")
def lacking(): import nothing_like_it
def dies(): os.kill(os.getpid(), signal.SIGKILL)
def loses_the_card():
    benchmarks.gpu.findings.device_is_lost = lambda: True

def attempts(findings, settings):
    for name, action in dict(a=fails, b=dies, c=lacking, d=loses_the_card, e=lambda: None, f=dies).items():
        findings.attempt(name, action)
        findings.check(f"after {name}", True)
"""
Run = Callable[..., dict[str, Any]]


def made_up(name: str, **options: Any) -> Part:
    return Part(name, "made_up", name, 300, "made up", **options)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("crashes")`` runs that function as a part."""
    (tmp_path / "made_up.py").write_text(MADE_UP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    env = surroundings.environment(tmp_path)
    settings = Settings("cpu", True, str(tmp_path), str(tmp_path))
    return lambda name, **options: running.run_part(made_up(name, **options), settings, env, 300)


def verdicts(found: dict[str, Any]) -> dict[str, bool]:
    return {check["name"]: check["passed"] for check in found["checks"]}


def test_what_a_part_found_is_kept_however_it_ends(run: Run) -> None:
    found = run("fine")
    assert (found["status"], found["reason"]) == ("done", "")
    assert found["checks"][0] == {"name": "it is so", "passed": True, "px": 0.5}
    found = run("crashes")
    assert found["status"] == "failed"
    assert "the card fell off" in found["reason"]
    assert verdicts(found) == {"before": True, "crashes comes to its end": False}


def test_bytes_that_are_no_text_end_nothing(run: Run) -> None:
    found = run("junk")
    assert (found["status"], found["checks"][0]["passed"]) == ("failed", True)
    assert found["reason"].startswith("exit code 7; ")
    assert found["reason"].endswith(" the last words")


def test_what_is_not_installed_is_left_out_but_a_mistake_of_ours_is_not(run: Run) -> None:
    found = run("lacks")
    assert (found["status"], found["reason"]) == ("skipped", "nothing_like_it cannot be imported")
    assert found["checks"] == []
    assert run("lacks_ours")["status"] == "failed"


def test_a_part_that_shows_nothing_is_not_taken_for_one_that_passed(run: Run) -> None:
    found = run("silent")
    assert (found["status"], verdicts(found)) == ("empty", {"silent comes to its end": False})
    assert run("silent", times=True)["status"] == "done"  # rows are what it is for
    assert run("fine", times=True)["status"] == "empty"


def test_a_warning_is_a_note(run: Run) -> None:
    assert run("warns")["notes"] == ["UserWarning: slower than it could be"]


def test_attempts_do_not_take_each_other_along(run: Run) -> None:
    """An error, a crash, a missing package, a card that is lost: each costs its own attempt, whoever goes on."""
    found = run("attempts")
    assert found["status"] == "done", found["reason"]
    failed = {check["name"]: check["said"] for check in found["checks"] if not check["passed"]}
    assert set(failed) == {"a", "b", "f"}
    assert "not a number" in failed["a"]
    assert "signal 9" in failed["b"]
    assert [text.partition(":")[0] for text in found["skipped"]] == ["c"]
    assert verdicts(found)["after e"]
    assert not {"begun", "under_way"} & set(found)


class Impatient(subprocess.Popen[bytes]):
    """The time is up as soon as something was found in the file ``watched``."""

    watched: Path

    def wait(self, timeout: float | None = None) -> int:
        if timeout is None:
            return super().wait()
        while not self.watched.exists() or '"before"' not in self.watched.read_text():
            time.sleep(0.02)
        raise subprocess.TimeoutExpired("part", timeout)


@pytest.mark.parametrize("times", [False, True])
def test_a_part_that_hangs_is_ended_with_all_it_started(
    run: Run, times: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that only takes times, those that it had taken are good."""
    monkeypatch.setattr(Impatient, "watched", tmp_path / f"gpu-{running.RUNNING}", raising=False)
    monkeypatch.setattr(running.subprocess, "Popen", Impatient)
    found = run("hangs", times=times)
    assert found["status"] == ("cut short" if times else "stopped")
    assert [check["passed"] for check in found["checks"]] == [True, *([] if times else [False])]
    wait_for_the_end_of(found["rows"][0]["child"])


def wait_for_the_end_of(process: int) -> None:
    """Gone, or ended and not yet asked after (Z). It was told to end; for ever, if it was not."""
    path = Path(f"/proc/{process}/stat")
    while path.exists():
        try:
            if path.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killing_the_command_loses_nothing_and_leaves_nothing_running(
    run: Run, how: signal.Signals, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code = (
        "import sys; from benchmarks.gpu import main; from benchmarks.gpu.parts import Part;"
        "main.PARTS = [Part(name, 'made_up', name, 300, '') for name in ('fine', 'hangs')];"
        f"sys.exit(main.main(['--dry-run', '--out', {str(out)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (under_way := list(out.glob(f"*{running.RUNNING}"))) or '"before"' not in under_way[0].read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait() == (-how if how == signal.SIGKILL else 128 + how)
    left = json.loads(under_way[0].read_text())
    wait_for_the_end_of(left["rows"][0]["part"])
    if how == signal.SIGKILL:  # nobody was left to end what that part had started
        os.kill(left["rows"][0]["child"], signal.SIGKILL)
    wait_for_the_end_of(left["rows"][0]["child"])
    (result,) = (path for path in out.glob("*.json") if path not in under_way)
    assert [part["name"] for part in json.loads(result.read_text())["parts"]] == ["fine"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_failed_checks_count_and_fail_the_command(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a part does, those after it have their turn."""
    monkeypatch.setattr(gpu, "PARTS", [made_up(name) for name in ("head", "wrong", "junk", "silent", "lacks", "fine")])
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out")]) == 1
    result = result_in(tmp_path / "out")
    assert (result["checks_passed"], result["checks_failed"]) == (4, 3)
    assert [part["status"] for part in result["parts"]] == ["done", "done", "failed", "empty", "skipped", "done"]
    said = capsys.readouterr().out
    assert "FAILED: it is so" in said
    assert "4 checks passed, 3 failed, 1 part failed, 1 part empty, 1 part skipped" in said
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".json"]
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "some"), "--only", "fine,lacks"]) == 0
    result = result_in(tmp_path / "some")
    assert [part["name"] for part in result["parts"]] == ["head", "lacks", "fine"]
    assert (result["gpu"], result["versions"]) == ("Abacus", {"beads": "1"})


def test_a_machine_that_cannot_be_described_may_have_a_gpu_all_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PARTS", [made_up("crashes"), made_up("head")])
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    result = result_in(tmp_path / "out")
    assert [part["status"] for part in result["parts"]] == ["failed", "done"]
    assert result["gpu"] == "Abacus"


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
    monkeypatch.setattr(gpu, "PARTS", [Part("quick", "", "", 10, ""), *(made_up(name) for name in "abcd")])
    gpu.main(["--dry-run", "--out", str(tmp_path), "--seconds", "550"])
    assert limits == pytest.approx([10, 180, 120, 120, 120])  # a third of the rest, then equal parts
    assert result_in(tmp_path)["seconds"] == 550


def test_a_second_run_on_a_day_overwrites_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", [made_up("fine")])
    for _ in range(3):
        gpu.main(["--dry-run", "--out", str(tmp_path / "out")])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name.partition("-gpu-dry-run")[2] for name in names] == ["-2.json", "-3.json", ".json"]


def test_flowreel_need_not_be_installed(tmp_path: Path) -> None:
    folder = surroundings._checkout(tmp_path / "made")
    code = (
        "import flowreel, flowreel.engine.errors, flowreel.kernels.cuda as c;"
        "print(flowreel.__version__, flowreel.__file__, list(c.__path__)[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    version, place, sources = done.stdout.split()
    assert version[0].isdigit()
    assert place.startswith(str(folder))
    assert Path(sources, "warp.cu").exists()
