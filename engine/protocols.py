"""The interfaces of sources, readers and sinks, as the stages between them see them. What travels: ``engine/data.py``.

The classes in ``engine/sources/`` and ``sinks/`` implement these protocols without deriving from them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from flowreel.engine.data import FlowBatch, FlowInfo, Frame, Prepared

if TYPE_CHECKING:
    from torch import Tensor

    from flowreel.engine.data import Float64Array, Pin

# -- Where frames come from ----------------------------------------------------------------------------------------


@runtime_checkable
class Source(Protocol):
    """Gives frames in order. ``info`` is known before the first one is decoded.

    Iterate once. After the iteration has ended, ``losses`` says in plain words what the input promised but did not
    deliver (a truncated file, frames that did not decode); empty if nothing is missing. ``notes`` says what the user
    should know but need not act on (timestamps that had to be filled in).
    """

    @property
    def info(self) -> FlowInfo: ...
    @property
    def decoder(self) -> str:
        """The decoder's name, for the summary: ``"PyAV (h264)"``, ``"Pillow"``, ``"synthetic"``."""
        ...

    @property
    def losses(self) -> list[str]: ...
    @property
    def notes(self) -> list[str]: ...
    def __iter__(self) -> Iterator[Frame]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded frame, not yet converted to a ``Frame``: frames that nobody requests are never converted."""

    number: int  # of the frame in the source
    size_bytes: int  # memory that it occupies
    develop: Callable[[], Frame]  # does the conversion


@runtime_checkable
class RandomAccess(Source, Protocol):
    """A source whose frames can be read in any order, by any number of concurrent readers."""

    reopening_frames: int  # frames that decode in the time that reopening and seeking takes; 0: frames are independent

    @property
    def wanted(self) -> range:
        """Numbers of the selected frames."""
        ...

    @property
    def times_s(self) -> Float64Array:
        """(T,) seconds, presentation timestamp of every frame of the source, ascending."""
        ...

    def standing_before(self, number: int) -> int:
        """The frame where decoding has to start to get this one: itself, or an earlier (key) frame."""
        ...

    def pictures_from(self, number: int) -> Generator[Picture, None, None]:
        """Frames in ascending order, from this one or somewhat before it to the last one, including those between
        the wanted ones. A frame that cannot be decoded is left out. Raises SourceError when the source is gone or has
        changed."""
        ...


@runtime_checkable
class MayWait(Protocol):
    """A source that may wait for ever for its input, such as stdin; other sources only read what exists already."""

    def interrupt(self) -> None:
        """Ends the wait and the iteration within a moment. May be called from any thread, any number of times."""
        ...


@runtime_checkable
class MayLose(Protocol):
    """A source that goes on after a frame that it cannot give, or gives patched up; others can only end early."""

    first_loss: int | None  # number of the first such frame; known before any later frame is given


@runtime_checkable
class OnDevice(Protocol):
    """A source that may deliver its frames directly on the device that needs them."""

    on_device: bool  # whether it does, unless a note says that it had to fall back


# -- Where flow goes, and comes from again -------------------------------------------------------------------------


@dataclass(frozen=True)
class ResumePoint:
    """Where to resume an output that an earlier run left."""

    flows: int  # flows that are kept, so the place in the output of the next one
    frame: int  # number in the source of the frame to resume from
    timestamp_s: float  # its timestamp in the earlier run: the source must give the same
    complete: bool  # nothing is missing, unless the source has grown since
    stored: int  # flows that are there in all, including those to be recomputed
    batch: int | None = None  # pairs per batch of the earlier run, reused for equal results; None: unknown
    shard: int | None = None  # flows in a shard
    loss: tuple[int, int] | None = None  # the first missing or damaged frame, and the first kept flow that it affects


@runtime_checkable
class Resumable(Protocol):
    """A sink that can resume what an earlier run with the same settings left."""

    def resume_point(self, below: int | None = None) -> ResumePoint | None:
        """Called before ``open``, which resumes at the point last returned; None: nothing there is worth resuming. Not
        called: ``open`` starts afresh.

        below: keep fewer flows than this.
        """
        ...

    def require_same(self, info: FlowInfo) -> None:
        """Raises ResumeMismatchError unless a run with this header would have written the existing output."""
        ...

    def note_loss(self, frame: int) -> None:
        """Has the number of the first missing or damaged frame recorded, before any flow that it affects."""
        ...

    def tell_losses(self, losses: Sequence[str]) -> None:
        """Has the source's losses recorded; called before a ``commit`` that treats the rest as the whole."""
        ...

    def copy(self, finished: str) -> int:
        """Called instead of ``open``: makes this output the same as a finished one of its kind, replacing what is
        there. Returns its size in bytes."""
        ...


