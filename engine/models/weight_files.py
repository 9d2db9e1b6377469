"""Reads weights files, ``.safetensors`` and ``.pth.tar``: tensors by name, and the metadata stored with them.

Nothing is ever unpickled unsafely, and a file's claims alone never cause an allocation: its tensors together may be no
larger than the file itself.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import reprlib
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowreel.engine.data import JSON
from flowreel.engine.errors import OutputWriteError, UnreadableWeightsError, WeightsMismatchError, lacks_memory
from flowreel.engine.models.pickles import MOST_BYTES, check_checkpoint
from flowreel.engine.publish import atomic_path, write_errors

METADATA_KEY = "flowreel"
LARGEST_BYTES = 16 << 30  # of a file; FlowNet2 four times as wide as published has 10.4 GB
MOST_SHOWN = 200  # characters quoted from a file in a message


def read_tensors(path: Path, name: str) -> tuple[dict[str, Tensor], Mapping[str, JSON]]:
    """The tensors and metadata of a weights file, whose format follows from the suffix; messages call it ``name``.

    Raises:
        UnreadableWeightsError: empty, too large, truncated, damaged, or holding more than tensors and plain values.
        WeightsMismatchError: a checkpoint, but without a state_dict of tensors.
    """
    size_bytes = path.stat().st_size
    if size_bytes == 0:
        raise UnreadableWeightsError(f"{name} is empty")
    if size_bytes > LARGEST_BYTES:
        raise UnreadableWeightsError(f"{name} has {size_bytes} bytes; no FlowNet2 network has over {LARGEST_BYTES}")
    ours = path.suffix.lower() == ".safetensors"
    state, about = _read_safetensors(path, name) if ours else _read_checkpoint(path, name)
    _require_real(state, size_bytes, name)
    return state, about


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """``publish.atomic_path`` for files that torch writes. Raises OutputWriteError.

    torch must be given an open file: given a path, it does not say why a write failed.
    """
    with write_errors(path):
        try:
            with atomic_path(path) as temporary:
                yield temporary
        except RuntimeError as error:  # torch's, about where in the file a write failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise OutputWriteError(f"cannot write {path}: {_quoted(error)}") from error


def _require_real(state: Mapping[str, Tensor], size_bytes: int, name: str) -> None:
    """Requires dense tensors whose values are all in the file: one value repeated a million times grows when used."""
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
            raise UnreadableWeightsError(f"{name}: {key[:MOST_SHOWN]} is not a plain tensor of numbers")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > size_bytes:
        raise UnreadableWeightsError(f"{name} claims {claimed} bytes of tensors, but the file has {size_bytes}")


def _read_safetensors(path: Path, name: str) -> tuple[dict[str, Tensor], Mapping[str, JSON]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:  # refuses a header that claims more than the file holds
            about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, TypeError, ValueError, RecursionError, MemoryError, RuntimeError) as error:
        raise _unreadable(name, "not a whole .safetensors file", error) from error
    return state, about if isinstance(about, dict) else {}


def _read_checkpoint(path: Path, name: str) -> tuple[dict[str, Tensor], Mapping[str, JSON]]:
    try:
        _check_zip(path, name)
        check_checkpoint(path)
        with _numpy_scalars_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; real problems are raised
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnreadableWeightsError:
        raise
    except pickle.UnpicklingError as error:
        raise UnreadableWeightsError(
            f"{name} is damaged, or holds more than tensors and plain values; it was not loaded: {_met(error)}. Save "
            "it again where it was made, with nothing else than {'state_dict': model.state_dict()}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _unreadable(name, "cut, damaged, or no checkpoint", error) from error
    except (zipfile.BadZipFile, MemoryError, OverflowError, AssertionError, RecursionError) as error:
        raise _unreadable(name, "damaged", error) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise WeightsMismatchError(f"{name} holds no state_dict, but {type(content).__name__}")
    strange = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strange:
        raise WeightsMismatchError(f"{name} holds no state_dict of tensors: {reprlib.repr(strange[0])} is not one")
    return state, _about(content)


def _check_zip(path: Path, name: str) -> None:
    """Refuses compressed zip files, which might expand to any size; torch stores its tensors uncompressed."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":  # of a zip file's first record; what marks its end is missing
                raise UnreadableWeightsError(f"{name} is cut short or damaged: its end is missing; download it again")
        return
    with zipfile.ZipFile(path) as packed:
        records = packed.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise UnreadableWeightsError(f"{name} is a compressed zip file; torch saves checkpoints uncompressed")
    largest = max((record.file_size for record in records if record.filename.endswith(".pkl")), default=0)
    if largest > MOST_BYTES:
        raise UnreadableWeightsError(f"{name} holds a pickle of {largest} bytes; no checkpoint needs over {MOST_BYTES}")


def _about(content: Mapping[str, Any]) -> Mapping[str, JSON]:
    """A checkpoint's metadata: all of ours; of NVIDIA's own, the architecture, epoch and best error."""
    about: Any = {}
    if isinstance(content.get(METADATA_KEY), str):
        with suppress(ValueError, RecursionError):
            about = json.loads(content[METADATA_KEY])
    about = about if isinstance(about, dict) else {}
    trained: dict[str, JSON] = {}
    for key in ("arch", "epoch", "best_EPE"):
        value = content.get(key)
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            trained[key] = value
    recorded = about.get("made_by")
    return {**about, "made_by": recorded if isinstance(recorded, dict) else trained}


@contextmanager
def _numpy_scalars_allowed() -> Iterator[None]:
    """Allows NumPy scalars, which a checkpoint's ``best_EPE`` may be, under their old and new pickled names."""
    from numpy._core import multiarray

    scalar = multiarray.scalar
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    allowed: list[Any] = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]
    with torch.serialization.safe_globals(allowed):
        yield


def _met(error: pickle.UnpicklingError) -> str:
    """What torch refused. Its message first explains how to load the file regardless, which must not be shown here."""
    met = re.search(r"unsupported [^\n]*", str(error), re.IGNORECASE)
    return _quoted(error) if met is None else met[0][:MOST_SHOWN].partition(" was not")[0]


def _unreadable(name: str, guess: str, error: BaseException) -> UnreadableWeightsError:
    """guess: what is wrong with the file, unless memory ran out, which a damaged file too can cause."""
    wrong = "too large for the memory that is free here, or damaged" if lacks_memory(error) else guess
    return UnreadableWeightsError(f"{name} is {wrong}: {_quoted(error)}")


def _quoted(error: BaseException) -> str:
    said = str(error).strip().split("\n")[0][:MOST_SHOWN]
    return said if " " in said else f"{type(error).__name__} {said}".strip()  # a bare key or number explains nothing
