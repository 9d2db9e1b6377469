"""The chain of a run, optionally without one end, and its speed once the pipeline is full."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Sample
from flowreel.engine.api import Chain, flow_header, stages
from flowreel.engine.config import RunConfig
from flowreel.engine.data import FlowBatch, FlowInfo, Frame, SourceId
from flowreel.engine.inference import Network
from flowreel.engine.outputs import Tally, opened_sinks, preparing
from flowreel.engine.pairing import batches
from flowreel.engine.protocols import Source
from flowreel.engine.stages import StageStatistics, compose
from flowreel.sinks import open_sink

RATE = 25
DIFFERENT = 8  # frames that a source in memory yields in turn
FULL_AFTER = 0.25  # of all pairs: by then the pipeline is full, and everything made once has been made


@dataclass
class Pace:
    """Records when batches reach the end of the chain."""

    reached: list[tuple[int, float]] = field(default_factory=list)  # pairs before a batch, time of its arrival

    def timed(self, items: Iterable[Any]) -> Iterator[Any]:
        """Passes on the items, and records when each arrives."""
        seen = 0

        def noted(item: Any) -> Any:
            nonlocal seen
            self.reached.append((seen, time.perf_counter()))
            seen += len(item)
            return item

        return map(noted, items)  # unlike a generator's loop, a map keeps no item alive while its consumer works

    def let_go(self, batches: Iterable[FlowBatch]) -> None:
        """Consumes batches, keeps none. Waits for each once the next has come: launches stay close to the GPU."""
        before: torch.cuda.Event | None = None
        for batch in self.timed(batches):
            if before is not None:
                before.synchronize()
            if batch.flow.is_cuda:
                before = torch.cuda.Event(blocking=True)
                before.record(torch.cuda.current_stream(batch.flow.device))
            del batch

    def rate(self, shard: int) -> tuple[float, Sample]:
        """Pairs/s from when the pipeline is full to the last whole shard, and the same by shard."""
        at = {seen: when for seen, when in self.reached if seen % shard == 0}
        marks = [seen for seen in at if seen >= FULL_AFTER * self.reached[-1][0]]
        shards = [at[b] - at[a] for a, b in pairwise(marks)]
        return (marks[-1] - marks[0]) / sum(shards), Sample.of(shards).rate(shard)


@dataclass(frozen=True)
class Ran:
    """The measurements of one run of a chain."""

    pairs_s: float
    by_shard: Sample  # pairs a second
    seconds: float  # of the whole run, from requesting the first frame
    stages: tuple[StageStatistics, ...]
    decoder: str
    with_outputs_s: float  # including opening the outputs before, and publishing them under their final names


def ran(
    source: Source,
    network: Network,
    config: RunConfig,
    output: Path | None,
    *,
    to_host: bool = False,
    around: AbstractContextManager[object] | None = None,
) -> Ran:
    """``flowreel.run`` with an open source and loaded weights.

    output: None: the flow is dropped. to_host: it is copied to the host before. around: entered when everything is
    ready, left when the last flow has been written or dropped.
    """
    with ExitStack() as opened:
        opened.enter_context(closing(source))
        inference = network.fitted(source.info.height, source.info.width)
        header = flow_header(source.info, inference, config)
        opening_s = time.perf_counter()
        sinks = [] if output is None else [open_sink(str(output), config.sink)]
        opened.enter_context(opened_sinks(sinks, header))
        shard = header.shard_length(config.sink.shard_bytes)
        inference.make_ready(shard, header.flow_count)
        downloads = to_host or (bool(sinks) and all(preparing(sink) is None for sink in sinks))
        steps = stages(inference, config.model.direction, batches(inference.batch, shard), to_host=downloads)
        pipeline = Chain(source, steps, config.queues, inference.device)
        pace, on_gpu = Pace(), inference.device.type == "cuda"
        tallies = [Tally(sink, on_gpu=on_gpu) for sink in sinks]

        def consume(flows: Iterator[FlowBatch]) -> None:
            if not tallies:
                pace.let_go(flows)
            for tally in tallies:
                tally.consume(pace.timed(flows))

        with around or nullcontext():
            began_s = time.perf_counter()
            pipeline.run({"write" if sinks else "drop": consume})
            seconds = time.perf_counter() - began_s
        for sink in sinks:
            sink.commit()
        with_outputs_s = time.perf_counter() - opening_s
    return Ran(*pace.rate(shard), seconds, pipeline.statistics(), source.decoder, with_outputs_s)


def without_threads(source: Source, network: Network, config: RunConfig) -> Ran:
    """Runs the same stages in turn in this thread and drops the flow: no queues, no locks, no streams of their own."""
    inference = network.fitted(source.info.height, source.info.width)
    header = flow_header(source.info, inference, config)
    shard = header.shard_length(config.sink.shard_bytes)
    inference.make_ready(shard, header.flow_count)
    steps = stages(inference, config.model.direction, batches(inference.batch, shard), to_host=False)
    pace, began_s = Pace(), time.perf_counter()
    with closing(source):
        pace.let_go(compose(source, steps))
    seconds = time.perf_counter() - began_s
    return Ran(*pace.rate(shard), seconds, (), source.decoder, seconds)


def written(source: Source, network: Network, config: RunConfig, output: Path) -> Ran:
    """The store alone: writes the source's first batch of flow repeatedly, as fast as the store accepts it."""
    inference = network.fitted(source.info.height, source.info.width)
    header = flow_header(source.info, inference, config)
    shard, count = header.shard_length(config.sink.shard_bytes), header.flow_count or 0
    steps = stages(inference, config.model.direction, batches(inference.batch, shard), to_host=False)
    with closing(source):
        flow = next(iter(compose(source, steps)))
    sinks, opening_s = [open_sink(str(output), config.sink)], time.perf_counter()
    with opened_sinks(sinks, header):
        pace, tally = Pace(), Tally(sinks[0], on_gpu=inference.device.type == "cuda")
        began_s = time.perf_counter()
        starts = (start for start in range(0, count, len(flow)) if start + len(flow) <= count)
        tally.consume(pace.timed(replace(flow, index=start) for start in starts))
        seconds = time.perf_counter() - began_s
        sinks[0].commit()
    return Ran(*pace.rate(shard), seconds, (), source.decoder, time.perf_counter() - opening_s)


class InMemory:
    """A ``Source`` that yields a few random frames in turn, which are on the device already."""

    losses: list[str]
    notes: list[str]

    def __init__(self, height: int, width: int, frames: int, device: str) -> None:
        shape = (3, height, width)
        self._pictures = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(DIFFERENT)]
        self.info = FlowInfo(height, width, Fraction(RATE), frames, SourceId("memory"))
        self.decoder = "none: frames in memory"
        self.losses, self.notes = [], []

    def __iter__(self) -> Iterator[Frame]:
        for number in range(self.info.frame_count or 0):
            yield Frame(self._pictures[number % DIFFERENT], number, number / RATE)

    def close(self) -> None:
        """Nothing is open."""
