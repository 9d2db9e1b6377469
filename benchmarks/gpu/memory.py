"""Memory of host and GPU: constant over a long video; with too little of it a run slows down or fails with advice."""

from __future__ import annotations

from functools import partial

import torch

import flowreel
from benchmarks.gpu import scarce
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.made_clips import written_clip
from benchmarks.processes import resident_bytes

LONG = (640, 360, 18 * 72 + 1)  # width, height, frames: whole shards, so that the last batch has the usual length
GROWTH = 1.05  # allowed factor, from the first fifth of the frames to the last fifth
SMALL_MB = 100.0  # allowed besides in a dry run: so short a run grows by what libraries allocate once


def check(findings: Findings, settings: Settings) -> None:
    """Checks a long video, then too little memory."""
    findings.attempt("a long video", partial(_long, findings, settings))
    scarce.check(findings, settings)


def _long(findings: Findings, settings: Settings) -> None:
    """Samples memory of host and GPU about every tenth of a long clip that streams through."""
    width, height, count = (64, 60, 40) if settings.dry else LONG
    clip = written_clip(settings.folder, width, height, count)
    samples: list[tuple[int, float, float]] = []  # flows so far, MB of the process, MB of the GPU
    seen = 0
    for batch in flowreel.stream(
        clip, device=settings.device, model="FlowNet2C", precision="fp32" if settings.dry else "fp16"
    ):
        seen += len(batch.frame)
        if seen >= (len(samples) + 1) * count // 10:
            samples.append((seen, resident_bytes() / 1e6, _gpu_mb(settings)))
            findings.row(flows=seen, host_mb=samples[-1][1], gpu_mb=samples[-1][2])
    findings.check("every flow came", seen == count - 1, flows=seen)
    besides_mb = SMALL_MB if settings.dry else 1.0
    for place, name in ((1, "host"), (2, "GPU")):
        early, late = samples[1][place], samples[-1][place]
        flat = late <= early * GROWTH + besides_mb
        findings.check(f"memory of the {name} is flat", flat, early_mb=early, late_mb=late)
    findings.add(
        headline=f"{seen} flows: host {samples[1][1]:.0f} to {samples[-1][1]:.0f} MB, GPU {samples[-1][2]:.0f} MB"
    )


def _gpu_mb(settings: Settings) -> float:
    """All GPU memory in use, by any library."""
    if settings.device == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e6
