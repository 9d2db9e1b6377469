"""The keyword options of the library's functions, so that editors complete them and type checkers know them.

Each is an option of the command line by the same name; ``config.py`` checks the values and has the defaults. NumPy's
numbers are taken as well.
"""

from __future__ import annotations

from fractions import Fraction
from os import PathLike
from typing import TYPE_CHECKING, Literal, TypedDict

from flowreel.engine.config import Codec, Decoder, Direction, Encoder, FitMode, Precision, Resolution

if TYPE_CHECKING:
    import torch

Auto = Literal["auto"]


class QueueOptions(TypedDict, total=False):
    queue_mb: float  # megabytes that may wait between the stages


class ComputeOptions(QueueOptions, total=False):
    """What flow is computed of, and how."""

    model: str | None  # FlowNet2, FlowNet2C, ...; None: what the weights hold
    weights: str | PathLike[str]  # "baseline", a path, or a downloaded checkpoint's name
    device: str | torch.device  # "auto", "cpu", "cuda", "cuda:1"; "cuda:0,1" of a run
    decoder: Decoder
    batch: int | Auto | None  # pairs that go through the network together
    precision: Precision | Auto | None
    fit: FitMode
    direction: Direction
    start: int | str  # frame, or a time: "10s", "1:02.5"
    stop: int | str | None  # exclusive
    step: int
    stream: int | None  # video stream of the container
    shard_bytes: int | None  # float32 bytes of flow in one shard, which no batch crosses


class OutputOptions(TypedDict, total=False):
    """How outputs are written."""

    max_error: float  # pixels; 0: lossless
    codec: Codec
    max_flow: float | Auto | None  # pixels at full colour
    encoder: Encoder  # of colour video
    bound: float  # pixels at either end of two-stream pictures
    overwrite: bool


class RunOptions(ComputeOptions, OutputOptions, total=False):
    """Of ``run``, ``run_many`` and ``stream``."""

    resolution: Resolution
    resume: bool
    tolerate_truncation: bool


class ExportOptions(OutputOptions, QueueOptions, total=False):
    """Of ``export``."""

    frame_rate: Fraction | float | str | None  # of files, which carry no times
    shard_bytes: int | None


class ColorOptions(QueueOptions, total=False):
    """Of ``color``."""

    encoder: Encoder
    bound: float
    overwrite: bool


class LazyOptions(ComputeOptions, total=False):
    """Of ``open``."""

    max_error: float  # of a cache
    codec: Codec  # of a cache


class ClipOptions(LazyOptions, total=False):
    """Of ``FlowClips``, for the videos that it opens."""

    frames_mb: float  # of decoded frames that each open video keeps
