"""A slow source, model or sink, ten times slower than the rest: do queues and memory stay bounded, is no time lost?

The stages are real: a synthetic source, pairs, batches, a network, restore, a flow store. One of them sleeps after each
item, so that it takes ten times as long per flow as the slowest stage takes alone. Runs of that stage alone, fed from
memory, alternate with runs of the whole pipeline; the pipeline must be as fast, and no items may pile up before the
slow stage.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from benchmarks.measure import ratio
from benchmarks.processes import resident_bytes
from flowreel.engine.api import flow_header
from flowreel.engine.config import ModelConfig, QueueConfig, RunConfig, SelectConfig, SinkConfig
from flowreel.engine.data import FlowBatch, Frame, PairBatch
from flowreel.engine.inference import Inference, load_network
from flowreel.engine.outputs import Tally
from flowreel.engine.pairing import batches, pairs
from flowreel.engine.pipeline import Pipeline, in_own_thread
from flowreel.engine.restore import restore
from flowreel.engine.sources import open_source
from flowreel.engine.stages import Stage
from flowreel.sinks import open_sink

Slow = Literal["source", "model", "sink"]
FACTOR = 10
HEIGHT, WIDTH = 192, 256
BETWEEN = 5  # channels: in front of pairs, batches, model, restore, sink


@dataclass
class Job:
    """One pipeline's parts, and what is observed while it runs."""

    flows: int
    inference: Inference
    header: Any
    rest_s: dict[Slow, float] = field(default_factory=dict)  # seconds that a stage sleeps after each item
    queues: QueueConfig = field(default_factory=lambda: QueueConfig(items=4, total_bytes=64 << 20))
    frames_made: int = 0
    flows_written: int = 0
    furthest_ahead: int = 0  # most frames ever made whose flow was not yet written
    resident_mb: list[float] = field(default_factory=list)  # resident memory after each flow written

    def frames(self) -> Iterator[Frame]:
        with closing(open_source(_scene(self.flows + 1), SelectConfig())) as source:
            for frame in source:
                self.frames_made += 1
                self.furthest_ahead = max(self.furthest_ahead, self.frames_made - self.flows_written)
                self._rest("source")
                yield frame

    def model(self, waiting: Iterator[PairBatch]) -> Iterator[FlowBatch]:
        for batch in self.inference.stage(waiting):
            self._rest("model")
            yield batch

    def write(self, flows: Iterator[FlowBatch], folder: Path) -> None:
        sink = open_sink(folder / "x.zarr", SinkConfig())
        sink.open(self.header)

        def watched() -> Iterator[FlowBatch]:
            for batch in flows:
                yield batch
                self._rest("sink")
                self.flows_written += len(batch)
                self.resident_mb.append(resident_bytes() / 1e6)

        try:
            Tally(sink).consume(watched())
        except BaseException:
            sink.abort()
            raise
        sink.commit()

    def _rest(self, stage: Slow) -> None:
        if stage in self.rest_s:
            time.sleep(self.rest_s[stage])


def _scene(frames: int) -> str:
    return f"synthetic:translate?size={WIDTH}x{HEIGHT}&frames={frames}"


def new_job(flows: int, rest_s: dict[Slow, float] | None = None) -> Job:
    inference = load_network(ModelConfig(model="FlowNet2C", device="cpu", batch=1)).fitted(HEIGHT, WIDTH)
    with closing(open_source(_scene(flows + 1), SelectConfig())) as source:
        header = flow_header(source.info, inference, RunConfig())
    return Job(flows, inference, header, rest_s or {})


def whole(job: Job) -> tuple[float, Pipeline]:
    """Runs the pipeline to its end. Returns the seconds from requesting the first frame to publishing the store."""
    stages = [
        Stage("pairs", pairs),
        Stage("batches", batches(job.inference.batch, job.header.shard_length(SinkConfig().shard_bytes))),
        Stage("model", job.model),
        Stage("restore", restore(job.inference.fit)),
    ]
    pipeline = Pipeline("source", job.frames(), stages, job.queues)
    with tempfile.TemporaryDirectory() as folder:
        began_s = time.perf_counter()
        pipeline.run({"sink": lambda flows: job.write(flows, Path(folder))})
        return time.perf_counter() - began_s, pipeline


