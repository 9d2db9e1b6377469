"""From a video file: what a store keeps of its flow, and memory over a long one."""

from __future__ import annotations

import resource
import sys
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

LONG = (640, 360, 18 * 72 + 1)  # width, height, frames: whole shards, so that no batch is of a new length at the end
GROWTH = 1.05  # of memory, from the first fifth of the frames to the last
ROUNDING = 2e-4  # of the longest vector, in float32, between two programs of one network


# --- the store --------------------------------------------------------------------------------------------------------


def store(findings: Findings, settings: Settings) -> None:
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


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(findings: Findings, settings: Settings) -> None:
    """Host and card, looked at every so often while a long clip streams through."""
    width, height, count = (96, 64, 40) if settings.dry else LONG
    clip = written_clip(settings.folder, width, height, count)
    samples: list[tuple[int, float, float]] = []  # flow, MB of the process, MB of the card
    seen = 0
    for batch in flowreel.stream(
        clip, device=settings.device, model="FlowNet2C", precision="fp32" if settings.dry else "fp16"
    ):
        seen += len(batch.frame)
        if seen >= (len(samples) + 1) * count // 10:
            samples.append((seen, _resident_mb(), _card_mb(settings)))
            findings.row(flows=seen, host_mb=samples[-1][1], gpu_mb=samples[-1][2])
    findings.check("every flow came", seen == count - 1, flows=seen)
    for place, name in ((1, "host"), (2, "card")):
        early, late = samples[1][place], samples[-1][place]
        findings.check(f"memory of the {name} is flat", late <= early * GROWTH + 1, early_mb=early, late_mb=late)
    findings.add(
        headline=f"{seen} flows: host {samples[1][1]:.0f} to {samples[-1][1]:.0f} MB, card {samples[-1][2]:.0f} MB"
    )


def _resident_mb() -> float:
    """Now; where the system does not say, the most there ever was."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def _card_mb(settings: Settings) -> float:
    """Everything taken on the card, by whatever library."""
    if settings.device == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e6
