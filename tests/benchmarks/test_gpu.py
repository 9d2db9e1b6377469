"""``python -m benchmarks gpu``: every part on a CPU, and what becomes of parts that fail, hang, or lack something."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.gpu import main as gpu
from benchmarks.gpu import network, sanitizer, surroundings, tests
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.original import kernels_of
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.measure import Skipped

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def result_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_a_dry_run_walks_through_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--dry-run", "--out", str(tmp_path)]) == 0
    result = result_in(tmp_path)
    assert [(part["name"], part["status"]) for part in result["parts"]] == [(part.name, "done") for part in PARTS]
    assert result["checks_failed"] == 0
    checks = [check for part in result["parts"] for check in part["checks"]]
    assert result["checks_passed"] == len(checks) > 60
    assert {"gpu", "versions", "commit"} <= set(result)
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in torch.__version__
    assert result["dry_run"]
    assert [row["model"] for row in result["rows"]] == ["FlowNet2", "FlowNet2C"]
    assert (tmp_path / "gpu-profile.txt").stat().st_size > 1000
    said = capsys.readouterr().out.rstrip().splitlines()
    assert said[-1].startswith("a dry run, which proves nothing about a GPU")
    assert [line.split("|")[1].strip() for line in said[-3 - len(PARTS) : -2]][-len(PARTS) :] == [
        part.name for part in PARTS
    ]


@no_gpu
def test_without_a_gpu_it_says_so_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--out", str(tmp_path), "--commit", "abc"]) == 2
    result = result_in(tmp_path)
    assert [part["name"] for part in result["parts"]] == ["machine"]
    assert (result["gpu"], result["commit"]) == (None, "abc")
    assert "no GPU that torch can use" in capsys.readouterr().out


def test_wrong_usage(tmp_path: Path) -> None:
    for wrong in (["--only", "nothing"], ["--wheels", str(tmp_path / "none")], ["--original", str(tmp_path / "none")]):
        with pytest.raises(SystemExit, match="2"):
            gpu.main(["--out", str(tmp_path), *wrong])


# --- parts that go wrong ----------------------------------------------------------------------------------------------

MADE_UP = """
import subprocess, sys, time

def fine(findings, settings):
    findings.check("it is so", True, px=0.5)
    findings.check("so is this", settings.device == "cpu")

def wrong(findings, settings):
    findings.check("it is so", False)

def crashes(findings, settings):
    findings.check("before", True)
    raise RuntimeError("the card fell off")

def hangs(findings, settings):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    findings.row(child=child.pid)
    findings.check("before", True)
    time.sleep(1000)

def lacks(findings, settings):
    import nothing_like_it

def lacks_ours(findings, settings):
    import flowreel.nothing_like_it
"""
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("crashes")`` runs that function as a part."""
    (tmp_path / "made_up.py").write_text(MADE_UP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    env, _ = surroundings.environment(tmp_path, None)
    settings = Settings("cpu", True, str(tmp_path), str(tmp_path))
    return lambda name: gpu.run_part(Part(name, "made_up", name, 1, "made up"), settings, env, 300)


def test_what_a_part_found_is_kept_however_it_ends(run: Run) -> None:
    found = run("fine")
    assert (found["status"], found["reason"]) == ("done", "")
    assert found["checks"][0] == {"name": "it is so", "passed": True, "px": 0.5}
    found = run("crashes")
    assert found["status"] == "failed"
    assert "the card fell off" in found["reason"]
    assert [(check["name"], check["passed"]) for check in found["checks"]] == [
        ("before", True),
        ("crashes comes to its end", False),
    ]


def test_what_is_not_installed_is_left_out_but_a_mistake_of_ours_is_not(run: Run) -> None:
    found = run("lacks")
    assert (found["status"], found["reason"]) == ("skipped", "nothing_like_it cannot be imported")
    assert found["checks"] == []
    assert run("lacks_ours")["status"] == "failed"


def test_a_part_that_hangs_is_ended_with_all_it_started(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(subprocess.Popen[str]):
        """The time is up as soon as something was found."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            path = tmp_path / "hangs.json"
            while not path.exists() or '"before"' not in path.read_text():
                time.sleep(0.02)
            raise subprocess.TimeoutExpired("part", timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Impatient)
    found = run("hangs")
    assert found["status"] == "stopped"
    assert [check["passed"] for check in found["checks"]] == [True, False]
    while _lives(found["rows"][0]["child"]):  # it was told to end; for ever, if it was not
        time.sleep(0.02)


def _lives(process: int) -> bool:
    """Gone, or ended and not yet asked after (Z), is not alive."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_failed_checks_count_and_fail_the_command(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [Part(name, "made_up", name, 300, "made up") for name in ("fine", "wrong", "crashes", "lacks")]
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out")]) == 1
    result = result_in(tmp_path / "out")
    assert (result["checks_passed"], result["checks_failed"]) == (3, 2)
    assert "FAILED: it is so" in capsys.readouterr().out
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "some"), "--only", "fine,lacks"]) == 0


def test_a_part_that_no_time_is_left_for_is_not_taken_for_one_that_passed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "TOTAL_S", 0)
    monkeypatch.setattr(gpu, "PARTS", [Part("fine", "made_up", "fine", 300, "made up")])
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out")]) == 1
    (part,) = result_in(tmp_path / "out")["parts"]
    assert part["status"] == "no time"


