"""How fast scenes are painted on the card, and steps of training made with them."""

from __future__ import annotations

import math
import os
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import training as checks
from benchmarks.gpu.findings import Findings, Settings
from flowreel.engine.device import to_host
from flowreel.engine.textures import texture_bank
from flowreel.engine.training import batches
from flowreel.engine.training import train as training
from flowreel.engine.training.config import TrainConfig
from flowreel.engine.training.drawing import SceneConfig
from flowreel.engine.training.painting import Painter
from flowreel.engine.training.train import Progress

CASES = (("FlowNet2C", 16), ("FlowNet2C", 64), ("FlowNet2CSS", 16), ("FlowNet2CSS", 64))  # network, pairs a step
LONG_S = 4.0  # of training, each
HEIGHT, WIDTH = 256, 384
MOST_WORKERS = 12


def run(findings: Findings, settings: Settings) -> None:
    findings.attempt("painting", partial(_paint, findings, settings))
    for model, batch in CASES[:1] if settings.dry else CASES:
        findings.attempt(f"{model}, {batch} pairs", partial(_train, findings, settings, model, batch))


def _paint(findings: Findings, settings: Settings) -> None:
    device, count = torch.device(settings.device), 2 if settings.dry else 64
    painter = Painter(device, texture_bank(*SceneConfig().bank))
    packed = batches.draw(0, 0, count, HEIGHT, WIDTH)
    best_s = math.inf
    for _ in range(2 if settings.dry else 5):
        before_s = time.perf_counter()
        to_host(painter.paint(packed)[2])  # waits for all
        best_s = min(best_s, time.perf_counter() - before_s)
    findings.row(what="painting", size=f"{WIDTH}x{HEIGHT}", batch=count, pairs_s=count / best_s)


def _train(findings: Findings, settings: Settings, model: str, batch: int) -> None:
    """What the command does, with scenes drawn by processes; from the first report on."""
    reports: list[Progress] = []
    config = TrainConfig(model=model, batch=batch, height=HEIGHT, width_px=WIDTH, batch_norm=False, minutes=LONG_S / 60)
    workers = max(min((os.cpu_count() or 1) - 2, MOST_WORKERS), 1)
    if settings.dry:
        config, workers = checks.DRY, 0
    training.train(
        config,
        Path(settings.folder) / f"training-{model}-{batch}",
        workers=workers,
        report_every=1 if settings.dry else 10,
        report=reports.append,
        device=settings.device,
    )
    steps, spent_s = (reports[-1].step - reports[0].step), reports[-1].seconds - reports[0].seconds
    findings.row(
        what="training",
        model=model,
        size=f"{config.width_px}x{config.height}",
        batch=config.batch,
        workers=workers,
        steps_s=steps / spent_s if spent_s > 0 else None,
    )
