"""CUDA sources to running kernels: NVRTC compiles, CuPy loads and launches, torch owns the memory and the stream.

    cuda/NAME.cu -> includes inlined -> NVRTC -> cubin, cached on disk -> CuPy module, cached per device -> launch

CuPy is not imported before the first launch. A launch allocates nothing and waits for nothing, so it may be captured
in a CUDA graph once its module is loaded: ``prepare`` loads all modules that run on a device.

Without CuPy, for float64, and for inputs that a kernel does not take, the plain torch definitions run on the GPU too;
``recording`` tells which version ran.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from flowreel.engine.errors import DeviceError, MissingDependencyError
from flowreel.engine.files import cache_folder

SOURCES = Path(__file__).resolve().parent / "cuda"
OPTIONS = ("-std=c++17", "--ptxas-options=-v")  # -v: the log reports registers and spills
SUFFIXES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16"}  # of a kernel's name
TENSOR_CORES_SINCE = (8, 0)  # the compute capability that ``tensor_core.cuh`` requires
THREADS = 256  # per block, unless there is a reason for another number
MOST_DEEP = (1 << 16) - 1  # the most blocks a grid may have along its second or its third axis

Argument = Tensor | np.int32 | np.int64 | np.float32 | None
Size = tuple[int, ...]


class Kernel(Protocol):
    """A kernel of a loaded module, called as CuPy's kernels are."""

    def __call__(self, grid: Size, block: Size, args: tuple[object, ...], **where: object) -> None: ...


class Module(Protocol):
    """A compiled source, loaded on its device."""

    def get_function(self, name: str) -> Kernel: ...


# --- launching --------------------------------------------------------------------------------------------------------


def launch(source: str, entry: str, grid: Size, arguments: Sequence[Argument], block: Size = (THREADS,)) -> None:
    """Runs one kernel on its tensors' device, on torch's current stream there.

    Args:
        source: name of the ``.cu`` file, without the suffix.
        entry: name of the kernel in it.
        grid: blocks, 1 to 3 numbers.
        arguments: tensors, None for a null pointer, and numbers of exactly the type that the kernel takes: a plain int
            would be passed as 64 bits whatever the kernel expects.
        block: threads per block, 1 to 3 numbers.

    Raises:
        MissingDependencyError: CuPy is not installed, or does not load.
        DeviceError: the source does not compile for this device.
    """
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    passed = tuple(pointer_of(x) if isinstance(x, Tensor) else 0 if x is None else x for x in arguments)
    _start(_kernel(source, entry, device), device, grid, block, passed)


class Prepared:
    """A launch prepared once for many calls that differ only in their tensors' addresses.

    In Python, reading a tensor's strides and converting them to NumPy numbers takes longer than launching a kernel.
    """

    def __init__(self, source: str, entry: str, grid: Size, arguments: Sequence[Argument], block: Size = (THREADS,)):
        """Takes and raises the same as ``launch``; the tensors are those that a first call would be given."""
        self._device = next(x.device for x in arguments if isinstance(x, Tensor))
        self._kernel = _kernel(source, entry, self._device)
        self._grid, self._block = grid, block
        self._places = [place for place, x in enumerate(arguments) if isinstance(x, Tensor)]
        self._passed: list[object] = [0 if x is None or isinstance(x, Tensor) else x for x in arguments]

    def __call__(self, *pointers: int) -> None:
        """Runs it on torch's current stream. pointers: the address of each tensor, in the order of the arguments."""
        passed = self._passed.copy()
        for place, pointer in zip(self._places, pointers, strict=True):
            passed[place] = pointer
        _start(self._kernel, self._device, self._grid, self._block, tuple(passed))


def view(x: Tensor) -> tuple[Argument, ...]:
    """A (N, C, H, W) tensor of any strides as the five arguments that ``VIEW`` declares in the sources."""
    return x, *map(np.int64, x.stride())


def sizes(*numbers: int) -> tuple[np.int32, ...]:
    return tuple(map(np.int32, numbers))


