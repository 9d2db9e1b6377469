"""From a video file: decoded on the card and on the host, what a store keeps of its flow, memory over a long one."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

import flowreel
from benchmarks.gpu.findings import Findings, Settings
from flowreel.engine.config import ModelConfig, SelectConfig, SinkConfig
from flowreel.engine.inference import prepare
from flowreel.engine.sources import open_source

RATE = 25
LEVELS_MEAN, LEVELS_MOST = 0.5, 2  # of 256: both round to whole levels, from chroma that is enlarged alike
SAME_PX = 0.05  # mean difference of the flow between frames that differ so little
LONG = (640, 360, 18 * 72 + 1)  # width, height, frames: whole shards, so that no batch is of a new length at the end
GROWTH = 1.05  # of memory, from the first fifth of the frames to the last
ROUNDING = 2e-4  # of the longest vector, in float32, between two programs of one network


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
        from flowreel.engine.sources import nvcodec

        findings.note(f"PyNvVideoCodec {getattr(nvcodec.load(), '__version__', '')}")
    width, height, count = (96, 64, 5) if settings.dry else (640, 360, 60)
    clip = written_clip(settings.folder, width, height, count)
    decoder = "pyav" if settings.dry else "nvdec"
    findings.attempt("frames", partial(_compare_frames, findings, settings, clip, decoder, count))
    findings.attempt("flow", partial(_compare_flow, findings, settings, clip, decoder))


def _compare_frames(findings: Findings, settings: Settings, clip: Path, decoder: str, count: int) -> None:
    ours, wanted = (list(_frames(clip, name, settings)) for name in (decoder, "pyav"))
    findings.check("as many frames", len(ours) == len(wanted) == count, nvdec=len(ours), pyav=len(wanted))
    same = [(a.index, a.timestamp_s) for a in ours] == [(b.index, b.timestamp_s) for b in wanted]
    findings.check("the same numbers and times", same)
    apart = [(a.rgb.cpu().int() - b.rgb.cpu().int()).abs() for a, b in zip(ours, wanted, strict=False)]
    most, mean = max(int(x.max()) for x in apart), max(float(x.float().mean()) for x in apart)
    findings.check("colours within rounding", most <= LEVELS_MOST and mean <= LEVELS_MEAN, most=most, mean=mean)


def _compare_flow(findings: Findings, settings: Settings, clip: Path, decoder: str) -> None:
    options: dict[str, Any] = {"device": settings.device, "precision": "fp32", "model": "FlowNet2C", "batch": 4}
    flows = [
        torch.cat([batch.flow.cpu() for batch in flowreel.stream(clip, decoder=name, **options)])
        for name in (decoder, "pyav")
    ]
    px = float((flows[0] - flows[1]).norm(dim=1).mean())
    findings.check("the same flow", px <= SAME_PX, mean_px=px)


def _frames(clip: Path, decoder: Any, settings: Settings) -> Iterator[Any]:
    with closing(open_source(clip, SelectConfig(decoder=decoder), numbered(settings.device))) as source:
        yield from source


def numbered(device: str) -> str:
    """As sources are told it."""
    return "cuda:0" if device == "cuda" else device


# --- the store --------------------------------------------------------------------------------------------------------


def store(findings: Findings, settings: Settings) -> None:
    """Flows read back from a store that was written there, beside the network's own for the same frames."""
    for precision in ("fp32",) if settings.dry else ("fp32", "fp16"):
        findings.attempt(f"a store in {precision}", partial(_compare_store, findings, settings, precision))


def _compare_store(findings: Findings, settings: Settings, precision: str) -> None:
    """The first batches of two shards: in float32 every vector; in fp16 the mean, which leaves half a step to it."""
    width, height, batch = (96, 64, 2) if settings.dry else (640, 360, 8)
    clip = written_clip(settings.folder, width, height, 2 * (batch + 1) + 1)
    options: dict[str, Any] = {"device": settings.device, "precision": precision, "batch": batch}
    shard_bytes = 8 * width * height * batch  # two whole shards of one batch, and a short one
    path = Path(settings.folder) / f"{precision}.zarr"
    flowreel.run(clip, path, overwrite=True, shard_bytes=shard_bytes, **options)
    kept = flowreel.open_store(path)
    frames = torch.stack([frame.rgb.cpu() for frame in _frames(clip, "auto", settings)])
    inference = prepare(ModelConfig(**options), height, width)
    findings.check(f"{precision}: every flow is there", len(kept) == len(frames) - 1, flows=len(kept))
    for first in (0, batch):
        pairs = slice(first, first + batch), slice(first + 1, first + batch + 1)
        wanted = inference.fit.undo(inference.flow(*(frames[some] for some in pairs))).cpu()
        apart = (torch.from_numpy(kept[first : first + batch]) - wanted).abs()
        most, mean, longest = float(apart.max()), float(apart.mean()), float(wanted.abs().max())
        step = SinkConfig().max_error
        good = most <= step + ROUNDING * longest if precision == "fp32" else mean <= step
        findings.check(
            f"{precision}: flows {first} to {first + batch - 1} are the network's",
            good,
            most_px=most,
            mean_px=mean,
            longest_px=longest,
            max_error=step,
        )


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(findings: Findings, settings: Settings) -> None:
    """Host and card, looked at every so often while a long clip streams through."""
    width, height, count = (96, 64, 40) if settings.dry else LONG
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
