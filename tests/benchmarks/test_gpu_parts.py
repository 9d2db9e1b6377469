"""What single parts of ``python -m benchmarks gpu`` make of what they see."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flowreel
from benchmarks import gpu_peers
from benchmarks.gpu import (
    end_to_end,
    kernel_times,
    machine,
    network,
    peers,
    precision,
    profile,
    sanitizer,
    tests,
    video,
)
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.original import kernels_of
from benchmarks.measure import Effort, Skipped
from flowreel.engine.compiled import graphs, padded
from flowreel.engine.data import FlowInfo


class Found(Findings):
    """Findings of a test, and what is in their file."""

    def __getitem__(self, kind: str) -> Any:
        return json.loads(self._path.read_text())[kind] if self._path.exists() else []

    @property
    def verdicts(self) -> dict[str, bool]:
        return {check["name"]: check["passed"] for check in self["checks"]}


@pytest.fixture
def findings(tmp_path: Path) -> Found:
    return Found(tmp_path / "found.json")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings("cpu", True, str(tmp_path), str(tmp_path))


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


# --- compute-sanitizer ------------------------------------------------------------------------------------------------

TOOL = r"""#!/bin/sh
if [ "$1" = --help ]; then echo "{helps}"; exit 0; fi
echo "$@" > {folder}/arguments
printf '\377\n{says}\n'
exit {code}
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``tool(says, code)`` is what ``compute-sanitizer`` does."""

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
        ("========= ERROR SUMMARY: 0 errors", 1, False),  # what was watched failed itself
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
    assert f"--log-file {tmp_path / 'gpu-racecheck.log'} " in arguments  # it outlives whoever is stopped
    assert ("kns=warp_" in arguments) == (option is not None)
    assert option is None or f"{option} kns=warp_" in arguments


def test_every_kernel_is_among_those_that_are_watched() -> None:
    names = [path.stem for path in (tests.ROOT / "kernels" / "cuda").glob("*.cu")]
    assert names
    assert all(any(f"{name}_".startswith(kernel) for kernel in sanitizer.KERNELS) for name in names)


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


def run_tests(findings: Found, files: dict[str, str], *arguments: str, code: int = 0) -> None:
    """In a process of its own: one pytest inside another would share what both have loaded."""
    folder = findings._path.parent
    for name, text in files.items():
        (folder / name).write_text(text)
    names = ",".join(str(folder / name) for name in files)
    command = [sys.executable, "-c", RUN_TESTS, str(findings._path), names, *arguments]
    done = subprocess.run(command, cwd=tests.ROOT, capture_output=True, check=False)
    assert done.returncode == code, done.stderr


def test_each_test_of_pytest_is_a_check(findings: Found) -> None:
    """What cannot be collected, or finds no card, has shown nothing: that is a failure, not something left out."""
    files = {
        "test_made_up.py": MADE_UP_TESTS,
        "test_lacking.py": "import nothing_like_it",
        "test_empty.py": "",
        "test_wrong.py": "1 / 0",
    }
    run_tests(findings, files)
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


def test_once_the_card_is_lost_no_test_of_that_process_is_blamed(findings: Found) -> None:
    files = {"test_a.py": "def test_1(): assert 0\ndef test_2(): assert 0", "test_b.py": "def test_3(): pass"}
    run_tests(findings, files, "lost", code=1)  # an exception, which ``benchmarks.gpu.one`` knows
    assert [name.rpartition("/")[2] for name in findings.verdicts] == [
        "test_a.py::test_1",
        "test_a.py: tests are found",
        "test_a.py",
    ]
    run_tests(findings, files)  # the next process goes on behind it
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


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("card", "aim"), [("NVIDIA H200", 585), ("NVIDIA H100 80GB HBM3", None)])
def test_aims_are_shown_on_the_card_that_they_are_for(
    card: str, aim: int | None, findings: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    monkeypatch.setattr(network, "_cells", lambda *_: {"pairs/s": {"median": 117.0}})
    network._time(findings, network.TIMED[0], Settings("cuda", False, str(tmp_path), str(tmp_path)))
    (row,) = findings["rows"]
    assert (row.get("aim"), row.get("of the aim")) == (aim, aim and 0.2)
    assert ("asked for" in findings["headline"]) == (aim is not None)


def test_the_search_is_as_it_was_afterwards() -> None:
    before = padded.SEARCHES
    with network.searching(not before):
        assert padded.SEARCHES is not before
    assert padded.SEARCHES is before


@pytest.mark.parametrize(("off_px", "within"), [(0.0, True), (0.5, True), (1.5, False)])
def test_filled_weights_are_judged_by_their_flow_and_told_in_pixels(
    off_px: float, within: bool, findings: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = torch.tensor([60.0, 80.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)  # of 100 px
    monkeypatch.setattr(flowreel, "compile", lambda *_: lambda *_: flow + torch.tensor([0, off_px]).view(1, 2, 1, 1))
    frames = (torch.zeros(1, 3, 4, 4),) * 2
    precision._check(findings, "filled, width 1", "fp16", lambda: (torch.nn.Identity(), flow), frames)
    assert findings.verdicts["fp16, filled, width 1"] is within
    (row,) = findings["rows"]
    assert row["mean_px_apart"] == pytest.approx(off_px, abs=1e-5)
    assert row["within_aim"] is (off_px == 0)
    assert ("0.05 px holds" in findings["headline"]) == (off_px == 0)


@pytest.mark.parametrize("captured", [True, False])
def test_a_network_that_runs_without_its_graph_fails(
    captured: bool, findings: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = torch.ones(1, 2, 4, 4)

    def compiled(*_: object) -> Callable[..., torch.Tensor]:
        if not captured:
            warnings.warn(f"running {precision.WITHOUT_GRAPH}, which could not be captured", stacklevel=2)
        return lambda *_: flow

    monkeypatch.setattr(flowreel, "compile", compiled)
    frames = (torch.zeros(1, 3, 4, 4),) * 2
    precision._check(findings, "baseline", "fp16", lambda: (torch.nn.Identity(), flow), frames)
    assert findings.verdicts["fp16, baseline: one CUDA graph"] is captured
    assert len(findings["notes"]) == (not captured)
    assert precision.WITHOUT_GRAPH in Path(graphs.__file__).read_text()


def test_kernels_are_told_apart_by_their_names() -> None:
    shares = profile.by_kind(
        {
            "sm90_xmma_fprop_implicit_gemm_f16f16_nhwc": 60.0,
            "bias_leaky_relu_half_to_half": 20.0,
            "void cudnn::ops::nchwToNhwcKernel<float>": 10.0,
            "void at::native::elementwise_kernel<128>": 6.0,
            "something_else": 4.0,
        }
    )
    assert shares == {"convolution": 0.6, "ours": 0.2, "layout": 0.1, "elementwise": 0.06, "other": 0.04}
    assert profile.bound(shares, 500, 1000) == (
        "busy 50% of 1.00 ms a call: convolution 60%, ours 20%, layout 10%, elementwise 6%, other 4%"
    )


# --- videos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong_px", [0.0, 0.1])
def test_a_store_that_is_not_what_the_network_gives_fails(
    wrong_px: float, findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Store(flowreel.FlowStore):
        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__(key) + wrong_px

    monkeypatch.setattr(flowreel, "open_store", Store)
    video._compare_store(findings, settings, "fp32")
    assert list(findings.verdicts.values()) == [True, not wrong_px, not wrong_px]


def test_the_memory_check_ends_with_a_whole_shard_of_whole_batches() -> None:
    """Or the engine would make a program for a batch of another length just when the last sample is taken."""
    width, height, frames = video.LONG
    header = FlowInfo(height, width, None, frames, None, made_by={"batch": 8})  # type: ignore[arg-type]
    shard = header.shard_length(None)
    assert (frames - 1) % shard == 0
    assert (frames - 1) // shard >= 10
    assert shard % 8 == 0


def test_the_speed_of_a_run_is_that_of_its_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 3 s and .01 s a flow, in shards of 7: 100 flows a second."""
    asked: list[int] = []

    def run(_: Path, __: Path, stop: int, **___: object) -> SimpleNamespace:
        asked.append(stop - 1)
        return SimpleNamespace(seconds=3 + (stop - 1) / 100)

    monkeypatch.setattr(flowreel, "run", run)
    monkeypatch.setattr(flowreel, "open_store", lambda _: SimpleNamespace(shard_length=7))
    sample, _ = end_to_end._rate(end_to_end.Job(tmp_path, 4, 4, 100, {}), tmp_path / "x.mp4", "auto")
    assert sample.median == pytest.approx(100)
    assert asked[1:] == [7, 7, 98, 98]


# --- kernels and peers ------------------------------------------------------------------------------------------------


def test_on_a_cpu_calls_are_timed_as_they_are() -> None:
    calls: list[int] = []
    action, count, how = kernel_times.repeated(lambda: calls.append(1), "cpu")
    action()
    assert (len(calls), count, how) == (3, 1, "calls")


def test_a_peer_beside_ours(findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peers, "raft_and_ours", lambda *_: (lambda: sum(range(10**5)), lambda: sum(range(10**4))))
    peers._compare(findings, settings, "128x128", (128, 128), Effort(least=3, most=3))
    assert [row["peer"] for row in findings["rows"]] == [gpu_peers.RAFT, gpu_peers.OURS]
    assert f"{gpu_peers.RAFT} takes " in findings["headline"]


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
