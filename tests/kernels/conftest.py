"""Tests run our CUDA kernels in two places: on a GPU if there is one, and always on a CPU that acts as a GPU.

The launch code is the same in both. For the CPU, the ``.cu`` files are compiled with ``cuda_on_cpu/cuda_on_cpu.h``.
During a launch, each tensor's memory lies behind a fence, in which reads find NaN and writes are detected, and directly
before a page that can be neither read nor written.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowreel.kernels import compiling, launch
from flowreel.kernels.operation import recording

HERE = Path(__file__).resolve().parent
SHIM = HERE / "cuda_on_cpu"
FLAGS = ("-std=c++17", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fPIC", "-shared", "-w")
FLAGS += ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")  # where a GPU would fail
FLAGS += (f"-I{SHIM}", "-include", "cuda_on_cpu.h")
FLAGS += ("-nostdinc++",)  # C's headers, without C++'s around them, which take longer to read than most kernels
ORDERS = ("forward", "backward", "shuffled")  # of warps, or of all threads
MOST_KEPT = 2000  # files: those of a few versions of the sources
FENCE = np.full(1 << 12, 0x7FA07DA5, np.uint32).view(np.uint8)  # NaN in every type, with bits that no computation gives
CUDA_DIR = Path(os.environ.get("FLOWREEL_CUDA_DIR", compiling.SOURCES)).resolve()


class KernelFailure(AssertionError):
    """A kernel did something that is forbidden or undefined on a GPU."""


class CPU:
    """Acts as a GPU: compiles sources, loads them, and launches their kernels on CPU tensors."""

    def __init__(self, built: Path, order: str, optimise: str) -> None:
        self.order = ORDERS.index(order)
        self._built = built
        self._optimise = optimise
        self._fenced: dict[int, tuple[Fenced, Tensor]] = {}  # by address; the tensor keeps its memory alive

    def load(self, name: str, device: torch.device) -> Module:
        return Module(self, shared_library(name, self._built, self._optimise))

    def pointer_of(self, tensor: Tensor) -> int:
        """The tensor's address in a fenced copy of its whole memory."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._fenced:
            self._fenced[key] = Fenced(key, storage.nbytes()), tensor
        return self._fenced[key][0].start + tensor.data_ptr() - key

    def taken_back(self) -> bool:
        """Copies all memory back to the tensors; false if a kernel wrote to a fence."""
        broken = [fenced for fenced, _ in self._fenced.values() if not fenced.taken_back()]
        self._fenced.clear()
        return not broken


class Fenced:
    """A copy of some memory, with a fence before it and a forbidden page behind it, as close as alignment allows."""

    def __init__(self, address: int, size: int) -> None:
        self._origin, self._size = address, size
        page = mmap.PAGESIZE
        body = FENCE.size + -(-(size + 16) // page) * page
        self._map = mmap.mmap(-1, body + page)
        self._memory = np.frombuffer(self._map, np.uint8)[:body]
        self._memory[:] = np.resize(FENCE, body)
        base = self._memory.ctypes.data
        self._offset = body - size - (body - size - address) % 16
        self.start = base + self._offset
        ctypes.memmove(self.start, address, size)
        forbidden = ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + body), ctypes.c_size_t(page), 0)
        assert forbidden == 0

    def taken_back(self) -> bool:
        ctypes.memmove(self._origin, self.start, self._size)
        changed = self._memory != np.resize(FENCE, self._memory.size)
        changed[self._offset : self._offset + self._size] = False
        return not changed.any()


