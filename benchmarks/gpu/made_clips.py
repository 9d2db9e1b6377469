"""Generates video files with known motion."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

RATE = 25


@dataclass(frozen=True)
class Encoding:
    """How a clip is encoded. ``encoders``: the first one that PyAV has is used."""

    name: str
    encoders: tuple[str, ...]
    pix_fmt: str = "yuv420p"
    suffix: str = "mp4"
    options: dict[str, dict[str, str]] = field(default_factory=dict)  # by encoder


PLAIN = Encoding("H.264", ("libx264", "mpeg4"), options={"libx264": {"preset": "superfast"}})


def written_clip(folder: str, width: int, height: int, frames: int, how: Encoding = PLAIN) -> Path:
    """A video of a picture of soft blobs that moves by (3, 1) px per frame and wraps around. An existing one is reused.

    Raises LookupError when no encoder can make such a file.
    """
    kind = "" if how is PLAIN else "-" + re.sub(r"\W+", "_", how.name)
    path = Path(folder) / f"{width}x{height}-{frames}{kind}.{how.suffix}"
    if path.exists():
        return path
    encoder = next((name for name in how.encoders if name in av.codecs_available), None)
    if encoder is None:
        raise LookupError(f"PyAV has no encoder {' or '.join(how.encoders)}")
    beside = path.with_stem(f"{path.stem}-part")  # so that stopping leaves no partial file under the clip's name
    with av.open(str(beside), "w") as container:
        stream: Any = container.add_stream(encoder, rate=RATE, options=how.options.get(encoder, {}))
        stream.width, stream.height, stream.pix_fmt = width, height, how.pix_fmt
        stream.codec_context.time_base = Fraction(1, RATE)
        stream.thread_type = "AUTO"
        try:
            stream.codec_context.open()
        except av.FFmpegError as error:
            raise LookupError(f"{encoder} makes no {how.pix_fmt}: {error.strerror}") from error
        for number, picture in enumerate(_moving(width, height, frames)):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    os.replace(beside, path)
    return path


def _moving(width: int, height: int, frames: int) -> Iterator[np.ndarray]:
    """The frames, (H, W, 3) uint8 each."""
    coarse = torch.rand(1, 3, height // 8 + 1, width // 8 + 1, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    picture = (fine[0] * 255).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    for number in range(frames):
        yield np.ascontiguousarray(np.roll(picture, (number, 3 * number), (0, 1)))
