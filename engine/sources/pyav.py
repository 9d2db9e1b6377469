"""Frames of a video file through PyAV (FFmpeg), decoded on the CPU. Works everywhere, for every codec."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import av
import torch
from av import CodecContext
from av.bitstream import BitStreamFilterContext
from av.packet import Packet
from torch import Tensor

from flowreel.engine.sources.picture import Converter
from flowreel.engine.sources.probe import VideoProbe, decoded, opened, packets
from flowreel.engine.sources.timecode import MOST_REORDERED, Timeline

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


# Decoders that with frame threading sometimes output a picture before they mark it as damaged, so that the damage goes
# unreported: on a loaded machine FFmpeg's MPEG-4 part 2 decoder did so 17 times in 750, its H.264 decoder every second
# time for some frames. With the threads named here they never did. With slices, the H.264 decoder marks nothing.
_TELL_LATE: dict[str, tuple[Literal["SLICE", "AUTO"], int]] = {"h264": ("AUTO", 1), "mpeg4": ("SLICE", 0)}
# Decoders that conceal damage without marking the picture. With err_detect=explode they report it as an error instead.
# That cannot be the rule for all of them: FFmpeg's VP9 decoder then fails on intact files.
_SILENT = {"hevc", "mjpeg"}
_FAIL_AT_ERRORS = {"err_detect": "explode"}

# fast: on all cores. exact: on as many as report all damage. careful: on one, skipping damaged packets.
_Mode = Literal["fast", "exact", "careful"]


@dataclass(frozen=True, eq=False)
class Decoded:
    """A decoded picture. It stays valid for as long as it is referenced."""

    frame: VideoFrame
    damaged: bool  # and concealed by the decoder


class PyAVDecoder:
    """A ``VideoDecoder`` that gives pictures on the CPU.

    fast: decode on all cores even where damage may then go unreported (``_TELL_LATE``): for a network on a GPU, which
        may be faster than one decoding thread.
    """

    def __init__(self, probe: VideoProbe, *, fast: bool = False) -> None:
        self._probe = probe
        self._fast = fast
        self._convert = Converter(probe.path.name, probe.stored_size, probe.turn)
        self.name = f"PyAV ({probe.codec})"

    def pictures(self, first: int) -> Generator[tuple[int, Decoded], None, None]:
        """See ``VideoDecoder``."""
        return _numbered(self._probe, first, "fast" if self._fast else "exact")

    def patched(self, picture: Decoded) -> bool:
        """See ``VideoDecoder``."""
        return picture.damaged

    def interlaced(self, picture: Decoded) -> bool:
        """See ``VideoDecoder``."""
        return bool(picture.frame.interlaced_frame)

    def rgb(self, picture: Decoded, number: int) -> Tensor:
        """See ``VideoDecoder``."""
        return torch.from_numpy(self._convert(picture.frame, number)).permute(2, 0, 1)


def _numbered(probe: VideoProbe, first: int, mode: _Mode) -> Generator[tuple[int, Decoded], None, None]:
    """Pictures with their numbers, in rising order, from ``first`` or somewhat before it on.

    When a frame from ``first`` on is missing, or any has concealed damage, decoding starts over near that place with
    one thread. With several threads, the number of intact frames lost with a damaged one, and what conceals the damage
    in it and in the frames that reference it, would depend on the number of cores, and FFmpeg may not report the error.
    """
    due = first
    with suppress(av.FFmpegError):
        for number, picture in _from(probe, first, mode):
            if number > due or picture.damaged:
                break
            yield number, picture
            due = max(due, number + 1)
    if due < len(probe.timeline):
        for number, picture in _from(probe, due, "careful"):
            if number >= due:
                yield number, picture


def key_frame_before(probe: VideoProbe, number: int) -> int:
    """The frame where decoding has to start for this one: the last key frame at or before it."""
    place = bisect_right(probe.key_frames, number) - 1
    return int(probe.key_frames[place]) if place >= 0 and probe.seekable else 0


def _from(probe: VideoProbe, first: int, mode: _Mode) -> Iterator[tuple[int, Decoded]]:
    """Pictures with their numbers, from ``first`` or somewhat before it.

    Frames shown after a key frame reference nothing before it. Frames shown before it may, even if they follow it in
    the file. So decoding starts at the last key frame that is shown no later than ``first``, or, near damage
    (``"careful"``), at least ``MOST_REORDERED`` frames before ``first``.
    """
    start = key_frame_before(probe, max(first - MOST_REORDERED, 0) if mode == "careful" else first)
    if start > 0:
        with closing(_pass(probe, start, mode)) as pictures:
            head = next(pictures, None)
            number = None if head is None else probe.timeline.number_of(head.frame.pts)
            if head is not None and number is not None and number <= first:
                yield number, head
                yield from _count(probe.timeline, pictures, number)
                return
    with closing(_pass(probe, None, mode)) as pictures:
        yield from _count(probe.timeline, pictures, -1)


def _count(timeline: Timeline, pictures: Iterator[Decoded], last: int) -> Iterator[tuple[int, Decoded]]:
    """Number pictures by their stamps, or by counting where those are unusable. ``last``: number before the first."""
    for picture in pictures:
        number = timeline.number_of(picture.frame.pts)
        if number is None:
            number = last + 1
        if number <= last:
            continue  # a repeated frame
        if number >= len(timeline):
            return
        yield number, picture
        last = number


def _pass(probe: VideoProbe, key: int | None, mode: _Mode) -> Generator[Decoded, None, None]:
    """One pass of the decoder, from the start (None) or from the key frame of that number; empty if no seek finds it.

    A damaged packet raises FFmpeg's error, unless the mode is ``"careful"``: then it is skipped.
    """
    with opened(probe.path) as container:
        stream = container.streams[probe.stream_index]
        assert isinstance(stream, av.VideoStream)
        silent, watcher = stream.codec_context.name in _SILENT, None
        if mode == "careful":
            stream.thread_count = 1
            watcher = _Watcher(stream) if silent else None
        else:
            threads = _TELL_LATE.get(stream.codec_context.name) if mode == "exact" else None
            stream.thread_type, stream.thread_count = threads or ("AUTO", 0)  # 0: as many threads as there are cores
            stream.codec_context.options = dict(_FAIL_AT_ERRORS) if silent else {}
        wrong: set[int | None] = set()  # stamps of the packets in which the watcher has found an error
        for packet in packets(container, stream) if key is None else _sought(container, stream, probe.timeline, key):
            if watcher is not None and watcher.finds_error(packet):
                wrong.add(packet.pts)
            for frame in decoded(packet) if mode == "careful" else packet.decode():
                yield Decoded(frame, frame.is_corrupt or (frame.pts is not None and frame.pts in wrong))


def _sought(
    container: InputContainer, stream: VideoStream, timeline: Timeline, key: int
) -> Iterator[Packet[VideoStream]]:
    """The packets from key frame ``key`` on; none if no seek finds it.

    With an index, a seek leads to the key frame. Without one, as in transport streams, it leads to some packet that is
    decoded later, and the first packets may bear the stamps of others. So the second aim is well before the key frame.
    """
    assert timeline.stamps is not None
    for aim in (key, key - MOST_REORDERED):
        if aim < 0:
            return
        try:
            container.seek(int(timeline.stamps[aim]), stream=stream)
        except av.FFmpegError:
            return
        found = packets(container, stream)
        for packet in found:
            if packet.is_keyframe and timeline.number_of(packet.pts) == key:
                yield packet
                yield from found
                return
            if aim == key or (packet.dts is not None and packet.dts > timeline.stamps[key]):
                break  # the key frame was missed, or came with another stamp than when the file was probed


class _Watcher:
    """A second decoder of a stream, which finds the errors that the first one conceals.

    For HEVC it does not see SEI messages: an error in one of those does not damage the picture.
    """

    def __init__(self, stream: VideoStream) -> None:
        own = stream.codec_context
        self._context: Any = CodecContext.create(own.codec, "r")  # a VideoCodecContext, which has decode()
        self._context.options = dict(_FAIL_AT_ERRORS)
        self._context.thread_count = 1
        self._filter = None
        if own.name == "hevc":  # hevc_mp4toannexb moves parameter sets from the extradata into the stream
            self._filter = BitStreamFilterContext("hevc_mp4toannexb,filter_units=remove_types=39-40", stream)
        else:
            self._context.extradata = own.extradata

    def finds_error(self, packet: Packet[VideoStream]) -> bool:
        """Whether the packet is damaged. To be called with every packet in file order, from a key frame on."""
        if packet.size == 0:
            return False  # the packet that flushes the decoder
        copied = Packet(bytes(packet))  # a filter consumes its packet
        try:
            for part in [copied] if self._filter is None else self._filter.filter(copied):
                self._context.decode(part)
        except av.FFmpegError:
            return True
        return False
