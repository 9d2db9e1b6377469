"""A clip to a flow store, beside the network alone and every other stage alone: what the stages do and wait for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.data import found
from benchmarks.measure import Effort, Sample, alternated, cpu_precisions, devices, ratio
from benchmarks.networks import random_weights
from flowreel.engine.api import flow_header, run_one
from flowreel.engine.config import RunConfig
from flowreel.engine.data import Frame
from flowreel.engine.device import download
from flowreel.engine.inference import Network, load_network
from flowreel.engine.outputs import Tally
from flowreel.engine.pairing import batches, pairs
from flowreel.engine.pipeline import in_own_thread
from flowreel.engine.protocols import Source
from flowreel.engine.restore import restore
from flowreel.engine.run_report import RunReport
from flowreel.engine.sources import open_source
from flowreel.sinks import open_sink

CLIP = "sintel_cave_1024x436.mp4"
STAGES = ("decode", "model", "write")  # those that do real work


@dataclass(frozen=True)
class Job:
    """One clip through one network, and the reports of its runs."""

    source: str
    config: RunConfig
    network: Network
    flows: int
    reports: list[RunReport] = field(default_factory=list)

    def whole(self) -> float:
        """Runs clip to store. Returns the seconds from requesting the first frame to publishing the store."""
        with tempfile.TemporaryDirectory() as folder:
            report = run_one(self.source, [str(Path(folder) / "x.zarr")], self.config, lambda: self.network)
        if report.pairs != self.flows:
            raise RuntimeError(f"{report.pairs} flows instead of {self.flows}")
        self.reports.append(report)
        return report.seconds

    def alone(self) -> dict[str, Callable[[], object]]:
        """Each stage of ``STAGES`` alone, its input already in memory where the stage reads it.

        The model runs in a thread that ends, as in a run: this thread would keep its OpenMP workers, and with these no
        other worker could spin while waiting (see ``in_own_thread``).
        """
        frames = list(self.frames())
        inference = self.network.fitted(*frames[0].rgb.shape[-2:])
        with closing(self.opened()) as source:
            header = flow_header(source.info, inference, self.config)
        shard = header.shard_length(self.config.sink.shard_bytes)
        waiting = list(batches(inference.batch, shard)(pairs(iter(frames))))
        made = in_own_thread(lambda: list(download(restore(inference.fit)(inference.stage(iter(waiting))))))

        def model() -> None:
            for batch in inference.stage(iter(waiting)):
                if inference.device.type == "cuda":
                    batch.flow[0, 0, 0, 0].item()

        def write() -> None:
            with tempfile.TemporaryDirectory() as folder:
                sink = open_sink(Path(folder) / "x.zarr", self.config.sink)
                sink.open(header)
                Tally(sink).consume(iter(made))
                sink.commit()

        return {"decode": lambda: [None for _ in self.frames()], "model": lambda: in_own_thread(model), "write": write}

    def opened(self) -> Source:
        return open_source(self.source, self.config.select, str(self.network.device))

    def frames(self) -> Iterator[Frame]:
        with closing(self.opened()) as source:
            yield from source


def run(short: bool = False) -> dict[str, object]:
    """For each network one row for the whole pipeline, then one per stage.

    "of the model alone", "of the slowest alone": the pipeline's speed as a fraction of that stage's. "width 1": random
    weights at the published width; "baseline": the shipped weights. Everything runs in turn in this process.
    """
    clip = str(found("videos", CLIP))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for device in devices():
            for model, weights, precision, flows in _settings(device, short):
                path = "baseline" if weights == "baseline" else str(random_weights(model, Path(folder)))
                about = {"model": model, "weights": weights, "precision": precision, "device": device}
                config = RunConfig.of(**about | {"weights": path}, stop=flows + 1)
                job = Job(clip, config, load_network(config.model), flows)
                rows += measured(job, about, 2 if short else 5)
    return {"clip": CLIP, "rows": rows}


def _settings(device: str, short: bool) -> list[tuple[str, str, str, int]]:
    """Model, weights, precision, and flows per run: enough for start and end to matter little."""
    heavy = ("FlowNet2", "width 1")
    if device == "cpu":
        if short:
            return [("FlowNet2C", "width 1", "fp32", 12)]
        light = [("FlowNet2C", "width 1", "fp32", 40), ("FlowNet2S", "width 1", "fp32", 40)]
        flows = {"fp32": 24, "bf16": 40}
        heavies = [(*heavy, precision, flows[precision]) for precision in cpu_precisions()]
        return [*heavies, *light, ("FlowNet2CSS", "baseline", "fp32", 40)]
    return [(*heavy, "fp16", 40 if short else 49), ("FlowNet2CSS", "baseline", "fp16", 49)]


def measured(job: Job, about: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """The whole pipeline and each stage alone, in turn, ``rounds`` times."""
    actions: dict[str, Callable[[], object]] = {"all": job.whole} | job.alone()
    spent = alternated(actions, Effort(least=rounds, most=rounds, cap_s=1e9))
    # A run's own seconds count, which exclude opening and loading; alternated() has timed the whole call.
    whole = [report.seconds for report in job.reports[-rounds:]]
    slowest = max(STAGES, key=lambda stage: Sample.of(spent[stage]).median)
    stages = job.reports[-1].stages
    summary = {
        "stage": "all of it",
        "pairs/s": Sample.of(whole).rate(job.flows).cell(),
        "of the model alone": ratio(spent["model"], whole),
        "slowest alone": slowest,
        "of the slowest alone": ratio(spent[slowest], whole),
        "busy s": sum(stage.busy_s for stage in stages),
        "busy at once": sum(stage.busy_s for stage in stages) / whole[-1],
    }
    rows = [about | {"batch": job.reports[-1].batch, "flows": job.flows} | summary]
    for stage in stages:
        name = "write" if stage.name.startswith("write") else stage.name
        row: dict[str, Any] = {"stage": name}
        if name in spent:
            row["pairs/s alone"] = Sample.of(spent[name]).rate(job.flows).cell()
        waits = {"wait in s": stage.wait_in_s, "wait out s": stage.wait_out_s}
        rows.append(about | row | {"busy s": stage.busy_s} | waits | {"peak queue": float(stage.peak_queue)})
    return rows
