"""Resuming a store that an earlier run left: which store, from which frame, and whether this is the same run.

A store's shards are whole or absent, and batches never cross them, so a resumed run computes exactly the batches that
are missing. Only the store is resumed; a run's other outputs are made from it when it is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flowreel.engine.data import SAME_TIME_S, FlowInfo, Frame
from flowreel.engine.errors import OutputExistsError, ResumeMismatchError, TooFewFramesError, UsageError, counted
from flowreel.engine.export import write_flows
from flowreel.engine.files import PathLike
from flowreel.engine.models.weights import read_weights
from flowreel.engine.outputs import OutputReport, first_store, is_finished, named_files, unname
from flowreel.engine.protocols import OneFileAFlow, Resumable, ResumableSink, ResumePoint, Sink, Source
from flowreel.engine.provenance import settings
from flowreel.engine.restore import Fit
from flowreel.engine.run_report import RunReport, report_of_complete
from flowreel.engine.sources import comes_once, open_source
from flowreel.sinks import differing_settings, open_flows, open_sink, open_store

if TYPE_CHECKING:
    from flowreel.engine.config import RunConfig


@dataclass(frozen=True)
class Resumption:
    """A store to resume, and the source, opened at the frame where the store ends."""

    store: ResumableSink
    point: ResumePoint
    frames: Source | None  # None: the store already holds all that the source gives
    source_info: FlowInfo  # of ``frames``, or of the whole source

    @property
    def info(self) -> FlowInfo:
        """The header of the whole flow, not only of the part that is left."""
        assert self.frames is not None
        rest = self.source_info
        return replace(rest, frame_count=None if rest.frame_count is None else rest.frame_count + self.point.flows)

    @property
    def losses(self) -> list[str]:
        """What the earlier run found missing or damaged, as far as the flow that is kept depends on it."""
        if self.point.loss is None:
            return []
        frame, _ = self.point.loss
        return [f"an earlier run, whose flow is kept, found frame {frame}, and perhaps later ones, missing or damaged"]

    def checked(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """The frames, after checking that the first is the one that the store's last kept flow leads to."""
        first = next(frames, None)
        if first is None:
            return
        moved = first.index != self.point.frame or abs(first.timestamp_s - self.point.timestamp_s) > SAME_TIME_S
        if moved and self.point.flows:
            raise ResumeMismatchError(
                f"the store continues at frame {self.point.frame}, {self.point.timestamp_s:.6f} s, but the source "
                f"gives frame {first.index}, {first.timestamp_s:.6f} s there: it is another recording; start afresh "
                "with --overwrite"
            )
        yield first
        del first
        yield from frames


def take_up(source: PathLike, config: RunConfig, sinks: Sequence[Sink], device: str) -> Resumption | None:
    """Opens the source at the frame where the store among the outputs ends; None: there is nothing to resume.

    Unless truncation is tolerated, it ends before the first flow that a missing or damaged frame affects: the frame may
    be intact by now, as where a download has gone on, and otherwise its loss is told again.

    ``device``: as for ``open_source``.

    Raises:
        UsageError: no output is a store.
        SourceError: what ``open_source`` raises.
        DamagedStoreError: the store cannot be read.
        ResumeMismatchError: the source ends, or ``stop`` lies, before the frame where the store ends.
        OutputExistsError: the store was never finished, but another output is there.
    """
    store = first_store(sinks)
    if store is None:
        raise UsageError("resume continues a flow store, and no output is one: add -o X.zarr, or leave resume out")
    select, point = config.select, store.resume_point()
    if point is None:
        return None
    if point.complete:
        with closing(open_source(source, replace(select, decoder="auto"))) as whole:  # for its header only
            info = whole.info
        if not _grown(source, info, store.path, point):
            return Resumption(store, point, None, info)
    _require_none_in_the_way(store, sinks)
    if point.loss is not None and not config.tolerate_truncation:
        point = store.resume_point(below=point.loss[1] + 1)
        if point is None:
            return None
    ends, below = point.frame, point.flows
    while True:
        try:
            if isinstance(select.stop, int) and select.stop <= point.frame:
                raise TooFewFramesError(f"stop ({select.stop}) leaves no frame from {point.frame} on")
            # Where no flow is kept, from ``start`` itself: frames before the store's first one may have been missing.
            onward = replace(select, start=point.frame) if point.flows else select
            rest = open_source(source, onward, device)
            return Resumption(store, point, rest, rest.info)
        except TooFewFramesError as error:  # the store has every flow but was never renamed: redo its last ones
            earlier = store.resume_point(below=below)
            if earlier is None or not (earlier.flows or (point.flows and point.complete)):
                raise ResumeMismatchError(
                    f"the store continues at frame {ends}, and the source, from start to stop, does not reach as far: "
                    "run it as before, or start afresh with --overwrite"
                ) from error
            point, below = earlier, earlier.flows // 2 + 1  # far too many: each look is at all the shards before


