"""The speed of the networks alone, as the engine runs them."""

from __future__ import annotations

import gc
import itertools
import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import flowreel
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.measure import ONCE, Effort, device_sync, timed
from benchmarks.networks import filled
from flowreel.engine.compiled import CompiledModel

INPUTS = 4  # different batches, used in turn
AIMED_AT = "H200"  # the GPU that the aims are for


class Timed(NamedTuple):
    """One row of the table of speeds. ``aim``: pairs/s on an H200 that the design demands."""

    model: str
    precision: str
    size: str
    batch: int
    aim: float | None = None


SIZES = {"1024x448": (448, 1024), "1920x1088": (1088, 1920), "128x64": (64, 128)}
TIMED = (  # the most important first: the last ones are missing if time runs out
    Timed("FlowNet2", "fp16", "1024x448", 8, 585),
    Timed("FlowNet2", "fp16", "1920x1088", 8, 130),
    Timed("FlowNet2", "fp16", "1024x448", 1),
    Timed("FlowNet2", "fp16", "1024x448", 4),
    Timed("FlowNet2", "tf32", "1024x448", 8),
    Timed("FlowNet2", "bf16", "1024x448", 8),
    Timed("FlowNet2C", "fp16", "1024x448", 8),
    Timed("FlowNet2", "fp32", "1024x448", 8),
    Timed("FlowNet2", "fp16", "1920x1088", 1),
    Timed("FlowNet2S", "fp16", "1024x448", 8),
    Timed("FlowNet2CSS", "fp16", "1024x448", 8),
    Timed("FlowNet2SD", "fp16", "1024x448", 8),
)
DRY = (Timed("FlowNet2", "fp32", "128x64", 1, 585), Timed("FlowNet2C", "bf16", "128x64", 2))


@lru_cache(maxsize=1)
def network(model: str, settings: Settings) -> nn.Module:
    """The network with random weights; the last one is cached."""
    return filled(model, settings.device, 0.05 if settings.dry else 1.0)


def inputs(one: Timed, settings: Settings, count: int = INPUTS) -> list[Tensor]:
    """Batches of random frames on the device, (B, 3, H, W) float32, 0..255."""
    height, width = SIZES[one.size]
    return [torch.randint(0, 256, (one.batch, 3, height, width), device=settings.device).float() for _ in range(count)]


def made(one: Timed, settings: Settings) -> CompiledModel:
    """The network of a row, compiled by ``flowreel.compile``."""
    return flowreel.compile(network(one.model, settings), (one.batch, *SIZES[one.size]), one.precision)


def _effort(settings: Settings) -> Effort:
    return ONCE if settings.dry else Effort(least=5, most=30, cap_s=1.5)


def times(findings: Findings, settings: Settings) -> None:
    """Pairs/s of ``flowreel.compile``'s result on random frames on the device, several batches in turn."""
    for one in DRY if settings.dry else TIMED:
        name = f"{one.model} {one.precision} {one.size}, batch {one.batch}"
        findings.attempt(name, partial(_time, findings, one, settings))


def _time(findings: Findings, one: Timed, settings: Settings) -> None:
    aim = one.aim if settings.device == "cuda" and AIMED_AT in torch.cuda.get_device_name() else None
    cells = _cells(one, settings)
    rate = cells["pairs/s"]["median"]
    aimed = {} if aim is None else {"aim": aim, "of the aim": rate / aim}
    findings.row(model=one.model, precision=one.precision, size=one.size, batch=one.batch, **cells, **aimed)
    if one in (TIMED[0], DRY[0]):
        asked = "" if aim is None else f", {aim:.0f} asked for"
        findings.add(headline=f"{one.model} {one.precision} {one.size}: {rate:.0f} pairs/s{asked}")


def _cells(one: Timed, settings: Settings) -> dict[str, Any]:
    on_gpu, sync = settings.device == "cuda", device_sync(settings.device)
    network(one.model, settings)  # stays in its cache, so its weights are not counted below
    gc.collect()
    before, at_first = 0, 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
    frames = inputs(one, settings)
    turns = itertools.cycle(itertools.pairwise([*frames, frames[0]]))
    fast = made(one, settings)
    fast(*next(turns))
    sync()
    if on_gpu:  # memory needed only while compiling is reported separately
        at_first = torch.cuda.max_memory_reserved() - before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sample = timed(lambda: fast(*next(turns)), _effort(settings), sync)
    cells: dict[str, Any] = {"pairs/s": sample.rate(one.batch).cell(), "ms/pair": sample.times(1e3 / one.batch).cell()}
    if on_gpu:
        taken = torch.cuda.max_memory_reserved() - before
        cells |= {"GPU MB": taken / 1e6, "bytes/pixel": taken / (one.batch * math.prod(SIZES[one.size]))}
        cells["GPU MB at first"] = at_first / 1e6
    return cells
