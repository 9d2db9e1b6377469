"""Cost as work grows: pairs a second and peak memory against resolution, batch, length and number of outputs."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Sample
from benchmarks.processes import in_module

MODEL = "FlowNet2C"  # the lightest of the shipped weights, so that the cost of everything else shows
RESOLUTIONS = {(256, 256): 240, (512, 384): 96, (1024, 448): 40, (1280, 720): 20, (1920, 1080): 10, (3840, 2160): 5}
BATCHES = (1, 2, 4, 8)
LENGTHS = (10, 100, 1000, 10_000)
REPEATS = 2
OUTPUTS = ("x.zarr", "x.mp4", "flo/%06d.flo", "colour/%06d.png", "kitti/%06d.kitti.png", "npz/%06d.npz")


@dataclass(frozen=True)
class Point:
    """One run of the engine."""

    grows: str  # the axis that is varied
    x: int | float  # the value on that axis
    width: int = 512
    height: int = 384
    frames: int = 64
    batch: int | None = None
    outputs: tuple[str, ...] = OUTPUTS[:1]


def points(short: bool = False) -> Iterator[Point]:
    """All runs, axis by axis."""
    for (width, height), frames in list(RESOLUTIONS.items())[: 5 if short else None]:
        count = max(3, frames // 4) if short else frames
        yield Point("resolution", round(width * height / 1e6, 3), width, height, count)
    for batch in BATCHES:
        yield Point("batch", batch, frames=17 if short else 65, batch=batch)
    for length in LENGTHS[: 2 if short else None]:
        yield Point("length", length, 192, 128, length)
    for count in range(1, len(OUTPUTS) + 1, 2 if short else 1):
        yield Point("outputs", count, frames=16 if short else 64, outputs=OUTPUTS[:count])


def run(short: bool = False) -> dict[str, object]:
    """Each run in its own process, always with the same synthetic scene, on the GPU if there is one, else the CPU."""
    rows = [_row(point, 1 if short else REPEATS) for point in points(short)]
    return {"model": MODEL, "rows": rows}


def _row(point: Point, repeats: int) -> dict[str, Any]:
    if point.frames > LENGTHS[-2]:
        repeats = 1  # it takes minutes, long enough to average over itself
    runs = [in_module("benchmarks.scaling", vars(point)) for _ in range(repeats)]
    told: list[Any] = [found for found, _ in runs]
    rate = Sample.of([found["pairs/s"] for found in told])
    return {
        "grows": point.grows,
        "x": f"{point.x:g}",  # as text, since it identifies the row
        "size": f"{point.width}x{point.height}",
        "frames": point.frames,
        "batch": told[0]["batch"],
        "outputs": len(point.outputs),
        "device": told[0]["device"],
        "pairs/s": rate.cell(),
        "megapixels/s": rate.times(point.width * point.height / 1e6).cell(),
        "peak MB": Sample.of([spent.peak_bytes / 1e6 for _, spent in runs]).cell(),
        "GPU MB": told[0]["gpu_mb"],
        "the model is at work": Sample.of([found["model_share"] for found in told]).median,
    }


def _measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs in the measured process: one run into a temporary folder."""
    import torch

    import flowreel

    size, frames = f"{settings['width']}x{settings['height']}", settings["frames"]
    source = f"synthetic:translate?size={size}&frames={frames}"
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in settings["outputs"]]
        report = flowreel.run(source, outputs, model=MODEL, batch=settings["batch"] or "auto")
    return {
        "pairs/s": report.pairs_per_s,
        "batch": report.batch,
        "device": report.device.split(" ")[0],
        "gpu_mb": torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None,
        "model_share": next(stage.busy_s for stage in report.stages if stage.name == "model") / report.seconds,
    }


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
