"""What sources, readers and outputs are, to the stages between them. What travels is in ``engine/data.py``.

The classes in ``engine/sources/`` and ``sinks/`` meet them without deriving from them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from flowreel.engine.data import FlowBatch, FlowInfo, Frame, Prepared

if TYPE_CHECKING:
    from torch import Tensor

    from flowreel.engine.data import Float64Array, Pin

# -- Where frames come from ----------------------------------------------------------------------------------------


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


@runtime_checkable
class MayWait(Protocol):
    """A source whose input may not come for ever; the others only read what is there."""

    def interrupt(self) -> None:
        """Ends the waiting and the iteration within a moment; from any thread, any number of times."""
        ...


@runtime_checkable
class OnDevice(Protocol):
    """A source that may give its frames on the device they are wanted on."""

    on_device: bool  # whether it does, until it says otherwise in its notes


# -- Where flow goes, and comes from again -------------------------------------------------------------------------


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
