"""Writes weights as our ``.safetensors`` or as flownet2-pytorch's ``.pth.tar``, and converts between the two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flowreel.engine.data import JSON
from flowreel.engine.errors import UsageError, WeightsMismatchError
from flowreel.engine.models.identify import identify
from flowreel.engine.models.weight_files import METADATA_KEY, appearing
from flowreel.engine.models.weights import Weights, instantiate, read_weights
from flowreel.engine.publish import require_absent

CHECKPOINT_SUFFIXES = (".pth.tar", ".pth", ".pt", ".tar")
NO_BEST_EPE = 1e10  # pixels; NVIDIA's own value where nothing was measured


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
        path: written whole or not at all, replacing a file of that name; missing folders are created.
        state: a network's state_dict, from which the model is identified, and the width unless given.
        half: store float16 (half the size; about 1e-3 relative error); loading gives float32 again.

    Raises:
        WeightsMismatchError: the tensors fit no FlowNet2 network, or their values exceed float16's range.
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
    tensors = _apart({key: _halved(key, tensor) for key, tensor in state.items()} if half else state)
    with appearing(Path(path)) as temporary:
        # Not save_file, which creates files that only their owner may read.
        temporary.write_bytes(save(tensors, metadata={"format": "pt", METADATA_KEY: json.dumps(about)}))


def save_checkpoint(path: str | Path, weights: Weights) -> None:
    """Writes a ``.pth.tar`` that flownet2-pytorch loads: ``epoch``, ``state_dict``, ``best_EPE``, all float32.

    Licence and history are stored as JSON under a key of our own, which NVIDIA's code ignores.

    Raises:
        OutputWriteError: the file cannot be written. It is written whole or not at all.
    """
    trained = {key: weights.made_by[key] for key in ("arch", "epoch", "best_EPE") if key in weights.made_by}
    about = {"width": weights.width, "licence": weights.licence, "made_by": dict(weights.made_by)}
    content = {
        "epoch": 0,
        "best_EPE": NO_BEST_EPE,
        **trained,
        "state_dict": _apart(weights.state),
        METADATA_KEY: json.dumps(about),
    }
    with appearing(Path(path)) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def convert(source: str | Path, output: str | Path, *, half: bool = False, overwrite: bool = False) -> Weights:
    """Converts a weights file to the format that ``output``'s suffix names. float32 values are preserved bit for bit.

    Licence and history are kept, and the source's name and sha256 are appended to the history.

    Args:
        source: as for ``read_weights``.
        output: ``X.safetensors``, or ``X.pth.tar`` as flownet2-pytorch loads it.
        half: store float16; ``.safetensors`` only.
        overwrite: replace an existing file.

    Returns:
        The new file, read back.

    Raises:
        UsageError: another suffix, or ``half`` for a checkpoint.
        OutputExistsError, OutputWriteError, WeightsError: as their names say; nothing half-written remains.
    """
    path = Path(output)
    ours = path.name.lower().endswith(".safetensors")
    if not ours and not path.name.lower().endswith(CHECKPOINT_SUFFIXES):
        raise UsageError(f"weights are written as X.safetensors or X.pth.tar, got {path.name!r}")
    if half and not ours:
        raise UsageError(f"flownet2-pytorch loads float32 alone: half is for .safetensors, not for {path.name!r}")
    require_absent(path, overwrite)
    held = read_weights(source)
    instantiate(held, share=True)  # raises if the tensors do not fit the network
    before = held.made_by.get("converted_from")
    origin: dict[str, JSON] = {"name": held.known_as or held.name, "sha256": held.sha256}
    lineage: list[JSON] = [*(before if isinstance(before, list) else []), origin]
    held = replace(held, made_by={**held.made_by, "converted_from": lineage})
    if ours:
        save_weights(path, held.state, licence=held.licence, made_by=held.made_by, width=held.width, half=half)
    else:
        save_checkpoint(path, held)
    return read_weights(path)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, dense, and no two sharing memory, as files require; copied only if necessary."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()  # addresses
    for key, tensor in state.items():
        dense = tensor.detach().cpu().contiguous()
        if dense.untyped_storage().nbytes() != dense.nbytes or dense.data_ptr() in taken:
            dense = dense.clone()
        taken.add(dense.data_ptr())
        apart[key] = dense
    return apart


def _halved(key: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    halved = tensor.detach().half()
    if not torch.equal(halved.isfinite(), tensor.isfinite()):
        raise WeightsMismatchError(f"{key} reaches {tensor.abs().max():.3g}, float16 only 65504: store it without half")
    return halved
