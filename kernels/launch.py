"""Launches kernels: CuPy loads and launches, torch owns the memory and the stream. ``compiling.py`` compiles them.

    cuda/NAME.cu -> CuPy module (compiling), cached per device -> kernel -> launch

CuPy is not imported before the first launch. A launch allocates nothing and waits for nothing, so it may be captured
in a CUDA graph once its module is loaded: ``prepare`` loads all modules that run on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowreel.kernels import compiling
from flowreel.kernels.compiling import Kernel, Module

SUFFIXES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16"}  # of a kernel's name
TENSOR_CORES_SINCE = (8, 0)  # the compute capability that ``tensor_core.cuh`` requires
THREADS = 256  # per block, unless there is a reason for another number
MOST_DEEP = (1 << 16) - 1  # the most blocks a grid may have along its second or its third axis

Argument = Tensor | np.int32 | np.int64 | np.float32 | None
Size = tuple[int, ...]


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
    start(_kernel(source, entry, device), device, grid, block, passed)


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
        start(self._kernel, self._device, self._grid, self._block, tuple(passed))


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
        for path in sorted(compiling.SOURCES.glob("*.cu")):
            if on_tensor_cores(device) or not needs_tensor_cores(path.stem):
                _module(path.stem, device)


def needs_tensor_cores(source: str) -> bool:
    """Whether the source includes ``tensor_core.cuh``."""
    return '#include "tensor_core.cuh"' in (compiling.SOURCES / f"{source}.cu").read_text()


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
    return "cuda" if device.type == "cuda" and cupy_is_there() else "torch"


@cache
def cupy_is_there() -> bool:
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


def start(kernel: Kernel, device: torch.device, grid: Size, block: Size, passed: tuple[object, ...]) -> None:
    """Launches on that device, on torch's current stream."""
    if device.type != "cuda":
        kernel(grid, block, passed)
        return
    with _current(device):
        kernel(grid, block, passed, stream=_Stream(torch.cuda.current_stream(device.index).cuda_stream))


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes the GPU this thread's current device.

    Torch makes the one before it current again: CuPy would create a context there (see ``engine/device.py``).
    """
    if device.type != "cuda":
        return nullcontext()
    with ExitStack() as entered:  # left, if no context can be had
        if torch.cuda.current_device() != device.index:
            entered.enter_context(torch.cuda.device(device))
        compiling.load_cupy().cuda.Device(device.index).use()  # a thread new to CUDA has no context yet
        return entered.pop_all()


loaders: dict[str, Callable[[str, torch.device], Module]] = {
    "cuda": compiling.load_module
}  # the tests add one for the CPU
