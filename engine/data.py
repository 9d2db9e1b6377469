"""What travels along the chain: frames, pairs, batches of pairs, batches of flow, and the header before them.

Each class states its fields' shape, dtype, unit and device once, and checks them once, when it is made.
Tensors may live on any device; ``engine/device.py`` alone moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    Int64Array = npt.NDArray[np.int64]
    Float64Array = npt.NDArray[np.float64]
    Bytes = npt.NDArray[np.uint8]
    Pin = Callable[[Bytes], Callable[[], None]]  # has memory pinned, as ``engine.pinned.pin`` does for a device

# Pixels; a component beyond it, NaN or infinite marks a vector that nobody knows: Middlebury's convention.
UNKNOWN_ABOVE = 1e9
UNKNOWN = 1e10  # pixels; what Middlebury's own tools write in a .flo for a vector nobody knows
MOST_FLOWS_A_SHARD = 512
_SHARD_BYTES = 128 << 20

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


@dataclass(frozen=True)
class SourceId:
    """Which input this is: enough to recognise it again, e.g. before a resume."""

    name: str  # file name, folder name, or "synthetic:NAME"; never a full path, so that stores can be shared
    size_bytes: int | None = None  # of the file, or of all the images together
    duration_s: float | None = None  # as the container tells
    head_sha256: str | None = None  # of the first MiB: stays the same when a recording grows
    sampled_sha256: str | None = None  # of samples all over: does not, and hardly when something else changes


@dataclass(frozen=True)
class NativeGrid:
    """How a network's own, coarser prediction lies in the flow that is made of it."""

    height: int  # of the prediction
    width: int
    factor: int  # each side is enlarged by this much, to the size the network saw
    upsampling: Literal["bilinear", "nearest"]  # half-pixel centres
    fit: Literal["pad", "crop", "resize"]  # pad: the flow is cut out of the enlarged one; crop: it is that one;
    # resize: the enlarged one is resized to it, bilinearly
    top: int = 0  # rows of the enlarged prediction above the flow
    left: int = 0  # columns to the left of it


