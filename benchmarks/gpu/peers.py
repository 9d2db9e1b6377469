"""A network of today beside ours: torchvision's RAFT-small, where torchvision is installed."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu_peers import OURS, RAFT, SIZES, raft_rows, torchvision_models
from benchmarks.measure import Effort

DRY = {"128x128": (128, 128)}  # the smallest that RAFT takes


def run(findings: Findings, settings: Settings) -> None:
    """One pair a call, random weights, in turn."""
    torchvision_models()  # or there is nothing to be found
    effort = Effort(least=2, most=2, cap_s=0.1) if settings.dry else Effort(least=5, most=30, cap_s=3.0)
    for name, size in (DRY if settings.dry else SIZES).items():
        findings.attempt(name, partial(_compare, findings, settings, name, size, effort))


def _compare(findings: Findings, settings: Settings, name: str, size: tuple[int, int], effort: Effort) -> None:
    rows = raft_rows(name, size, settings.device, "fp32" if settings.dry else "fp16", effort)
    for row in rows:
        findings.row(**row)
    if name in (next(iter(SIZES)), *DRY):
        times = next(row["its time / ours"]["median"] for row in rows if row["peer"] == RAFT)
        findings.add(headline=f"{name}: {RAFT} takes {times:.1f} times as long as {OURS}")
