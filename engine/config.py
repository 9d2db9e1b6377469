"""Settings, as small frozen dataclasses: each field with its unit and the reason for its default.

The command line only translates flags into these; a library caller uses the same names. Values are checked here, once,
so that all later code can trust them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from operator import index
from os import PathLike, fspath
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from flowreel.engine.errors import UsageError

Part = TypeVar("Part", "SelectConfig", "ModelConfig", "SinkConfig", "QueueConfig")
Codec = Literal["blosc", "pcodec", "pcodec2d", "zstd"]
Precision = Literal["fp32", "tf32", "fp16", "bf16"]
FitMode = Literal["pad", "crop", "resize"]
Direction = Literal["forward", "backward"]
Resolution = Literal["full", "native"]
Decoder = Literal["auto", "nvdec", "pyav"]
Encoder = Literal["auto", "nvenc", "cpu"]
_WHOLE = re.compile("[+-]?[0-9]{1,30}", re.ASCII)
_KINDS: dict[object, str] = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
DEFAULT_OUTPUT = "{stem}.flow.zarr"  # of a run, in the working folder
MOST_FRAMES = (1 << 62) - 1  # so that frame numbers, and sums of two, fit in 64 bits
DEFAULT_QUEUE_MB = 512  # MiB
MOST_MB = 1 << 40  # more than any machine has, yet its bytes still fit in 64 bits


def _one_of(name: str, value: str, kind: object, *others: str) -> None:
    allowed = (*others, *get_args(kind))
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True)
class SelectConfig:
    """Which frames of the source are used."""

    start: int | str = 0  # frame number (as int or text) or time: "10s", "1:02.5"
    stop: int | str | None = None  # exclusive; None: to the end
    step: int = 1  # take every step-th frame and pair neighbours of that sequence
    stream: int | None = None  # which video stream of the container; None: FFmpeg's "best"
    decoder: Decoder = "auto"

    def __post_init__(self) -> None:
        if self.step < 1:
            raise UsageError(f"step must be at least 1, got {self.step}")
        for name in ("start", "stop"):
            value = getattr(self, name)
            if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
                value = int(value)
                object.__setattr__(self, name, value)
            if isinstance(value, int) and value < 0:
                raise UsageError(f"{name} must not be negative, got {value}")
        for name in ("start", "stop", "step"):
            value = getattr(self, name)
            if isinstance(value, int) and value > MOST_FRAMES:
                raise UsageError(f"{name} is beyond {MOST_FRAMES}, the last frame there can be")
        if isinstance(self.start, int) and isinstance(self.stop, int) and self.stop <= self.start:
            raise UsageError(f"stop ({self.stop}) must be greater than start ({self.start})")
        if self.stream is not None and self.stream < 0:
            raise UsageError(f"stream must not be negative, got {self.stream}")
        _one_of("decoder", self.decoder, Decoder)


@dataclass(frozen=True)
class ModelConfig:
    """Which network runs, where, and how."""

    model: str | None = None  # FlowNet2, FlowNet2C, ...; None: what the weights hold
    weights: str = "baseline"  # "baseline" (shipped), a path, or a downloaded checkpoint's name
    device: str = "auto"  # auto: CUDA if available, and reported; cuda without a GPU is an error; cuda:0,1: both GPUs
    batch: int | None = None  # pairs; None: from the frame size; on a GPU from its free memory too, and recorded
    precision: Precision | None = None  # None: fp32 on a CPU, fp16 on a GPU
    fit: FitMode = "pad"  # to the networks' multiple of 64; pad is undone exactly, crop is flownet2-pytorch's way
    direction: Direction = "forward"

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"batch must be at least 1, got {self.batch}")
        if self.precision is not None:
            _one_of("precision", self.precision, Precision, "auto")
        _one_of("fit", self.fit, FitMode)
        _one_of("direction", self.direction, Direction)


@dataclass(frozen=True)
class SinkConfig:
    """How outputs are written. Each format reads the fields that concern it."""

    max_error: float = 1 / 64  # pixels; far below any network's own error, and several times smaller; 0: lossless
    codec: Codec = "blosc"  # the one that every Zarr v3 reader can decode
    resolution: Resolution = "full"  # native: stores keep the network's own quarter-resolution prediction
    shard_bytes: int | None = None  # float32 bytes of flow in one shard; None: about 128 MiB, in whole batches
    max_flow: float | None = None  # colour scale in pixels; None: 95th percentile of the first 32 flows, then fixed
    encoder: Encoder = "auto"  # of colour video; auto: NVENC if the flow is computed on a GPU that has it, else the CPU
    bound: float = 20.0  # pixels; two-stream pictures span -bound to bound; the default is that of TSN and denseflow
    resume: bool = False  # continue a store that an earlier run left unfinished, or one whose source has grown
    overwrite: bool = False  # replace an existing output, keeping the old one until the new one is complete

    def __post_init__(self) -> None:
        if not 0 <= self.max_error <= 1024:
            raise UsageError(f"max-error must lie between 0 (lossless) and 1024 px, got {self.max_error}")
        _one_of("codec", self.codec, Codec)
        _one_of("resolution", self.resolution, Resolution)
        _one_of("encoder", self.encoder, Encoder)
        if self.max_flow is not None and not 0 < self.max_flow < float("inf"):
            raise UsageError(f"max-flow must be a positive number of pixels or auto, got {self.max_flow}")
        if self.resume and self.overwrite:
            raise UsageError("resume continues what exists and overwrite replaces it: give only one of them")
        if not 0 < self.bound < float("inf"):
            raise UsageError(f"bound must be a positive number of pixels, got {self.bound}")
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise UsageError(f"shard-bytes must be at least 1, got {self.shard_bytes}")


@dataclass(frozen=True)
class QueueConfig:
    """How much may wait between the stages, which is all that a run holds in memory besides the model."""

    items: int = 4  # per channel: enough to even out an irregular neighbour, few enough to stop quickly
    total_bytes: int = DEFAULT_QUEUE_MB << 20  # over all channels together, a frame shared by two pairs counted once

    def __post_init__(self) -> None:
        if self.items < 1:
            raise UsageError(f"a queue holds at least one item, got {self.items}")
        if self.total_bytes < 1:
            raise UsageError(f"queue-mb must be positive, got {self.total_bytes} bytes")


@dataclass(frozen=True)
class RunConfig:
    """Everything one run needs besides its source and outputs."""

    select: SelectConfig = field(default_factory=SelectConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sink: SinkConfig = field(default_factory=SinkConfig)
    queues: QueueConfig = field(default_factory=QueueConfig)
    tolerate_truncation: bool = False  # treat what a truncated file yields as complete; else its store stays unfinished

    @classmethod
    def of(cls, **options: Any) -> RunConfig:
        """Builds one from the command line's flat names, e.g. ``of(stop=12, max_error=0, queue_mb=64)``.

        ``"auto"`` stands for None. Unknown names and impossible values raise UsageError.
        """
        options = {name: _plain(value) for name, value in options.items()}
        tolerate = options.pop("tolerate_truncation", False)
        _require_kind("tolerate_truncation", tolerate, bool)
        if "queue_mb" in options:
            options["total_bytes"] = bytes_of("queue-mb", options.pop("queue_mb"))
        config = cls(
            select=_taken(SelectConfig, options),
            model=_taken(ModelConfig, options),
            sink=_taken(SinkConfig, options),
            queues=_taken(QueueConfig, options),
            tolerate_truncation=tolerate,
        )
        if options:
            raise UsageError(f"unknown option {', '.join(sorted(options))}")
        return config


def _taken(kind: type[Part], options: dict[str, Any]) -> Part:
    """Moves the options that are fields of ``kind`` into an instance of it; ``"auto"`` stands for a default of None."""
    hints = get_type_hints(kind)
    given = {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}
    left = [field.name for field in fields(kind) if field.default is None and _is_auto(given.get(field.name))]
    values = given | dict.fromkeys(left)
    for name, value in values.items():
        _require_kind(name, value, hints[name])
    return kind(**values)


def _is_auto(value: object) -> bool:
    return isinstance(value, str) and value == "auto"  # what NumPy and torch compare with text may be no bool


def _plain(value: object) -> object:
    """Converts numbers, text, paths and devices of NumPy, torch and pathlib to Python's own types."""
    if isinstance(value, PathLike):
        return fspath(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        plain: object = value.item()
        return plain
    return str(value) if type(value).__module__ == "torch" and type(value).__name__ == "device" else value


def as_whole(value: object) -> int | None:
    """The value as a Python int; NumPy and torch integers are accepted too. None: it is not a whole number."""
    try:
        return None if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _require_kind(name: str, value: object, hint: object) -> None:
    """Raises UsageError for a value whose type is not the field's."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = {str if get_origin(part) is Literal else part for part in parts}
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return
    if isinstance(value, str) and str in kinds:  # also of a subclass, such as an enumeration's
        return
    if type(value) not in kinds:
        words = [words for kind, words in _KINDS.items() if kind in kinds]
        raise UsageError(f"{name.replace('_', '-')} must be {' or '.join(words)}, got {value!r}")


def bytes_of(name: str, megabytes: object) -> int:
    """An option in megabytes as bytes. Raises UsageError for anything but a number from 0 to ``MOST_MB``."""
    plain = _plain(megabytes)  # NumPy's small integers would overflow below
    if not isinstance(plain, int | float) or not 0 <= plain <= MOST_MB:
        raise UsageError(f"{name} must be a number of megabytes from 0 to {MOST_MB}, got {megabytes!r}")
    return int(plain * (1 << 20))
