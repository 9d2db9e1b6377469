"""The first flows of every real clip through the main job: size, time, and bytes beside ``.flo``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import flowreel
from benchmarks.data import found

MOST_FRAMES = 61


def run() -> dict[str, object]:
    """Store and colour video of each clip in ``videos``, one run each."""
    rows = []
    for clip in sorted(found("videos").iterdir()):
        with tempfile.TemporaryDirectory() as folder:
            report = flowreel.run(clip, [Path(folder) / "x.zarr", Path(folder) / "x.mp4"], stop=MOST_FRAMES)
        store, video = report.outputs
        rows.append(
            {
                "clip": clip.name,
                "flows": report.pairs,
                "size": f"{report.width}x{report.height}",
                "seconds": report.seconds,
                "flows/s": report.pairs_per_s,
                "store MB": store.bytes_written / 1e6,
                "colour video MB": video.bytes_written / 1e6,
                ".flo MB": report.flo_bytes / 1e6,
                ".flo / store": report.flo_bytes / store.bytes_written,
            }
        )
    return {"model": report.model, "weights": report.weights, "precision": report.precision, "rows": rows}
