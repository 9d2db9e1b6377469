"""NVIDIA's PyNvVideoCodec: loaded on first use, and asked what a GPU decodes. What it decodes is in ``nvdec.py``."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

from flowreel.engine.errors import MissingDependencyError

OLDEST = (2, 2, 4)  # before it, the strides of 16-bit surfaces were wrong
INSTALL = "pip install 'flowreel[cuda]' (flowreel[cuda12] for a driver of CUDA 12)"


def load() -> ModuleType:
    """PyNvVideoCodec itself.

    Raises MissingDependencyError saying whether it is not installed, too old, or cannot load, and why.
    """
    try:
        import PyNvVideoCodec
    except ModuleNotFoundError as error:
        if error.name != "PyNvVideoCodec":
            raise _cannot_load(error) from error
        raise MissingDependencyError(f"PyNvVideoCodec is not installed: {INSTALL}") from error
    except (ImportError, OSError, RuntimeError) as error:  # without the driver's NVENC library it is a RuntimeError
        raise _cannot_load(error) from error
    found = str(getattr(PyNvVideoCodec, "__version__", "unknown"))
    if _numbers(found) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise MissingDependencyError(f"PyNvVideoCodec {found} is too old, {wanted} is needed: {INSTALL}")
    module: ModuleType = PyNvVideoCodec
    return module


def _cannot_load(error: Exception) -> MissingDependencyError:
    return MissingDependencyError(f"PyNvVideoCodec is installed, but cannot load: {first_line(error)}")


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 2, 4) of "2.2.4"."""
    return tuple(map(int, re.findall(r"\d+", version)[: len(OLDEST)]))


def decodes(codec: ModuleType, gpu: int, kind: Any, chroma: str, bits: int) -> dict[str, int]:
    """What GPU number ``gpu`` can do with a codec, chroma subsampling ("420", "422", "444") and depth.

    ``num_decoder_engines`` is zero or missing where it decodes no such thing; else ``width_min`` to ``height_max`` are
    pixels and ``mb_num_max`` is the most macroblocks (16x16 pixels) of a picture. Empty when it cannot even be asked.
    """
    try:
        caps = codec.GetDecoderCaps(
            gpuid=gpu, codec=kind, chromaformat=getattr(codec.cudaVideoChromaFormat, chroma), bitdepth=bits
        )
    except Exception:  # errors of its own kind, and for a codec it has never heard of a plain one
        return {}
    return dict(caps)


def first_line(error: BaseException) -> str:
    """What is wrong: the line "Error Type : ..." of its own errors, which go on for lines, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line.partition(":")[2].strip() for line in lines if line.startswith("Error Type")), "")
    return told or (lines[0] if lines else type(error).__name__)
