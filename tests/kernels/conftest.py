"""The two places our CUDA kernels run in tests: a GPU where there is one, and a CPU that acts the GPU everywhere.

The launch code is the same in both. On the CPU the ``.cu`` files are compiled with ``cuda_on_cpu/cuda_on_cpu.h``, and
every tensor a kernel is given lies, during the launch, between fences: a read beyond it finds NaN, a write is noticed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flowreel.kernels import launch

HERE = Path(__file__).resolve().parent
SHIM = HERE / "cuda_on_cpu"
FLAGS = ("-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-w", f"-I{SHIM}", "-include", "cuda_on_cpu.h")
ORDERS = ("forward", "backward", "shuffled")  # whose turn is next
FENCE = np.full(1 << 14, 0x7FA07DA5, np.uint32).view(np.uint8)  # NaN in every type, and of a kind no sum leaves
CUDA_DIR = Path(os.environ.get("FLOWREEL_CUDA_DIR", launch.SOURCES)).resolve()


class KernelFailure(AssertionError):
    """A kernel did what a GPU forbids or leaves undefined."""


class CPU:
    """Acts as a GPU: compiles sources, loads them, and launches their kernels on CPU tensors."""

    def __init__(self, sources: Path, built: Path, order: str = "forward") -> None:
        self.order = ORDERS.index(order)
        self._sources = sources
        self._built = built
        self._fenced: dict[int, tuple[np.ndarray, Tensor]] = {}

    def load(self, name: str, device: torch.device) -> Module:
        return Module(self, shared_library(name, self._built))

    def pointer_of(self, tensor: Tensor) -> int:
        """A copy of the tensor's whole memory between fences."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._fenced:
            buffer = np.concatenate([FENCE, np.empty(storage.nbytes(), np.uint8), FENCE])
            ctypes.memmove(buffer.ctypes.data + FENCE.size, key, storage.nbytes())
            self._fenced[key] = buffer, tensor
        return self._fenced[key][0].ctypes.data + FENCE.size + tensor.data_ptr() - key

    def taken_back(self) -> bool:
        """Copies the memory back where it came from; false when a fence was written to."""
        whole = True
        for key, (buffer, _) in self._fenced.items():
            whole &= np.array_equal(buffer[: FENCE.size], FENCE) and np.array_equal(buffer[-FENCE.size :], FENCE)
            ctypes.memmove(key, buffer.ctypes.data + FENCE.size, buffer.size - 2 * FENCE.size)
        self._fenced.clear()
        return whole


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
            """Takes what a CuPy kernel takes, and passes it on as CuPy does."""
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
    """How CuPy passes it: a plain int as 64 bits, which is what a pointer is."""
    if type(x) is int:
        return "p" if expected == "p" else "l"
    return {np.int32: "i", np.int64: "l", np.float32: "f"}[type(x)]


# --- compiling --------------------------------------------------------------------------------------------------------


def shared_library(name: str, built: Path) -> ctypes.CDLL:
    """One source for the CPU; compiled once a session, as long as nothing in it changes."""
    text = launch.read_source(name)
    key = hashlib.sha256("\0".join((text, *((SHIM / "cuda_on_cpu.h").read_text(), *FLAGS))).encode()).hexdigest()[:16]
    library = built / f"{name}-{key}.so"
    if not library.exists():
        source = built / f"{name}-{key}.cpp"
        source.write_text(text)
        entries = [f"ENTRY({entry})" for entry in entries_of(source)]
        source.write_text(f"{text}\nstatic const shim::Entry entries[] = {{{', '.join(entries)}}};\n{ACCESS}")
        part = library.with_suffix(".part")
        compile_cpp(str(source), "-o", str(part))
        part.rename(library)
    return ctypes.CDLL(str(library))


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
    """The names of all entries, those that macros make included: the preprocessor leaves a mark at each."""
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
    assert done.returncode == 0, done.stderr


def compiler() -> list[str]:
    """A C++ compiler: $CXX, the machine's own, or the one that pip installs."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return [name]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++", "-nostdlib++"]
    pytest.fail("these tests need a C++ compiler: install g++ or clang, or pip install ziglang")


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session keeps what it compiled."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="session")
def cuda_dir() -> Path:
    """The folder of CUDA sources to test: ours, or the one that FLOWREEL_CUDA_DIR names."""
    return CUDA_DIR


@pytest.fixture
def acting(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., CPU]]:
    """``acting(folder, order)`` makes the CPU act as a GPU that runs the sources of that folder."""

    def start(sources: Path = CUDA_DIR, order: str = "forward") -> CPU:
        cpu = CPU(sources, built, order)
        monkeypatch.setattr(launch, "SOURCES", sources)
        monkeypatch.setattr(launch, "pointer_of", cpu.pointer_of)
        monkeypatch.setitem(launch.loaders, "cpu", cpu.load)
        monkeypatch.setattr(launch, "_modules", {})
        monkeypatch.setattr(launch, "_kernels", {})
        return cpu

    return start


@pytest.fixture(params=[*(f"cpu {order}" for order in ORDERS), "gpu"])
def card(request: pytest.FixtureRequest, acting: Callable[..., CPU]) -> torch.device:
    """The device whose tensors the CUDA versions take: the acting CPU in each order of threads, then a real GPU."""
    name, _, order = request.param.partition(" ")
    if name == "cpu":
        acting(order=order)
        return torch.device("cpu")
    return request.getfixturevalue("gpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A real one."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(launch, "SOURCES", CUDA_DIR)
    return torch.device("cuda", torch.cuda.current_device())
