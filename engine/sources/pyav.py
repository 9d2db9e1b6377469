"""Frames of a video file through PyAV (FFmpeg), decoded on the CPU. Works everywhere, for every codec."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import av
import torch
from torch import Tensor

from flowreel.engine.sources.picture import Converter
from flowreel.engine.sources.probe import VideoProbe, decoded, opened, packets
from flowreel.engine.sources.timecode import MOST_REORDERED, Timeline

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


# Decoders that with frame threading sometimes output a picture before they mark it as damaged (seen 17 times in 750
# with FFmpeg's MPEG-4 part 2 decoder on a loaded machine; never with one thread).
_TELL_LATE = {"mpeg4"}


class PyAVDecoder:
    """A ``VideoDecoder`` that gives pictures on the CPU. They stay valid for as long as they are referenced."""

    def __init__(self, probe: VideoProbe) -> None:
        self._probe = probe
        self._convert = Converter(probe.path.name, probe.stored_size, probe.turn)
        self.name = f"PyAV ({probe.codec})"

    def pictures(self, first: int) -> Generator[tuple[int, VideoFrame], None, None]:
        """See ``VideoDecoder``."""
        return _numbered(self._probe, first)

    def rgb(self, picture: VideoFrame, number: int) -> Tensor:
        """See ``VideoDecoder``."""
        return torch.from_numpy(self._convert(picture, number)).permute(2, 0, 1)


def _numbered(probe: VideoProbe, first: int) -> Generator[tuple[int, VideoFrame], None, None]:
    """Decoded frames with their numbers, in rising order, from ``first`` or somewhat before it on.

    When a frame from ``first`` on is missing, or any has concealed damage, decoding starts over near that place with
    one thread. With several threads, the number of intact frames lost with a damaged one, and what conceals the damage
    in it and in the frames that reference it, would depend on the number of cores, and FFmpeg may not report the error.
    """
    due = first
    with suppress(av.FFmpegError):
        for number, frame in _from(probe, first, careful=False):
            if number > due or frame.is_corrupt:
                break
            yield number, frame
            due = max(due, number + 1)
    if due < len(probe.timeline):
        for number, frame in _from(probe, due, careful=True):
            if number >= due:
                yield number, frame


def key_frame_before(probe: VideoProbe, number: int) -> int:
    """The frame where decoding has to start for this one: the last key frame at or before it."""
    place = bisect_right(probe.key_frames, number) - 1
    return int(probe.key_frames[place]) if place >= 0 and probe.timeline.stamps is not None else 0


def _from(probe: VideoProbe, first: int, careful: bool) -> Iterator[tuple[int, VideoFrame]]:
    """Decoded frames with their numbers, from ``first`` or somewhat before it.

    Frames shown after a key frame reference nothing before it. Frames shown before it may, even if they follow it in
    the file. So decoding starts at the last key frame that is shown no later than ``first``, or, near damage
    (``careful``), at least ``MOST_REORDERED`` frames before ``first``.
    """
    start = key_frame_before(probe, max(first - MOST_REORDERED, 0) if careful else first)
    if start > 0 and probe.timeline.stamps is not None:
        with closing(_pass(probe, int(probe.timeline.stamps[start]), careful, latest=first)) as frames:
            head = next(frames, None)
            number = None if head is None else probe.timeline.number_of(head.pts)
            if head is not None and number is not None and number <= first:
                yield number, head
                yield from _count(probe.timeline, frames, number)
                return
    with closing(_pass(probe, None, careful)) as frames:
        yield from _count(probe.timeline, frames, -1)


def _count(timeline: Timeline, frames: Iterator[VideoFrame], last: int) -> Iterator[tuple[int, VideoFrame]]:
    """Number frames by their stamps, or by counting where those are unusable. ``last``: number before the first."""
    for frame in frames:
        number = timeline.number_of(frame.pts)
        if number is None:
            number = last + 1
        if number <= last:
            continue  # a repeated frame
        if number >= len(timeline):
            return
        yield number, frame
        last = number


def _pass(
    probe: VideoProbe, seek_stamp: int | None, careful: bool, latest: int = 0
) -> Generator[VideoFrame, None, None]:
    """One pass of the decoder, from the start or from the key frame at a stamp; empty if the seek fails.

    latest: highest number of a key frame to start from: a container that seeks by decoding order may land too late.

    A damaged packet raises FFmpeg's error, unless the pass is ``careful``: then it is skipped.
    """
    with opened(probe.path) as container:
        stream = container.streams[probe.stream_index]
        assert isinstance(stream, av.VideoStream)
        if careful:
            stream.thread_count = 1
        else:
            stream.thread_type = "SLICE" if stream.codec_context.name in _TELL_LATE else "AUTO"
        if seek_stamp is not None:
            try:
                container.seek(seek_stamp, stream=stream)
            except av.FFmpegError:
                return  # cannot seek: the caller decodes from the start
        for place, packet in enumerate(packets(container, stream)):
            if seek_stamp is not None and place == 0 and not _is_key(packet, probe, latest):
                return
            yield from decoded(packet) if careful else packet.decode()


def _is_key(packet: Packet[VideoStream], probe: VideoProbe, latest: int) -> bool:
    """Whether decoding can start at this packet: a key frame with a number of at most ``latest``."""
    number = probe.timeline.number_of(packet.pts)
    return packet.is_keyframe and number is not None and number <= latest
