"""Peak memory of ``flowreel run`` as the video gets longer: it must not grow."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.data import FOLDER

LENGTHS = (120, 1189)  # frames; the second is the whole clip
REPEATS = 3
MODEL = ("--model=FlowNet2C",)  # the lightest network of the baseline: what could grow lies around it


def run() -> dict[str, object]:
    """Each length in processes of its own, lengths alternating; medians."""
    peaks: dict[int, list[int]] = {length: [] for length in LENGTHS}
    for _ in range(REPEATS):
        for length in LENGTHS:
            peaks[length].append(peak_bytes(length))
    medians = {length: sorted(found)[len(found) // 2] for length, found in peaks.items()}
    rows = [
        {
            "frames": length,
            "peak MB (median)": medians[length] / 1e6,
            "lowest": min(peaks[length]) / 1e6,
            "highest": max(peaks[length]) / 1e6,
            "ratio": medians[length] / medians[LENGTHS[0]],
        }
        for length in LENGTHS
    ]
    return {"clip": "conveyor_640x360.mp4", "outputs": ["zarr", "mp4"], "rows": rows}


def peak_bytes(frames: int) -> int:
    """Largest resident set of one run, as the operating system counted it."""
    with tempfile.TemporaryDirectory() as folder:
        clip = FOLDER / "videos" / "conveyor_640x360.mp4"
        outputs = [f"--output={folder}/x.zarr", f"--output={folder}/x.mp4", *MODEL]
        command = [
            sys.executable,
            "-m",
            "benchmarks.memory",
            str(clip),
            *outputs,
            f"--stop={frames}",
            "--quiet",
            *MODEL,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        return int(done.stdout)


if __name__ == "__main__":
    from flowreel.engine.cli import call

    code = call(["run", *sys.argv[1:]])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    sys.exit(code)
