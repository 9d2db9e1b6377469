"""The keyword options of the library's functions, so that editors complete them and type checkers know them.

Nearly all are options of the command line by the same name; ``config.py`` checks the values and has the defaults.
NumPy numbers are accepted as well.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Literal, TypedDict

from flowreel.engine.config import Codec, Decoder, Direction, Encoder, FitMode, Precision, Resolution

if TYPE_CHECKING:
    import torch

Auto = Literal["auto"]


class QueueOptions(TypedDict, total=False):
    queue_mb: float  # MiB that may wait between the stages


class ComputeOptions(QueueOptions, total=False):
    """What flow is computed from, and how."""

    model: str | None  # FlowNet2, FlowNet2C, ...; None: what the weights hold
    weights: str | PathLike[str]  # "baseline", a path, or a downloaded checkpoint's name
    device: str | torch.device  # "auto", "cpu", "cuda", "cuda:1"; for a run also "cuda:0,1"
    decoder: Decoder
    batch: int | Auto | None  # frame pairs that go through the network together
    precision: Precision | Auto | None
    fit: FitMode
    direction: Direction
    start: int | str  # frame, or a time: "10s", "1:02.5"
    stop: int | str | None  # exclusive
    step: int
    stream: int | None  # video stream of the container
    shard_bytes: int | None  # bytes of flow per shard, as float32; no batch crosses shards


class OutputOptions(TypedDict, total=False):
    """How outputs are written."""

    max_error: float  # pixels; 0: lossless
    codec: Codec
    max_flow: float | Auto | None  # flow magnitude at full colour, pixels
    encoder: Encoder  # of colour video
    bound: float  # pixels; two-stream pictures span -bound to bound
    overwrite: bool


class RunOptions(ComputeOptions, OutputOptions, total=False):
    """Options of ``run``, ``run_many`` and ``stream``."""

    resolution: Resolution
    resume: bool
    tolerate_truncation: bool


class ExportOptions(OutputOptions, QueueOptions, total=False):
    """Options of ``export``."""

    shard_bytes: int | None


class ColorOptions(QueueOptions, total=False):
    """Options of ``color``."""

    encoder: Encoder
    bound: float
    overwrite: bool


class LazyOptions(ComputeOptions, total=False):
    """Options of ``open``."""

    max_error: float  # of the cache
    codec: Codec  # of the cache


class ClipOptions(LazyOptions, total=False):
    """Options of ``FlowClips``, for the videos that it opens."""

    frames_mb: float  # MiB of decoded frames that each open video keeps
