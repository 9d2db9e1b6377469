"""Weights in and out of files: NVIDIA's ``.pth.tar`` checkpoints and our ``.safetensors``.

What a file holds (which model, BatchNorm, width) is told from its tensors' names and shapes alone, so that any
checkpoint of these networks can be loaded without being told. How the files themselves are read is in
``weight_files.py``.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor, nn

from flowreel.engine.data import JSON
from flowreel.engine.device import one_device
from flowreel.engine.errors import (
    OutputExistsError,
    UnreadableWeightsError,
    UsageError,
    WeightsMismatchError,
    WeightsNotFoundError,
)
from flowreel.engine.models import MODELS, build_model, model_name
from flowreel.engine.models.checkpoints import (
    BASELINE,
    Checkpoint,
    checkpoint_of,
    file_sha256,
    find_checkpoint,
    published,
)
from flowreel.engine.models.layers import scaled
from flowreel.engine.models.unfilled import without_values
from flowreel.engine.models.weight_files import METADATA_KEY, MOST_SHOWN, appearing, read_tensors

UNSTATED = "unstated; NVIDIA's FlowNet2 checkpoints are for research only"
CHECKPOINT_SUFFIXES = (".pth.tar", ".pth", ".pt", ".tar")
LEAST_VALUES = 30_000_000  # at width 1, times width squared: every network has more; FlowNet2S has 38.7 million
NO_BEST_EPE = 1e10  # pixels; what NVIDIA's own checkpoints say where nothing was measured

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

    @property
    def known_as(self) -> str | None:
        """Which published checkpoint the file is, to the bit; None when it is none whose hash is known."""
        known = checkpoint_of(self.sha256)
        return None if known is None else known.name

    def summary(self) -> dict[str, JSON]:
        """What the file holds, in plain values."""
        return {
            "kind": "weights",
            "name": self.name,
            "known_as": self.known_as,
            "model": self.model,
            "also_runs": list(self.serves()[1:]),
            "batch_norm": self.batch_norm,
            "width": self.width,
            "parameters": sum(tensor.numel() for tensor in self.state.values()),
            "licence": self.licence,
            "sha256": self.sha256,
            "made_by": dict(self.made_by),
        }

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
        weights: ``"baseline"``, a ``.safetensors`` or a ``.pth.tar`` file, or a downloaded checkpoint's name; None:
            initialised, not loaded.
        device: where the parameters go: cpu, cuda, cuda:N, or auto, which takes CUDA when it is there.
        batch_norm, width: architecture; with ``weights`` they are read from the file, and giving another is an error.

    Returns:
        A module called as ``module(first, second)``: two (B, 3, H, W) float tensors, RGB 0..255, H and W multiples
        of 64, to (B, 2, H, W) float32 flow in pixels, x (right) then y (down).

    Raises:
        UsageError: no model by that name, neither a model nor weights, or no such kind of device.
        DeviceError: CUDA was asked for and is not there.
        WeightsNotFoundError, UnreadableWeightsError, WeightsMismatchError: see ``read_weights``.
    """
    device = one_device(str(device))
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


