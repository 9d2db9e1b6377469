"""A whole run, from an H.264 file to a store or a colour video, beside the network and the decoder alone.

Its speed is measured over the flows that a long run computes in addition to a short one: filling the pipeline, the
first batches and finishing the output take the same time in both.
"""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import flowreel
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.made_clips import written_clip
from benchmarks.gpu.nvdec import numbered
from benchmarks.gpu.surroundings import memory_folder
from benchmarks.measure import ONCE, Effort, Sample, Skipped, alternated, device_sync
from benchmarks.networks import filled
from benchmarks.processes import MEMORY
from flowreel.engine.config import ModelConfig, SelectConfig
from flowreel.engine.inference import load_network
from flowreel.engine.models.saving import save_weights
from flowreel.engine.models.weights import BASELINE
from flowreel.engine.run_report import RunReport
from flowreel.engine.sources import open_source
from flowreel.sinks import video_writer

IN_MEMORY = "store in memory"
MEMORY_BYTES = 8 << 30  # for two stores, one of which is being replaced
TRAINED = "FlowNet2CSS"  # the model that runs with the shipped weights
OF_THE_NETWORK = 0.9  # aim: pairs/s of a whole run, relative to the network alone


class Job(NamedTuple):
    """The clip, and the options of a run."""

    clip: Path
    height: int
    width: int
    frames: int
    options: dict[str, Any]
    repeats: int = 2  # of a short run, and of a long one to a store


def run(findings: Findings, settings: Settings) -> None:
    """1024x436. Stores in memory first: flow of random weights hardly compresses, so a disk may be the bottleneck.

    To a video encoder such flow is noise, so there is also a video of the baseline's flow. Both videos are also encoded
    without parts (``sinks/video_writer.py``), which are justified only where they are faster.
    """
    job = job_of(settings)
    trained = job._replace(options=job.options | {"weights": BASELINE})
    alone = cache(lambda model, batch: _alone(trained if model == TRAINED else job, settings, model, batch))
    decoders: list[str] = []  # those timed so far
    in_memory, on_disk = (place / "x.zarr" for place in (memory_folder(settings.folder), Path(settings.folder)))

    def timed(name: str, model: str, output: Path, decoder: str, share: float, encoder: str = "auto") -> None:
        if output.is_relative_to(MEMORY):
            _require_memory()
        if decoder == "pyav" and any(used.startswith("PyAV") for used in decoders):
            raise Skipped("that is what auto has chosen")
        options = {"model": model, "decoder": decoder, "encoder": encoder}
        sample, report = _rate(trained if model == TRAINED else job, output, share, **options)
        decoders.append(report.decoder)
        _file(findings, name, sample, report, alone(model, report.batch))

    def by_its_threads(*arguments: Any) -> None:
        before, video_writer.ROWS_OF_A_THREAD = video_writer.ROWS_OF_A_THREAD, 0
        try:
            timed(*arguments, encoder="cpu")  # "auto" would take a GPU's own encoder, where it has one
        finally:
            video_writer.ROWS_OF_A_THREAD = before

    a_part = 1.0 if settings.dry else 0.3  # of the clip: slow runs need fewer pairs
    for name, model, output, decoder, share in (
        (IN_MEMORY, "FlowNet2", in_memory, "auto", 1.0),
        ("video, baseline weights", TRAINED, on_disk.with_suffix(".mp4"), "auto", a_part),
        (f"{IN_MEMORY}, FlowNet2C", "FlowNet2C", in_memory, "auto", 1.0),
        ("store", "FlowNet2", on_disk, "auto", 1.0),
        ("video", "FlowNet2", on_disk.with_suffix(".mp4"), "auto", a_part),
        (f"{IN_MEMORY}, PyAV", "FlowNet2", in_memory, "pyav", a_part),
    ):
        findings.attempt(name, partial(timed, name, model, output, decoder, share))
    for name, model in (("video, baseline weights", TRAINED), ("video", "FlowNet2")):
        name, video = f"{name}, x264's threads", on_disk.with_suffix(".mp4")
        findings.attempt(name, partial(by_its_threads, name, model, video, "auto", a_part))
    for decoder in ("auto", "pyav"):
        findings.attempt(f"decoder {decoder} alone", partial(_decoder_alone, findings, settings, job, decoder))


def _require_memory() -> None:
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < MEMORY_BYTES:
        raise Skipped(f"{MEMORY} is no folder in memory with {MEMORY_BYTES >> 30} GiB of room")


