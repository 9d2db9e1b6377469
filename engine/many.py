"""Many sources, one network: each source to outputs of its own, what is done already skipped, failures collected.

A manifest beside the outputs tells at every moment how far it is. It is replaced as a whole when a source's outputs
have been opened and when it has ended; between the two it says interrupted, so that a killed process leaves the truth.
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
from flowreel.engine.config import ModelConfig, RunConfig
from flowreel.engine.errors import FlowreelError, ResumeMismatchError, SomeSourcesFailedError, UsageError
from flowreel.engine.files import PathLike
from flowreel.engine.inference import Network, load_network
from flowreel.engine.manifest import MANIFEST, Job, Ledger, SourceReport
from flowreel.engine.models import model_name
from flowreel.engine.models.weights import Weights, read_weights
from flowreel.engine.options import RunOptions
from flowreel.engine.outputs import Progress
from flowreel.engine.protocols import Resumable, Sink
from flowreel.engine.provenance import settings, settings_of_others
from flowreel.engine.sources import source_identity, source_stem
from flowreel.engine.sources.kinds import IMAGE_SUFFIXES
from flowreel.sinks import differing_settings, open_sink, open_store


@dataclass(frozen=True)
class ManyReport:
    """What a run over many sources did."""

    sources: tuple[SourceReport, ...]  # in the order they were given
    manifest: str  # path of the file that says the same
    seconds: float

    @property
    def failed(self) -> tuple[SourceReport, ...]:
        return tuple(report for report in self.sources if report.status == "failed")

    def raise_if_failed(self) -> None:
        """Raises SomeSourcesFailedError naming how many, the first of them and the manifest; nothing if none did."""
        if self.failed:
            first = self.failed[0]
            raise SomeSourcesFailedError(
                f"{len(self.failed)} of {len(self.sources)} sources failed, the first {first.source}: {first.error}; "
                f"{self.manifest} tells of each, and the same command again leaves out what is done"
            ) from first.error

    def as_json(self) -> dict[str, object]:
        """The report as plain values, for a file; a source that was done has its RunReport under ``run``."""
        runs = [report.run and report.run.as_json() for report in self.sources]
        sources = [report.as_json() | {"run": run} for report, run in zip(self.sources, runs, strict=True)]
        return {"seconds": self.seconds, "manifest": self.manifest, "sources": sources}


@dataclass(frozen=True)
class ManyProgress:
    """What a run over many sources tells while it is under way."""

    source: str
    number: int  # of this source among all, from 1
    count: int  # sources given
    failed: int  # so far
    run: Progress | None  # of this source; None: it has only begun


def run_many(
    sources: PathLike | Iterable[PathLike],
    outputs: PathLike | Iterable[PathLike] | None = None,
    *,
    progress: Callable[[ManyProgress], None] | None = None,
    manifest: PathLike | None = None,
    **options: Unpack[RunOptions],
) -> ManyReport:
    """Computes the flow of many sources with one network, one source after another.

    A source whose outputs are all there is skipped; where some are missing, only those are made. What is there must be
    of that source and made with these settings, as stores tell themselves and the manifest tells of other outputs;
    else the source fails with ResumeMismatchError, or OutputExistsError where nothing is known. What a source left
    unfinished in an earlier run with the same manifest is made anew. ``overwrite`` makes everything anew.

    Args:
        sources: each as ``source`` of ``flowreel.run``; one alone will do.
        outputs: as of ``flowreel.run``; with more than one source each must contain ``{stem}``, which stands for the
            source's name without folder and ending.
        progress: called a few times a second with a ``ManyProgress``, and once as each source begins.
        manifest: where to write what became of each source, as JSON. None: ``flowreel-manifest.json`` in the folder
            of the first output, or the one above where the folder's own name holds ``{stem}``.
        **options: as of ``flowreel.run``.

    Returns:
        What became of each source. Failures of single sources are in it and are not raised: see ``raise_if_failed``.

    Raises:
        UsageError, UnknownOutputError: before anything is written; also for two sources of one name.
        WeightsError: before the first source of which something is there, or left to do; DeviceError: left to do.
        OutputExistsError, OutputWriteError, OutputBusyError: of the manifest: something else is in its place, it cannot
            be written, or another run is writing it.
        KeyboardInterrupt: after the source at work was stopped; the manifest says so.
    """
    began_s = time.perf_counter()
    config = RunConfig.of(**options)
    given = [sources] if isinstance(sources, str | os.PathLike) else sources
    jobs = _jobs([os.fspath(source) for source in given], outputs)
    for path in jobs[0].outputs:
        open_sink(path, config.sink)  # writes nothing yet: a name that no format goes by is told of at once
    with closing(Ledger(_manifest_path(manifest, outputs), jobs)) as ledger:
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


def _instead(source: str) -> str:
    """What to do where two sources meet."""
    if Path(source).suffix.lower() in IMAGE_SUFFIXES:
        return "to take images as one sequence, name their folder, or put the glob in quotes"
    return "rename one, or run them apart"


def _jobs(sources: list[str], outputs: PathLike | Iterable[PathLike] | None) -> list[Job]:
    """Each source with its outputs' names. Raises UsageError when two sources would meet in one output."""
    if not sources:
        raise UsageError("give at least one source")
    templates = _templates(outputs)
    if len(sources) > 1:
        for template in templates:
            if "{stem}" not in template:
                raise UsageError(
                    f"with {len(sources)} sources each output's name must hold {{stem}}, which stands for the "
                    f"source's: got {template!r}, expected something like 'out/{{stem}}.zarr'"
                )
    by_stem: dict[str, str] = {}
    for source in sources:
        stem = source_stem(source)
        if stem in by_stem:
            raise UsageError(
                f"{by_stem[stem]} and {source} both go by the name {stem!r}, so their outputs would meet: "
                f"{_instead(source)}"
            )
        by_stem[stem] = source
    return [Job(source, tuple(output_names(templates, source))) for source in sources]