def _require_none_in_the_way(store: Sink, sinks: Sequence[Sink]) -> None:
    """Raises OutputExistsError for another output that is there though the store was never finished.

    It would be replaced at the end, and is hardly of the run that is resumed: that one names the store first, or last
    if it was to overwrite what is there (then it may be, and nothing tells whose it is).
    """
    there = [] if is_finished(store, 0) else [file for sink in sinks for file in named_files(sink)]
    if there:
        raise OutputExistsError(
            f"{there[0]} is already there, though {store.path} is unfinished: remove it, or choose another name"
        )


def _grown(source: PathLike, info: FlowInfo, path: str, point: ResumePoint) -> bool:
    """Whether the source has grown since the store was finished. One that comes only once counts as unchanged.

    Too few flows alone are no sign of it: frames that were missing then may have been accepted. Nor need there be more
    flows now where something was accepted: the last frame may have been cut.
    """
    if comes_once(source) or info.flow_count is None:
        return False
    recorded = open_store(path).attrs
    if info.flow_count <= point.stored and not recorded.get("source_losses"):
        return False
    return bool((recorded.get("source") or {}).get("size_bytes") != info.source.size_bytes)


def complete_already(resumed: Resumption, paths: list[str], config: RunConfig) -> RunReport:
    """The report of a run whose store is complete already; missing other outputs are exported from that store.

    Loads no network and decodes nothing, so that a complete store is recognised at once. Raises WeightsError, and
    ResumeMismatchError unless a run of the source with these settings would have written that store.
    """
    store, info = open_store(resumed.store.path), resumed.source_info
    differing = differing_settings(store.attrs, settings(config, info.source, read_weights(config.model.weights)))
    height, width = Fit(config.model.fit, info.height, info.width).flow_size
    if (height, width) != store.shape[2:]:
        differing.append(f"flow was {store.shape[3]}x{store.shape[2]}, is {width}x{height}")
    if differing:
        raise ResumeMismatchError(
            f"{store.path} is complete, but differs from what is asked for: {'; '.join(differing)}. Run it as before, "
            "choose another name, or start afresh with --overwrite"
        )
    return with_others(report_of_complete(store), resumed, paths, config)


def unname_others(resumed: Resumption, paths: list[str], config: RunConfig) -> None:
    """Gives the other outputs their unfinished names again, as ``with_others`` makes them anew."""
    for path in paths:
        if path != resumed.store.path:
            unname(open_sink(path, config.sink))


def with_others(report: RunReport, resumed: Resumption, paths: list[str], config: RunConfig) -> RunReport:
    """Makes those of the other outputs that are missing from the complete store: other stores are copies of it."""
    outputs, notes = list(report.outputs), list(report.notes)
    if resumed.frames is not None and resumed.point.flows:
        notes.append(f"continued after {counted(resumed.point.flows, 'flow')} of an earlier run")
    for path in paths:
        if path == resumed.store.path:
            continue
        sink = open_sink(path, config.sink)
        if is_finished(sink, report.flows):
            notes.append(
                f"{path} exists already and is kept, though its settings may differ: to remake it, remove it first"
            )
            continue
        # What is left of an unfinished single output is replaced. Of many files, nobody can tell whose they are, unless
        # a run was killed while it named them.
        if (one_each := isinstance(sink, OneFileAFlow)) and sink.holds(report.flows, or_unfinished=True):
            unname(sink)
        flows = open_flows(resumed.store.path)
        flo_bytes = report.flows * flows.info.flo_bytes
        if isinstance(sink, Resumable):  # all stores of a run are the same, also in resolution and in what they record
            outputs.append(OutputReport(path, sink.copy(resumed.store.path), flo_bytes=flo_bytes))
            notes.append(f"{path} was copied from {resumed.store.path}")
            continue
        replacing = replace(config.sink, overwrite=not one_each, resume=False)
        try:
            outputs += write_flows(flows, [path], replace(config, sink=replacing)).outputs
        except OutputExistsError as error:
            raise OutputExistsError(
                f"{path}: what is there is not the {counted(report.flows, 'flow')} of {resumed.store.path}: remove it, "
                "or choose another place"
            ) from error
        bound = config.sink.max_error
        within = f", whose flow is within {bound:g} px of what was computed" if bound else ""
        notes.append(f"{path} was made from the store{within}")
    written = sum(output.bytes_written for output in outputs)
    return replace(report, outputs=tuple(outputs), bytes_written=written, notes=tuple(notes))
