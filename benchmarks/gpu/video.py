"""From a video file: decoded on the card and on the host, memory over a long one, and the whole run to a store."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

import flowreel
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.measure import Effort, Sample, alternated, device_sync
from benchmarks.networks import filled
from flowreel.engine.config import ModelConfig, SelectConfig
from flowreel.engine.inference import prepare
from flowreel.engine.models.weights import save_weights
from flowreel.engine.sources import open_source

RATE = 25
LEVELS_MEAN, LEVELS_MOST = 0.5, 2  # of 256: both round to whole levels, from chroma that is enlarged alike
SAME_PX = 0.05  # mean difference of the flow between frames that differ so little
GROWTH = 1.05  # of memory, from the first fifth of the frames to the last
OF_THE_NETWORK = 0.9  # pairs a second of a whole run, of the network alone


def written_clip(folder: str, width: int, height: int, frames: int) -> Path:
    """An H.264 file: a picture of soft blobs that moves on by (3, 1) px a frame, edges wrapped. Made once a size."""
    path = Path(folder) / f"{width}x{height}-{frames}.mp4"
    if path.exists():
        return path
    coarse = torch.rand(1, 3, height // 8 + 1, width // 8 + 1, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    picture = (fine[0] * 255).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    with av.open(str(path), "w") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream: Any = container.add_stream(
            codec, rate=RATE, options={"preset": "superfast"} if codec == "libx264" else {}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        stream.thread_type = "AUTO"
        for number in range(frames):
            moved = np.ascontiguousarray(np.roll(picture, (number, 3 * number), (0, 1)))
            frame = av.VideoFrame.from_ndarray(moved, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# --- NVDEC ------------------------------------------------------------------------------------------------------------


def nvdec(findings: Findings, settings: Settings) -> None:
    """The same frames in the same order with the same times, up to the rounding of colours; and the same flow."""
    if not settings.dry:
        import PyNvVideoCodec

        findings.note(f"PyNvVideoCodec {getattr(PyNvVideoCodec, '__version__', '')}")
    width, height, count = (96, 64, 5) if settings.dry else (640, 360, 60)
    clip = written_clip(settings.folder, width, height, count)
    decoder = "pyav" if settings.dry else "nvdec"
    ours, wanted = (list(_frames(clip, name, settings)) for name in (decoder, "pyav"))
    findings.check("as many frames", len(ours) == len(wanted) == count, nvdec=len(ours), pyav=len(wanted))
    same = [(a.index, a.timestamp_s) for a in ours] == [(b.index, b.timestamp_s) for b in wanted]
    findings.check("the same numbers and times", same)
    apart = [(a.rgb.cpu().int() - b.rgb.cpu().int()).abs() for a, b in zip(ours, wanted, strict=False)]
    most, mean = max(int(x.max()) for x in apart), max(float(x.float().mean()) for x in apart)
    findings.check("colours within rounding", most <= LEVELS_MOST and mean <= LEVELS_MEAN, most=most, mean=mean)
    options: dict[str, Any] = {"device": settings.device, "precision": "fp32", "model": "FlowNet2C", "batch": 4}
    flows = [_flow(clip, decoder=name, **options) for name in (decoder, "pyav")]
    px = float((flows[0] - flows[1]).norm(dim=1).mean())
    findings.check("the same flow", px <= SAME_PX, mean_px=px)


def _frames(clip: Path, decoder: Any, settings: Settings) -> Iterator[Any]:
    with closing(open_source(clip, SelectConfig(decoder=decoder), _numbered(settings.device))) as source:
        yield from source


def _numbered(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def _flow(clip: Path, **options: Any) -> torch.Tensor:
    return torch.cat([batch.flow.cpu() for batch in flowreel.stream(clip, **options)])


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(findings: Findings, settings: Settings) -> None:
    """Host and card, looked at every so often while a long clip streams through."""
    width, height, count = (96, 64, 40) if settings.dry else (640, 352, 1300)
    clip = written_clip(settings.folder, width, height, count)
    samples: list[tuple[int, float, float]] = []  # flow, MB of the process, MB of the card
    seen = 0
    for batch in flowreel.stream(
        clip, device=settings.device, model="FlowNet2C", precision="fp32" if settings.dry else "fp16"
    ):
        seen += len(batch.frame)
        if seen >= (len(samples) + 1) * count // 10:
            samples.append((seen, _resident_mb(), _card_mb(settings)))
            findings.row(flows=seen, host_mb=samples[-1][1], gpu_mb=samples[-1][2])
    findings.check("every flow came", seen == count - 1, flows=seen)
    for place, name in ((1, "host"), (2, "card")):
        early, late = samples[1][place], samples[-1][place]
        findings.check(f"memory of the {name} is flat", late <= early * GROWTH + 1, early_mb=early, late_mb=late)
    findings.add(
        headline=f"{seen} flows: host {samples[1][1]:.0f} to {samples[-1][1]:.0f} MB, card {samples[-1][2]:.0f} MB"
    )


def _resident_mb() -> float:
    """Now; where the system does not say, the most there ever was."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def _card_mb(settings: Settings) -> float:
    """Everything taken on the card, by whatever library."""
    if settings.device == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e6


