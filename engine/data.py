"""What travels along the chain: frames, pairs, batches of pairs, batches of flow, and the header before them.

Each class states its fields' shape, dtype, unit and device once, and checks them once, at construction.
Tensors may live on any device; only ``engine/device.py`` moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Array = npt.NDArray[Any]
    BoolArray = npt.NDArray[np.bool_]
    Float32Array = npt.NDArray[np.float32]
    Int64Array = npt.NDArray[np.int64]
    Float64Array = npt.NDArray[np.float64]
    Bytes = npt.NDArray[np.uint8]
    Pin = Callable[[Bytes], Callable[[], None]]  # pins memory and returns what unpins it: see ``engine.pinned.pin``

Components = TypeVar("Components", "Array", "Tensor")
# Pixels; a component beyond this, NaN or infinite marks an unknown vector: Middlebury's convention. See ``is_known``.
UNKNOWN_ABOVE = 1e9
UNKNOWN = 1e10  # pixels; what Middlebury's own tools write in a .flo for an unknown vector
UNKNOWN_WORDS = "unknown (NaN, infinite or beyond 1e9 px)"
SAME_TIME_S = 1e-6  # times of one frame, read twice, that differ by less are the same
MOST_FLOWS_A_SHARD = 512
_SHARD_BYTES = 128 << 20

HEAD_BYTES = 1 << 20  # enough to tell videos apart, few enough to read quickly from a slow disk

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


def is_known(flow: Components) -> Components:
    """Which components of flow are known; a vector is known if both are. NaN fails every comparison."""
    return abs(flow) <= UNKNOWN_ABOVE


@dataclass(frozen=True)
class SourceId:
    """Identifies an input well enough to recognise it again, e.g. before a resume."""

    name: str  # file name, folder name, or "synthetic:NAME"; never a full path, so that stores can be shared
    size_bytes: int | None = None  # of the file, or of all the images together
    duration_s: float | None = None  # as stated by the container
    head_sha256: str | None = None  # of the first HEAD_BYTES, or all of a shorter input: see ``heads_sha256``
    heads_sha256: tuple[str, ...] = ()  # of the first 1, 4, 16, 64 and 256 KiB, as far as the input has them: these
    # stay the same when an input shorter than HEAD_BYTES grows
    sampled_sha256: str | None = None  # of samples from the whole input: changes when it grows, or almost any other way


@dataclass(frozen=True)
class NativeGrid:
    """How a network's own, coarser prediction maps to the flow that is made from it."""

    height: int  # of the prediction
    width: int
    factor: int  # upsampling factor of each side, to the size of the network's input
    upsampling: Literal["bilinear", "nearest"]  # half-pixel centres
    # The flow is: pad: cropped from the upsampled prediction; crop: the upsampled prediction itself;
    # resize: the upsampled prediction, resized bilinearly
    fit: Literal["pad", "crop", "resize"]
    top: int = 0  # rows of the upsampled prediction above the flow
    left: int = 0  # columns to the left of it


