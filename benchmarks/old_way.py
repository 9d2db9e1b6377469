"""The old way and this one on the same clip with the same network: seconds and bytes on disk, step by step.

The old way is that of flownet2-pytorch's users: the video to PNG frames, each pair of frames to a ``.flo`` file, these
files to colour PNGs and a video. Its steps use this project's own parts here (and PyAV and Pillow for the frames), so
the network costs the same on both sides, and only what surrounds it differs.
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
from benchmarks.measure import Sample, ratio
from flowreel.engine.color import color

CLIP = "sintel_cave_1024x436.mp4"
ALL = "all of it"


def run(short: bool = False) -> dict[str, object]:
    """Both ways, several times in alternating order (once in a short run)."""
    repeats = 1 if short else 3
    source = found("videos", CLIP)
    seconds: dict[tuple[str, str], list[float]] = {}
    written: dict[tuple[str, str], int] = {}
    for number in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            ways = _steps(source, Path(folder))
            for way in reversed(ways) if number % 2 else ways:
                for step, action, made in ways[way]:
                    began_s = time.perf_counter()
                    action()
                    seconds.setdefault((way, step), []).append(time.perf_counter() - began_s)
                    written[way, step] = sum(file.stat().st_size for place in made for file in _files(place))
    for way in ways:
        parts = [key for key in seconds if key[0] == way]
        seconds[way, ALL] = [sum(one) for one in zip(*(seconds[key] for key in parts), strict=True)]
        written[way, ALL] = sum(written[key] for key in parts)
    rows = [
        {"way": way, "step": step, "seconds": Sample.of(spent).cell(), "MB on disk": written[way, step] / 1e6}
        for (way, step), spent in sorted(seconds.items(), key=lambda item: (item[0][1] == ALL, item[0][0] != "old"))
    ]
    less = {
        "seconds": ratio(seconds["old", ALL], seconds["flowreel", ALL]),
        "MB on disk": written["old", ALL] / written["flowreel", ALL],
    }
    return {"clip": CLIP, "repeats": repeats, "rows": [*rows, {"way": "old / flowreel", "step": "", **less}]}


def _steps(source: Path, folder: Path) -> dict[str, list[tuple[str, Callable[[], Any], list[Path]]]]:
    """For each way its steps: name, action, and the files or folders it leaves on disk."""
    frames, flows, pictures = folder / "frames", folder / "flows", folder / "colour"
    store, video = folder / "x.zarr", folder / "x.mp4"

    def paint() -> None:
        color([flows], pictures, video=True, frame_rate=30)

    return {
        "old": [
            ("video to PNG frames", lambda: _to_pictures(source, frames), [frames]),
            ("frames to .flo", lambda: flowreel.run(frames, [flows / "%06d.flo"]), [flows]),
            (".flo to colour PNGs and video", paint, [pictures]),
        ],
        "flowreel": [
            ("video to store and colour video", lambda: flowreel.run(source, [store, video]), [store, video]),
        ],
    }


def _to_pictures(source: Path, folder: Path) -> None:
    """Like ``ffmpeg -i VIDEO frames/%06d.png``, with Pillow's default compression: zlib level 6, as FFmpeg's."""
    folder.mkdir()
    with av.open(str(source)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            Image.fromarray(frame.to_ndarray(format="rgb24")).save(folder / f"{number:06}.png")


def _files(place: Path) -> list[Path]:
    return [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