# --- a bare machine ---------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, files: dict[str, str], tag: str = "py3-none-any") -> None:
    told = f"{name}-1.0.dist-info"
    files = files | {
        f"{told}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: nothing-like-it\n",
        f"{told}/WHEEL": f"Wheel-Version: 1.0\nGenerator: made up\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{told}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{told}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_wheels_that_fit_are_used_and_others_are_told_of(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "brought", {"brought.py": "word = 'here'"})
    wheel(wheels, "strange", {"strange.py": ""}, "cp27-none-any")
    env, notes = surroundings.environment(tmp_path / "made", wheels)
    done = subprocess.run(
        [sys.executable, "-c", "import brought; print(brought.word)"], env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "here", done.stderr
    assert [note.partition(" ")[0] for note in notes] == ["strange-1.0-cp27-none-any.whl"]


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


# --- what single parts make of what they see --------------------------------------------------------------------------


def said_by(tmp_path: Path) -> tuple[Findings, Callable[[], list[dict[str, Any]]]]:
    path = tmp_path / "found.json"
    return Findings(path), lambda: json.loads(path.read_text())["checks"]


@pytest.mark.parametrize(
    ("says", "code", "passed"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, True),
        ("========= ERROR SUMMARY: 3 errors", 99, False),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 99, False),
        ("========= ERROR SUMMARY: 0 errors", 1, False),  # what was watched failed itself
        ("cannot attach to the device", 1, None),
    ],
)
def test_the_sanitizers_verdict(
    says: str, code: int, passed: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    findings, checks = said_by(tmp_path)
    settings = Settings("cuda", False, str(tmp_path), str(tmp_path))
    if passed is None:
        with pytest.raises(Skipped, match="cannot attach"):
            sanitizer.memcheck(findings, settings)
        return
    sanitizer.memcheck(findings, settings)
    assert [check["passed"] for check in checks()] == [passed]


MADE_UP_TESTS = """
import pytest

def test_good(): pass
def test_bad(): assert 1 + 1 == 3, "the whole story"
def test_left_out(): pytest.skip("no such codec")

@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_broken(broken): pass
"""


def test_each_test_of_pytest_is_a_check(tmp_path: Path) -> None:
    """In a process of its own: one pytest inside another would share what both have loaded."""
    (tmp_path / "test_made_up.py").write_text(MADE_UP_TESTS)
    (tmp_path / "test_lacking.py").write_text("import nothing_like_it")
    (tmp_path / "test_wrong.py").write_text("1 / 0")
    code = (
        "from pathlib import Path; from benchmarks.gpu.findings import Findings; from benchmarks.gpu import tests;"
        f"tests.run_tests(Findings(Path({str(tmp_path / 'found.json')!r})), 'tests', [{str(tmp_path)!r}])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tests.ROOT, capture_output=True, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    checks = {check["name"].rpartition("/")[2]: check for check in found["checks"]}
    assert {name: check["passed"] for name, check in checks.items()} == {
        "test_made_up.py::test_good": True,
        "test_made_up.py::test_bad": False,
        "test_made_up.py::test_broken": False,
        "test_wrong.py can be collected": False,
    }
    assert "the whole story" in checks["test_made_up.py::test_bad"]["said"]
    assert [text.rpartition("/")[2] for text in found["skipped"]] == [
        "test_lacking.py can be collected: nothing_like_it is not installed",
        "test_made_up.py::test_left_out: Skipped: no such codec",
    ]


def test_tests_that_take_a_gpu_are_found_by_their_fixture() -> None:
    found = [
        path.name for path in Path(__file__).parents[1].rglob("test_*.py") if tests.TAKES_A_GPU.search(path.read_text())
    ]
    assert {"test_cuda.py", "test_cuda_on_gpu.py", "test_cuda_bias_leaky_relu.py"} <= set(found)
    assert "test_graphs.py" not in found


def test_kernels_are_told_apart_by_their_names() -> None:
    shares = network.by_kind(
        {
            "sm90_xmma_fprop_implicit_gemm_f16f16_nhwc": 60.0,
            "bias_leaky_relu_half_to_half": 20.0,
            "void cudnn::ops::nchwToNhwcKernel<float>": 10.0,
            "void at::native::elementwise_kernel<128>": 6.0,
            "something_else": 4.0,
        }
    )
    assert shares == {"convolution": 0.6, "ours": 0.2, "layout": 0.1, "elementwise": 0.06, "other": 0.04}
    assert network.bound(shares, 500, 1000) == (
        "busy 50% of 1.00 ms a call: convolution 60%, ours 20%, layout 10%, elementwise 6%, other 4%"
    )


def test_only_the_kernels_of_a_fetched_source_are_compiled() -> None:
    source = (
        '#include "x.cuh"\n#include <ATen/ATen.h>\nusing at::Half;\n__global__ void correlation_forward() {}\n\n'
        "int correlation_forward_cuda_kernel(at::Tensor& output) {}\n"
    )
    text = kernels_of(source)
    assert "ATen" not in text
    assert "at::" not in text
    assert "__global__ void correlation_forward() {}" in text
    with pytest.raises(Skipped, match="not flownet2-pytorch's"):
        kernels_of("int main() {}")