@dataclass(frozen=True)
class FlowInfo:
    """The header that comes before the first frame. A source states it; sinks are opened with it."""

    height: int  # pixels; of a source: the frame as shown (rotation applied); of a sink: the flow field
    width: int  # pixels
    frame_rate: Fraction | None  # average frames per second of the frames the source gives; None: unknown
    frame_count: int | None  # frames the source will give; None: unknown until it ends
    source: SourceId
    made_by: Mapping[str, JSON] = field(default_factory=dict)  # model, weights, precision, ...: kept in the store
    native: NativeGrid | None = None  # given when ``FlowBatch.native`` will come, and stores are to keep that
    device: str | None = None  # what computes the flow, beside the outputs: cpu, cuda:0; None: it is there already
    batch: int | None = None  # pairs that it computes together
    shard: int | None = None  # flows in a shard of a store that is gone on with, which keeps its own

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
        """Bytes of one flow field as a ``.flo`` file, which begins with a tag, the width and the height."""
        return 12 + self.flow_bytes

    @property
    def stored_size(self) -> tuple[int, int]:
        """(height, width) of what a store keeps of each flow."""
        return (self.height, self.width) if self.native is None else (self.native.height, self.native.width)

    def shard_length(self, shard_bytes: int | None) -> int:
        """Flows in one shard of ``shard_bytes`` float32 bytes, at least one. Batches never cross shards either.

        Of small fields not more than 512: a shard's index has room for each, and a crash costs a shard's work. None:
        128 MiB (few files, each still quick to re-make), less what would end in a short batch, a waste of a GPU's time.
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

    rgb: Tensor  # (3, H, W) uint8, full-range RGB, any strides, on the source's device
    index: int  # number of this frame in the source, from 0, whatever start and step select
    timestamp_s: float  # presentation time as the container has it, seconds, unshifted
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
    """Neighbouring pairs that go through the model together. Never crosses a shard; the last may be short."""

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
    """Flow fields in order, with the frames and times they belong to."""

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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.flow,) if self.native is None else (self.flow, self.native)

    @property
    def last_frame(self) -> int:
        return int(self.frame_to[-1])

    def moved(self, copy: Callable[[Tensor], Tensor]) -> FlowBatch:
        """The same with a copy of each tensor in its place."""
        return replace(self, flow=copy(self.flow), native=None if self.native is None else copy(self.native))


@dataclass(frozen=True, eq=False)
class ColorBatch:
    """Flow fields in order, as pictures."""

    pictures: Tensor  # (N, H, W, 3) uint8 RGB; for a video (N, 3 h / 2, w) uint8, planes of 4:2:0, h and w even
    unknown: Tensor  # (N,) int64, vectors of each field that nobody knows
    index: int  # place of pictures[0] in the output, from 0
    frame: Int64Array  # (N,) number of each pair's first frame in the source
    timestamp_s: Float64Array  # (N,) seconds, presentation time of that frame

    def __len__(self) -> int:
        return int(self.pictures.shape[0])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.pictures, self.unknown)

    def moved(self, copy: Callable[[Tensor], Tensor]) -> ColorBatch:
        """The same with a copy of each tensor in its place."""
        return replace(self, pictures=copy(self.pictures), unknown=copy(self.unknown))


@dataclass(frozen=True, eq=False)
class StepsBatch:
    """Flow fields in order, as a store keeps them: whole numbers of steps, and what could not be kept."""

    steps: Tensor  # (N, 2, H, W) int16 or int32, or (N, bytes) uint8 of the same, as ``kernels.bitshuffle`` has them
    found: Tensor  # (3, N) int32, of ``kernels.quantise``: what could not be kept, and how near the rest is
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
        """The same with a copy of each tensor in its place."""
        return replace(self, steps=copy(self.steps), found=copy(self.found))


Prepared = ColorBatch | StepsBatch  # what a ``DeviceSink`` wants on the host


@runtime_checkable
class Source(Protocol):
    """Gives frames in order. ``info`` is known before the first one is decoded.

    Iterate once. After the iteration has ended, ``losses`` says in plain words what the input promised and did not
    give (a cut file, frames that would not decode); empty when all came. ``notes`` says what the user should know
    but need not act on (timestamps that had to be filled in).
    """

    @property
    def info(self) -> FlowInfo: ...
    @property
    def decoder(self) -> str:
        """What decodes, for the summary: ``"PyAV (h264)"``, ``"Pillow"``, ``"synthetic"``."""
        ...

    @property
    def losses(self) -> list[str]: ...
    @property
    def notes(self) -> list[str]: ...
    def __iter__(self) -> Iterator[Frame]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Picture:
    """A frame as it was decoded, before it is made a ``Frame``: what is not asked for is never converted."""

    number: int  # of the frame in the source
    size_bytes: int  # that it keeps in memory
    develop: Callable[[], Frame]


@runtime_checkable
class RandomAccess(Source, Protocol):
    """A source whose frames can be had in any order. Any number of readings may go on side by side."""

    reopening_frames: int  # so many frames are decoded in the time starting over takes; 0: each stands by itself

    @property
    def wanted(self) -> range:
        """Numbers of the frames that the selection takes."""
        ...

    @property
    def times_s(self) -> Float64Array:
        """(T,) seconds, presentation time of every frame of the source, ascending."""
        ...

    def standing_before(self, number: int) -> int:
        """The frame that has to be decoded first to get this one: itself, or one before it."""
        ...

    def pictures_from(self, number: int) -> Generator[Picture, None, None]:
        """Frames in rising order, from this one or somewhat before it to the last one, those between the wanted ones
        included. One that cannot be decoded is left out. Raises SourceError when the source has gone or changed."""
        ...


@dataclass(frozen=True)
class ResumePoint:
    """Where an output that an earlier run left goes on."""

    flows: int  # that are there and stay: the place in the output of the next one
    frame: int  # number in the source of the frame to go on from
    timestamp_s: float  # its time as the earlier run saw it: the source must say the same
    complete: bool  # nothing was missing, unless the source has grown since
    stored: int  # flows that are there in all, those that will be made again included
    batch: int | None = None  # pairs a batch had: the same again, for the same numbers; None: not known
    shard: int | None = None  # flows a shard has


@runtime_checkable
class Resumable(Protocol):
    """A sink that can take up what an earlier run of the same settings left."""

    def resume_point(self, below: int | None = None) -> ResumePoint | None:
        """Asked before ``open``, which goes on at the point last given; None: nothing is there that is worth it.

        below: keep fewer flows than this.
        """
        ...

    def require_same(self, info: FlowInfo) -> None:
        """Raises ResumeMismatchError unless a run with this header would have written what is there."""
        ...

    def tell_losses(self, losses: Sequence[str]) -> None:
        """Of what the source did not give, before a ``commit`` that takes the rest as the whole: to be recorded."""
        ...


@runtime_checkable
class FlowReader(Protocol):
    """Gives flow that is stored already, in order: a store or a part of it, ``.flo`` files, KITTI pictures.

    Iterate once. Vectors nobody knows are NaN, or beyond ``UNKNOWN_ABOVE`` as they stand in a ``.flo``.
    """

    @property
    def info(self) -> FlowInfo:
        """Header of the flow itself: ``frame_count`` is one more than the flows there are."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """A name for each flow, without folder: ``000001.flo``, or ``000001`` where it is no file of its own."""
        ...

    @property
    def stem(self) -> str | None:
        """What a store's outputs are called after; None: those of files, after the files."""
        ...

    @property
    def has_times(self) -> bool:
        """Whether it keeps the times and frame numbers of its flows, as a store does and files do not."""
        ...

    @property
    def notes(self) -> list[str]: ...
    def __iter__(self) -> Iterator[FlowBatch]: ...
    def close(self) -> None: ...

    def reads(self, output: str) -> bool:
        """Whether writing ``output`` would destroy what is still being read."""
        ...


