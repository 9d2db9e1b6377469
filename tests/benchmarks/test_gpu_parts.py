"""The parts of ``python -m benchmarks gpu`` that run other programs (tools, pytest) judge their output correctly."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import launch_all, machine, sanitizer, tests
from benchmarks.gpu.findings import Settings
from benchmarks.measure import Skipped
from flowreel.engine.errors import MissingDependencyError
from flowreel.kernels import compiling, launch
from tests.fakes.fresh import Fresh
from tests.fakes.gpu_parts import Found

# --- the machine ------------------------------------------------------------------------------------------------------


def test_a_driver_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (subprocess.TimeoutExpired("nvidia-smi", 20), FileNotFoundError("nvidia-smi")):

        def run(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(machine.subprocess, "run", run)
        assert machine._driver() is None


def test_what_is_known_of_the_machine_is_saved_before_anything_can_fail(
    findings: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "machine", lambda: {"gpu": "Abacus", "commit": "abc", "python": "3", "cpu": "x"})
    monkeypatch.setattr(machine, "_driver", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        machine.describe(findings, Settings("cuda", False, str(tmp_path), str(tmp_path)))
    assert (findings["head"]["gpu"], findings["head"]["commit"]) == ("Abacus", "abc")


@pytest.mark.parametrize("lacking", ["load_cupy", "prepare"])
def test_kernels_that_cannot_run_are_a_failure_and_not_left_out(
    lacking: str, findings: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> None:
        raise MissingDependencyError("our CUDA kernels need CuPy")

    monkeypatch.setattr(launch, "prepare", lambda device: None)
    monkeypatch.setattr(compiling if lacking == "load_cupy" else launch, lacking, absent)
    findings.attempt(machine.COMPILED, lambda: machine._load(findings))
    (check,) = findings["checks"]
    assert (check["passed"], check["said"]) == (False, "our CUDA kernels need CuPy")


# --- compute-sanitizer ------------------------------------------------------------------------------------------------

TOOL = r"""#!/bin/sh
if [ "$1" = --help ]; then echo "{helps}"; exit 0; fi
echo "$@" > {folder}/arguments
printf '\377\n{says}\n'
exit {code}
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``tool(says, code)`` installs a fake ``compute-sanitizer`` with that output and exit code."""

    def made(says: str, code: int, helps: str = "--tool arg") -> None:
        path = tmp_path / "compute-sanitizer"
        path.write_text(TOOL.format(says=says, code=code, helps=helps, folder=tmp_path))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return made


@pytest.mark.parametrize(
    ("says", "code", "passed"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, True),
        ("========= ERROR SUMMARY: 3 errors", 99, False),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 99, False),
        ("========= ERROR SUMMARY: 0 errors", 1, False),  # the program that was watched failed
        ("cannot attach to the device", 1, None),
        ("========= Device not supported\\n========= ERROR SUMMARY: 2 errors", 99, None),
    ],
)
def test_the_sanitizers_verdict(
    says: str, code: int, passed: bool | None, tool: Callable[..., None], findings: Found, tmp_path: Path
) -> None:
    tool(says, code)
    on_gpu = Settings("cuda", False, str(tmp_path), str(tmp_path))
    if passed is None:
        with pytest.raises(Skipped, match=r"cannot attach|Device not supported"):
            sanitizer.memcheck(findings, on_gpu)
        return
    sanitizer.memcheck(findings, on_gpu)
    assert list(findings.verdicts.values()) == [passed]


@pytest.mark.parametrize(
    ("helps", "option"),
    [("--kernel-name arg", "--kernel-name"), ("--kernel-regex arg", "--kernel-regex"), ("--tool arg", None)],
)
def test_the_sanitizer_watches_our_kernels_where_it_can_choose(
    helps: str, option: str | None, tool: Callable[..., None], findings: Found, tmp_path: Path
) -> None:
    tool("========= RACECHECK SUMMARY: 0 hazards", 0, helps)
    sanitizer.racecheck(findings, Settings("cuda", False, str(tmp_path), str(tmp_path)))
    arguments = (tmp_path / "arguments").read_text()
    assert f"--log-file {tmp_path / 'gpu-racecheck.log'} " in arguments  # survives if the part is stopped
    assert ("kns=warp_" in arguments) == (option is not None)
    assert option is None or f"{option} kns=warp_" in arguments


def test_a_sanitizer_that_breaks_watches_the_kernels_one_by_one(
    tool: Callable[..., None], findings: Found, tmp_path: Path
) -> None:
    """Here the tool breaks whenever the kernels named warp_* are among those it watches."""
    tool("", 0, "--kernel-name arg")
    path = tmp_path / "compute-sanitizer"
    ends = (
        'case "$*" in *kns=warp_*) echo "Internal Sanitizer Error: no";; *) echo "RACECHECK SUMMARY: 0 hazards";; esac'
    )
    path.write_text(path.read_text().replace("printf", f"{ends}\nprintf"))
    sanitizer.racecheck(findings, Settings("cuda", False, str(tmp_path), str(tmp_path)))
    assert list(findings.verdicts.values()) == [True] * (len(sanitizer.KERNELS) - 1)
    assert [said.partition(":")[0] for said in findings["skipped"]] == ["racecheck of warp_*"]


def test_a_sanitizer_that_breaks_at_every_kernel_proves_nothing(
    tool: Callable[..., None], findings: Found, tmp_path: Path
) -> None:
    tool("Internal Sanitizer Error: no", 99, "--kernel-name arg")
    with pytest.raises(Skipped, match="racecheck works with no kernel here"):
        sanitizer.racecheck(findings, Settings("cuda", False, str(tmp_path), str(tmp_path)))


class AsOnAGpu(TorchDispatchMode):
    """Our operations take a CPU's tensors for those of a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "flowreel":
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)
        return func(*args, **(kwargs or {}))


