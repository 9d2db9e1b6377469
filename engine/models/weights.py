"""Weights from NVIDIA's ``.pth.tar`` checkpoints and our ``.safetensors``, and networks with those weights.

``weight_files.py`` reads the files themselves, ``saving.py`` writes them.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor, nn

from flowreel.engine.data import JSON
from flowreel.engine.device import one_device
from flowreel.engine.errors import UnreadableWeightsError, UsageError, WeightsMismatchError, WeightsNotFoundError
from flowreel.engine.models import build_model, model_name
from flowreel.engine.models.checkpoints import (
    BASELINE,
    Checkpoint,
    checkpoint_of,
    file_sha256,
    find_checkpoint,
    published,
)
from flowreel.engine.models.identify import PARTS, SERVES, identify
from flowreel.engine.models.layers import scaled
from flowreel.engine.models.unfilled import without_values
from flowreel.engine.models.weight_files import MOST_SHOWN, read_tensors

SHIPPED = files("flowreel.engine.weights") / "baseline.safetensors"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm, which are no parameters
UNSTATED = "unstated; NVIDIA's FlowNet2 checkpoints are for research only"


@dataclass(frozen=True)
class Weights:
    """The tensors of one network, and what is known about them."""

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
        """The published checkpoint that the file is identical to; None when it is none whose hash is known."""
        known = checkpoint_of(self.sha256)
        return None if known is None else known.name

    def summary(self) -> dict[str, JSON]:
        """The file's properties as plain values. Raises WeightsMismatchError where tensors do not fit the network."""
        instantiate(self, share=True)
        return {
            "kind": "weights",
            "name": self.name,
            "known_as": self.known_as,
            "model": self.model,
            "also_runs": list(self.serves()[1:]),
            "batch_norm": self.batch_norm,
            "width": self.width,
            "parameters": sum(x.numel() for key, x in self.state.items() if not key.endswith(STATISTICS)),
            "licence": self.licence,
            "sha256": self.sha256,
            "made_by": dict(self.made_by),
        }

    def serves(self) -> tuple[str, ...]:
        """The models these weights can run: their own, and the sub-networks inside a stack."""
        return (self.model, *SERVES.get(self.model, ()))

    def state_for(self, model: str) -> dict[str, Tensor]:
        """The tensors of one of the models in ``serves()``.

        Raises:
            WeightsMismatchError: these weights do not contain that network.
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
            for prefix, inside in PARTS[model]
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
        model: one of FlowNet2, FlowNet2C, FlowNet2S, FlowNet2SD, FlowNet2CS, FlowNet2CSS, in any case. None: the
            weights' own model.
        weights: ``"baseline"``, a ``.safetensors`` or ``.pth.tar`` file, or a downloaded checkpoint's name. None:
            the network is initialised, not loaded.
        device: where the parameters go: cpu, cuda, cuda:N, or auto, which takes CUDA when available.
        batch_norm, width: architecture. With ``weights`` they are read from the file, and other values are an error.

    Returns:
        A module called as ``module(first, second)``: two (B, 3, H, W) float tensors, RGB 0..255, H and W multiples
        of 64, to (B, 2, H, W) float32 flow in pixels, x (right) then y (down). In training mode FlowNet2C, FlowNet2S
        and FlowNet2SD give five flows instead, at 1/4 to 1/64 of the size, in pixels / 20.

    Raises:
        UsageError: no model of that name, neither a model nor weights, or no such kind of device.
        DeviceError: CUDA was requested and is not available.
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
    if width is not None and not _as_wide(width, held.width):
        raise WeightsMismatchError(f"{held.name} has width {held.width:g}, not {width:g}")
    return instantiate(held, model).to(device).eval()


def instantiate(weights: Weights, model: str | None = None, *, share: bool = False) -> nn.Module:
    """The network the weights are of, or one inside it, with the weights loaded.

    Args:
        share: use the weights' own tensors as the network's parameters instead of copies.

    Raises:
        WeightsMismatchError: no such network inside, or tensors missing, left over, or of another shape or kind.
    """
    name = weights.model if model is None else model_name(model)
    state = weights.state_for(name)
    # Whatever width a small file claims, nothing is allocated for it; and torch's random generator stays untouched.
    with without_values():
        net = build_model(name, batch_norm=weights.batch_norm, width=weights.width)
    expected = net.state_dict()
    problems = [f"lacks {key}" for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    problems += [f"has an unexpected {key[:MOST_SHOWN]}" for key in state if key not in expected]
    problems += [
        f"{key} is {reprlib.repr(tuple(state[key].shape))} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    problems += [
        f"{key} is {state[key].dtype} instead of floating point"
        for key, tensor in expected.items()
        if key in state and tensor.is_floating_point() and not state[key].is_floating_point()
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsMismatchError(f"{weights.name} does not fit {name}: {', '.join(problems[:3])}{more}")
    counts = {
        key: torch.zeros((), dtype=torch.long, device="cpu") for key in expected if key.endswith("num_batches_tracked")
    }
    own = state if share else {key: tensor.clone() for key, tensor in state.items()}
    net.load_state_dict(counts | own, assign=True)  # checked above; only the counts may be absent
    return net


def lasting_weights(source: str) -> str:
    """A name for the same weights that is valid in any working folder."""
    return os.path.abspath(source) if source != BASELINE and os.path.isfile(source) else source


def require_same_weights(weights: Weights, sha256: str) -> None:
    """Raises WeightsMismatchError unless the weights, read again in another process, are still those of that hash."""
    if weights.sha256 != sha256:
        raise WeightsMismatchError(
            f"{weights.name} has been replaced since it was loaded (sha256 {weights.sha256} instead of {sha256}): "
            "start again, or put the old file back"
        )


def read_weights(source: str | Path) -> Weights:
    """Reads a weights file and identifies its network.

    Args:
        source: ``"baseline"`` for the weights that come with the package (``./baseline`` for a file of that name); a
            path; or the name of a downloaded published checkpoint, such as ``"FlowNet2"``.

    Raises:
        WeightsNotFoundError: no such file, or a checkpoint that is not downloaded.
        UnreadableWeightsError: truncated, damaged, not a checkpoint, or one that holds more than tensors and plain
            values; or a downloaded file that has changed since.
        WeightsMismatchError: readable, but not of a FlowNet2 network.
    """
    if str(source) == BASELINE:  # first: the default must not depend on files in the working folder
        with as_file(SHIPPED) as path:
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
    """The shipped weights and the published checkpoints as plain values: see ``checkpoints.published``."""
    with as_file(SHIPPED) as path:
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


def _read(path: Path, name: str) -> Weights:
    raw, about = read_tensors(path, name)
    state = {key.removeprefix("module."): tensor for key, tensor in raw.items()}
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    model, batch_norm, width = identify(state, name)
    recorded = about.get("width")
    if isinstance(recorded, float) and _as_wide(recorded, width):
        width = recorded  # exact, where the rounded channel counts only approximate it
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


def _as_wide(a: float, b: float) -> bool:
    """Whether networks of these widths have the same channels."""
    return abs(a - b) < 1 / 1024 and all(scaled(16 << step, a) == scaled(16 << step, b) for step in range(7))
