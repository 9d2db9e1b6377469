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
from flowreel.engine.training.drawing import SceneConfig
from flowreel.engine.training.painting import Painter

# Network, pairs per step; those of a long training come first.
CASES = (("FlowNet2CSS", 64), ("FlowNet2C", 64), ("FlowNet2CSS", 16), ("FlowNet2C", 16))
HEIGHT, WIDTH = 256, 384
WARM_UP = 12  # untimed steps at first, while libraries load and workers fill their queues
LONG_S = 3.0  # duration of the timed steps
MOST_WORKERS = 12


def run(findings: Findings, settings: Settings) -> None:
    scenes = checks.FEW_TEXTURES if settings.dry else SceneConfig()
    painter = cache(lambda: Painter(torch.device(settings.device), scenes.bank))  # in an attempt, since it may fail
    findings.attempt("painting", partial(_paint, findings, settings, painter, scenes))
    for model, batch in CASES[-1:] if settings.dry else CASES:
        # A dry run paints its scenes on the host, where it needs only few textures.
        by = None if settings.dry else painter
        findings.attempt(f"{model}, {batch} pairs", partial(_train, findings, settings, by, model, batch))


def _paint(findings: Findings, settings: Settings, made: Callable[[], Painter], scenes: SceneConfig) -> None:
    """Painting alone, of scenes drawn beforehand."""
    painter = made()
    count, sync = 2 if settings.dry else 64, device_sync(settings.device)
    packed, best_s = batches.draw(0, 0, count, HEIGHT, WIDTH, scenes), math.inf
    for _ in range(2 if settings.dry else 5):
        sync()
        before_s = time.perf_counter()
        painter.paint(packed)
        sync()
        best_s = min(best_s, time.perf_counter() - before_s)
    findings.row(what="painting", size=f"{WIDTH}x{HEIGHT}", batch=count, pairs_s=count / best_s)


def _train(findings: Findings, settings: Settings, made: Callable[[], Painter] | None, model: str, batch: int) -> None:
    """The same steps as ``flowreel train``, with scenes drawn by worker processes, but without reports."""
    config = TrainConfig(model=model, batch=batch, height=HEIGHT, width_px=WIDTH, batch_norm=False, minutes=1)
    workers, warm_up = max(min((os.cpu_count() or 1) - 2, MOST_WORKERS), 1), WARM_UP
    if settings.dry:
        config, workers, warm_up = checks.DRY, 0, 1
    device, sync = torch.device(settings.device), device_sync(settings.device)
    net = start.network(config).to(device, memory_format=torch.channels_last)
    optimiser, steps, began_s = training.optimiser_of(config, net), 0, 0.0
    painter = None if made is None else made()
    with closing(batches.batches(config, 0, workers, painter)) as seen:
        for steps, scenes in enumerate(seen, 1 - warm_up):
            training.make_step(config, net, optimiser, scenes, 1e-5, visible_alone=False)
            if steps == 0:
                sync()
                began_s = time.perf_counter()
            if steps > 0 and time.perf_counter() - began_s > LONG_S:
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
