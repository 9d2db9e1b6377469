"""Peers that want a GPU: torchvision's RAFT-small, and flownet2-pytorch's own kernels; left out with the reason."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Action, Effort, Sample, Skipped, alternated, device_sync, ratio
from benchmarks.networks import random_weights
from flowreel.engine.config import ModelConfig
from flowreel.engine.inference import prepare

SIZES = {"1024x448": (448, 1024), "1920x1088": (1088, 1920)}
RAFT, OURS = "torchvision RAFT-small, 12 updates", "flowreel FlowNet2C"
KERNELS = ("correlation_cuda", "resample2d_cuda", "channelnorm_cuda")  # what flownet2-pytorch's build installs


def run(short: bool = False) -> dict[str, object]:
    """One row a peer, ours beside it; a row that could not be measured says why under "skipped"."""
    rows = [row for size in SIZES for row in _raft_rows(size, short)]
    return {"rows": [*rows, *_kernel_rows()]}


def _raft_rows(size: str, short: bool) -> Iterator[dict[str, Any]]:
    try:
        if not torch.cuda.is_available():
            raise Skipped("there is no GPU")
        yield from raft_rows(size, SIZES[size], "cuda", "fp16", Effort.of(short))
    except Skipped as reason:
        yield {"peer": RAFT, "size": size, "skipped": str(reason)}


def raft_rows(name: str, size: tuple[int, int], device: str, precision: str, effort: Effort) -> list[dict[str, Any]]:
    """Both on frames of one size (height, width), in turn. Raises Skipped where torchvision cannot be had."""
    with tempfile.TemporaryDirectory() as folder:
        ways = raft_and_ours(device, precision, *size, Path(folder))
    found = alternated({RAFT: ways[0], OURS: ways[1]}, effort, device_sync(device))
    return [
        {
            "peer": peer,
            "size": name,
            "pairs/s": Sample.of(seconds).rate(1).cell(),
            "its time / ours": ratio(seconds, found[OURS]),
        }
        for peer, seconds in found.items()
    ]


def raft_and_ours(device: str, precision: str, height: int, width: int, folder: Path) -> tuple[Action, Action]:
    """Both on the same frames, one pair a call, random weights. Raises Skipped where torchvision cannot be had."""
    raft = torchvision_models().raft_small(weights=None).eval().to(device)
    weights = str(random_weights("FlowNet2C", folder))
    config = ModelConfig(model="FlowNet2C", weights=weights, device=device, precision=precision, batch=1)  # type: ignore
    inference = prepare(config, height, width)
    torch.manual_seed(0)
    frames = [torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, device=device) for _ in range(2)]
    half = torch.float16 if precision == "fp16" else torch.bfloat16

    def theirs() -> Tensor:
        first, second = (frame.float() / 127.5 - 1 for frame in frames)
        with torch.no_grad(), torch.autocast(device, half, enabled=precision != "fp32"):
            flow: Tensor = raft(first, second)[-1]
            return flow

    return theirs, lambda: inference.flow(*frames)


def torchvision_models() -> Any:
    """Its module of flow networks. Raises Skipped where there is none."""
    try:
        return import_module("torchvision.models.optical_flow")
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise Skipped(f"torchvision cannot be used: {error}") from error


def _kernel_rows() -> Iterator[dict[str, Any]]:
    for kernel in KERNELS:
        if not torch.cuda.is_available():
            reason = "there is no GPU"
        else:
            try:
                import_module(kernel)
                reason = "it is installed, but this comparison has never been tried and is not written"
            except ImportError as error:
                reason = f"not installed: {error}"
        yield {"peer": f"flownet2-pytorch {kernel}", "skipped": reason}