@dataclass(frozen=True)
class FlowInfo:
    """The header that comes before the first frame. A source provides it; sinks are opened with it."""

    height: int  # pixels; of a source: the frame as shown (rotation applied); of a sink: the flow field
    width: int  # pixels
    frame_rate: Fraction | None  # average frames per second of the frames the source gives; None: unknown
    frame_count: int | None  # frames the source will give; None: unknown until it ends
    source: SourceId
    made_by: Mapping[str, JSON] = field(default_factory=dict)  # model, weights, precision, ...: kept in the store
    native: NativeGrid | None = None  # set if batches carry ``FlowBatch.native`` and stores should keep that
    device: str | None = None  # what computes the flow while outputs are written: cpu, cuda:0; None: it exists already
    batch: int | None = None  # pairs computed together
    shard: int | None = None  # flows in a shard of the store that is resumed, which keeps its own shard length

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a frame is at least 1x1 pixels, got {self.width}x{self.height}")

    @property
    def flow_count(self) -> int | None:
        """N frames give N-1 flows; None when N is unknown."""
        return None if self.frame_count is None else max(self.frame_count - 1, 0)

    @property
    def flow_bytes(self) -> int:
        """Bytes of one flow field as float32: 2 x H x W x 4."""
        return 8 * self.height * self.width

    @property
    def flo_bytes(self) -> int:
        """Bytes of one flow field as a ``.flo`` file, which starts with a tag, the width and the height."""
        return 12 + self.flow_bytes

    @property
    def stored_size(self) -> tuple[int, int]:
        """(height, width) at which a store keeps each flow."""
        return (self.height, self.width) if self.native is None else (self.native.height, self.native.width)

    def shard_length(self, shard_bytes: int | None) -> int:
        """Flows in one shard of ``shard_bytes`` float32 bytes, at least one. Batches never cross shards either.

        At most 512, however small the fields: a shard's index holds an entry for each flow, and a crash costs a whole
        shard's work. None: 128 MiB (few files, each still quick to recompute), rounded down to whole batches, since a
        short batch wastes a GPU's time.
        """
        height, width = self.stored_size
        length = max(1, min(MOST_FLOWS_A_SHARD, (shard_bytes or _SHARD_BYTES) // (8 * height * width)))
        if shard_bytes is not None:
            return length
        if self.shard is not None:
            return self.shard
        return length - length % self.batch if self.batch is not None and self.batch <= length else length


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded picture."""

    rgb: Tensor = field(repr=False)  # (3, H, W) uint8, full-range RGB, any strides, on the source's device
    index: int  # number of this frame in the source, from 0, whatever start and step select
    timestamp_s: float  # presentation timestamp of the container, seconds, unshifted
    clip: int = 0  # frames of different clips are never paired

    def __post_init__(self) -> None:
        if self.rgb.ndim != 3 or self.rgb.shape[0] != 3:
            raise ValueError(f"a frame is (3, H, W), got {tuple(self.rgb.shape)}")
        if self.rgb.dtype.is_floating_point or self.rgb.element_size() != 1:
            raise TypeError(f"a frame is uint8, got {self.rgb.dtype}")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.rgb,)

    @property
    def last_frame(self) -> int:
        return self.index


@dataclass(frozen=True, eq=False)
class FramePair:
    """Two frames of one clip; flow goes from ``first`` to ``second``."""

    first: Frame
    second: Frame

    def __post_init__(self) -> None:
        if self.first.clip != self.second.clip:
            raise ValueError(f"frames {self.first.index} and {self.second.index} belong to different clips")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.first.rgb, self.second.rgb)

    @property
    def last_frame(self) -> int:
        return self.second.index


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Neighbouring pairs that go through the model together. Never crosses a shard; a shard's last may be short."""

    pairs: tuple[FramePair, ...]
    index: int  # place of the first pair's flow in the output, from 0

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("a batch holds at least one pair")

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for pair in self.pairs for tensor in pair.tensors)

    @property
    def last_frame(self) -> int:
        return self.pairs[-1].last_frame


@dataclass(frozen=True, eq=False)
class FlowBatch:
    """N flow fields in order, with the frames and times they belong to.

    ``flow`` is (N, 2, H, W) float32, pixels of the source frame, x (right) then y (down). ``frame`` and ``timestamp_s``
    (seconds) are those of each pair's first frame, ``frame_to`` and ``timestamp_to_s`` of its second, each (N,).
    """

    flow: Tensor  # (N, 2, H, W) float32, pixels of the source frame, x (right) then y (down)
    index: int  # place of flow[0] in the output, from 0
    frame: Int64Array  # (N,) number of each pair's first frame in the source
    frame_to: Int64Array  # (N,) number of each pair's second frame
    timestamp_s: Float64Array  # (N,) seconds, presentation time of the first frame
    timestamp_to_s: Float64Array  # (N,) seconds, of the second
    native: Tensor | None = None  # (N, 2, h, w) float32, the network's own prediction, pixels of the source frame

    def __post_init__(self) -> None:
        if self.flow.ndim != 4 or self.flow.shape[1] != 2:
            raise ValueError(f"flow is (N, 2, H, W), got {tuple(self.flow.shape)}")
        if self.flow.element_size() != 4 or not self.flow.dtype.is_floating_point:
            raise TypeError(f"flow is float32, got {self.flow.dtype}")
        count = (self.flow.shape[0],)
        for name in ("frame", "frame_to", "timestamp_s", "timestamp_to_s"):
            if getattr(self, name).shape != count:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected {count}")

    def __len__(self) -> int:
        return int(self.flow.shape[0])

    def __repr__(self) -> str:
        which = ""
        if len(self):
            which = (
                f": frame {self.frame[0]} to {self.frame[-1]}, {self.timestamp_s[0]:g} to {self.timestamp_s[-1]:g} s"
            )
        return f"<FlowBatch {tuple(self.flow.shape)} float32 on {self.flow.device}{which}>"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.flow,) if self.native is None else (self.flow, self.native)

    @property
    def last_frame(self) -> int:
        return int(self.frame_to[-1])

    def moved(self, copy: Callable[[Tensor], Tensor]) -> FlowBatch:
        """The same batch with each tensor replaced by its copy."""
        return replace(self, flow=copy(self.flow), native=None if self.native is None else copy(self.native))


@dataclass(frozen=True, eq=False)
class ColorBatch:
    """Flow fields in order, as colour pictures."""

    pictures: Tensor  # (N, H, W, 3) uint8 RGB; for a video (N, 3 h / 2, w) uint8, planes of 4:2:0, h and w even
    unknown: Tensor  # (N,) int64, unknown vectors of each field
    index: int  # place of pictures[0] in the output, from 0
    frame: Int64Array  # (N,) number of each pair's first frame in the source
    timestamp_s: Float64Array  # (N,) seconds, presentation time of that frame

    def __len__(self) -> int:
        return int(self.pictures.shape[0])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.pictures, self.unknown)

    def moved(self, copy: Callable[[Tensor], Tensor]) -> ColorBatch:
        """The same batch with each tensor replaced by its copy."""
        return replace(self, pictures=copy(self.pictures), unknown=copy(self.unknown))


@dataclass(frozen=True, eq=False)
class StepsBatch:
    """Flow fields in order, quantised to whole numbers of steps as a store keeps them."""

    steps: Tensor  # (N, 2, H, W) int16 or int32, or the same as (N, bytes) uint8, shuffled by ``kernels.bitshuffle``
    found: Tensor  # (3, N) int32, ``Quantised.found``: what could not be kept, and the largest error of the rest
    index: int  # place of steps[0] in the output, from 0
    frame: Int64Array  # (N,) number of each pair's first frame in the source
    frame_to: Int64Array  # (N,) number of each pair's second frame
    timestamp_s: Float64Array  # (N,) seconds, presentation time of the first frame
    timestamp_to_s: Float64Array  # (N,) seconds, of the second

    def __len__(self) -> int:
        return int(self.steps.shape[0])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.steps, self.found)

    def moved(self, copy: Callable[[Tensor], Tensor]) -> StepsBatch:
        """The same batch with each tensor replaced by its copy."""
        return replace(self, steps=copy(self.steps), found=copy(self.found))


Prepared = ColorBatch | StepsBatch  # what a ``DeviceSink`` wants on the host