@runtime_checkable
class OneFileAFlow(Protocol):
    """A sink whose output is many files: it takes more than a look at one name to know whether it is finished."""

    def holds(self, flows: int) -> bool:
        """Whether files of so many flows are there, all of them finished. Asked without ``open``."""
        ...


class Sink(Protocol):
    """Takes flow in order and publishes it on success. One format = one file in ``sinks/``.

    ``open`` once, ``write`` any number of times, then ``commit`` or ``abort`` once. Until ``commit`` returns, nothing
    that looks finished is at the output's name; after ``abort`` what cannot be of use is gone, and what it returns
    tells the user of what is kept.
    ``commit(complete=False)`` keeps all that was written but leaves it named as unfinished.
    """

    def open(self, info: FlowInfo) -> None: ...
    def write(self, batch: FlowBatch) -> None: ...
    def commit(self, complete: bool = True) -> None: ...
    def abort(self) -> str | None: ...

    @property
    def path(self) -> str:
        """Where the finished output is, or will be."""
        ...

    @property
    def bytes_written(self) -> int:
        """Bytes on disk that this sink has put there so far; what it has replaced since does not count."""
        ...

    @property
    def notes(self) -> list[str]:
        """What the user should know, e.g. how many vectors were unknown or beyond range."""
        ...


@runtime_checkable
class DeviceSink(Protocol):
    """A sink that can have part of its work done where the flow is, so that only what it keeps comes to the host."""

    @property
    def prepares(self) -> bool:
        """Whether it has any such work. Known once it is open."""
        ...

    def prepare(self, batches: Iterator[FlowBatch]) -> Iterator[Prepared]:
        """A stage: flow on any device to what the sink makes of it on that device, in order: pictures, or steps."""
        ...

    def take(self, prepared: Prepared) -> None:
        """Takes one such, on the host, in place of what ``write`` takes."""
        ...


@runtime_checkable
class LandingSink(Protocol):
    """A ``DeviceSink`` that has memory where what it has prepared may come to lie, so that nobody copies it there."""

    def landing(self, prepared: Prepared, pin: Pin) -> Tensor | None:
        """Host memory for the first of the tensors of what comes next, of its shape and dtype; None: anywhere.

        pin: to be called with memory before the first piece of it is given away. What comes back is called before
        that memory goes.
        """
        ...
