"""A modern network beside ours: torchvision's RAFT-small, where torchvision is installed."""

from __future__ import annotations

import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.findings import Findings, Settings
from benchmarks.measure import ONCE, Action, Effort, Sample, Skipped, alternated, device_sync, ratio
from benchmarks.networks import random_weights
from flowreel.engine.config import ModelConfig
from flowreel.engine.inference import load_network

SIZES = {"1024x448": (448, 1024), "1920x1088": (1088, 1920)}
DRY = {"128x128": (128, 128)}  # the smallest size that RAFT accepts
RAFT, OURS = "torchvision RAFT-small, 12 updates", "flowreel FlowNet2C"


def run(findings: Findings, settings: Settings) -> None:
    """Both networks in turn, one pair per call, random weights."""
    torchvision_models()  # raises Skipped here, for the whole part
    effort = ONCE if settings.dry else Effort(least=5, most=30, cap_s=3.0)
    for name, size in (DRY if settings.dry else SIZES).items():
        findings.attempt(name, partial(_compare, findings, settings, name, size, effort))


def _compare(findings: Findings, settings: Settings, name: str, size: tuple[int, int], effort: Effort) -> None:
    """On frames of one size (height, width)."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = raft_and_ours(settings.device, "fp32" if settings.dry else "fp16", *size, Path(folder))
    found = alternated({RAFT: theirs, OURS: ours}, effort, device_sync(settings.device))
    times = {peer: ratio(seconds, found[OURS]) for peer, seconds in found.items()}
    for peer, seconds in found.items():
        rate = Sample.of(seconds).rate(1).cell()
        findings.row(peer=peer, size=name, **{"pairs/s": rate, "its time / ours": times[peer]})
    if name in (next(iter(SIZES)), *DRY):
        findings.add(headline=f"{name}: {RAFT} takes {times[RAFT]['median']:.1f} times as long as {OURS}")


def raft_and_ours(device: str, precision: str, height: int, width: int, folder: Path) -> tuple[Action, Action]:
    """Both on the same frames, one pair per call, random weights. Raises Skipped when torchvision cannot be used."""
    raft = torchvision_models().raft_small(weights=None).eval().to(device)
    weights = str(random_weights("FlowNet2C", folder))
    config = ModelConfig(model="FlowNet2C", weights=weights, device=device, precision=precision, batch=1)  # type: ignore
    inference = load_network(config).fitted(height, width)
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
    """torchvision's module of flow networks. Raises Skipped when it cannot be imported."""
    try:
        return import_module("torchvision.models.optical_flow")
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise Skipped(f"torchvision cannot be used: {error}") from error