def test_every_kernel_is_launched_and_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()
    monkeypatch.setattr(launch, "cupy_is_there", lambda: True)
    monkeypatch.setattr(launch, "_kernel", lambda source, entry, device: launched.add(entry))
    monkeypatch.setattr(launch, "start", lambda *_: None)
    with AsOnAGpu():
        launch_all.main("cpu")
    budget = json.loads((tests.ROOT / "tests/kernels/cuda_budget.json").read_text())  # names all that there are
    assert launched == {entry for entries in budget.values() for entry in entries}
    assert {entry for entry in launched if not entry.startswith(sanitizer.KERNELS)} == set()


# --- the tests --------------------------------------------------------------------------------------------------------

MADE_UP_TESTS = """
import pytest

def test_good(): pass
def test_bad(): assert 1 + 1 == 3, "the whole story"
def test_left_out(): pytest.skip("no such codec")
def test_no_card(): pytest.skip("no CUDA device")

@pytest.fixture
def broken(): raise RuntimeError("no fixture")
def test_broken(broken): pass
"""
RUN_TESTS = """
import sys
from pathlib import Path
from benchmarks.gpu import findings, tests
if "lost" in sys.argv:
    tests.device_is_lost = findings.device_is_lost = lambda: True
kept = findings.Findings(Path(sys.argv[1]))
for name in sys.argv[2].split(","):
    kept.attempt(name, lambda: tests.run_tests(kept, name))
"""


def run_tests(fresh: Fresh, findings: Found, files: dict[str, str], *arguments: str, code: int = 0) -> None:
    """In a separate process, because one pytest inside another would share loaded modules with it."""
    folder = findings._path.parent
    for name, text in files.items():
        (folder / name).write_text(text)
    names = ",".join(str(folder / name) for name in files)
    ended, said = fresh("-c", [RUN_TESTS, str(findings._path), names, *arguments], tests.ROOT)
    assert ended == code, said


def test_each_test_of_pytest_is_a_check(findings: Found, fresh: Fresh) -> None:
    """A file that cannot be collected, or a test that finds no GPU, counts as failed, not as skipped."""
    files = {
        "test_made_up.py": MADE_UP_TESTS,
        "test_lacking.py": "import nothing_like_it",
        "test_empty.py": "",
        "test_wrong.py": "1 / 0",
    }
    run_tests(fresh, findings, files)
    checks = {check["name"].rpartition("/")[2]: check for check in findings["checks"]}
    assert {name: check["passed"] for name, check in checks.items()} == {
        "test_made_up.py::test_good": True,
        "test_made_up.py::test_bad": False,
        "test_made_up.py::test_no_card": False,
        "test_made_up.py::test_broken": False,
        "test_made_up.py: tests are found": True,
        "test_lacking.py can be collected": False,
        "test_lacking.py: tests are found": False,
        "test_empty.py: tests are found": False,
        "test_wrong.py can be collected": False,
        "test_wrong.py: tests are found": False,
    }
    assert "the whole story" in checks["test_made_up.py::test_bad"]["said"]
    assert "nothing_like_it" in checks["test_lacking.py can be collected"]["said"]
    assert [text.rpartition("/")[2] for text in findings["skipped"]] == [
        "test_made_up.py::test_left_out: Skipped: no such codec"
    ]


def test_once_the_card_is_lost_no_test_of_that_process_is_blamed(findings: Found, fresh: Fresh) -> None:
    files = {"test_a.py": "def test_1(): assert 0\ndef test_2(): assert 0", "test_b.py": "def test_3(): pass"}
    run_tests(fresh, findings, files, "lost", code=1)  # ends with an exception that ``benchmarks.gpu.one`` handles
    assert [name.rpartition("/")[2] for name in findings.verdicts] == [
        "test_a.py::test_1",
        "test_a.py: tests are found",
        "test_a.py",
    ]
    run_tests(fresh, findings, files)  # the next process continues after it
    assert any(name.endswith("test_b.py::test_3") and passed for name, passed in findings.verdicts.items())


def test_tests_that_take_a_gpu_are_found_by_their_fixture() -> None:
    found = [
        path.name for path in Path(__file__).parents[1].rglob("test_*.py") if tests.TAKES_A_GPU.search(path.read_text())
    ]
    assert {"test_cuda.py", "test_cuda_on_gpu.py", "test_cuda_bias_leaky_relu.py"} <= set(found)
    assert "test_graphs.py" not in found


def test_every_file_of_tests_has_its_part() -> None:
    chosen: list[str] = []
    for part in (tests.kernels, tests.engine, tests.others, tests.graphs):
        note = SimpleNamespace(attempt=lambda name, action: chosen.append(name))
        part(note, SimpleNamespace(dry=True))  # type: ignore[arg-type]
    assert sorted(chosen) == tests.files()
    assert tests.GRAPHS in chosen
