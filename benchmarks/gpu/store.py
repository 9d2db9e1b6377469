"""What a store keeps of the flow of a video file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

import flowreel
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.made_clips import written_clip
from benchmarks.gpu.nvdec import frames_of
from flowreel.engine.config import ModelConfig, SinkConfig
from flowreel.engine.inference import prepare

ROUNDING = 2e-4  # of the longest vector, in float32, between two programs of one network


def check(findings: Findings, settings: Settings) -> None:
    """Flows read back from a store that was written there, beside the network's own for the same frames."""
    for precision in ("fp32",) if settings.dry else ("fp32", "fp16"):
        findings.attempt(f"a store in {precision}", partial(_compare_store, findings, settings, precision))


def _compare_store(findings: Findings, settings: Settings, precision: str) -> None:
    """The first batches of two shards: in float32 every vector; in fp16 the mean, which leaves half a step to it."""
    width, height, batch = (96, 64, 2) if settings.dry else (640, 360, 8)
    clip = written_clip(settings.folder, width, height, 2 * (batch + 1) + 1)
    options: dict[str, Any] = {"device": settings.device, "precision": precision, "batch": batch}
    shard_bytes = 8 * width * height * batch  # two whole shards of one batch, and a short one
    path = Path(settings.folder) / f"{precision}.zarr"
    flowreel.run(clip, path, overwrite=True, shard_bytes=shard_bytes, **options)
    kept = flowreel.open_store(path)
    frames = torch.stack([frame.rgb.cpu() for frame in frames_of(clip, "auto", settings)])
    inference = prepare(ModelConfig(**options), height, width)
    findings.check(f"{precision}: every flow is there", len(kept) == len(frames) - 1, flows=len(kept))
    for first in (0, batch):
        pairs = slice(first, first + batch), slice(first + 1, first + batch + 1)
        wanted = inference.fit.undo(inference.flow(*(frames[some] for some in pairs))).cpu()
        apart = (torch.from_numpy(kept[first : first + batch]) - wanted).abs()
        most, mean, longest = float(apart.max()), float(apart.mean()), float(wanted.abs().max())
        step = SinkConfig().max_error
        good = most <= step + ROUNDING * longest if precision == "fp32" else mean <= step
        findings.check(
            f"{precision}: flows {first} to {first + batch - 1} are the network's",
            good,
            most_px=most,
            mean_px=mean,
            longest_px=longest,
            max_error=step,
        )
