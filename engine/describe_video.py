"""Describes a video file, as plain values: its container, every stream, and how flowreel reads it."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from av.video.stream import VideoStream

from flowreel.engine.data import JSON
from flowreel.engine.errors import SourceError
from flowreel.engine.sources.probe import VideoProbe, is_cover, opened, probe_video

if TYPE_CHECKING:
    from av.container import InputContainer

    from flowreel.engine.data import Float64Array
    from flowreel.engine.sources.picture import Turn

Facts = dict[str, JSON]


def video_facts(name: str) -> Facts:
    """What a container and its streams hold, from a packet scan and each video stream's first frame.

    Raises what ``probe_video`` raises.
    """
    path = Path(name)
    used = probe_video(name)
    width, height = used.shown_size
    frames = len(used.timeline)
    notes: list[JSON] = [*used.notes]
    if used.cut_short:
        notes.append(used.loss)
    if frames < 2:
        notes.append("one frame: flow needs at least two")
    with opened(path) as container:
        return {
            "format": container.format.name,
            "format_name": container.format.long_name,
            "duration_s": used.duration_s,
            "start_time_s": None if container.start_time is None else container.start_time / 1e6,
            "size_bytes": path.stat().st_size,
            "bit_rate": container.bit_rate or None,
            "cut_short": used.cut_short,
            "decoder": f"PyAV ({used.codec})",
            "stream_used": used.stream_index,
            "width": width,
            "height": height,
            "frames": frames,
            "flows": frames - 1,
            "frame_rate": float(used.frame_rate),
            "streams": list(_streams(container, used)),
            "notes": notes,
        }


def _streams(container: InputContainer, used: VideoProbe) -> Iterator[JSON]:
    """Every stream, in the container's order. Video streams that are not used are scanned as well."""
    number = 0
    for stream in container.streams:
        language = stream.metadata.get("language", "und").encode(errors="surrogateescape").decode(errors="replace")
        context = getattr(stream, "codec_context", None)  # None: FFmpeg has no decoder for it
        facts: Facts = {
            "index": stream.index,
            "type": stream.type,
            "codec": None if context is None else context.codec.canonical_name,
            "profile": getattr(context, "profile", None),
            "bit_rate": getattr(context, "bit_rate", None) or None,
            "language": None if language == "und" else language,
        }
        if stream.type == "audio" and context is not None:
            facts |= {"sample_rate": context.sample_rate, "channels": context.channels, "layout": context.layout.name}
        if isinstance(stream, VideoStream):
            cover = is_cover(stream)
            facts |= {"used": stream.index == used.stream_index, "number": None if cover else number, "cover": cover}
            try:
                probe = used if facts["used"] else None if cover else probe_video(str(used.path), number)
                facts |= {} if probe is None else _video_facts(stream, probe)
            except SourceError as error:
                facts["problem"] = str(error)
            number += not cover
        yield facts


def _video_facts(stream: VideoStream, probe: VideoProbe) -> Facts:
    """What a video stream's packets and first frame tell."""
    times_s, pixels = probe.timeline.times_s, probe.pixel_format
    gaps_s, key_gaps_s = np.diff(times_s), np.diff(times_s[probe.key_frames])
    (stored_width, stored_height), (width, height) = probe.stored_size, probe.shown_size
    aspect = stream.sample_aspect_ratio or Fraction(1)
    on_screen = (round(stored_width * aspect), stored_height)
    return {
        "pixel_format": pixels.name,
        "bit_depth": pixels.bit_depth,
        "stored_width": stored_width,
        "stored_height": stored_height,
        "width": width,
        "height": height,
        "sample_aspect_ratio": f"{aspect.numerator}:{aspect.denominator}",
        "display_width": on_screen[probe.turn.transpose],
        "display_height": on_screen[not probe.turn.transpose],
        "rotation": _rotation(probe.turn),
        "mirrored": _is_mirrored(probe.turn),
        "frames": len(times_s),
        "flows": len(times_s) - 1,
        "average_rate": float(probe.frame_rate),
        "nominal_rate": float(stream.base_rate) if stream.base_rate else None,
        "constant_rate": _is_steady(gaps_s, float(stream.time_base or 0)),
        "smallest_gap_s": float(gaps_s.min()) if len(gaps_s) else None,
        "largest_gap_s": float(gaps_s.max()) if len(gaps_s) else None,
        "first_frame_s": float(times_s[0]),
        "last_frame_s": float(times_s[-1]),
        "key_frames": len(probe.key_frames),
        "largest_key_gap_s": float(key_gaps_s.max()) if len(key_gaps_s) else None,
        "colour": {
            "range": pixels.value_range,
            "matrix": pixels.matrix,
            "primaries": pixels.primaries,
            "transfer": pixels.transfer,
            "used_range": pixels.used_range,
            "used_matrix": pixels.used_matrix,
        },
    }


def _is_steady(gaps_s: Float64Array, tick_s: float) -> bool | None:
    """Whether the frame rate is constant, allowing for timestamps rounded to ticks or, by some muxers, to 1 ms."""
    if not len(gaps_s):
        return None
    smallest, largest = float(gaps_s.min()), float(gaps_s.max())
    return largest - smallest <= 1.001 * max(tick_s, 1e-3) and largest <= 1.5 * smallest


def _rotation(turn: Turn) -> int:
    """Degrees counterclockwise, -90 to 180, as FFmpeg counts them; a mirrored picture is mirrored before it turns."""
    if not turn.transpose:
        return 180 if turn.flip_y else 0
    return -90 if turn.flip_x else 90


def _is_mirrored(turn: Turn) -> bool:
    return turn.transpose ^ turn.flip_x ^ turn.flip_y
