"""Loads NVIDIA's PyNvVideoCodec on first use and asks it what a GPU can decode. ``nvdec.py`` decodes with it."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from types import ModuleType
from typing import Any

from flowreel.engine.errors import DeviceError, MissingDependencyError, first_line
from flowreel.engine.pipeline import in_own_thread

OLDEST = (2, 2, 4)  # before it, the strides of 16-bit surfaces were wrong
INSTALL = "pip install 'flowreel[cuda]' (flowreel[cuda12] for a driver of CUDA 12)"


def load() -> ModuleType:
    """Import PyNvVideoCodec.

    Its warnings would go to stdout, which is for the requested output, so they are turned off unless LOGGER_LEVEL says
    otherwise. Messages about damaged pictures are printed all the same.

    Raises MissingDependencyError, which says whether it is missing, too old or fails to load, and why.
    """
    os.environ.setdefault("LOGGER_LEVEL", "ERROR")  # read at import
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
    return MissingDependencyError(f"PyNvVideoCodec is installed, but cannot load: {reason(error)}")


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 2, 4) of "2.2.4"."""
    return tuple(map(int, re.findall(r"\d+", version)[: len(OLDEST)]))


def decodes(codec: ModuleType, gpu: int, kind: Any, chroma: str, bits: int) -> dict[str, int]:
    """The decoder capabilities of GPU number ``gpu`` for a codec, chroma subsampling ("420", "422", "444") and depth.

    ``supported`` and ``num_decoder_engines`` are zero if it cannot decode that; else ``width_min`` to ``height_max``
    are pixels and ``mb_num_max`` is the most macroblocks (16x16 pixels) in a picture. Raises DeviceError when the
    query itself fails.

    PyNvVideoCodec 2.2.4 asks GPU 0, whatever the number. Each query creates and destroys a CUDA context, so answers are
    cached.
    """
    answer = _answer(codec, gpu, kind, chroma, bits)
    if isinstance(answer, str):
        raise DeviceError(answer)
    return answer


@lru_cache(maxsize=128)
def _answer(codec: ModuleType, gpu: int, kind: Any, chroma: str, bits: int) -> dict[str, int] | str:
    """The answer, or why there is none. Failures are cached too, since each costs the memory of a context."""
    if kind not in codec.cudaVideoCodec.__members__.values():  # the demuxer numbers even a codec it does not know
        return {}
    chroma_kind = codec.cudaVideoChromaFormat.__members__[chroma]

    def ask() -> dict[str, int]:
        return dict(codec.GetDecoderCaps(gpuid=gpu, codec=kind, chromaformat=chroma_kind, bitdepth=bits))

    try:
        return in_own_thread(ask)  # a failed query leaves its context current on the calling thread
    except Exception as error:  # its own types, and a plain Exception where a library is missing
        return reason(error)


def reason(error: BaseException) -> str:
    """What went wrong: the "Error Type : ..." line of its own errors, which have many lines, else the first line."""
    lines = (line.strip() for line in str(error).splitlines())
    told = next((line.partition(":")[2].strip() for line in lines if line.startswith("Error Type")), "")
    return told or first_line(error)
