"""How fast the GPU paints scenes, and how fast training steps are that use them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache, partial

import torch

from benchmarks.gpu import training as checks
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.measure import device_sync
from flowreel.engine.training import batches, start
from flowreel.engine.training import train as training
from flowreel.engine.training.config import TrainConfig
from flowreel.engine.training.painting import Painter

# Network, pairs per step; those of a long training come first.
CASES = (("FlowNet2CSS", 64), ("FlowNet2C", 64), ("FlowNet2CSS", 16), ("FlowNet2C", 16))
HEIGHT, WIDTH = 256, 384
WARM_UP = 12  # untimed steps at first, while libraries load and workers fill their queues
LONG_S = 3.0  # duration of the timed steps
MOST_WORKERS = 12


def run(findings: Findings, settings: Settings) -> None:
    checks.make_small(settings)
    painter = cache(lambda: batches.painter_on(torch.device(settings.device)))  # in an attempt, since it may fail
    findings.attempt("painting", partial(_paint, findings, settings, painter))
    for model, batch in CASES[-1:] if settings.dry else CASES:
        findings.attempt(f"{model}, {batch} pairs", partial(_train, findings, settings, painter, model, batch))


def _paint(findings: Findings, settings: Settings, made: Callable[[], Painter]) -> None:
    """Painting alone, of scenes drawn beforehand."""
    painter = made()
    count, size = (2, (64, 96)) if settings.dry else (64, (HEIGHT, WIDTH))
    sync = device_sync(settings.device)
    packed, best_s = batches.draw(0, 0, count, *size), math.inf
    for _ in range(2 if settings.dry else 5):
        sync()
        before_s = time.perf_counter()
        painter.paint(packed)
        sync()
        best_s = min(best_s, time.perf_counter() - before_s)
    findings.row(what="painting", size=f"{size[1]}x{size[0]}", batch=count, pairs_s=count / best_s)


def _train(findings: Findings, settings: Settings, made: Callable[[], Painter], model: str, batch: int) -> None:
    """The same steps as ``flowreel train``, with scenes drawn by worker processes, but without reports."""
    config = TrainConfig(model=model, batch=batch, height=HEIGHT, width_px=WIDTH, batch_norm=False, minutes=1)
    workers, warm_up, long_s = max(min((os.cpu_count() or 1) - 2, MOST_WORKERS), 1), WARM_UP, LONG_S
    if settings.dry:
        config, workers, warm_up, long_s = checks.DRY, 0, 1, 0.0
    device, sync = torch.device(settings.device), device_sync(settings.device)
    net = start.network(config).to(device, memory_format=torch.channels_last)
    optimiser, steps, began_s = training.optimiser_of(config, net), 0, 0.0
    with closing(batches.batches(config, 0, workers, made())) as seen:
        for steps, scenes in enumerate(seen, 1 - warm_up):
            training.make_step(config, net, optimiser, scenes, 1e-5, visible_alone=False)
            if steps == 0:
                sync()
                began_s = time.perf_counter()
            if steps > 0 and time.perf_counter() - began_s > long_s:
                break
        sync()
        rate = steps / (time.perf_counter() - began_s)
    findings.row(
        what="training",
        model=model,
        size=f"{config.width_px}x{config.height}",
        batch=config.batch,
        reuse=config.reuse,
        workers=workers,
        steps_s=rate,
    )
