"""CUDA sources to modules loaded on a GPU: NVRTC compiles, CuPy loads. ``launch.py`` launches their kernels.

cuda/NAME.cu -> includes inlined -> NVRTC -> cubin, cached on disk -> CuPy module
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from flowreel.engine.errors import DeviceError, MissingDependencyError
from flowreel.engine.files import cache_folder

SOURCES = Path(__file__).resolve().parent / "cuda"
OPTIONS = ("-std=c++17", "--ptxas-options=-v")  # -v: the log reports registers and spills


class Kernel(Protocol):
    """A kernel of a loaded module, called as CuPy's kernels are."""

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[object, ...], **where: object
    ) -> None: ...


class Module(Protocol):
    """A compiled source, loaded on its device."""

    def get_function(self, name: str) -> Kernel: ...


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
    nvrtc = load_cupy().cuda.nvrtc
    try:
        program = nvrtc.createProgram(read_source(name), f"{name}.cu", [], [])
    except Exception as error:  # CuPy looks for the NVRTC library only now
        raise MissingDependencyError(f"NVRTC cannot be loaded ({error}): install flowreel[cuda]") from error
    options = (f"--gpu-architecture={architecture}", *OPTIONS, f"-I{header_folder()}")
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


def load_module(name: str, device: torch.device) -> Module:
    """Loads a source's program for this GPU, compiled now or taken from the cache of an earlier run."""
    cupy = load_cupy()
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
def header_folder() -> str:
    """The folder of cuda_fp16.h: in pip's CUDA runtime package, or in an installed toolkit."""
    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory("cudart")
    if found is None:
        raise MissingDependencyError("the CUDA runtime's headers (cuda_fp16.h) cannot be found: install flowreel[cuda]")
    return str(found)


@cache
def load_cupy() -> Any:
    """The package, imported on first use. Raises MissingDependencyError."""
    try:
        import cupy
    except Exception as error:  # of any kind: CuPy loads libraries that load others
        raise MissingDependencyError(
            f"our CUDA kernels need CuPy, which does not load ({error}): pip install 'flowreel[cuda]', "
            "or 'flowreel[cuda12]' for a CUDA 12 driver"
        ) from error
    return cupy
