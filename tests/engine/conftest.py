"""What many tests share: small clips whose frames show their own numbers, frames warped along flow, and networks with
reproducible weights, with which the golden results were computed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from flowreel.engine.models import build_model

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
        rate: int = RATE,
    ) -> Path:
        path = folder / name
        frames: Iterator[av.VideoFrame] = iter(pictures or ())
        if pictures is None:
            frames = (av.VideoFrame.from_ndarray(numbered_picture(n, *size), "rgb24") for n in range(count))
        with av.open(str(path), "w", options=container_options or {}) as container:
            stream: Any = container.add_stream(codec, rate=rate, options=options or {})
            stream.width, stream.height = size
            stream.pix_fmt = pix_fmt
            stream.codec_context.time_base = Fraction(1, rate)
            if b_frames is not None:
                stream.codec_context.max_b_frames = b_frames
            for field, value in (colour or {}).items():
                setattr(stream.codec_context, field, value)
            for number, frame in enumerate(frames):
                frame.pts, frame.time_base = stamps(number), Fraction(1, rate)
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


@pytest.fixture
def pulled() -> Callable[[Tensor, Tensor], Tensor]:
    """A function of a second frame (3, H, W) and a flow (2, H, W) px that warps the frame back along the flow."""
    return _pulled


def _pulled(second: Tensor, flow: Tensor) -> Tensor:
    """``second`` sampled at the end of each vector of ``flow``: (3, H, W) float32."""
    height, width = flow.shape[1:]
    x = (flow[0] + torch.arange(width)) * 2 / (width - 1) - 1
    y = (flow[1] + torch.arange(height)[:, None]) * 2 / (height - 1) - 1
    grid = torch.stack((x, y), -1)[None]
    return functional.grid_sample(second[None].float(), grid, padding_mode="border", align_corners=True)[0]


def fill(key: str, shape: torch.Size) -> np.ndarray:
    """The values of one tensor, which follow from its name and shape alone."""
    noise = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(shape), np.float32)
    if len(shape) >= 2:
        taps = shape[2] * shape[3]
        transposed = any(part.startswith(("deconv", "upsampled_flow")) for part in key.split("."))
        fan_in = shape[0] * taps / 4 if transposed else shape[1] * taps
        noise *= np.float32(np.sqrt(2 / (1.01 * fan_in)))
        return noise
    if key.endswith("running_var"):
        return 1 + 0.01 * np.abs(noise)
    if key.endswith(".1.weight"):
        return 1 + 0.01 * noise
    return 0.01 * noise


@pytest.fixture(scope="session")
def filled() -> Callable[..., nn.Module]:
    """``filled(name, **options)``: a network in evaluation mode with reproducible weights."""

    def build(name: str, **options: object) -> nn.Module:
        with torch.device("meta"):  # its own values would be drawn in vain
            model = build_model(name, **options)  # type: ignore[arg-type]
        state = {
            key: torch.tensor(0) if key.endswith("num_batches_tracked") else torch.from_numpy(fill(key, tensor.shape))
            for key, tensor in model.state_dict().items()
        }
        model.load_state_dict(state, assign=True)
        return model.eval()

    return build