class Module:
    """One source, compiled for the CPU."""

    def __init__(self, cpu: CPU, library: ctypes.CDLL) -> None:
        self._cpu = cpu
        self._library = library
        library.entry_name.restype = library.entry_kinds.restype = library.launch_entry.restype = ctypes.c_char_p
        names = iter(lambda: library.entry_name(next(numbers)), None)
        numbers = iter(range(1000))
        self.entries = {name.decode(): number for number, name in enumerate(names)}

    def get_function(self, name: str) -> Callable[..., None]:
        number = self.entries[name]
        kinds = self._library.entry_kinds(number).decode()

        def kernel(grid: tuple[int, ...], block: tuple[int, ...], args: tuple[object, ...]) -> None:
            """Takes the arguments of a CuPy kernel and passes them on as CuPy does."""
            given = "".join(passed_as(x, kind) for x, kind in zip(args, kinds, strict=True))
            assert given == kinds, f"{name} takes {kinds}, got {given}"
            cells = [np.array(x, np.int64) if isinstance(x, int) else np.array(x) for x in args]
            pointers = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
            dims = [(ctypes.c_uint * 3)(*(*size, 1, 1)[:3]) for size in (grid, block)]
            error = self._library.launch_entry(number, *dims, pointers, self._cpu.order, 1)
            inside = self._cpu.taken_back()
            if error is not None:
                raise KernelFailure(f"{name}: {error.decode()}")
            if not inside:
                raise KernelFailure(f"{name} writes beyond a tensor's memory")

        return kernel


def passed_as(x: object, expected: str) -> str:
    """The kind of argument as CuPy passes it; a plain int has 64 bits, as a pointer has."""
    if type(x) is int:
        return "p" if expected == "p" else "l"
    return {np.int32: "i", np.int64: "l", np.float32: "f"}[type(x)]


def as_on_a_gpu(operation: Any, *arguments: object) -> str:
    """Calls one of our operations (``torch.ops.flowreel...default``) as for a GPU's tensors; returns what ran."""
    with recording(ran := {}):
        if any(isinstance(x, Tensor) and x.is_cuda for x in arguments):
            operation(*arguments)
        else:
            operation.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)
    (how,) = ran.values()
    return how


# --- compiling --------------------------------------------------------------------------------------------------------


def shared_library(name: str, built: Path, optimise: str) -> ctypes.CDLL:
    """One source, compiled for the CPU."""
    text = compiling.read_source(name)
    of = text, optimise, [path.read_text() for path in (*sorted(SHIM.iterdir()), Path(__file__))], compiler_version()

    def compiled(part: Path) -> None:
        source = part.with_suffix(".cpp")
        source.write_text(text)
        entries = [f"ENTRY({entry})" for entry in entries_of(source)]
        source.write_text(f"{text}\nstatic const shim::Entry entries[] = {{{', '.join(entries)}}};\n{ACCESS}")
        compile_cpp(optimise, str(source), "-o", str(part))
        source.unlink()

    return ctypes.CDLL(str(made_once(built, f"{name}.so", of, compiled)))


def made_once(folder: Path, name: str, of: object, make: Callable[[Path], None]) -> Path:
    """A file that an earlier session has made of the same things, or that ``make`` makes now."""
    path = folder / f"{hashlib.sha256(repr(of).encode()).hexdigest()[:24]}-{name}"
    if path.exists():
        path.touch()  # so that it is kept
    else:
        part = folder / f"{os.getpid()}.part"
        make(part)
        part.rename(path)
    return path


ACCESS = """
static const unsigned entry_count = sizeof entries / sizeof *entries;
extern "C" const char* entry_name(unsigned number) { return number < entry_count ? entries[number].name : nullptr; }
extern "C" const char* entry_kinds(unsigned number) { return entries[number].kinds; }
extern "C" const char* launch_entry(
    unsigned number, const unsigned* grid, const unsigned* block, void** values, int order, unsigned seed
) {
    return shim::launch(entries[number], grid, block, values, order, seed);
}
"""