def parts(count: int, size: int) -> int:
    """How many parts of ``size`` hold ``count`` items; the last part may be short."""
    return -(-count // size)


def blocks_for(count: int) -> Size:
    """The grid with one thread for each of ``count`` items."""
    return (parts(count, THREADS),)


def blocks_for_picture(height: int, width: int) -> int:
    """How many blocks share a picture when each ends by adding to a total: 16 pixels per thread, to keep them few."""
    return parts(height * width, 16 * THREADS)


def prepare(device: torch.device) -> None:
    """Loads all kernels for a GPU, so that none is compiled or loaded while a CUDA graph is being captured."""
    if kernels_on(device) == "cuda":
        for path in sorted(SOURCES.glob("*.cu")):
            if on_tensor_cores(device) or not needs_tensor_cores(path.stem):
                _module(path.stem, device)


def needs_tensor_cores(source: str) -> bool:
    """Whether the source includes ``tensor_core.cuh``."""
    return '#include "tensor_core.cuh"' in (SOURCES / f"{source}.cu").read_text()


@cache
def on_tensor_cores(device: torch.device) -> bool:
    """Whether kernels that include ``tensor_core.cuh`` run there: not on GPUs before compute capability 8.0."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= TENSOR_CORES_SINCE


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors share the work on a GPU; a CPU reports as many as an H100 has."""
    if device.type != "cuda":
        return 132
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def kernels_on(device: torch.device) -> str:
    """``cuda`` where our own kernels run, ``torch`` where torch's operations replace them."""
    return "cuda" if device.type == "cuda" and _cupy_is_there() else "torch"


# --- which version runs -----------------------------------------------------------------------------------------------

_ran: ContextVar[dict[str, str] | None] = ContextVar("_ran", default=None)


def implement(
    library: Any,
    name: str,
    definition: Callable[..., Any],
    *,
    on_cpu: Callable[..., Any] | None = None,
    on_cuda: Callable[..., Any] | None = None,
    takes: Callable[..., bool] = lambda *_: True,
) -> None:
    """Registers the versions of one operation: our kernel on CUDA tensors where it can run, else the definition.

    ``takes`` tells whether our kernel takes the operation's arguments. It is called here and nowhere else, so that the
    version that is noted is the one that runs.
    """
    operation = name.removesuffix("_into")  # the same operation, written to a given tensor

    def run(on: Callable[..., Any], how: str) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            note(operation, how)
            return on(*arguments)

        return noted

    plain = run(definition, "torch")
    library.impl(name, plain, "CompositeExplicitAutograd")  # for any device without a version of its own
    if on_cpu is not None:
        library.impl(name, run(on_cpu, "torch"), "CPU")
    if on_cuda is not None:
        ours = run(on_cuda, "cuda")

        def chosen(*arguments: Any) -> Any:
            known = all(x.dtype in SUFFIXES for x in arguments if isinstance(x, Tensor) and x.is_floating_point())
            return (ours if known and _cupy_is_there() and takes(*arguments) else plain)(*arguments)

        library.impl(name, chosen, "CUDA")


def refuse_derivative(library: Any, name: str) -> None:
    """Makes it an error to differentiate this operation, which computes a gradient itself.

    Otherwise torch would silently leave its part out of the result, and with ``once_differentiable`` still does so
    where the incoming gradient is a constant, as after ``.sum()``.
    """

    def refused(*_: Any) -> None:
        raise RuntimeError(
            f"{name} has no derivative, since flowreel's operations can be differentiated only once: "
            "use their gradients as constants, with .detach()"
        )

    torch.library.register_autograd(f"flowreel::{name}", refused, lib=library)


@contextmanager
def recording(into: dict[str, str]) -> Iterator[None]:
    """Notes which version of each of our operations runs meanwhile in this thread: ``cuda``, ``torch``, or both.

    The replay of a CUDA graph is not seen: record while it is captured.
    """
    before = _ran.set(into)
    try:
        yield
    finally:
        _ran.reset(before)


def note(name: str, how: str) -> None:
    """Notes that an operation is about to run, by our kernel (``cuda``) or by torch's operations (``torch``)."""
    ran = _ran.get()
    if ran is not None:
        ran[name] = how if ran.get(name, how) == how else "cuda and torch"


@cache
def _cupy_is_there() -> bool:
    return find_spec("cupy") is not None


pointer_of: Callable[[Tensor], int] = Tensor.data_ptr  # the tests put fences around the memory it points to
_modules: dict[tuple[str, torch.device], Module] = {}
_kernels: dict[tuple[str, str, torch.device], Kernel] = {}


def _kernel(source: str, entry: str, device: torch.device) -> Kernel:
    key = source, entry, device
    if key not in _kernels:
        with _current(device):
            _kernels[key] = _module(source, device).get_function(entry)
    return _kernels[key]


def _module(source: str, device: torch.device) -> Module:
    key = source, device
    if key not in _modules:
        with _current(device):
            _modules[key] = loaders[device.type](source, device)
    return _modules[key]


class _Stream(NamedTuple):
    """The attributes that CuPy reads from a stream to launch on it."""

    ptr: int  # cudaStream_t


def _start(kernel: Kernel, device: torch.device, grid: Size, block: Size, passed: tuple[object, ...]) -> None:
    """Launches on that device, on torch's current stream."""
    if device.type != "cuda":
        kernel(grid, block, passed)
        return
    with _current(device):
        kernel(grid, block, passed, stream=_Stream(torch.cuda.current_stream(device.index).cuda_stream))


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes the GPU this thread's current device."""
    if device.type != "cuda":
        return nullcontext()
    gpu = _cupy().cuda.Device(device.index)
    entered = ExitStack()
    if torch.cuda.current_device() != device.index:
        entered.enter_context(gpu)
    gpu.use()  # a thread that has not used CUDA before has no context yet
    return entered


# --- compiling --------------------------------------------------------------------------------------------------------


def read_source(name: str) -> str:
    """One ``.cu`` file with our own includes inlined: the text that is compiled and hashed."""

    def written_out(path: Path, seen: set[Path]) -> str:
        def included(match: re.Match[str]) -> str:
            inner = path.parent / match[1]
            if inner in seen:
                return ""
            seen.add(inner)
            return written_out(inner, seen)

        return re.sub(r'^#include "([^"]+)"$', included, path.read_text().replace("#pragma once\n", ""), flags=re.M)

    return written_out(SOURCES / f"{name}.cu", set())


def compile_source(name: str, architecture: str) -> tuple[bytes, str]:
    """Compiles one ``.cu`` file for e.g. ``sm_90`` (a cubin) or ``compute_90`` (PTX). Gives program and compiler log.

    Needs no GPU.

    Raises:
        DeviceError: the source does not compile.
        MissingDependencyError: neither CuPy nor NVRTC can be loaded.
    """
    nvrtc = _cupy().cuda.nvrtc
    try:
        program = nvrtc.createProgram(read_source(name), f"{name}.cu", [], [])
    except Exception as error:  # CuPy looks for the NVRTC library only now
        raise MissingDependencyError(f"NVRTC cannot be loaded ({error}): install flowreel[cuda]") from error
    options = (f"--gpu-architecture={architecture}", *OPTIONS, f"-I{_header_folder()}")
    try:
        nvrtc.compileProgram(program, options)
        log = nvrtc.getProgramLog(program)
        virtual = architecture.startswith("compute_")
        return nvrtc.getPTX(program) if virtual else nvrtc.getCUBIN(program), log
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise DeviceError(f"kernel {name}.cu does not compile for {architecture}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def _load_with_cupy(name: str, device: torch.device) -> Module:
    """Loads a source's program for this GPU, compiled now or taken from the cache of an earlier run."""
    cupy = _cupy()
    architecture = _architecture(*torch.cuda.get_device_capability(device), cupy.cuda.nvrtc.getSupportedArchs())
    key = repr((read_source(name), architecture, OPTIONS, cupy.cuda.nvrtc.getVersion()))
    kept = _cache_folder() / f"{name}-{architecture}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"

    def loaded() -> Module:
        module: Any = cupy.RawModule(path=str(kept))
        module.compile()  # loads it: otherwise the first launch would, and an error would only show there
        return module  # type: ignore[no-any-return]

    if kept.is_file():
        with suppress(RuntimeError):  # CUDA's, if the file is damaged: then it is made anew
            return loaded()
    program, _ = compile_source(name, architecture)
    _publish(kept, program)
    return loaded()


def _architecture(major: int, minor: int, supported: Sequence[int]) -> str:
    """The GPU's own architecture; if the compiler does not know it yet, the newest older virtual one (PTX)."""
    own = 10 * major + minor
    if own in supported:
        return f"sm_{own}"
    older = [number for number in supported if number < own]
    if not older:
        raise DeviceError(f"this NVRTC compiles for compute capability {min(supported) / 10} and newer, not {own / 10}")
    return f"compute_{max(older)}"


def _cache_folder() -> Path:
    """Where programs are cached: flowreel's cache folder if it is writable, else a temporary one of this process."""
    wanted = cache_folder("kernels")
    if wanted.is_absolute():
        with suppress(OSError):
            wanted.mkdir(parents=True, exist_ok=True)
            if os.access(wanted, os.W_OK):
                return wanted
    return _own_folder()


@cache
def _own_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="flowreel-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _publish(path: Path, content: bytes) -> None:
    """Writes the file whole or not at all, even if other processes compile the same program or the power fails.

    Not by tempfile, whose files only their owner may read: several users may share the cache.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without the content, which would never load
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@cache
def _header_folder() -> str:
    """The folder of cuda_fp16.h: in pip's CUDA runtime package, or in an installed toolkit."""
    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory("cudart")
    if found is None:
        raise MissingDependencyError("the CUDA runtime's headers (cuda_fp16.h) cannot be found: install flowreel[cuda]")
    return str(found)


@cache
def _cupy() -> Any:
    try:
        import cupy
    except Exception as error:  # of any kind: CuPy loads libraries that load others
        raise MissingDependencyError(
            f"our CUDA kernels need CuPy, which does not load ({error}): pip install 'flowreel[cuda]', "
            "or 'flowreel[cuda12]' for a CUDA 12 driver"
        ) from error
    return cupy


loaders: dict[str, Callable[[str, torch.device], Module]] = {"cuda": _load_with_cupy}  # the tests add one for the CPU
