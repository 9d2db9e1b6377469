"""Small clips made on the spot, whose frames tell their own number."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from flowreel.engine.sources import nvdec, video
from tests.fakes.pynvvideocodec import fake_module

RATE = 25


def numbered_picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """(H, W, 3) uint8: the number in binary, eight pixels a digit, over a bar that moves two pixels a frame."""
    picture = np.full((height, width, 3), 30, np.uint8)
    for digit in range(8):
        if number >> digit & 1:
            picture[: height // 2, 8 * digit : 8 * digit + 8] = 220
    left = 2 * number % (width - 8)
    picture[height // 2 :, left : left + 8] = 220
    return picture


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``clip("name.mp4", count=12, ...)`` writes a video and gives its path."""
    folder = tmp_path_factory.mktemp("clips")

    def write(
        name: str,
        *,
        count: int = 12,
        size: tuple[int, int] = (64, 48),
        codec: str = "libx264",
        pix_fmt: str = "yuv420p",
        pictures: list[av.VideoFrame] | None = None,
        stamps: Callable[[int], int] = lambda number: number,
        options: dict[str, str] | None = None,
        container_options: dict[str, str] | None = None,
        b_frames: int | None = None,
        colour: dict[str, int] | None = None,
    ) -> Path:
        path = folder / name
        frames: Iterator[av.VideoFrame] = iter(pictures or ())
        if pictures is None:
            frames = (av.VideoFrame.from_ndarray(numbered_picture(n, *size), "rgb24") for n in range(count))
        with av.open(str(path), "w", options=container_options or {}) as container:
            stream: Any = container.add_stream(codec, rate=RATE, options=options or {})
            stream.width, stream.height = size
            stream.pix_fmt = pix_fmt
            stream.codec_context.time_base = Fraction(1, RATE)
            if b_frames is not None:
                stream.codec_context.max_b_frames = b_frames
            for field, value in (colour or {}).items():
                setattr(stream.codec_context, field, value)
            for number, frame in enumerate(frames):
                frame.pts, frame.time_base = stamps(number), Fraction(1, RATE)
                for field, value in (colour or {}).items():
                    setattr(frame, field, value)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write


@pytest.fixture(scope="session")
def long_clip(clip: Callable[..., Path]) -> Path:
    """100 frames with B-frames, a key frame every 20, and its index in front so that it can be cut."""
    options = {"g": "20", "keyint_min": "20", "x264-params": "open-gop=1:scenecut=0:bframes=3"}
    return clip("long.mp4", count=100, options=options, container_options={"movflags": "faststart"})


STREAM = 0x5EED  # handle of the decoder's stream


@pytest.fixture
def nvc(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stand-in for PyNvVideoCodec, with streams that only write down what is asked of them in ``behaviour.log``."""
    module = fake_module()

    class Stream:
        handle = STREAM

        def __init__(self, device: torch.device) -> None:
            self.device = device

        def run(self, work: Callable[[], Tensor]) -> Tensor:
            return work()

        def finish(self) -> None:
            module.behaviour.log.append("finished")

    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", module)
    monkeypatch.setattr(nvdec, "WorkStream", Stream)
    monkeypatch.setattr(nvdec, "free_bytes", lambda device: 80 << 30)
    return module


@pytest.fixture(params=["PyAV", "NVDEC"])
def each_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every video source that a test opens is decoded by this one, and by nobody instead of it; gives its name."""
    if request.param == "NVDEC":
        request.getfixturevalue("nvc")
        no_one = None
        monkeypatch.setattr(video, "PyAVDecoder", lambda probe: nvdec.NvdecDecoder(probe, "cuda:0", no_one, print))
    name: str = request.param
    return name
