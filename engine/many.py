"""Many sources, one network: each source has its own outputs, finished ones are skipped, failures are collected.

A manifest beside the outputs always records the current state. It is replaced atomically when a source's outputs have
been opened and again when the source ends; in between it says interrupted, so that it is still true of a killed run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from flowreel.engine.api import output_names, run_one
from flowreel.engine.config import DEFAULT_OUTPUT, ModelConfig, RunConfig
from flowreel.engine.errors import FlowreelError, ResumeMismatchError, SomeSourcesFailedError, UsageError
from flowreel.engine.files import PathLike, as_names
from flowreel.engine.inference import Network, load_network
from flowreel.engine.manifest import MANIFEST, Job, Ledger, SourceReport
from flowreel.engine.models import model_name
from flowreel.engine.models.weights import Weights, read_weights
from flowreel.engine.options import RunOptions
from flowreel.engine.outputs import Progress
from flowreel.engine.places import require_not_among
from flowreel.engine.protocols import Resumable, Sink
from flowreel.engine.provenance import settings, settings_of_others
from flowreel.engine.sources import image_folders, source_identity, source_stem
from flowreel.engine.sources.kinds import IMAGE_SUFFIXES, as_weights
from flowreel.sinks import differing_settings, open_sink, open_store


@dataclass(frozen=True)
class ManyReport:
    """What a run over many sources did."""

    sources: tuple[SourceReport, ...]  # in the order they were given
    manifest: str  # path of the manifest, which records the same
    seconds: float

    @property
    def failed(self) -> tuple[SourceReport, ...]:
        """The sources that failed, each with its ``error``."""
        return tuple(report for report in self.sources if report.status == "failed")

    def raise_if_failed(self) -> None:
        """Raises SomeSourcesFailedError naming how many failed, the first one and the manifest; only if any failed."""
        if self.failed:
            first = self.failed[0]
            raise SomeSourcesFailedError(
                f"{len(self.failed)} of {len(self.sources)} sources failed, the first {first.source}: {first.error}; "
                f"{self.manifest} lists each; the same command again skips what is done"
            ) from first.error

    def as_json(self) -> dict[str, object]:
        """The report as plain values, for a file; a source computed now has its RunReport under ``run``."""
        sources = [report.as_json() | {"run": report.run and report.run.as_json()} for report in self.sources]
        return {"seconds": self.seconds, "manifest": self.manifest, "sources": sources}


@dataclass(frozen=True)
class ManyProgress:
    """How far a run over many sources has come."""

    source: str
    number: int  # of this source, counted from 1
    count: int  # of all sources
    failed: int  # sources so far
    run: Progress | None  # of this source; None: it is only starting


def run_many(
    sources: PathLike | Iterable[PathLike],
    outputs: PathLike | Iterable[PathLike] | None = None,
    *,
    progress: Callable[[ManyProgress], None] | None = None,
    manifest: PathLike | None = None,
    **options: Unpack[RunOptions],
) -> ManyReport:
    """Computes the flow of many sources with one network, one source after another.

    A source whose outputs all exist is skipped; where some are missing, only those are made. Existing outputs must
    come from that source and these settings, as recorded by a store itself and by the manifest for other outputs;
    otherwise the source fails with ResumeMismatchError, or with OutputExistsError where nothing is recorded. Outputs
    left unfinished by an earlier run with the same manifest are made anew. ``overwrite`` makes everything anew.

    Args:
        sources: each as ``source`` of ``flowreel.run``; a single one is allowed.
        outputs: as for ``flowreel.run``; with more than one source each must contain ``{stem}``, which stands for the
            source's name without folder and suffix.
        progress: called a few times a second with a ``ManyProgress``, and once as each source starts.
        manifest: where to record the outcome of each source, as JSON. None: ``flowreel-manifest.json`` in the folder
            of the first output, or in the nearest folder above it whose path is free of ``{stem}``.
        **options: as for ``flowreel.run``.

    Returns:
        The outcome of each source. A source that fails is reported there and not raised: see ``raise_if_failed``.

    Raises:
        UsageError, UnknownOutputError: before anything is written; also when two sources have the same stem, or an
            output is another source.
        WeightsError: before the first source that has finished outputs or something left to compute.
        DeviceError: before the first source that has something left to compute.
        OutputExistsError, OutputWriteError, OutputBusyError: the manifest's path is taken by something else, it cannot
            be written, or another run is writing it.
        KeyboardInterrupt: after the current source was stopped, which the manifest records.
    """
    began_s = time.perf_counter()
    config = RunConfig.of(**options)
    templates = as_names(DEFAULT_OUTPUT if outputs is None else outputs)
    jobs = _jobs(as_names(sources), templates)
    for path in (path for job in jobs for path in job.outputs):
        open_sink(path, config.sink)  # writes nothing yet, but rejects an impossible name at once
    with closing(Ledger(manifest_path(manifest, templates), jobs)) as ledger:
        _run_each(jobs, config, ledger, progress)
        ledger.write(ended=True)
        return ManyReport(tuple(ledger.reports), str(ledger.path), time.perf_counter() - began_s)


def _run_each(
    jobs: list[Job], config: RunConfig, ledger: Ledger, progress: Callable[[ManyProgress], None] | None
) -> None:
    network: Network | None = None
    weights: Weights | None = None
    for number, job in enumerate(jobs, 1):
        missing = list(job.outputs)
        if not config.sink.overwrite and (there := ledger.finished(job, config.sink)):
            weights = weights or (_held(config.model) if network is None else network.weights)
            try:
                missing = _missing(job, there, ledger, config, weights)
            except FlowreelError as error:
                began = ledger.left_unfinished(job)
                ledger.note(SourceReport(job.source, "failed", job.outputs, began=began, error=error))
                continue
        if not missing:
            ledger.note(SourceReport(job.source, "skipped", job.outputs, ledger.flows_before(job)))
            continue
        network = network or load_network(config.model)

        def tell(run: Progress | None, number: int = number, source: str = job.source) -> None:
            if progress is not None:
                progress(ManyProgress(source, number, len(jobs), ledger.failed, run))

        tell(None)
        ours = ledger.left_unfinished(job) and not config.sink.resume
        again = replace(config, sink=replace(config.sink, overwrite=True)) if ours else config
        _attempt(job, missing, again, network, ledger, tell)


def _jobs(sources: list[str], templates: list[str]) -> list[Job]:
    """Each source with its outputs' names.

    Raises UsageError when two sources would share an output, or one's output would replace another source or lie among
    its images.
    """
    if not sources:
        raise UsageError("give at least one source")
    by_stem: dict[str, str] = {}
    for source in sources:
        stem = source_stem(source)
        if stem in by_stem:
            raise UsageError(_alike(by_stem[stem], source, stem))
        by_stem[stem] = source
    if len(sources) > 1:
        for template in templates:
            if "{stem}" not in template:
                hint = next(filter(None, map(as_weights, sources)), "")
                raise UsageError(
                    f"with {len(sources)} sources each output's name must hold {{stem}}, which stands for the "
                    f"source's: got {template!r}, expected something like 'out/{{stem}}.zarr'{hint and '; ' + hint}"
                )
    jobs = [Job(source, tuple(output_names(templates, source))) for source in sources]
    taken = {os.path.realpath(source): "a source" for source in sources}
    folders = {os.path.realpath(folder) for source in sources for folder in image_folders(source) or ()}
    for job in jobs:
        for path in job.outputs:
            require_not_among(path, folders)
            place = os.path.realpath(path)
            if place in taken:
                raise UsageError(f"{path}, an output of {job.source}, is {taken[place]}, too: choose other names")
            taken[place] = f"one of {job.source}"
    return jobs


def _alike(one: str, other: str, stem: str) -> str:
    """What to say of two sources whose outputs would have the same names. Images go by the name of their folder."""
    if all(os.path.isfile(source) and Path(source).suffix.lower() in IMAGE_SUFFIXES for source in (one, other)):
        return (
            f"{one} and {other} are two images, not two sources: to take images as one sequence, name their folder, or "
            "put the glob in quotes"
        )
    return f"{one} and {other} both go by the name {stem!r}, so their outputs would meet: rename one, or run them apart"


def _held(config: ModelConfig) -> Weights:
    """The weights without their tensors. Raises WeightsError; UsageError for an unknown model."""
    if config.model is not None:
        model_name(config.model)
    return replace(read_weights(config.weights), state={})


def _missing(job: Job, there: list[Sink], ledger: Ledger, config: RunConfig, weights: Weights) -> list[str]:
    """The outputs that are left to make; ``there`` are the finished ones.

    Raises ResumeMismatchError when one of them has other settings or another source, or, without ``resume``, when the
    source's size has changed since.
    """
    source = source_identity(job.source)
    stored = settings(config, source, weights)
    grown = False
    for sink in there:
        is_store = isinstance(sink, Resumable)
        was = open_store(sink.path).attrs if is_store else ledger.made(sink.path)
        differing = differing_settings(was, stored if is_store else settings_of_others(stored, config, sink.path))
        if differing:
            raise ResumeMismatchError(
                f"{sink.path} exists, but differs from what is asked for: {'; '.join(differing)}. Choose another name, "
                "or remake it with --overwrite"
            )
        before = (was.get("source") or {}).get("size_bytes")
        if None not in (before, source.size_bytes) and before != source.size_bytes:
            if not config.sink.resume:
                raise ResumeMismatchError(
                    f"{sink.path} exists, but {source.name} had {before} bytes then and has {source.size_bytes}: "
                    "continue a store with --resume, or remake it with --overwrite"
                )
            grown = True
    paths = {sink.path for sink in there}
    missing = [path for path in job.outputs if path not in paths]
    # A resumed run needs the store's name too: it makes the other outputs from it.
    return list(job.outputs) if config.sink.resume and (missing or grown) else missing


def _attempt(
    job: Job,
    missing: list[str],
    config: RunConfig,
    network: Network,
    ledger: Ledger,
    tell: Callable[[Progress | None], None],
) -> None:
    """Runs one source and records the outcome. Only Ctrl-C and errors that are not FlowreelError (bugs) propagate."""
    began_s = time.perf_counter()
    # The status until the outcome is known. Outputs an earlier run began stay ours even if this one opens none.
    report = SourceReport(job.source, "interrupted", job.outputs, began=ledger.left_unfinished(job))

    def follow(run: Progress) -> None:
        nonlocal report
        if not ledger.has(job):  # the first call: the outputs have just been opened
            report = replace(report, began=True)
            ledger.note(report)
        tell(run)

    try:
        stored = settings(config, source_identity(job.source), network.weights)  # of the source before the run
        run = run_one(job.source, missing, config, lambda: network, follow)
        chosen = {"batch": run.batch, "precision": run.precision, "flows": run.flows}
        ledger.remember({path: settings_of_others(stored, config, path) | chosen for path in missing})
        report = replace(report, status="done", flows=run.flows, run=run)
    except Exception as error:
        report = replace(report, status="failed", error=error)
        if not isinstance(error, FlowreelError):
            raise
        _forget_traceback(error)
    finally:
        ledger.note(replace(report, seconds=time.perf_counter() - began_s))


def _forget_traceback(error: BaseException | None) -> None:
    """Drops the tracebacks, which would keep alive pictures, sinks and the whole chain of every failed source."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def manifest_path(manifest: PathLike | None, templates: list[str]) -> Path:
    """Where the manifest is: what is given, or by default beside the outputs."""
    if manifest is not None:
        return Path(manifest)
    folder = Path(templates[0]).parent
    while "{stem}" in str(folder):
        folder = folder.parent
    return folder / MANIFEST
