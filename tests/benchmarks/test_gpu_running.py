"""How parts of ``python -m benchmarks gpu`` that fail, hang, crash or lack something are handled."""

from __future__ import annotations

import contextlib
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

from benchmarks.gpu import running, surroundings
from benchmarks.gpu.findings import Settings
from benchmarks.processes import ROOT
from tests.fakes.gpu_parts import part

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``run("crashes")`` runs the part of that name."""
    env = surroundings.environment(tmp_path)
    settings = Settings("cpu", True, str(tmp_path), str(tmp_path))
    return lambda name, **options: running.run_part(part(name, **options), settings, env, 300)


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
    found = run("lacks_everywhere")
    assert (found["status"], len(found["skipped"]), found["checks"]) == ("skipped", 2, [])
    assert run("lacks_ours")["status"] == "failed"


def test_a_part_that_has_too_little_time_is_not_begun(run: Run) -> None:
    found = run("fine", least_s=301)
    assert (found["status"], found["reason"]) == ("skipped", "300 s are left for it, and it wants 301")
    assert (found["checks"], found["rows"], found["seconds"]) == ([], [], 0.0)
    assert set(found) == set(run("fine", least_s=300))


def test_a_part_that_shows_nothing_is_not_taken_for_one_that_passed(run: Run) -> None:
    found = run("silent")
    assert (found["status"], verdicts(found)) == ("empty", {"silent comes to its end": False})
    assert run("silent", times=True)["status"] == "done"  # a part that takes times only has to make rows
    assert run("fine", times=True)["status"] == "empty"


def test_a_warning_is_a_note(run: Run) -> None:
    assert run("warns")["notes"] == ["UserWarning: slower than it could be"]


def test_attempts_do_not_take_each_other_along(run: Run) -> None:
    """An error, a crash, a missing package or a lost GPU fails only its own attempt; the next ones still run."""
    found = run("attempts")
    assert found["status"] == "done", found["reason"]
    failed = {check["name"]: check["said"] for check in found["checks"] if not check["passed"]}
    assert set(failed) == {"a", "b", "d", "f", "g"}
    assert "an illegal memory access" in failed["d"]
    assert "not a number" in failed["a"]
    assert "code -9" in failed["b"]
    assert "code 7" in failed["g"]
    assert [text.partition(":")[0] for text in found["skipped"]] == ["c"]
    assert verdicts(found)["after e"]
    assert not {"begun", "under_way"} & set(found)


def finding_under_way(out: Path) -> Path | None:
    """The file of the part under way, once it holds the finding of a part that hangs. Each part removes its own."""
    for path in out.glob(f"*{running.RUNNING}"):
        with contextlib.suppress(FileNotFoundError):
            if '"before"' in path.read_text():
                return path
    return None


class Impatient(subprocess.Popen[bytes]):
    """Its time limit is over as soon as there is a finding in the folder ``watched``."""

    watched: Path

    def wait(self, timeout: float | None = None) -> int:
        if timeout is None:
            return super().wait()
        while finding_under_way(self.watched) is None:
            time.sleep(0.02)
        raise subprocess.TimeoutExpired("part", timeout)


@pytest.mark.parametrize("times", [False, True])
def test_a_part_that_hangs_is_ended_with_all_it_started(
    run: Run, times: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the part only takes times, those taken before it was stopped are kept as valid."""
    monkeypatch.setattr(Impatient, "watched", tmp_path, raising=False)
    monkeypatch.setattr(running.subprocess, "Popen", Impatient)
    found = run("hangs", times=times)
    assert found["status"] == ("cut short" if times else "stopped")
    assert [check["passed"] for check in found["checks"]] == [True, *([] if times else [False])]
    wait_for_the_end_of(found["rows"][0]["child"])


def wait_for_the_end_of(process: int) -> None:
    """Waits until a process is gone or a zombie (Z). If nobody stopped it, this waits until the test times out."""
    path = Path(f"/proc/{process}/stat")
    while path.exists():
        try:
            if path.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killing_the_command_loses_nothing_and_leaves_nothing_running(how: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys; from benchmarks.gpu import main; from tests.fakes.gpu_parts import part;"
        "main.PARTS = [part('fine'), part('hangs')];"
        f"sys.exit(main.main(['--dry-run', '--out', {str(out)!r}]))"
    )
    own = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed command leaves its temporary folder behind
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, env=own) as process:
        while (under_way := finding_under_way(out)) is None:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(how)
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how)
    left = json.loads(under_way.read_text())
    wait_for_the_end_of(left["rows"][0]["part"])
    if how == signal.SIGKILL:  # then nobody ends the part's own child process
        os.kill(left["rows"][0]["child"], signal.SIGKILL)
    wait_for_the_end_of(left["rows"][0]["child"])
    (result,) = (path for path in out.glob("*.json") if path != under_way)
    assert [part["name"] for part in json.loads(result.read_text())["parts"]] == ["fine"]
