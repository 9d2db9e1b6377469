"""Frames of a video file through PyAV (FFmpeg), decoded on the CPU. Works everywhere, for every codec."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import av
import torch
from torch import Tensor

from flowreel.engine.sources.picture import Converter
from flowreel.engine.sources.probe import VideoProbe, decoded, opened, packets
from flowreel.engine.timecode import MOST_REORDERED, Timeline

if TYPE_CHECKING:
    from av.video.frame import VideoFrame


class PyAVDecoder:
    """A ``VideoDecoder`` that gives pictures on the CPU."""

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
    """Decoded frames with their numbers, in rising order, from ``first`` on.

    When one does not come, decoding starts over near that place on one thread: with several, how many sound frames
    go down with a damaged one would depend on the number of cores, and FFmpeg may keep the error to itself.
    """
    due = first
    with suppress(av.FFmpegError):
        for number, frame in _from(probe, first, careful=False):
            if number > due:
                break
            if number == due:
                yield number, frame
                due += 1
    if due < len(probe.timeline):
        for number, frame in _from(probe, due, careful=True):
            if number >= due:
                yield number, frame


def _from(probe: VideoProbe, first: int, careful: bool) -> Iterator[tuple[int, VideoFrame]]:
    """Decoded frames with their numbers, from ``first`` or somewhat before it."""
    # Frames that precede a key frame may lean on what came before it, so aim well ahead of the frame that is needed.
    aim = first - MOST_REORDERED
    if aim > 0 and probe.timeline.stamps is not None:
        with closing(_pass(probe, int(probe.timeline.stamps[aim]), careful)) as frames:
            head = next(frames, None)
            number = None if head is None else probe.timeline.number_of(head.pts)
            if head is not None and number is not None and number <= first:
                yield number, head
                yield from _count(probe.timeline, frames, number)
                return
    with closing(_pass(probe, None, careful)) as frames:
        yield from _count(probe.timeline, frames, -1)


def _count(timeline: Timeline, frames: Iterator[VideoFrame], last: int) -> Iterator[tuple[int, VideoFrame]]:
    """Number frames by their stamps, or by counting where those do not tell. ``last``: number before the first."""
    for frame in frames:
        number = timeline.number_of(frame.pts)
        if number is None:
            number = last + 1
        if number <= last:
            continue  # the same frame again
        if number >= len(timeline):
            return
        yield number, frame
        last = number


def _pass(probe: VideoProbe, seek_stamp: int | None, careful: bool) -> Generator[VideoFrame, None, None]:
    """One pass of the decoder, from the start or from the key frame before a stamp.

    On a damaged packet FFmpeg's error gets out, unless the pass is ``careful``: then it is skipped.
    """
    with opened(probe.path) as container:
        stream = container.streams[probe.stream_index]
        assert isinstance(stream, av.VideoStream)
        if careful:
            stream.thread_count = 1
        else:
            stream.thread_type = "AUTO"
        if seek_stamp is not None:
            try:
                container.seek(seek_stamp, stream=stream)
            except av.FFmpegError:
                return  # cannot seek: the caller decodes from the start
        for packet in packets(container, stream):
            yield from decoded(packet) if careful else packet.decode()
