"""Decoding the shared clips on the CPU: as the engine's source, to RGB, and bare with one thread and more."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import av
import cv2

from benchmarks.data import found
from benchmarks.measure import Action, Effort, Sample, alternated, ratio
from flowreel.engine.config import SelectConfig
from flowreel.engine.sources import open_source

MOST_FRAMES = 240
SHORT_FRAMES = 48


def run(short: bool = False) -> dict[str, object]:
    """Frames per second over the first frames of each clip, including opening the file; all decoders in turn."""
    most = SHORT_FRAMES if short else MOST_FRAMES
    rows: list[dict[str, Any]] = []
    for clip in sorted(found("videos").iterdir()):
        with av.open(str(clip)) as container:
            stream = container.streams.video[0]
            codec, size = stream.codec_context.name, f"{stream.width}x{stream.height}"
        count = sum(1 for _ in _bare(clip, most, 0))
        timings = alternated(_ways(clip, count), Effort.of(short))
        for way, seconds in timings.items():
            rows.append(
                {
                    "clip": clip.name,
                    "codec": codec,
                    "size": size,
                    "frames": count,
                    "by": way,
                    "frames/s": Sample.of(seconds).rate(count).cell(),
                    "its time / ours": None if way == OURS else ratio(seconds, timings[OURS]),
                }
            )
    return {"rows": rows}


OURS = "flowreel source (exact RGB)"


def _ways(clip: Path, count: int) -> dict[str, Action]:
    cores = os.cpu_count() or 1

    def consume(frames: Iterator[object]) -> None:
        assert sum(1 for _ in itertools.islice(frames, count)) == count

    def ours() -> None:
        with closing(open_source(clip, SelectConfig(stop=count))) as source:
            consume(iter(source))

    ways: dict[str, Action] = {OURS: ours}
    for threads in dict.fromkeys((1, cores)):
        name = f"PyAV, {threads} thread{'s' * (threads > 1)}, no RGB"
        ways[name] = partial(lambda n: consume(_bare(clip, count, n)), threads)
    ways["PyAV, to_ndarray(rgb24)"] = lambda: consume(f.to_ndarray(format="rgb24") for f in _bare(clip, count, 0))
    ways["OpenCV VideoCapture"] = lambda: consume(_opencv(clip))
    return ways


def _bare(clip: Path, count: int, threads: int) -> Iterator[av.VideoFrame]:
    """Decodes without conversion. threads: 0: as many as FFmpeg chooses; unless 1, both frame and slice threads."""
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        stream.thread_count = threads
        if threads != 1:
            stream.thread_type = "AUTO"
        yield from itertools.islice(container.decode(stream), count)


def _opencv(clip: Path) -> Iterator[object]:
    capture = cv2.VideoCapture(str(clip))
    try:
        while True:
            there, picture = capture.read()
            if not there:
                return
            yield picture
    finally:
        capture.release()