def _templates(outputs: PathLike | Iterable[PathLike] | None) -> list[str]:
    if outputs is None:
        return ["{stem}.flow.zarr"]
    given = [outputs] if isinstance(outputs, str | os.PathLike) else outputs
    return [os.fspath(path) for path in given]


def _held(config: ModelConfig) -> Weights:
    """What is known of the weights, without their tensors. Raises WeightsError; UsageError for a model that is none."""
    if config.model is not None:
        model_name(config.model)
    return replace(read_weights(config.weights), state={})


def _missing(job: Job, there: list[Sink], ledger: Ledger, config: RunConfig, weights: Weights) -> list[str]:
    """The outputs that are left to make.

    Raises ResumeMismatchError when one that is ``there`` was made otherwise, or of another source, or of less of it.
    """
    source = source_identity(job.source)
    stored = settings(config, source, weights)
    grown = False
    for sink in there:
        is_store = isinstance(sink, Resumable)
        was = open_store(sink.path).attrs if is_store else ledger.made(sink.path)
        differing = differing_settings(was, stored if is_store else settings_of_others(stored, config))
        if differing:
            raise ResumeMismatchError(
                f"{sink.path} is there, but not what is asked for: {'; '.join(differing)}. Choose another name, or "
                "make it anew with --overwrite"
            )
        before = (was.get("source") or {}).get("size_bytes")
        if None not in (before, source.size_bytes) and before != source.size_bytes:
            if not config.sink.resume:
                raise ResumeMismatchError(
                    f"{sink.path} is there, but {source.name} had {before} bytes then and has {source.size_bytes}: go "
                    "on with a store with --resume, or make it anew with --overwrite"
                )
            grown = True
    paths = {sink.path for sink in there}
    missing = [path for path in job.outputs if path not in paths]
    return list(job.outputs) if config.sink.resume and (missing or grown) else missing  # others are made of the store


def _attempt(
    job: Job,
    missing: list[str],
    config: RunConfig,
    network: Network,
    ledger: Ledger,
    tell: Callable[[Progress | None], None],
) -> None:
    """Runs one source and records what became of it. Only what is nobody's fault but ours, and Ctrl-C, get out."""
    began_s = time.perf_counter()
    # Until something better is known. What an earlier run began stays ours, whether or not this one gets as far.
    report = SourceReport(job.source, "interrupted", job.outputs, began=ledger.left_unfinished(job))

    def follow(run: Progress) -> None:
        nonlocal report
        if not ledger.has(job):  # this is the first call: the outputs have just been opened
            report = replace(report, began=True)
            ledger.note(report)
        tell(run)

    try:
        stored = settings(config, source_identity(job.source), network.weights)  # of the source as it is now
        run = run_one(job.source, missing, config, lambda: network, follow)
        chosen = {"batch": run.batch, "precision": run.precision, "flows": run.flows}
        ledger.remember(missing, settings_of_others(stored, config) | chosen)
        report = replace(report, status="done", flows=run.flows, run=run)
    except Exception as error:
        report = replace(report, status="failed", error=error)
        if not isinstance(error, FlowreelError):
            raise
        _forget_traceback(error)
    finally:
        ledger.note(replace(report, seconds=time.perf_counter() - began_s))


def _forget_traceback(error: BaseException | None) -> None:
    """A traceback keeps alive whatever its frames held: pictures, sinks, the whole chain, for each failed source."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _manifest_path(manifest: PathLike | None, outputs: PathLike | Iterable[PathLike] | None) -> Path:
    if manifest is not None:
        return Path(manifest)
    folder = Path(_templates(outputs)[0]).parent
    while "{stem}" in str(folder):
        folder = folder.parent
    return folder / MANIFEST