def instantiate(weights: Weights, model: str | None = None, *, share: bool = False) -> nn.Module:
    """The network those weights hold, or one inside it, with the weights in place.

    Args:
        share: the network's parameters are the weights' own tensors, where they would else be copies.

    Raises:
        WeightsMismatchError: no such network inside, or tensors missing, left over or of another shape.
    """
    name = weights.model if model is None else model_name(model)
    state = weights.state_for(name)
    _require_enough(state, weights, name)
    with without_values():  # nothing is drawn from torch's generator
        net = build_model(name, batch_norm=weights.batch_norm, width=weights.width)
    expected = net.state_dict()
    problems = [f"lacks {key}" for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    problems += [f"has an unexpected {key[:MOST_SHOWN]}" for key in state if key not in expected]
    problems += [
        f"{key} is {reprlib.repr(tuple(state[key].shape))} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsMismatchError(f"{weights.name} does not fit {name}: {', '.join(problems[:3])}{more}")
    counts = {
        key: torch.zeros((), dtype=torch.long, device="cpu") for key in expected if key.endswith("num_batches_tracked")
    }
    own = state if share else {key: tensor.clone() for key, tensor in state.items()}
    net.load_state_dict(counts | own, assign=True)  # checked above; only those may be absent
    return net


def _require_enough(state: Mapping[str, Tensor], weights: Weights, model: str) -> None:
    """A small file that poses as a network wider than any published must not make us build one of 10 GB."""
    values, least = sum(tensor.numel() for tensor in state.values()), LEAST_VALUES * weights.width**2
    if weights.width > 1 and values < least:
        raise WeightsMismatchError(
            f"{weights.name} does not fit {model}: at width {weights.width:g} it has at least {least:.0f} values, "
            f"the file {values}"
        )


def read_weights(source: str | Path) -> Weights:
    """Reads a weights file and finds out what it holds.

    Args:
        source: ``"baseline"`` for the weights that come with the package (``./baseline`` for a file of that name); a
            path; or the name of a published checkpoint that was downloaded, such as ``"FlowNet2"``.

    Raises:
        WeightsNotFoundError: no such file, or a checkpoint that is not downloaded.
        UnreadableWeightsError: cut, damaged, not a checkpoint, or one that holds more than tensors and plain values;
            or a download that is no longer the file it was.
        WeightsMismatchError: readable, but not of a FlowNet2 network.
    """
    if str(source) == BASELINE:  # before any path: the default must not hang on what the working folder holds
        with as_file(files("flowreel.engine.weights") / "baseline.safetensors") as path:
            return _read(path, BASELINE)
    path = Path(source)
    if path.is_file():
        return _read(path, path.name)
    known = find_checkpoint(str(source))
    if known is not None:
        return _read_downloaded(known)
    if not path.exists():
        raise WeightsNotFoundError(
            f"no weights file at {path}; give a path, 'baseline' for the shipped weights, "
            "or a checkpoint that 'flowreel weights list' shows as downloaded"
        )
    raise UnreadableWeightsError(f"{path} is not a file")


def known_weights() -> list[dict[str, JSON]]:
    """The shipped weights and the published checkpoints, in plain values: see ``checkpoints.published``."""
    with as_file(files("flowreel.engine.weights") / "baseline.safetensors") as path:
        held, size_bytes = _read(path, BASELINE), path.stat().st_size
    told: dict[str, JSON] = {"name": BASELINE, "model": held.model, "licence": held.licence, "sha256": held.sha256}
    sizes: dict[str, JSON] = {"size_bytes": size_bytes, "about_bytes": size_bytes}
    return [told | sizes | {"shipped": True, "downloaded": False, "path": None}, *published()]


def _read_downloaded(known: Checkpoint) -> Weights:
    if not known.path.is_file():
        raise WeightsNotFoundError(
            f"{known.name} is not downloaded: run 'flowreel weights download {known.name}' "
            "(research only; it asks first), or give the path of a file"
        )
    held = _read(known.path, known.name)
    if known.sha256 not in (None, held.sha256):
        raise UnreadableWeightsError(
            f"{known.path} is no longer {known.name}: expected sha256 {known.sha256}, found {held.sha256}; "
            f"run 'flowreel weights download {known.name} --overwrite'"
        )
    return held


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
        path: appears whole or not at all, and replaces a file of that name; missing folders are created.
        state: a network's state_dict; the model is told from it, and the width unless given.
        half: store float16 (half the size; about 1e-3 relative error); loading gives float32 again.

    Raises:
        WeightsMismatchError: the tensors are of no FlowNet2 network, or too large for float16.
        OutputWriteError: the file cannot be written.
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
    tensors = {key: _halved(key, tensor) if half else _own(tensor) for key, tensor in state.items()}
    with appearing(Path(path)) as temporary:
        # Not save_file, which makes files that nobody but their owner may read.
        temporary.write_bytes(save(tensors, metadata={"format": "pt", METADATA_KEY: json.dumps(about)}))


def save_checkpoint(path: str | Path, weights: Weights) -> None:
    """Writes a ``.pth.tar`` that flownet2-pytorch loads: ``epoch``, ``state_dict``, ``best_EPE``, all float32.

    Licence and history go along as JSON under a key of our own, which NVIDIA's code does not look at.

    Raises:
        OutputWriteError: the file cannot be written. It appears whole or not at all.
    """
    trained = {key: weights.made_by[key] for key in ("arch", "epoch", "best_EPE") if key in weights.made_by}
    about = {"width": weights.width, "licence": weights.licence, "made_by": dict(weights.made_by)}
    content = {
        "epoch": 0,
        "best_EPE": NO_BEST_EPE,
        **trained,
        "state_dict": {key: _own(tensor) for key, tensor in weights.state.items()},
        METADATA_KEY: json.dumps(about),
    }
    with appearing(Path(path)) as temporary:
        torch.save(content, temporary)


def convert(source: str | Path, output: str | Path, *, half: bool = False, overwrite: bool = False) -> Weights:
    """One kind of weights file to the other, which follows from ``output``'s name. float32 stays the same to the bit.

    Licence and history are kept, and what it was converted from (name and sha256) is added to them.

    Args:
        source: as of ``read_weights``.
        output: ``X.safetensors``, or ``X.pth.tar`` as flownet2-pytorch loads it.
        half: float16 values, in ``.safetensors`` only.
        overwrite: replace a file that is there.

    Returns:
        The new file, read back.

    Raises:
        UsageError: another ending, or half where it cannot be.
        OutputExistsError, OutputWriteError, WeightsError: as their names say; nothing half-written remains.
    """
    path = Path(output)
    ours = path.name.lower().endswith(".safetensors")
    if not ours and not path.name.lower().endswith(CHECKPOINT_SUFFIXES):
        raise UsageError(f"weights are written as X.safetensors or X.pth.tar, got {path.name!r}")
    if half and not ours:
        raise UsageError(f"flownet2-pytorch loads float32 alone: half is for .safetensors, not for {path.name!r}")
    if os.path.lexists(path) and not overwrite:
        raise OutputExistsError(f"{path} is already there: pass --overwrite to replace it, or choose another name")
    held = read_weights(source)
    before = held.made_by.get("converted_from")
    origin: dict[str, JSON] = {"name": held.known_as or held.name, "sha256": held.sha256}
    lineage: list[JSON] = [*(before if isinstance(before, list) else []), origin]
    held = replace(held, made_by={**held.made_by, "converted_from": lineage})
    if ours:
        save_weights(path, held.state, licence=held.licence, made_by=held.made_by, width=held.width, half=half)
    else:
        save_checkpoint(path, held)
    return read_weights(path)


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, dense, and sharing its memory with no other, as files want them; copied only where it must be."""
    dense = tensor.detach().cpu().contiguous()
    return dense if dense.untyped_storage().nbytes() == dense.nbytes else dense.clone()


def _halved(key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return _own(tensor)
    halved = _own(tensor.detach().half())
    if not torch.equal(halved.isfinite(), tensor.detach().cpu().isfinite()):
        raise WeightsMismatchError(f"{key} reaches {tensor.abs().max():.3g}, float16 only 65504: store it without half")
    return halved


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
        some = ", ".join(key[:MOST_SHOWN] for key in sorted(state)[:3]) or "nothing"
        raise WeightsMismatchError(f"{name} holds none of {', '.join(MODELS)}: its tensors are {some}, ...")
    width = widest.shape[1] / 1024
    if not 0.01 <= width <= 4:
        raise WeightsMismatchError(f"{name}: a network of {widest.shape[1]} channels is none of ours")
    return model, any(key.endswith("running_mean") for key in state), width


def _read(path: Path, name: str) -> Weights:
    raw, about = read_tensors(path, name)
    state = {key.removeprefix("module."): tensor for key, tensor in raw.items()}
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    model, batch_norm, width = identify(state, name)
    recorded = about.get("width")
    if isinstance(recorded, float) and math.isfinite(recorded) and scaled(1024, recorded) == scaled(1024, width):
        width = recorded  # exact, where the rounded channel numbers tell it only nearly
    made_by, sha256 = about.get("made_by"), file_sha256(path)
    known = checkpoint_of(sha256)
    return Weights(
        state=state,
        model=model,
        batch_norm=batch_norm,
        width=width,
        licence=str(about.get("licence", UNSTATED if known is None else known.licence)),
        name=name,
        sha256=sha256,
        made_by=made_by if isinstance(made_by, dict) else {},
    )


def _close(a: float, b: float) -> bool:
    return abs(a - b) < 1e-6