# --- the whole run ----------------------------------------------------------------------------------------------------


def end_to_end(findings: Findings, settings: Settings) -> None:
    """1024x436 H.264 to a store, after a short run that makes everything ready; then the network alone, preloaded."""
    width, height, count = (96, 64, 6) if settings.dry else (1024, 436, 1000)
    clip = written_clip(settings.folder, width, height, count)
    weights = Path(settings.folder) / "filled.safetensors"
    net = filled("FlowNet2", settings.device, 0.05 if settings.dry else 1.0)
    save_weights(
        weights,
        {name: value.cpu() for name, value in net.state_dict().items()},
        licence="none: random numbers",
        made_by={},
    )
    del net
    options: dict[str, Any] = {"device": settings.device, "weights": str(weights)}
    options["precision"] = "fp32" if settings.dry else "fp16"
    store = Path(settings.folder) / "x.zarr"
    flowreel.run(clip, store, stop=min(count, 40), overwrite=True, **options)
    for decoder in ("auto",) if settings.dry else ("auto", "pyav"):
        report = flowreel.run(clip, store, decoder=decoder, overwrite=True, **options)
        alone = _alone(report.batch, clip, settings, options)
        slowest = max(report.stages, key=lambda stage: stage.busy_s)
        share = report.pairs_per_s / alone.median
        findings.row(
            decoder=report.decoder,
            batch=report.batch,
            pairs_s=report.pairs_per_s,
            network_alone_pairs_s=alone.cell(),
            of_the_network=share,
            seconds=report.seconds,
            startup_s=report.startup_s,
            busiest_stage=slowest.name,
            busy={stage.name: round(stage.busy_s / report.seconds, 3) for stage in report.stages},
            store_mb=report.bytes_written / 1e6,
            flo_mb=report.flo_bytes / 1e6,
            notes=list(report.notes),
        )
        findings.note(
            f"decoder {report.decoder}: {report.pairs_per_s:.0f} pairs/s, {share:.0%} of the network alone "
            f"({OF_THE_NETWORK:.0%} asked for); busiest: {slowest.name}"
        )
        findings.add(
            headline=f"{report.pairs_per_s:.0f} pairs/s, {share:.0%} of the network alone, busiest: {slowest.name}"
        )


def _alone(batch: int, clip: Path, settings: Settings, options: dict[str, Any]) -> Sample:
    """Pairs a second of the same network on frames that are on the device already."""
    height, width = (64, 96) if settings.dry else (436, 1024)
    inference = prepare(ModelConfig(**options, batch=batch), height, width)
    frames = [
        torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, device=settings.device) for _ in range(3)
    ]
    effort = Effort(least=2, most=2, cap_s=0.1) if settings.dry else Effort(least=5, most=30, cap_s=2.0)
    sync = device_sync(settings.device)
    seconds = alternated({"": lambda: (inference.flow(*frames[:2]), inference.flow(*frames[1:]))}, effort, sync)[""]
    return Sample.of(seconds).rate(2 * batch)
