"""The whole chain, written once: frames -> pairs -> batches -> flow -> restored flow -> outputs.

run()     computes the flow of a source and writes the outputs; ``engine/many.py`` does the same for many sources
stream()  yields the same flow, batch by batch, to the caller's own loop
``engine/lazy.py`` uses the same stages to compute flow by index: ``flowreel.open``
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Unpack

from flowreel.engine.config import DEFAULT_OUTPUT, Direction, QueueConfig, RunConfig
from flowreel.engine.data import FlowBatch, FlowInfo, Frame
from flowreel.engine.device import Streams, download, resolve_device, upload
from flowreel.engine.errors import StageError, TooFewFramesError, TruncatedSourceError, UsageError
from flowreel.engine.files import PathLike
from flowreel.engine.forked import OfOneProcess, limit_threads_of_fork
from flowreel.engine.inference import Inference, Network, load_network
from flowreel.engine.options import RunOptions
from flowreel.engine.outputs import ProgressHook, Tally, commit_in_order, named_outputs, opened_sinks, preparing, teller
from flowreel.engine.pairing import batches, pairs
from flowreel.engine.pipeline import Pipeline
from flowreel.engine.places import require_harmless
from flowreel.engine.protocols import MayWait, OnDevice, Resumable, Sink
from flowreel.engine.provenance import selection
from flowreel.engine.restore import restore
from flowreel.engine.resume import complete_already, take_up, unname_others, with_others
from flowreel.engine.run_report import RunReport, report_of
from flowreel.engine.sources import lasting_name, open_source, source_stem
from flowreel.engine.sources.kinds import STDIN
from flowreel.engine.stages import Stage, StageFunction, joined
from flowreel.sinks import open_sink, without_effect

if TYPE_CHECKING:
    import torch


def run(
    source: PathLike,
    outputs: PathLike | Iterable[PathLike] | None = None,
    *,
    progress: ProgressHook | None = None,
    **options: Unpack[RunOptions],
) -> RunReport:
    """Computes the optical flow of a source and writes it to one or several outputs.

    Args:
        source: a video file, a folder or glob of images, ``synthetic:NAME``, or ``-``: YUV4MPEG2 on stdin.
        outputs: one or several paths; the format follows from each name (``X.zarr``, ``X.mp4``, ``DIR/%06d.flo``, ...),
            in which ``{stem}`` stands for the source's name. None: ``{stem}.flow.zarr`` in the working folder. Missing
            folders are created.
        progress: called with a ``Progress`` once the outputs are open, and then a few times a second.
        **options: those of ``flowreel run``, by the same names: ``model``, ``weights``, ``device``, ``decoder``,
            ``batch``, ``precision``, ``fit``, ``start``, ``stop``, ``step``, ``stream``, ``direction``,
            ``max_error``, ``codec``, ``resolution``, ``max_flow``, ``encoder``, ``bound``, ``resume``, ``overwrite``,
            ``tolerate_truncation``, ``queue_mb``.

    Returns:
        What was done, how fast, and how large the result is.

    Raises:
        UsageError: options that contradict each other.
        SourceError, WeightsError, DeviceError, OutputError: before the first frame is decoded.
        StageError: a stage failed; its ``__cause__`` is the original error. Nothing half-written looks finished.
        TruncatedSourceError: the source yielded less than it promised; the flow of what it did yield is kept under an
            unfinished name.
    """
    config = RunConfig.of(**options)
    return run_one(source, output_names(outputs, source), config, lambda: load_network(config.model), progress)


def run_one(
    source: PathLike,
    paths: list[str],
    config: RunConfig,
    network: Callable[[], Network],
    progress: ProgressHook | None = None,
) -> RunReport:
    """``run`` with everything settled except the network: ``network`` is called once the source is open."""
    began_s = time.perf_counter()
    sinks = [open_sink(path, config.sink) for path in paths]
    native = _wants_native(config, sinks)
    device = str(resolve_device(config.model.device))
    resumed = take_up(source, config, sinks, device) if config.sink.resume else None
    if resumed is not None and resumed.frames is None:
        return complete_already(resumed, paths, config)
    with ExitStack() as opened:
        rest = resumed and resumed.frames
        frames = opened.enter_context(closing(rest or open_source(source, config.select, device)))
        recorded = None if resumed is None else resumed.point.batch
        inference = network().fitted(frames.info.height, frames.info.width, native=native, recorded_batch=recorded)
        header = flow_header(frames.info if resumed is None else resumed.info, inference, config)
        if resumed is not None:
            header = replace(header, shard=resumed.point.shard)
            resumed.store.require_same(header)
            sinks = [resumed.store]  # the other outputs are exported from it once it is complete
        opened.enter_context(opened_sinks(sinks, header, resumes=True))
        to_host = all(preparing(sink) is None for sink in sinks)  # otherwise each output downloads what it needs itself
        shard = header.shard_length(config.sink.shard_bytes)
        done, checked = (0, None) if resumed is None else (resumed.point.flows, resumed.checked)
        batched = batches(inference.batch, shard, done)
        steps = stages(inference, config.model.direction, batched, checked, to_host=to_host)
        pipeline = Chain(frames, steps, config.queues, inference.device)
        tallies = [Tally(sink, frames, on_gpu=inference.device.type == "cuda") for sink in sinks]
        teller(progress, tallies, header.flow_count)(pipeline.statistics())  # the outputs are open
        inference.make_ready(shard, header.flow_count, done)
        started_s = time.perf_counter()
        tell = teller(progress, tallies, header.flow_count)
        try:
            pipeline.run({f"write {tally.sink.path}": tally.consume for tally in tallies}, tell)
        except StageError as error:
            # Of the frames after the flow that is kept, damage may have left too few for another one.
            if not (done and frames.losses and isinstance(error.__cause__, TooFewFramesError)):
                raise
        if tallies[0].flows == 0 and not done:
            raise TooFewFramesError(f"{_named(source)} gave fewer than two frames: there is no pair, so no flow")
        if resumed is not None:
            frames.losses[:0] = resumed.losses
        whole = not frames.losses or config.tolerate_truncation
        if resumed is not None and whole:
            unname_others(resumed, paths, config)
        commit_in_order(sinks, frames.losses, complete=whole, replaces=config.sink.overwrite)
        ended_s = time.perf_counter()
        if not whole:
            raise TruncatedSourceError(
                f"{_named(source)}: {'; '.join(frames.losses)}. What decoded is kept, marked as unfinished, beside "
                f"{', '.join(sink.path for sink in sinks)}; pass --tolerate-truncation to take it as the whole"
            )
        report = report_of(frames, inference, header, tallies, pipeline, (began_s, started_s, ended_s))
        report = replace(report, notes=(*report.notes, *without_effect(paths, config.sink)))
    if resumed is None:
        return report
    report = replace(report, flows=resumed.point.flows + report.pairs)
    return with_others(report, resumed, paths, config)


def stream(source: PathLike, **options: Unpack[RunOptions]) -> Iterator[FlowBatch]:
    """Yields the optical flow of a source in order, batch by batch, computing on demand and a little ahead.

    Args:
        source, **options: as in ``run``.

    Yields:
        FlowBatch: ``flow`` (N, 2, H, W) float32 pixels on the model's device, an ordinary tensor that can take part
        in training; ``frame``, ``frame_to`` (N,) int64; ``timestamp_s``, ``timestamp_to_s`` (N,) float64.

    Leaving the loop early stops everything. The call itself raises what ``run`` raises before the first frame; the
    loop raises StageError, and TruncatedSourceError after the last batch that could be computed.
    """
    config = RunConfig.of(**options)
    refuse_output_options(config)
    with ExitStack() as opened:
        device = str(resolve_device(config.model.device))
        frames = opened.enter_context(closing(open_source(lasting_name(source), config.select, device)))
        inference = load_network(config.model).fitted(frames.info.height, frames.info.width)
        header = flow_header(frames.info, inference, config)
        inference.make_ready(header.shard_length(config.sink.shard_bytes), header.flow_count)
        closer = opened.pop_all()

    def flows() -> Generator[FlowBatch, None, None]:
        limit_threads_of_fork()  # which may have inherited the stream
        with closer:
            batched = batches(inference.batch, header.shard_length(config.sink.shard_bytes))
            steps = stages(inference, config.model.direction, batched, to_host=False)
            with closing(Chain(frames, steps, config.queues, inference.device).flows()) as results:
                yield from results
            if frames.losses and not config.tolerate_truncation:
                raise TruncatedSourceError(f"{_named(source)}: {'; '.join(frames.losses)}")

    return OfOneProcess(flows())


def refuse_output_options(config: RunConfig) -> None:
    """Raises UsageError for options that ask something of outputs, where flow goes to the caller instead."""
    if asked := [name for name in ("resume", "overwrite") if getattr(config.sink, name)]:
        raise UsageError(f"{asked[0]} is for runs that write an output to their end")
    if config.sink.resolution != "full":
        raise UsageError("resolution native is for flow stores: flow that goes to the caller has full resolution")


def stages(
    inference: Inference,
    direction: Direction,
    batched: StageFunction,
    checked: StageFunction | None = None,
    *,
    to_host: bool,
) -> list[Stage]:
    """The chain itself, left to right: frames to flow in pixels of the source frame.

    On a GPU the chain also uploads each frame once, downloads the flow, and lets short steps share a thread.

    Args:
        batched: stage that gathers pairs into batches.
        checked: stage that checks the frames as they pass.
        to_host: download the flow in the chain; not when anything else, an output or the caller, takes it on the GPU.
    """
    by_frame = [
        *([Stage("resume", checked)] if checked is not None else []),
        Stage("pairs", partial(pairs, direction=direction)),
        Stage("batches", batched),
    ]
    restored = restore(inference.fit)
    if inference.device.type != "cuda":
        return [*by_frame, Stage("model", inference.stage), Stage("restore", restored)]
    return [
        Stage("batches", joined(Stage("upload", upload(inference.device)), *by_frame)),
        Stage("model", joined(Stage("model", inference.stage), Stage("restore", restored))),
        *([Stage("download", download)] if to_host else []),
    ]


class Chain(Pipeline):
    """A pipeline of these stages. On a GPU each stage has its own CUDA stream (``engine/device.py``).

    Stopping it also interrupts a source that may be waiting for input that never arrives.
    """

    def __init__(
        self, source: Iterable[Frame], stages: Sequence[Stage], queues: QueueConfig, device: torch.device
    ) -> None:
        self._streams = Streams(device)
        self._source = source
        if isinstance(source, OnDevice) and source.on_device:
            # The per-frame stages share the decoder's thread: handing on each frame would cost more than their work.
            by_frame, *stages = stages
            source = joined(Stage("decode", lambda _: iter(self._source)), by_frame)(iter(()))
        super().__init__("decode", source, stages, queues, self._streams.on_stream)

    def flows(self) -> Generator[FlowBatch, None, None]:
        """The items of ``stream``, each ready on the CUDA stream that is current in the consumer when it takes it."""
        with closing(self.stream()) as results:
            yield from self._streams.handed_over(results)

    def stop(self) -> None:
        super().stop()  # first, so that the interrupted source does not look like one that ended normally
        if isinstance(self._source, MayWait):
            self._source.interrupt()


def flow_header(info: FlowInfo, inference: Inference, config: RunConfig) -> FlowInfo:
    """The header that the sinks are opened with: the size of the flow, and how it is made."""
    height, width = inference.fit.flow_size
    return replace(
        info,
        height=height,
        width=width,
        made_by=dict(info.made_by) | inference.made_by() | selection(config),
        native=inference.grid,
        device=str(inference.device),
        batch=inference.batch,
    )


def _wants_native(config: RunConfig, sinks: list[Sink]) -> bool:
    """Whether stores should keep the network's native prediction. Raises UsageError when no output is a store."""
    if config.sink.resolution == "full":
        return False
    if not any(isinstance(sink, Resumable) for sink in sinks):
        raise UsageError("resolution native is for flow stores, and no output is one: add -o X.zarr")
    return True


def output_names(outputs: PathLike | Iterable[PathLike] | None, source: PathLike) -> list[str]:
    """The paths of a source's outputs. Raises UsageError for none, for two that collide, or for the source itself."""
    paths = named_outputs(DEFAULT_OUTPUT if outputs is None else outputs, source_stem(source))
    for path in paths:
        require_harmless(path, source)
    return paths


def _named(source: PathLike) -> str:
    """The source's name in messages."""
    return "stdin" if os.fspath(source) == STDIN else os.fspath(source)