def entries_of(source: Path) -> list[str]:
    """The names of all entries, including those that macros generate: the preprocessor puts a mark at each."""
    plain = [flag for flag in FLAGS if flag not in ("-include", "cuda_on_cpu.h")]
    text = subprocess.run(
        [*compiler(), *plain, "-E", "-P", "-D__global__=@entry@", "-D__launch_bounds__(...)=", str(source)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    return re.findall(r"@entry@\s+void\s+(\w+)\s*\(", text)


def compile_cpp(*arguments: str) -> None:
    done = subprocess.run([*compiler(), *FLAGS, *arguments], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)  # no AssertionError: a planted fault that does not compile counts as not caught


@cache
def compiler_version() -> str:
    return subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def compiler() -> list[str]:
    """A C++ compiler: $CXX, an installed one, or the one that pip installs (ziglang)."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return [name]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++", "-nostdlib++"]
    pytest.fail("these tests need a C++ compiler: install g++ or clang, or pip install ziglang")


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what compilers made, in pytest's cache: sources seldom change, and compiling them takes minutes."""
    kept = getattr(request.config, "cache", None)
    if kept is None:
        return tmp_path_factory.mktemp("kernels")
    folder: Path = kept.mkdir("kernels")
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)[MOST_KEPT:]:
        path.unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(built: Path) -> Callable[[str, object, Callable[[Path], None]], Path]:
    """See ``made_once``."""
    return partial(made_once, built)


@pytest.fixture(scope="session")
def cuda_dir() -> Path:
    """The folder of CUDA sources to test: ours, or FLOWREEL_CUDA_DIR."""
    return CUDA_DIR


@pytest.fixture
def acting(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., CPU]]:
    """``acting(folder, order)`` makes the CPU act as a GPU that runs the sources of that folder.

    New tensors are filled with NaN: else one could happen to lie where an earlier test left the right result.
    """

    def start(sources: Path = CUDA_DIR, order: str = "forward", optimise: str = "-O2") -> CPU:
        torch.use_deterministic_algorithms(True)
        cpu = CPU(built, order, optimise)
        monkeypatch.setattr(compiling, "SOURCES", sources)
        monkeypatch.setattr(launch, "pointer_of", cpu.pointer_of)
        monkeypatch.setitem(launch.loaders, "cpu", cpu.load)
        monkeypatch.setattr(launch, "cupy_is_there", lambda: True)
        monkeypatch.setattr(launch, "_modules", {})
        monkeypatch.setattr(launch, "_kernels", {})
        return cpu

    yield start
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def plant(acting: Callable[..., CPU], tmp_path: Path) -> Callable[[str, str, str], torch.device]:
    """``plant(file, right, wrong)`` plants a fault in a copy of our sources, which the CPU then runs as a GPU would."""

    def planted(file: str, right: str, wrong: str) -> torch.device:
        sources = tmp_path / "cuda"
        shutil.copytree(compiling.SOURCES, sources)
        text = (sources / file).read_text()
        assert right in text
        # Faults are tested with float where there is float, else with half: compile no entries of other types.
        text = re.sub(r"\b[A-Z_]+\([^()]*__nv_bfloat16[^()]*\)", "", text.replace(right, wrong))
        (sources / file).write_text(text)
        common = sources / "common.cuh"
        common.write_text(
            re.sub(r"(#define FOR_EACH_TYPE\(ENTRY\) ENTRY\(float, float\)).*", r"\1", common.read_text())
        )
        acting(sources, optimise="-Og")  # compiled once and run for a moment
        return torch.device("cpu")

    return planted


@pytest.fixture(params=["cpu forward", "cpu shuffled", pytest.param("gpu", marks=pytest.mark.gpu)])
def card(request: pytest.FixtureRequest, acting: Callable[..., CPU]) -> torch.device:
    """The device that CUDA kernels run on: the CPU acting as a GPU, in two orders of threads, and a real GPU."""
    name, _, order = request.param.partition(" ")
    if name == "cpu":
        acting(order=order)
        return torch.device("cpu")
    return request.getfixturevalue("gpu")


@pytest.fixture
def gpu(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A real GPU, which runs the chosen sources."""
    monkeypatch.setattr(compiling, "SOURCES", CUDA_DIR)
    return gpu
