"""Weights in and out of files: NVIDIA's ``.pth.tar`` checkpoints and our ``.safetensors``.

What a file holds (which model, BatchNorm, width) is told from its tensors' names and shapes alone, so that any
checkpoint of these networks can be loaded without being told. Nothing is ever unpickled unsafely.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowreel.engine.data import JSON
from flowreel.engine.errors import UnreadableWeightsError, UsageError, WeightsMismatchError, WeightsNotFoundError
from flowreel.engine.models import MODELS, build_model, model_name
from flowreel.engine.models.layers import scaled

BASELINE = "baseline"
METADATA_KEY = "flowreel"
RESEARCH_ONLY = "unstated; NVIDIA's FlowNet2 checkpoints are for research only"

# Which sub-network's prefix marks which stack, longest stack first.
_STACKS = (("flownetfusion.", "FlowNet2"), ("flownets_2.", "FlowNet2CSS"), ("flownets_1.", "FlowNet2CS"))
# What of a stack each smaller model is: (prefix in the stack, prefix in the model).
_PARTS = {
    "FlowNet2C": (("flownetc.", ""),),
    "FlowNet2CS": (("flownetc.", "flownetc."), ("flownets_1.", "flownets_1.")),
    "FlowNet2CSS": (("flownetc.", "flownetc."), ("flownets_1.", "flownets_1."), ("flownets_2.", "flownets_2.")),
}
_SERVES = {
    "FlowNet2": ("FlowNet2C", "FlowNet2CS", "FlowNet2CSS"),
    "FlowNet2CSS": ("FlowNet2C", "FlowNet2CS"),
    "FlowNet2CS": ("FlowNet2C",),
}


@dataclass(frozen=True)
class Weights:
    """Tensors of one network and what is known of them."""

    state: Mapping[str, Tensor]  # on the CPU, keys as in flownet2-pytorch
    model: str  # the model they were made for
    batch_norm: bool
    width: float  # factor on every layer's channels, 1.0 = the published network
    licence: str
    name: str  # "baseline", or the file's name
    sha256: str  # of the file
    made_by: Mapping[str, JSON] = field(default_factory=dict)  # how they were trained, as far as the file says

    def serves(self) -> tuple[str, ...]:
        """The models these weights can run: their own, and the sub-networks inside a stack."""
        return (self.model, *_SERVES.get(self.model, ()))

    def state_for(self, model: str) -> dict[str, Tensor]:
        """The tensors of one of the models in ``serves()``.

        Raises:
            WeightsMismatchError: these weights hold no such network.
        """
        if model == self.model:
            return dict(self.state)
        if model not in self.serves():
            raise WeightsMismatchError(
                f"{self.name} holds {self.model}, which has no {model} inside: "
                f"it can run {', '.join(self.serves())}; give other weights with --weights"
            )
        return {
            inside + key.removeprefix(prefix): tensor
            for prefix, inside in _PARTS[model]
            for key, tensor in self.state.items()
            if key.startswith(prefix)
        }


def load_model(
    model: str | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    batch_norm: bool | None = None,
    width: float | None = None,
) -> nn.Module:
    """A FlowNet2 network as a ``torch.nn.Module``, in evaluation mode.

    Args:
        model: one of FlowNet2, FlowNet2C, FlowNet2S, FlowNet2SD, FlowNet2CS, FlowNet2CSS, in any case. None: what the
            weights hold.
        weights: ``"baseline"``, a ``.safetensors`` or a ``.pth.tar`` file; None: initialised, not loaded.
        device: where the parameters go.
        batch_norm, width: architecture; with ``weights`` they are read from the file, and giving another is an error.

    Returns:
        A module called as ``module(first, second)``: two (B, 3, H, W) float tensors, RGB 0..255, H and W multiples
        of 64, to (B, 2, H, W) float32 flow in pixels, x (right) then y (down).

    Raises:
        UsageError: no model by that name, or neither a model nor weights.
        WeightsNotFoundError, UnreadableWeightsError, WeightsMismatchError: see ``read_weights``.
    """
    if weights is None:
        if model is None:
            raise UsageError("name a model, or give weights that say which model they hold")
        net = build_model(model, batch_norm=bool(batch_norm), width=1.0 if width is None else width)
        return net.to(device).eval()
    held = read_weights(weights)
    if batch_norm is not None and batch_norm != held.batch_norm:
        with_or_without = "with" if held.batch_norm else "without"
        raise WeightsMismatchError(f"{held.name} was made {with_or_without} BatchNorm")
    if width is not None and not _close(width, held.width):
        raise WeightsMismatchError(f"{held.name} has width {held.width:g}, not {width:g}")
    return instantiate(held, model).to(device).eval()


def instantiate(weights: Weights, model: str | None = None) -> nn.Module:
    """The network those weights hold, or one inside it, with the weights in place.

    Raises:
        WeightsMismatchError: no such network inside, or tensors missing, left over or of another shape.
    """
    name = weights.model if model is None else model_name(model)
    state = weights.state_for(name)
    net = build_model(name, batch_norm=weights.batch_norm, width=weights.width)
    expected = net.state_dict()
    problems = [f"lacks {key}" for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    problems += [f"has an unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsMismatchError(f"{weights.name} does not fit {name}: {', '.join(problems[:3])}{more}")
    net.load_state_dict(state, strict=False)  # checked above; only num_batches_tracked may be absent
    return net


def read_weights(source: str | Path) -> Weights:
    """Reads a weights file and finds out what it holds.

    Args:
        source: ``"baseline"`` for the weights that come with the package, else a path.

    Raises:
        WeightsNotFoundError: no such file.
        UnreadableWeightsError: cut, damaged, not a checkpoint, or one that holds more than tensors and plain values.
        WeightsMismatchError: readable, but not of a FlowNet2 network.
    """
    if str(source) == BASELINE:
        with as_file(files("flowreel.engine.weights") / "baseline.safetensors") as path:
            return _read(path, BASELINE)
    path = Path(source)
    if not path.exists():
        raise WeightsNotFoundError(f"no weights file at {path}; give a path, or 'baseline' for the shipped weights")
    if not path.is_file():
        raise UnreadableWeightsError(f"{path} is not a file")
    return _read(path, path.name)


def save_weights(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    licence: str,
    made_by: Mapping[str, JSON],
    width: float | None = None,
    half: bool = False,
) -> None:
    """Writes ``.safetensors`` with the model, width, licence and history in its metadata.

    Args:
        state: a network's state_dict; the model is told from it, and the width unless given.
        half: store float16 (half the size; about 1e-3 relative error); loading gives float32 again.

    Raises:
        WeightsMismatchError: the tensors are of no FlowNet2 network.
    """
    from safetensors.torch import save

    model, batch_norm, told = identify(state, str(path))
    about = {
        "model": model,
        "batch_norm": batch_norm,
        "width": told if width is None else width,
        "licence": licence,
        "made_by": dict(made_by),
    }
    tensors = {
        key: (tensor.detach().cpu().half() if half and tensor.is_floating_point() else tensor.detach().cpu())
        .clone()
        .contiguous()
        for key, tensor in state.items()
    }
    temporary = Path(f"{path}.partial")
    # Not save_file, which makes files that nobody but their owner may read.
    temporary.write_bytes(save(tensors, metadata={"format": "pt", METADATA_KEY: json.dumps(about)}))
    temporary.replace(path)


def identify(state: Mapping[str, Tensor], name: str) -> tuple[str, bool, float]:
    """(model, BatchNorm, width) told from tensor names and shapes.

    Raises:
        WeightsMismatchError: the names are of no FlowNet2 network, or it is a part of a stack alone.
    """
    model = next((stack for prefix, stack in _STACKS if any(key.startswith(prefix) for key in state)), None)
    prefix = "" if model is None else "flownetc."
    if model is None and f"{prefix}predict_flow6.weight" in state:
        if "conv_redir.0.weight" in state:
            model = "FlowNet2C"
        elif "conv0.0.weight" in state:
            model = "FlowNet2SD"
        elif "conv1.0.weight" in state and state["conv1.0.weight"].ndim == 4:
            inputs = state["conv1.0.weight"].shape[1]
            if inputs != 6:
                raise WeightsMismatchError(f"{name} holds a refining FlowNetS ({inputs} inputs): it cannot run alone")
            model = "FlowNet2S"
    widest = state.get(f"{prefix}predict_flow6.weight")
    if model is None or widest is None or widest.ndim != 4:
        some = ", ".join(sorted(map(str, state))[:3]) or "nothing"
        raise WeightsMismatchError(f"{name} holds none of {', '.join(MODELS)}: its tensors are {some}, ...")
    width = widest.shape[1] / 1024
    if not 0.01 <= width <= 4:
        raise WeightsMismatchError(f"{name}: a network of {widest.shape[1]} channels is none of ours")
    return model, any(key.endswith("running_mean") for key in state), width


def _read(path: Path, name: str) -> Weights:
    about: Mapping[str, JSON] = {}
    if path.suffix == ".safetensors":
        raw, about = _read_safetensors(path, name)
    else:
        raw = _read_checkpoint(path, name)
    state = {key.removeprefix("module."): tensor for key, tensor in raw.items()}
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    model, batch_norm, width = identify(state, name)
    recorded = about.get("width")
    if isinstance(recorded, float) and scaled(1024, recorded) == scaled(1024, width):
        width = recorded  # exact, where the rounded channel numbers tell it only nearly
    made_by = about.get("made_by")
    return Weights(
        state=state,
        model=model,
        batch_norm=batch_norm,
        width=width,
        licence=str(about.get("licence", RESEARCH_ONLY)),
        name=name,
        sha256=_sha256(path),
        made_by=made_by if isinstance(made_by, dict) else {},
    )


def _read_safetensors(path: Path, name: str) -> tuple[dict[str, Tensor], Mapping[str, JSON]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise UnreadableWeightsError(f"{name} is not a whole .safetensors file: {_first_line(error)}") from error
    return state, about if isinstance(about, dict) else {}


def _read_checkpoint(path: Path, name: str) -> dict[str, Tensor]:
    if path.stat().st_size == 0:
        raise UnreadableWeightsError(f"{name} is empty")
    try:
        with _numpy_scalars_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnreadableWeightsError(
            f"{name} is damaged, or holds more than tensors and plain values; it was not loaded: {_first_line(error)}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UnreadableWeightsError(f"{name} is cut, damaged, or no checkpoint: {_first_line(error)}") from error
    except (zipfile.BadZipFile, MemoryError, OverflowError, AssertionError, RecursionError) as error:
        raise UnreadableWeightsError(f"{name} is damaged: {_first_line(error)}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise WeightsMismatchError(f"{name} holds no state_dict, but {type(content).__name__}")
    strange = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strange:
        raise WeightsMismatchError(f"{name} holds no state_dict of tensors: {strange[0]!r} is none")
    return state


@contextmanager
def _numpy_scalars_allowed() -> Iterator[None]:
    """Checkpoints saved while training keep ``best_EPE``, sometimes as a NumPy scalar, under the name of its time."""
    from numpy._core import multiarray

    scalar = multiarray.scalar
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    allowed: list[Any] = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]
    with torch.serialization.safe_globals(allowed):
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    said = str(error).strip().split("\n")[0]
    return said if " " in said else f"{type(error).__name__} {said}".strip()  # a bare key or number says nothing


def _close(a: float, b: float) -> bool:
    return abs(a - b) < 1e-6
