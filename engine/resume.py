"""Going on with a store that an earlier run left: where, from which frame on, and whether it is the same run.

A store's shards are whole or not there, and batches never cross them, so a resumed run computes the very batches that
are missing. It is the store that is gone on with; a run's other outputs are made from it when it is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from flowreel.engine.data import FlowInfo, Frame, Resumable, ResumePoint, Sink, Source
from flowreel.engine.errors import ResumeMismatchError, TooFewFramesError, UsageError
from flowreel.engine.outputs import PathLike
from flowreel.engine.sources import STDIN, open_source

if TYPE_CHECKING:
    from flowreel.engine.config import SelectConfig

SAME_TIME_S = 1e-6


class ResumableSink(Sink, Resumable, Protocol):
    """A sink that can be gone on with."""


@dataclass(frozen=True)
class Resumption:
    """A store that is gone on with, and the source, opened where it ends."""

    store: ResumableSink
    point: ResumePoint
    frames: Source | None  # None: all that the source gives is there already

    @property
    def info(self) -> FlowInfo:
        """The header of the whole, not just of what is left."""
        assert self.frames is not None
        rest = self.frames.info
        return replace(rest, frame_count=None if rest.frame_count is None else rest.frame_count + self.point.flows)

    def checked(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """The frames, once the first is found to be the one that the store's last flow pointed to."""
        first = next(frames, None)
        if first is None:
            return
        if first.index != self.point.frame or abs(first.timestamp_s - self.point.timestamp_s) > SAME_TIME_S:
            raise ResumeMismatchError(
                f"the store goes on at frame {self.point.frame}, {self.point.timestamp_s:.6f} s, but the source gives "
                f"frame {first.index}, {first.timestamp_s:.6f} s there: it is another recording; start afresh with "
                "--overwrite"
            )
        yield first
        del first
        yield from frames


def take_up(source: PathLike, select: SelectConfig, sinks: Sequence[Sink], device: str = "cpu") -> Resumption | None:
    """Opens the source where the store among the outputs goes on; None: there is nothing to go on with.

    ``device``: as of ``open_source``.

    Raises:
        UsageError: no output is a store.
        SourceError: what ``open_source`` raises.
        DamagedStoreError: what is there cannot be read.
    """
    store = next((sink for sink in sinks if isinstance(sink, Resumable)), None)
    if store is None:
        raise UsageError("resume goes on with a flow store, and no output is one: add -o X.zarr, or leave resume out")
    point = store.resume_point()
    if point is None:
        return None
    if point.complete and not _grown(source, select, point):
        return Resumption(store, point, None)
    while True:
        try:
            return Resumption(store, point, open_source(source, replace(select, start=point.frame), device))
        except TooFewFramesError:  # the source ends where the store does, which was never given its name
            earlier = store.resume_point(below=point.flows)
            if earlier is None:
                raise
            point = earlier


def _grown(source: PathLike, select: SelectConfig, point: ResumePoint) -> bool:
    """Whether the source has more than a finished store holds. One that cannot be read twice is taken as it was."""
    if source == STDIN:
        return False
    whole = open_source(source, select)
    try:
        flows = whole.info.flow_count
    finally:
        whole.close()
    return flows is not None and flows > point.stored
