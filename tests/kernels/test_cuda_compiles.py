"""Every CUDA source compiles for every supported architecture, without a GPU, and stays within its budget.

The budget, ``cuda_budget.json``, limits each entry's registers per thread and bytes of shared memory per block, which
decide how many blocks a GPU runs at once. Raise a limit only for a good reason, never just to make a test pass.
Registers are limited for the NVRTC of ``constraints.txt`` only: another one, of a torch with CUDA, allots others.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from flowreel.engine.errors import DeviceError
from flowreel.kernels import compiling, launch

HERE = Path(__file__).resolve().parent
BUDGET: dict[str, dict[str, dict[str, int]]] = json.loads((HERE / "cuda_budget.json").read_text())
OLDEST, ARCHITECTURES = "sm_75", ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SOURCES = sorted(path.stem for path in compiling.SOURCES.glob("*.cu"))
ON_TENSOR_CORES = {"convolution", "correlation_products", "flow_head"}  # not for the oldest architecture


class Use(NamedTuple):
    registers: int  # per thread
    shared_bytes: int  # per block
    spilled_bytes: int  # per thread: registers that did not fit and went to memory


def uses(log: str) -> dict[str, Use]:
    """The resources of each entry, from the assembler's log."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        shared = re.search(r"(\d+) bytes smem", part)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert spilled, part
        assert registers, part
        spills = int(spilled[1]) + int(spilled[2])
        found[part.split("'")[0]] = Use(int(registers[1]), int(shared[1]) if shared else 0, spills)
    return found


def same_nvrtc() -> bool:
    """Whether the compiler is the one for which registers are limited."""
    pinned = re.search(
        r"^nvidia-cuda-nvrtc==(\d+)\.(\d+)\.", (HERE.parents[1] / "constraints.txt").read_text(), re.MULTILINE
    )
    assert pinned
    return bool(compiling.load_cupy().cuda.nvrtc.getVersion() == (int(pinned[1]), int(pinned[2])))


UsesOn = Callable[[str, str], dict[str, Use]]


@pytest.fixture(autouse=True)
def _chosen_sources(monkeypatch: pytest.MonkeyPatch, cuda_dir: Path) -> None:
    monkeypatch.setattr(compiling, "SOURCES", cuda_dir)


@pytest.fixture
def uses_on(once: Callable[..., Path]) -> UsesOn:
    """``uses_on(source, architecture)``: the resources of each entry."""

    def found(source: str, architecture: str) -> dict[str, Use]:
        def compiled(path: Path) -> None:
            program, log = compiling.compile_source(source, architecture)
            assert program[:4] == b"\x7fELF"
            path.write_text(log)

        cupy, text = compiling.load_cupy(), compiling.read_source(source)
        by = cupy.cuda.nvrtc.getVersion(), cupy.__version__, Path(compiling.__file__).read_text()
        return uses(once(f"{source}-{architecture}.log", (text, architecture, by), compiled).read_text())

    return found


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_source_compiles_within_its_budget(source: str, architecture: str, uses_on: UsesOn) -> None:
    taken = uses_on(source, architecture)
    assert set(taken) == set(BUDGET[source])
    assert {name: use for name, use in taken.items() if use.shared_bytes > BUDGET[source][name]["shared_bytes"]} == {}
    if same_nvrtc():
        assert {name: use for name, use in taken.items() if use.spilled_bytes} == {}
        assert {name: use for name, use in taken.items() if use.registers > BUDGET[source][name]["registers"]} == {}


@pytest.mark.parametrize("source", sorted(set(SOURCES) - ON_TENSOR_CORES))
def test_the_oldest_gpus_get_what_needs_no_tensor_cores(source: str, uses_on: UsesOn) -> None:
    """Registers are not limited there, because nothing has been tuned for the oldest GPUs."""
    taken = uses_on(source, OLDEST)
    assert set(taken) == set(BUDGET[source])
    for name, use in taken.items():
        assert use.spilled_bytes == 0, name
        assert use.shared_bytes <= BUDGET[source][name]["shared_bytes"], name


def test_the_oldest_gpus_do_without_what_needs_them() -> None:
    assert {source for source in SOURCES if launch.needs_tensor_cores(source)} == ON_TENSOR_CORES
    for source in ON_TENSOR_CORES:
        with pytest.raises(DeviceError, match=f"does not compile for {OLDEST}"):
            compiling.compile_source(source, OLDEST)


def test_budget_names_every_source() -> None:
    assert sorted(BUDGET) == SOURCES


def test_newer_gpus_get_a_program_their_driver_translates() -> None:
    """PTX instead of machine code. That every source compiles for this architecture is tested with machine code."""
    program, _ = compiling.compile_source("warp", "compute_80")
    assert b".target sm_80" in program


def test_an_error_in_a_source_is_told_with_the_compilers_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wrong.cu").write_text('extern "C" __global__ void wrong(float* x) { *x = unheard_of; }\n')
    monkeypatch.setattr(compiling, "SOURCES", tmp_path)
    with pytest.raises(DeviceError, match=r"(?s)wrong\.cu does not compile for sm_90.*unheard_of"):
        compiling.compile_source("wrong", "sm_90")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: NVRTC has compiled the same sources")
@pytest.mark.parametrize("source", SOURCES)
def test_source_stands_alone_under_nvcc(source: str, cuda_dir: Path, once: Callable[..., Path]) -> None:
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-G", "-ptx", f"{source}.cu"]  # -G: without optimising, so fast

    def compiled(path: Path) -> None:
        done = subprocess.run([*command, "-o", str(path)], cwd=cuda_dir, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    by = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    headers = [path.read_text() for path in sorted(cuda_dir.glob("*.cuh"))]
    once(f"{source}.ptx", ((cuda_dir / f"{source}.cu").read_text(), headers, command, by), compiled)