def alone(job: Job, stage: Slow) -> float:
    """Runs one stage alone, its input already in memory. Returns the seconds for all its items."""
    frames = list(Job(job.flows, job.inference, job.header).frames())
    waiting = list(batches(job.inference.batch, 1 << 20)(pairs(iter(frames))))
    if stage == "source":
        return _seconds(lambda: list(job.frames()))
    if stage == "model":
        return _seconds(lambda: list(job.model(iter(waiting))))
    computed = list(restore(job.inference.fit)(job.inference.stage(iter(waiting))))
    with tempfile.TemporaryDirectory() as folder:
        return _seconds(lambda: job.write(iter(computed), Path(folder)))


def _seconds(action: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    action()
    return time.perf_counter() - began_s


def run(short: bool = False) -> dict[str, object]:
    """One row for each stage that is made slow."""
    flows, rounds = (60, 1) if short else (100, 3)
    natural_s = {stage: median(by_itself(new_job(flows), stage) for _ in range(3)) / flows for stage in get_args(Slow)}
    slowest_s = max(natural_s.values())
    rows = [_row(stage, flows, rounds, FACTOR * slowest_s - natural_s[stage]) for stage in get_args(Slow)]
    return {
        "flows": flows,
        "rounds": rounds,
        "size": f"{WIDTH}x{HEIGHT}",
        "ms a flow, alone": {stage: 1e3 * seconds for stage, seconds in natural_s.items()},
        "rows": rows,
    }


def by_itself(job: Job, stage: Slow) -> float:
    """``alone`` in a thread of its own, since a run also computes in threads that end: see ``in_own_thread``."""
    return in_own_thread(lambda: alone(job, stage))


def _row(slow: Slow, flows: int, rounds: int, rest_s: float) -> dict[str, Any]:
    separately: list[float] = []
    together: list[float] = []
    runs: list[tuple[Job, Pipeline]] = []

    def run_alone() -> None:
        separately.append(by_itself(new_job(flows, {slow: rest_s}), slow))

    def run_whole() -> None:
        job = new_job(flows, {slow: rest_s})
        seconds, pipeline = whole(job)
        together.append(seconds)
        runs.append((job, pipeline))

    for round_number in range(rounds):
        for action in (run_alone, run_whole) if round_number % 2 else (run_whole, run_alone):
            action()
    return {
        "slow": slow,
        "ms a flow": 1e3 * median(separately) / flows,
        "throughput / slowest alone": ratio(separately, together),
        **held(runs),
    }


def held(runs: Sequence[tuple[Job, Pipeline]]) -> dict[str, Any]:
    """The largest queues and memory of any of these runs, beside their limits."""
    job = runs[0][0]
    pipelines = [pipeline for _, pipeline in runs]
    return {
        "deepest queue": float(max(stage.peak_queue for p in pipelines for stage in p.statistics())),
        "allowed": job.queues.items,
        "frames ahead": float(max(job.furthest_ahead for job, _ in runs)),
        "allowed ahead": most_ahead(job),
        "unbounded": job.flows + 1,
        "MB in queues": max(pipeline.peak_bytes for pipeline in pipelines) / 1e6,
        "allowed MB": round(job.queues.total_bytes / 1e6),
        "memory growth MB": median(growth_mb(job.resident_mb) for job, _ in runs),
    }


def most_ahead(job: Job) -> int:
    """The number of frames between source and sink when all channels are full, with batches of one pair.

    Each of the six stages holds one item that it is working on or waiting to pass on. The batches stage also holds the
    next pair, which tells it that the batch is full. And there is one more frame than flows.
    """
    return BETWEEN * job.queues.items + (BETWEEN + 1) + 2


def growth_mb(resident: Sequence[float]) -> float:
    """Growth from the second quarter of a run, when everything is warmed up, to the last quarter; medians of both."""
    quarter = max(1, len(resident) // 4)
    return median(resident[-quarter:]) - median(resident[quarter : 2 * quarter] or resident)
