"""Exports stored flow to other outputs: a store, a slice of one, or flow files, streamed through the pipeline.

read ──▢▢▢▢──┬──▢▢▢▢──> write        with the channels and the guarantees of a run
             └──▢▢▢▢──> write
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Unpack

from flowreel.engine.config import RunConfig, SinkConfig
from flowreel.engine.errors import UsageError
from flowreel.engine.files import PathLike
from flowreel.engine.options import ExportOptions
from flowreel.engine.outputs import (
    OutputReport,
    ProgressHook,
    Report,
    Tally,
    commit,
    named_outputs,
    opened_sinks,
    output_report,
    teller,
)
from flowreel.engine.pipeline import Pipeline
from flowreel.engine.protocols import FlowReader
from flowreel.engine.stages import StageStatistics
from flowreel.sinks import open_flows, open_sink, without_effect


@dataclass(frozen=True)
class ExportReport(Report):
    """What an export did; ``--stats`` writes it as JSON."""

    flows: int
    seconds: float  # from the first flow asked for to the last output published
    flows_per_s: float
    bytes_written: int  # of all outputs
    flo_bytes: int  # what the same flow takes as .flo files
    width: int  # pixels
    height: int
    source: str
    outputs: tuple[OutputReport, ...]
    stages: tuple[StageStatistics, ...]
    notes: tuple[str, ...] = ()


def export(
    source: PathLike | Iterable[PathLike],
    outputs: PathLike | Iterable[PathLike],
    *,
    progress: ProgressHook | None = None,
    start: int | None = None,
    stop: int | None = None,
    frame_rate: Fraction | float | str | None = None,
    **options: Unpack[ExportOptions],
) -> ExportReport:
    """Writes stored flow to one or several other outputs.

    Args:
        source: a store, finished or not; a slice of one, ``X.zarr@a:b``; a folder, glob or list of flow files, or
            a single one (``.flo``, ``.kitti.png``, ``.npz``, two-stream pictures). Files are taken in natural order,
            2.flo before 10.flo, in whatever order they are given.
        outputs: where to; the kind follows from each name, as for ``run``. ``{stem}`` stands for the source's name.
        progress: called a few times a second with a ``Progress``.
        start, stop: which flows, by number, as in a Python slice.
        frame_rate: of flow files without times, frames per second. None: 25.
        **options: ``codec``, ``max_error``, ``max_flow``, ``encoder``, ``bound``, ``overwrite``, ``queue_mb`` as for
            ``run``.

    Returns:
        What was done and how large it is. Its notes state the error that the stored flow had before: a lossless copy
        of a lossy store keeps that error.

    Raises:
        UsageError: impossible options, or an output that would destroy what is being read.
        SourceError, FlowFileError, StoreError, OutputError: before the first flow is read.
        StageError: reading or writing failed on the way; nothing half-written looks finished.
    """
    config = export_config(options)
    flows = open_flows(source, frame_rate=frame_rate, bound=config.sink.bound, start=start, stop=stop)
    paths = named_outputs(outputs, flows.stem or flows.info.source.name)
    for path in paths:
        if flows.reads(path):
            raise UsageError(f"{path} would replace what is being read: choose another output")
    report = write_flows(flows, paths, config, progress)
    return replace(report, notes=tuple(_notes(flows, paths, config.sink, frame_rate)))


def write_flows(
    flows: FlowReader, paths: Sequence[str], config: RunConfig, progress: ProgressHook | None = None
) -> ExportReport:
    """Writes stored flow to these outputs, whose names are settled: the report is without notes."""
    sinks = [open_sink(path, config.sink) for path in paths]
    with opened_sinks(sinks, flows.info):
        tallies = [Tally(sink) for sink in sinks]
        pipeline = Pipeline("read", flows, (), config.queues)
        started_s = time.perf_counter()
        pipeline.run(
            {f"write {tally.sink.path}": tally.consume for tally in tallies},
            teller(progress, tallies, flows.info.flow_count),
        )
        for sink in sinks:
            commit(sink)
        seconds = time.perf_counter() - started_s
        flo_bytes = tallies[0].flows * flows.info.flo_bytes
        return ExportReport(
            flows=tallies[0].flows,
            seconds=seconds,
            flows_per_s=tallies[0].flows / seconds,
            bytes_written=sum(sink.bytes_written for sink in sinks),
            flo_bytes=flo_bytes,
            width=flows.info.width,
            height=flows.info.height,
            source=flows.info.source.name,
            outputs=tuple(output_report(sink, flo_bytes) for sink in sinks),
            stages=pipeline.statistics(),
        )


def export_config(options: Mapping[str, Any]) -> RunConfig:
    """The settings of the outputs and queues. Raises UsageError for options that concern only computing flow."""
    if unknown := sorted(set(options) - ExportOptions.__optional_keys__):
        raise UsageError(f"unknown option {', '.join(unknown)}: flow that is stored is not computed again")
    return RunConfig.of(**options)


def _notes(flows: FlowReader, paths: list[str], config: SinkConfig, frame_rate: object) -> Iterator[str]:
    yield from flows.notes
    error = flows.info.made_by.get("earlier_max_error")
    if isinstance(error, float):
        yield f"the flow was stored within {error:g} px of what had been computed; every output carries that error too"
    if flows.has_times and frame_rate is not None:
        yield "what is read keeps its own times: the frame rate that was given does not apply"
    # For files the bound is not reported as without effect: two-stream pictures are read with it.
    yield from without_effect(paths, config if flows.has_times else replace(config, bound=SinkConfig.bound))
