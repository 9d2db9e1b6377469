"""Videos of several kinds decode to the same frames, times and flow on GPU and host, from any starting frame."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

import flowreel
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.made_clips import PLAIN, Encoding, written_clip
from benchmarks.measure import Skipped
from flowreel.engine.config import SelectConfig
from flowreel.engine.data import Frame
from flowreel.engine.sources import open_source

# Of 256 levels. Decoding is exact in all of these codecs, so only the conversion to RGB can differ, from 8 or 10 bits.
# Both sides upsample chroma alike and round once, to whole levels; one value in 200 is rounded the other way. Reducing
# ten bits to eight in between would cause an error of a quarter of a level on average.
LEVELS_MOST, LEVELS_MEAN = 2, 0.05
SAME_PX = 0.05  # mean distance of flows between frames that differ so little
EVERY = 12  # frames between key frames
X264 = {"preset": "superfast", "g": f"{EVERY}", "x264-params": f"keyint={EVERY}:min-keyint={EVERY}:scenecut=0"}
X265 = {"preset": "superfast", "x265-params": f"log-level=none:keyint={EVERY}:min-keyint={EVERY}:scenecut=0:open-gop=1"}
OPEN = X264 | {"x264-params": f"{X264['x264-params']}:open-gop=1:bframes=3"}
AV1 = {"libsvtav1": {"preset": "10", "g": f"{EVERY}"}, "libaom-av1": {"cpu-used": "8", "g": f"{EVERY}"}}
VP9 = {"libvpx-vp9": {"deadline": "good", "cpu-used": "5", "lag-in-frames": "8", "g": f"{EVERY}"}}
KINDS = (
    Encoding("H.264, B-frames and open GOPs", ("libx264",), options={"libx264": OPEN}),
    Encoding("H.264 in a transport stream", ("libx264",), suffix="ts", options={"libx264": OPEN}),
    Encoding("HEVC", ("libx265",), options={"libx265": X265}),
    Encoding("HEVC 10 bits", ("libx265",), "yuv420p10le", options={"libx265": X265}),
    Encoding("HEVC 4:4:4", ("libx265",), "yuv444p", options={"libx265": X265}),
    Encoding("VP9", ("libvpx-vp9",), suffix="webm", options=VP9),
    Encoding("VP9 10 bits", ("libvpx-vp9",), "yuv420p10le", suffix="webm", options=VP9),
    Encoding("AV1", ("libsvtav1", "libaom-av1"), options=AV1),
    Encoding("AV1 10 bits", ("libsvtav1", "libaom-av1"), "yuv420p10le", "mkv", options=AV1),
    Encoding("H.264 4:4:4", ("libx264",), "yuv444p", options={"libx264": X264}),
)
MPEG2 = {"mpeg2video": {"g": f"{EVERY}", "bf": "2"}}
UNSTAMPED = Encoding("MPEG-2 in a program stream", ("mpeg2video",), suffix="mpg", options=MPEG2)
GOOD = EVERY  # frames of a damaged clip before the damage
FLOW_OF = "HEVC 10 bits"  # the kind whose flow is compared, besides the plain clip's


def check(findings: Findings, settings: Settings) -> None:
    """The same frames in the same order with the same times, up to rounding of colours, and the same flow."""
    os.environ.setdefault("SVT_LOG", "1")  # only errors
    if not settings.dry:
        from flowreel.engine.sources import nvcodec

        findings.note(f"PyNvVideoCodec {getattr(nvcodec.load(), '__version__', '')}")
    width, height, count = (64, 60, 5) if settings.dry else (640, 360, 60)
    clip = written_clip(settings.folder, width, height, count)
    findings.attempt("frames", partial(_compare, findings, settings, PLAIN.name, clip, count))
    findings.attempt("flow", partial(_compare_flow, findings, settings, PLAIN.name, clip))
    for kind in KINDS:
        findings.attempt(kind.name, partial(_compare_kind, findings, settings, kind))
    findings.attempt(UNSTAMPED.name, partial(_read_unstamped, findings, settings))
    findings.attempt("damaged", partial(_read_damaged, findings, settings))  # last: it might crash the process


def _compare_kind(findings: Findings, settings: Settings, kind: Encoding) -> None:
    """From the start, and from frames around key frames: in an open GOP, frames shown before one depend on it."""
    width, height, count = (128, 96, EVERY + 4) if settings.dry else (330, 190, 3 * EVERY)
    clip = _made(settings, width, height, count, kind)
    if (refusal := _refusal(clip, settings)) is not None:
        _falls_back(findings, settings, kind.name, clip, count)
        raise Skipped(refusal)
    last_key = (count - 1) // EVERY * EVERY
    starts = sorted({EVERY - 2, last_key - 2, last_key, last_key + 1, count - 2})
    _compare(findings, settings, kind.name, clip, count, starts)
    if kind.name == FLOW_OF:
        _compare_flow(findings, settings, kind.name, clip)


def _made(settings: Settings, width: int, height: int, count: int, kind: Encoding) -> Path:
    """The clip. Raises Skipped where it cannot be made."""
    try:
        return written_clip(settings.folder, width, height, count, kind)
    except LookupError as error:
        raise Skipped(str(error)) from error


def _refusal(clip: Path, settings: Settings) -> str | None:
    """Why NVDEC cannot decode the clip on this machine; None: it can."""
    if settings.dry:
        return None
    from flowreel.engine.sources.nvdec import why_not
    from flowreel.engine.sources.probe import probe_video

    reason = why_not(probe_video(str(clip)), numbered(settings.device))
    return None if reason is None else str(reason)


def _falls_back(findings: Findings, settings: Settings, name: str, clip: Path, count: int) -> None:
    """What NVDEC cannot decode is decoded on the CPU instead, and reported."""
    with closing(open_source(clip, SelectConfig(), numbered(settings.device))) as source:
        given, told = sum(1 for _ in source), any("not with NVDEC" in note for note in source.notes)
        findings.check(f"{name}: the CPU decodes instead, and says so", told and given == count, decoder=source.decoder)


def _compare(
    findings: Findings, settings: Settings, name: str, clip: Path, count: int, starts: Sequence[int] = ()
) -> None:
    wanted = list(frames_of(clip, "pyav", settings))
    ours = list(frames_of(clip, _ours(settings), settings))
    findings.check(f"{name}: as many frames", len(ours) == len(wanted) == count, nvdec=len(ours), pyav=len(wanted))
    findings.check(f"{name}: the same numbers and times", _same_times(ours, wanted))
    most, mean = _levels_apart(ours, wanted)
    good = most <= LEVELS_MOST and mean <= LEVELS_MEAN
    findings.check(f"{name}: colours within rounding", good, most=most, mean=mean)
    for start in starts:
        ours = list(frames_of(clip, _ours(settings), settings, start))
        most, mean = _levels_apart(ours, wanted[start:])
        good = _same_times(ours, wanted[start:]) and most <= LEVELS_MOST and mean <= LEVELS_MEAN
        findings.check(f"{name}: the same from frame {start} on", good, frames=len(ours), most=most, mean=mean)


def _read_unstamped(findings: Findings, settings: Settings) -> None:
    """PyNvVideoCodec's demuxer cannot tell the time stamps of all its frames: no frame may be lost for that.

    The pictures are not compared, since decoders of MPEG-2 may differ.
    """
    width, height, count = (128, 96, EVERY + 4) if settings.dry else (330, 190, 3 * EVERY)
    clip = _made(settings, width, height, count, UNSTAMPED)
    wanted = list(frames_of(clip, "pyav", settings))
    with closing(open_source(clip, SelectConfig(), numbered(settings.device))) as source:
        ours = list(source)
        told = {"decoder": source.decoder, "losses": source.losses, "notes": source.notes}
    same = len(ours) == count and _same_times(ours, wanted)
    findings.check(f"{UNSTAMPED.name}: every frame comes at its time", same, frames=len(ours), **told)


def _read_damaged(findings: Findings, settings: Settings) -> None:
    """A file damaged in the middle: its first frames are good, the others arrive in order or are reported as lost.

    The check records the decoder and its notes: NVDEC may continue, or leave the rest to the CPU.
    """
    width, height, count = (128, 96, 3 * EVERY) if settings.dry else (330, 190, 3 * EVERY)
    clip = written_clip(settings.folder, width, height, count)
    good = [frame for frame in frames_of(clip, "pyav", settings) if frame.index < GOOD]
    content = bytearray(clip.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + len(content) // 16)
    content[middle] = bytes(255 - byte for byte in content[middle])  # including the length fields of its frames
    damaged = clip.with_stem(f"{clip.stem}-damaged")
    damaged.write_bytes(content)
    with closing(open_source(damaged, SelectConfig(), numbered(settings.device))) as source:
        frames = list(source)
        told = {"decoder": source.decoder, "losses": source.losses, "notes": source.notes}
    numbers = [frame.index for frame in frames]
    most, mean = _levels_apart(frames, good)
    findings.check("damaged: each frame comes once, in order", numbers == sorted(set(numbers)), **told)
    findings.check("damaged: what is missing is told", len(frames) == count or bool(told["losses"]), frames=len(frames))
    same = numbers[:GOOD] == list(range(GOOD)) and most <= LEVELS_MOST and mean <= LEVELS_MEAN
    findings.check("damaged: the frames before it are good", same, most=most, mean=mean)


def _same_times(ours: Sequence[Frame], wanted: Sequence[Frame]) -> bool:
    return [(a.index, a.timestamp_s) for a in ours] == [(b.index, b.timestamp_s) for b in wanted]


def _levels_apart(ours: Sequence[Frame], wanted: Sequence[Frame]) -> tuple[float, float]:
    """The largest difference of any value, and the largest mean difference of a frame, of frames with equal numbers."""
    known = {frame.index: frame.rgb.cpu().int() for frame in wanted}
    apart = [(a.rgb.cpu().int() - known[a.index]).abs() for a in ours if a.index in known]
    if not apart:
        return float("inf"), float("inf")
    return float(max(x.max() for x in apart)), max(float(x.float().mean()) for x in apart)


def _compare_flow(findings: Findings, settings: Settings, name: str, clip: Path) -> None:
    options: dict[str, Any] = {"device": settings.device, "precision": "fp32", "model": "FlowNet2C", "batch": 4}
    flows = [
        torch.cat([batch.flow.cpu() for batch in flowreel.stream(clip, decoder=decoder, **options)])
        for decoder in (_ours(settings), "pyav")
    ]
    px = float((flows[0] - flows[1]).norm(dim=1).mean())
    findings.check(f"{name}: the same flow", px <= SAME_PX, mean_px=px)


def _ours(settings: Settings) -> str:
    return "pyav" if settings.dry else "nvdec"


def frames_of(clip: Path, decoder: Any, settings: Settings, start: int = 0) -> Iterator[Frame]:
    """A clip's frames as the source yields them."""
    select = SelectConfig(decoder=decoder, start=start)
    with closing(open_source(clip, select, numbered(settings.device))) as source:
        yield from source


def numbered(device: str) -> str:
    """The device's name as sources expect it."""
    return "cuda:0" if device == "cuda" else device