@runtime_checkable
class FlowReader(Protocol):
    """Gives stored flow in order: of a store or a part of it, ``.flo`` files, KITTI pictures.

    Iterate once; a file is open only while it is read. Unknown vectors are NaN, or beyond ``UNKNOWN_ABOVE`` as in a
    ``.flo``.
    """

    @property
    def info(self) -> FlowInfo:
        """Header of the flow itself: ``frame_count`` is the number of flows plus one."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """A name for each flow, without folder: ``000001.flo``, or ``000001`` if the flow is not a separate file."""
        ...

    @property
    def stem(self) -> str | None:
        """What outputs made from a store are named after; None: outputs made from files are named after those files."""
        ...

    @property
    def has_times(self) -> bool:
        """Whether it holds the timestamps and frame numbers of its flows, as a store does and files do not."""
        ...

    @property
    def notes(self) -> list[str]: ...
    def __iter__(self) -> Iterator[FlowBatch]: ...

    def reads(self, output: str) -> bool:
        """Whether writing ``output`` would destroy what is still being read."""
        ...


@runtime_checkable
class OneFileAFlow(Protocol):
    """A sink whose output is many files, so that one path does not tell whether it is finished."""

    def holds(self, flows: int, *, or_unfinished: bool = False) -> bool:
        """Whether the finished files of exactly so many flows exist. Called without ``open``.

        or_unfinished: whether each exists under its finished or its unfinished name, but none under both, as when a run
        is killed while it names them.
        """
        ...

    def files(self) -> list[Path]:
        """The finished files. Called without ``open``."""
        ...


class Sink(Protocol):
    """Takes flow in order and publishes it on success. One format = one file in ``sinks/``.

    ``open`` once, ``write`` any number of times, then ``commit`` or ``abort`` once. Until ``commit`` returns, nothing
    at the output's name looks finished. ``abort`` removes what is of no further use, and returns a message about what
    it keeps, or None. ``commit(complete=False)`` keeps all that was written, but under an unfinished name.
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
        """Bytes that this sink has put on disk so far, not counting those it has since replaced."""
        ...

    @property
    def notes(self) -> list[str]:
        """What the user should know, e.g. how many vectors were unknown or out of range."""
        ...


class ResumableSink(Sink, Resumable, Protocol):
    """A sink that can be resumed."""


@runtime_checkable
class DeviceSink(Protocol):
    """A sink that can do part of its work on the device where the flow is, so that only the result is downloaded."""

    @property
    def prepares(self) -> bool:
        """Whether it has any such work. Known once the sink is open."""
        ...

    def prepare(self, batches: Iterator[FlowBatch]) -> Iterator[Prepared]:
        """A stage: flow on any device to what the sink makes from it on that device, in order: pictures or steps."""
        ...

    def take(self, prepared: Prepared) -> None:
        """Takes one prepared batch, on the host, instead of the flow that ``write`` takes."""
        ...


@runtime_checkable
class LandingSink(Protocol):
    """A ``DeviceSink`` that offers its own memory for prepared batches to land in, which saves a copy there."""

    def landing(self, prepared: Prepared, pin: Pin) -> Tensor | None:
        """Host memory for the first tensor of this batch, of its shape and dtype; None: any memory will do.

        pin: the sink calls it with memory before it first returns a piece of that memory, and calls the function that
        it returns before freeing that memory.
        """
        ...
