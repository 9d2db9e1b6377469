"""Each network alone, as the engine runs it: variants, precisions, batches, sizes; time, arithmetic, peak memory."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.ceilings import Ceilings, flops_per_s
from benchmarks.measure import Effort, Sample, alternated, cpu_precisions, device_sync, devices
from benchmarks.processes import in_module
from flowreel.engine.config import Precision

FULL = ("FlowNet2", "FlowNet2CSS", "FlowNet2CS", "FlowNet2C", "FlowNet2S", "FlowNet2SD")
BASELINE = ("FlowNet2CSS", "FlowNet2CS", "FlowNet2C")  # the networks that the shipped weights serve
SIZES = {"512x384": (384, 512), "1024x448": (448, 1024), "1920x1088": (1088, 1920)}
USUAL, BATCH = "1024x448", 4
ON_GPU: tuple[Precision, ...] = ("fp32", "tf32", "fp16")
INPUTS = 4  # different batches, used in turn


def run(short: bool = False, ceilings: Ceilings | None = None) -> dict[str, object]:
    """One process per row, for its own peak memory. "width 1": random weights at the published width; "baseline": the
    shipped weights."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for device in devices():
            every = _short() if short else _full(device)
            rows += [_row(one | {"device": device}, Path(folder), short, ceilings or {}) for one in every]
    return {"rows": rows}


def _short() -> Iterator[dict[str, Any]]:
    for model in ("FlowNet2", "FlowNet2C", "FlowNet2S"):
        yield _settings(model, "fp32")
    yield _settings("FlowNet2CSS", "fp32", weights="baseline")


def _full(device: str) -> Iterator[dict[str, Any]]:
    """Every network in every precision at one size; the heaviest and a light one also at other sizes and batched."""
    precisions = cpu_precisions() if device == "cpu" else ON_GPU
    for weights, models in (("width 1", FULL), ("baseline", BASELINE)):
        for model, precision in itertools.product(models, precisions):
            yield _settings(model, precision, weights=weights)
    for model, precision in itertools.product(("FlowNet2", "FlowNet2C"), precisions):
        yield _settings(model, precision, batch=BATCH)
        for size in SIZES:
            if size != USUAL:
                yield _settings(model, precision, size=size)
    yield _settings("FlowNet2CSS", "fp32", batch=BATCH, weights="baseline")


def _settings(
    model: str, precision: str, *, size: str = USUAL, batch: int = 1, weights: str = "width 1"
) -> dict[str, Any]:
    return {"model": model, "weights": weights, "precision": precision, "batch": batch, "size": size}


def _row(settings: dict[str, Any], folder: Path, short: bool, ceilings: Ceilings) -> dict[str, Any]:
    from benchmarks.networks import flops, random_weights  # not above: the measured process would load it, too

    baseline = settings["weights"] == "baseline"
    height, width = SIZES[settings["size"]]
    # The file is written in this process: the measured one only reads it, as a user's would.
    weights = "baseline" if baseline else str(random_weights(settings["model"], folder))
    found, spent = in_module("benchmarks.model", settings | {"weights": weights, "short": short})
    seconds = Sample.of(found["seconds"])  # type: ignore[arg-type]
    work = flops(settings["model"], height, width, 0.25 if baseline else 1.0) * settings["batch"]
    most = flops_per_s(ceilings, settings["device"], settings["precision"])
    rate = seconds.rate(work / 1e9)
    return settings | {
        "ms/pair": seconds.times(1e3 / settings["batch"]).cell(),
        "pairs/s": seconds.rate(settings["batch"]).cell(),
        "GFLOP/s": rate.cell(),
        "of the limit": None if most is None else rate.median * 1e9 / most,
        "peak MB": spent.peak_bytes / 1e6,
        "GPU MB": found["gpu_mb"],
    }


def _measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs in the measured process: seconds of each call on one batch."""
    import torch

    from flowreel.engine.config import ModelConfig
    from flowreel.engine.inference import load_network

    height, width = SIZES[settings["size"]]
    device, batch = settings["device"], settings["batch"]
    given = {name: settings[name] for name in ("model", "weights", "precision", "batch", "device")}
    inference = load_network(ModelConfig(**given)).fitted(height, width)
    torch.manual_seed(0)
    shape = (batch, 3, height, width)
    frames = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(INPUTS)]
    turns = itertools.cycle(itertools.pairwise([*frames, frames[0]]))
    effort = Effort(least=3, most=5, cap_s=5.0) if settings["short"] else Effort(least=5, most=30, cap_s=4.0)
    seconds = alternated({"": lambda: inference.flow(*next(turns))}, effort, device_sync(device))[""]
    gpu_mb = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else None
    return {"seconds": seconds, "gpu_mb": gpu_mb}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
