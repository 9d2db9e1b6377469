"""Peak memory of ``flowreel run`` as the video gets longer: it must not grow."""

from __future__ import annotations

import tempfile
from statistics import median

from benchmarks.data import found
from benchmarks.processes import flowreel, measured

CLIP = "conveyor_640x360.mp4"
LENGTHS = (120, 1189)  # frames; the second is the whole clip
REPEATS = 3
MODEL = "--model=FlowNet2C"  # the lightest of the baseline's networks: anything that could grow is outside the network


def run(short: bool = False) -> dict[str, object]:
    """Medians over several runs of each length, each in its own process, the lengths alternating."""
    lengths = (60, 240) if short else LENGTHS
    peaks: dict[int, list[int]] = {length: [] for length in lengths}
    for _ in range(1 if short else REPEATS):
        for length in lengths:
            peaks[length].append(peak_bytes(length))
    medians = {length: median(found) for length, found in peaks.items()}
    rows = [
        {
            "frames": length,
            "peak MB (median)": medians[length] / 1e6,
            "lowest": min(peaks[length]) / 1e6,
            "highest": max(peaks[length]) / 1e6,
            "ratio": medians[length] / medians[lengths[0]],
        }
        for length in lengths
    ]
    return {"clip": CLIP, "outputs": ["zarr", "mp4"], "rows": rows}


def peak_bytes(frames: int) -> int:
    """Peak resident set size of one run, as counted by the operating system."""
    clip = str(found("videos", CLIP))
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--output={folder}/x.zarr", f"--output={folder}/x.mp4"]
        return measured(flowreel("run", clip, *outputs, f"--stop={frames}", "--quiet", MODEL)).peak_bytes