def _decoder_alone(findings: Findings, settings: Settings, job: Job, decoder: Any) -> None:
    """Frames per second of a source whose consumer is always ready."""
    with closing(open_source(job.clip, SelectConfig(decoder=decoder), numbered(settings.device))) as source:
        frames = iter(source)
        for _ in range(job.frames // 10):
            next(frames)
        began_s = time.perf_counter()
        count = sum(1 for _ in frames)
        device_sync(settings.device)()
        rate = count / (time.perf_counter() - began_s)
        findings.row(decoder_alone=source.decoder, frames_s=rate)
        findings.note(f"{source.decoder} alone: {rate:.0f} frames/s")


def job_of(settings: Settings) -> Job:
    """The job of this part and others; its clip and weights are made by the first that needs them."""
    width, height, frames = (64, 60, 7) if settings.dry else (1024, 436, 1600)
    clip = written_clip(settings.folder, width, height, frames)
    weights = Path(settings.folder) / "filled.safetensors"
    if not weights.exists():
        net = filled("FlowNet2", settings.device, 0.05 if settings.dry else 1.0)
        state = {name: value.cpu() for name, value in net.state_dict().items()}
        save_weights(weights, state, licence="none: random numbers", made_by={})
    options: dict[str, Any] = {"device": settings.device, "weights": str(weights), "overwrite": True}
    small = {"precision": "fp32", "batch": 2, "shard_bytes": 2 * 8 * width * height}
    options |= small if settings.dry else {"precision": "fp16"}
    return Job(clip, height, width, frames, options, 1 if settings.dry else 2)


def _rate(job: Job, output: Path, share: float, **options: Any) -> tuple[Sample, RunReport]:
    """Pairs/s from runs of many shards minus a run of one, and the last long run's report. share: of the clip."""

    def ran(flows: int, to: Path = output) -> RunReport:
        return flowreel.run(job.clip, to, stop=flows + 1, **job.options, **options)

    store = output.with_suffix(".zarr")
    frames = int(job.frames * share)
    ran(frames // 4, store)  # warms up the GPU and its libraries
    shard = flowreel.open_store(store).shard_length
    long = max((frames - 1) // shard, 2) * shard
    short_s = [ran(shard).seconds for _ in range(job.repeats)][-1]
    reports = [ran(long) for _ in range(job.repeats if output == store else 1)]  # videos take long and vary little
    return Sample.of([report.seconds - short_s for report in reports]).rate(long - shard), reports[-1]


def _file(findings: Findings, name: str, sample: Sample, report: RunReport, alone: Sample) -> None:
    slowest = max(report.stages, key=lambda stage: stage.busy_s)
    share = sample.median / alone.median
    encoded = next((note for note in report.notes if "encoded" in note), None)
    findings.row(
        output=name,
        decoder=report.decoder,
        encoder=encoded,
        batch=report.batch,
        pairs_s=sample.cell(),
        network_alone_pairs_s=alone.cell(),
        of_the_network=share,
        pairs=report.pairs,
        seconds=report.seconds,
        startup_s=report.startup_s,
        busiest_stage=slowest.name,
        busy={stage.name: round(stage.busy_s / report.seconds, 3) for stage in report.stages},
        written_mb=report.bytes_written / 1e6,
        written_mb_s=report.bytes_written / 1e6 / report.seconds,
        flo_mb=report.flo_bytes / 1e6,
        notes=list(report.notes),
    )
    told = f"{sample.median:.0f} pairs/s, {share:.0%} of the network alone ({OF_THE_NETWORK:.0%} asked for)"
    findings.note(f"{name} by {report.decoder}: {told}; busiest: {slowest.name}{f'; {encoded}' if encoded else ''}")
    if name == IN_MEMORY:
        findings.add(headline=f"{told}, busiest: {slowest.name}")


def _alone(job: Job, settings: Settings, model: str, batch: int) -> Sample:
    """Pairs/s of the same network alone, on frames that are on the device already."""
    chosen = {name: job.options[name] for name in ("device", "weights", "precision")}
    inference = load_network(ModelConfig(**chosen, model=model, batch=batch)).fitted(job.height, job.width)
    shape = (batch, 3, job.height, job.width)
    frames = [torch.randint(0, 256, shape, dtype=torch.uint8, device=settings.device) for _ in range(3)]
    effort = ONCE if settings.dry else Effort(least=5, most=30, cap_s=2.0)
    sync = device_sync(settings.device)
    seconds = alternated({"": lambda: (inference.flow(*frames[:2]), inference.flow(*frames[1:]))}, effort, sync)[""]
    return Sample.of(seconds).rate(2 * batch)
