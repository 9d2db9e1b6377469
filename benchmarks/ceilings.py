"""The machine's own limits, measured: arithmetic, memory bandwidth, disk. Figures are given as fractions of them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Effort, Sample, alternated, cpu_precisions, device_sync, devices
from benchmarks.processes import MEMORY
from flowreel.sinks.store_writer import WRITERS

GEMM = 2048  # rows and columns
CONV = (1, 256, 56, 128)  # FlowNetC's features at 1024x448; 3x3, as many output channels
GEMM_ON_GPU, CONV_ON_GPU = 4, 8  # factors for the matrices' sides and for the batch: less leaves a large GPU half idle
COPY_BYTES = 256 << 20  # far beyond any cache
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Ceilings = dict[str, dict[str, float]]


def run(short: bool = False) -> dict[str, object]:
    """One row per limit; ``ceilings`` holds the best values reached, which other cases divide by."""
    effort = Effort(least=3, most=8, cap_s=1.0) if short else Effort(least=8, most=40, cap_s=5.0)
    rows: list[dict[str, Any]] = []
    for device in devices():
        rows += rows_of(device, effort)
    with tempfile.TemporaryDirectory() as folder:
        rows += written_rows("disk", folder, 4 if short else 10)
    if MEMORY.is_dir():
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            rows += written_rows("files in memory", folder, 4 if short else 10)
    return {"rows": rows, "ceilings": best(rows)}


def rows_of(device: str, effort: Effort) -> list[dict[str, Any]]:
    """Rows for arithmetic in each precision, and for memory bandwidth."""
    rows = []
    for precision in cpu_precisions() if device == "cpu" else PRECISIONS:
        for what, action, work in (_gemm(device, precision), _conv(device, precision)):
            seconds = _timed(action, effort, device)
            rows.append(_row(device, f"{what} {precision}", seconds, work / 1e9, "GFLOP/s"))
    action, moved = _copy(device)
    rows.append(_row(device, "memory copy", _timed(action, effort, device), moved / 1e9, "GB/s"))
    return rows


def written_rows(device: str, folder: str | Path, times: int) -> list[dict[str, Any]]:
    """Bytes written and synced to files in a folder: one file at a time, then several, as a store's writers do."""
    return [
        _row(device, limit, _written(Path(folder), times, at_once), _FILE_BYTES * at_once / 1e9, "GB/s")
        for limit, at_once in (("write and fsync", 1), (f"write and fsync, {WRITERS} files at once", WRITERS))
    ]


def best(rows: list[dict[str, Any]]) -> Ceilings:
    """The best value reached, by device and limit."""
    found: Ceilings = {}
    for row in rows:
        found.setdefault(row["device"], {})[row["limit"]] = row["best"]
    return found


def _timed(action: Callable[[], object], effort: Effort, device: str) -> list[float]:
    return alternated({"": action}, effort, device_sync(device))[""]


def _row(device: str, limit: str, seconds: list[float], work: float, unit: str) -> dict[str, Any]:
    return {
        "device": device,
        "limit": limit,
        "unit": unit,
        "reached": Sample.of(seconds).rate(work).cell(),
        "best": work / min(seconds),
    }


def _gemm(device: str, precision: str) -> tuple[str, Callable[[], object], float]:
    side = GEMM * (GEMM_ON_GPU if device == "cuda" else 1)
    a, b = (torch.randn(side, side, device=device).to(PRECISIONS[precision]) for _ in range(2))
    out = torch.empty_like(a)
    return "matrix product", lambda: torch.mm(a, b, out=out), 2.0 * side**3


def _conv(device: str, precision: str) -> tuple[str, Callable[[], object], float]:
    channels, dtype = CONV[1], PRECISIONS[precision]
    batch = CONV[0] * (CONV_ON_GPU if device == "cuda" else 1)
    x = torch.randn(batch, *CONV[1:], device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)

    def convolve() -> object:
        # On a GPU: cuDNN's fastest algorithm, and float32 without TF32.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            return torch.nn.functional.conv2d(x, weight, padding=1)

    return "3x3 convolution", convolve, 2.0 * 9 * channels * x.numel()


def _copy(device: str) -> tuple[Callable[[], object], float]:
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * COPY_BYTES  # read once, written once


_FILE_BYTES = 32 << 20  # about a shard of flow, compressed


def _written(folder: Path, times: int, at_once: int) -> list[float]:
    """Seconds for ``at_once`` files, each in its own thread. Each time overwrites the files of the time before last."""
    block = os.urandom(_FILE_BYTES)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())

    found = []
    with ThreadPoolExecutor(at_once) as pool:
        for number in range(times):
            began_s = time.perf_counter()
            list(pool.map(write, [folder / f"{number % 2}-{file}" for file in range(at_once)]))
            found.append(time.perf_counter() - began_s)
    return found


def flops_per_s(ceilings: Ceilings, device: str, precision: str) -> float | None:
    """The highest arithmetic throughput measured on the device in this precision; None when it was not measured."""
    found = ceilings.get(device, {})
    rates = [found[name] for name in (f"matrix product {precision}", f"3x3 convolution {precision}") if name in found]
    return max(rates) * 1e9 if rates else None


def bytes_per_s(ceilings: Ceilings, device: str) -> float | None:
    """Memory bandwidth, counting reads and writes; None when it was not measured."""
    rate = ceilings.get(device, {}).get("memory copy")
    return None if rate is None else rate * 1e9


def share_of_limit(
    seconds: float, flops: float, moved_bytes: float, ceilings: Ceilings, device: str, precision: str
) -> float | None:
    """The least time that the measured ceilings allow, over the time taken: 1.0 is the limit. None without ceilings.

    flops: 0 if only memory can be the limit, in any precision.
    """
    arithmetic, memory = flops_per_s(ceilings, device, precision), bytes_per_s(ceilings, device)
    if memory is None or (flops and arithmetic is None):
        return None
    return max(flops / arithmetic if arithmetic else 0.0, moved_bytes / memory) / seconds
