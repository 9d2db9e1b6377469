"""The old way and this one on the same clip with the same network: seconds and bytes on disk, step by step.

The old way is that of flownet2-pytorch's users: the video to PNG frames, the frames to one ``.flo`` each, those to
colour PNGs and a video. Its steps are done here with this project's own parts (the frames with PyAV and Pillow), so
the network costs the same on both sides; what differs is everything around it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
from PIL import Image

import flowreel
from benchmarks.data import found
from flowreel.engine.paint import color

CLIP = "sintel_cave_1024x436.mp4"


def run(clip: str = CLIP, repeats: int = 3, short: bool = False) -> dict[str, object]:
    """Both ways in turn, ``repeats`` times (once in a short run); medians."""
    repeats = 1 if short else repeats
    source = found("videos", clip)
    measured: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for way, step, action, made in _steps(source, Path(folder)):
                began_s = time.perf_counter()
                action()
                seconds = time.perf_counter() - began_s
                written = sum(file.stat().st_size for place in made for file in _files(place))
                measured.setdefault((way, step), []).append((seconds, written))
    rows = [_row(way, step, runs) for (way, step), runs in measured.items()]
    for way in ("old", "flowreel"):
        parts = [row for row in rows if row["way"] == way]
        total = {"way": way, "step": "all of it"}
        rows.append(total | {key: sum(row[key] for row in parts) for key in ("seconds", "MB on disk")})
    old, new = rows[-2:]
    ratios = {key: old[key] / new[key] for key in ("seconds", "MB on disk")}
    rows.append({"way": "old / flowreel", "step": "", **ratios})
    return {"clip": clip, "repeats": repeats, "rows": rows}


def _steps(source: Path, folder: Path) -> list[tuple[str, str, Callable[[], Any], list[Path]]]:
    frames, flows, pictures = folder / "frames", folder / "flows", folder / "colour"
    store, video = folder / "x.zarr", folder / "x.mp4"

    def paint() -> None:
        color([flows], pictures, video=True, frame_rate=30)

    return [
        ("old", "video to PNG frames", lambda: _to_pictures(source, frames), [frames]),
        ("old", "frames to .flo", lambda: flowreel.run(frames, [flows / "%06d.flo"]), [flows]),
        ("old", ".flo to colour PNGs and video", paint, [pictures]),
        ("flowreel", "video to store and colour video", lambda: flowreel.run(source, [store, video]), [store, video]),
    ]


def _to_pictures(source: Path, folder: Path) -> None:
    """What ``ffmpeg -i VIDEO frames/%06d.png`` does, at Pillow's default compression, like FFmpeg's a zlib level 6."""
    folder.mkdir()
    with av.open(str(source)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            Image.fromarray(frame.to_ndarray(format="rgb24")).save(folder / f"{number:06}.png")


def _files(place: Path) -> list[Path]:
    return [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]


def _row(way: str, step: str, runs: list[tuple[float, int]]) -> dict[str, Any]:
    seconds = sorted(run[0] for run in runs)
    return {"way": way, "step": step, "seconds": seconds[len(seconds) // 2], "MB on disk": runs[0][1] / 1e6}
