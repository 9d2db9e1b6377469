"""Video files through PyAV (FFmpeg), decoded on the CPU.

``probe_video`` has read ahead and knows every frame's number and time; ``VideoSource`` decodes in a second pass.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import av
import torch

from flowreel.engine.config import SelectConfig
from flowreel.engine.data import FlowInfo, Frame, Picture
from flowreel.engine.errors import DeviceError, SourceChangedError, SourceNotFoundError, TooFewFramesError
from flowreel.engine.sources.fingerprint import source_id
from flowreel.engine.sources.picture import Converter
from flowreel.engine.sources.probe import VideoProbe, decoded, opened, packets, probe_video
from flowreel.engine.timecode import MOST_REORDERED, Timeline, parse_seconds, select_frames

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from flowreel.engine.data import Float64Array

REOPENING_FRAMES = 32  # decoding on past so many frames is quicker than opening the file again and seeking


def open_video(name: str, select: SelectConfig) -> VideoSource:
    """Open a video file. Raises what :func:`probe_video` and :class:`VideoSource` raise."""
    if select.decoder == "nvdec":
        raise DeviceError("decoding with NVDEC is not available in this version; use --decoder auto or pyav")
    return VideoSource(probe_video(name, select.stream), select)


class VideoSource:
    """Selected frames of one video stream, in order of presentation.

    A frame that cannot be decoded is left out; the others keep their numbers and times. ``losses`` then tells how
    many, and whether the file itself ends too early.
    """

    reopening_frames = REOPENING_FRAMES

    def __init__(self, probe: VideoProbe, select: SelectConfig) -> None:
        """Raises TooFewFramesError or UsageError when ``select`` leaves nothing to pair or makes no sense."""
        times_s = probe.timeline.times_s
        self._probe = probe
        self._stat = _identity(probe)
        self._wanted = select_frames(select, times_s, probe.path.name)
        self._to_the_end = _reaches_beyond(select.stop, probe)
        self._losses: list[str] = []
        self._notes = list(probe.notes)
        self._iteration: Generator[Frame, None, None] | None = None
        self._closed = False
        width, height = probe.shown_size
        self._info = FlowInfo(
            height=height,
            width=width,
            frame_rate=probe.frame_rate / select.step,
            frame_count=len(self._wanted),
            source=source_id(probe.path.name, [probe.path], probe.duration_s),
        )

    @property
    def info(self) -> FlowInfo:
        return self._info

    @property
    def decoder(self) -> str:
        return f"PyAV ({self._probe.codec})"

    @property
    def losses(self) -> list[str]:
        return self._losses

    @property
    def notes(self) -> list[str]:
        return self._notes

    @property
    def wanted(self) -> range:
        return self._wanted

    @property
    def times_s(self) -> Float64Array:
        return self._probe.timeline.times_s

    def standing_before(self, number: int) -> int:
        return _key_frame_before(self._probe, number)

    def pictures_from(self, number: int) -> Generator[Picture, None, None]:
        """Raises SourceNotFoundError and SourceChangedError when the file is no longer the one that was opened."""
        name = self._probe.path.name
        try:
            changed = _identity(self._probe) != self._stat
        except OSError as error:
            raise SourceNotFoundError(f"{self._probe.path} is gone since it was opened") from error
        if changed:
            raise SourceChangedError(f"{name} is another file than the one that was opened: open it again")
        return self._pictures_from(number, Converter(name, self._probe.stored_size, self._probe.turn))

    def _pictures_from(self, first: int, convert: Converter) -> Generator[Picture, None, None]:
        def developed(number: int, picture: VideoFrame) -> Callable[[], Frame]:
            return lambda: self._frame(number, convert, picture)

        with closing(_numbered(self._probe, first)) as numbered:
            for number, picture in numbered:
                size = sum(plane.buffer_size for plane in picture.planes)
                yield Picture(number, size, developed(number, picture))

    def _frame(self, number: int, convert: Converter, picture: VideoFrame) -> Frame:
        rgb = torch.from_numpy(convert(picture, number)).permute(2, 0, 1)
        return Frame(rgb, number, float(self._probe.timeline.times_s[number]))

    def __iter__(self) -> Iterator[Frame]:
        """Decode. At the end TooFewFramesError when fewer than two came; FrameSizeError when the size changes."""
        if self._iteration is not None:
            raise RuntimeError(f"{self._info.source.name} is already being read; open it again to read it twice")
        self._iteration = self._frames()
        return self._iteration

    def _frames(self) -> Generator[Frame, None, None]:
        given = 0
        convert = Converter(self._probe.path.name, self._probe.stored_size, self._probe.turn)
        with closing(_numbered(self._probe, self._wanted[0])) as numbered:
            for number, picture in numbered:
                if self._closed:
                    return
                if number in self._wanted:
                    yield self._frame(number, convert, picture)
                    given += 1
                if number >= self._wanted[-1]:
                    break
        self._account(given)

    def _account(self, given: int) -> None:
        """Say at the end what did not come."""
        asked, probe = len(self._wanted), self._probe
        if given < asked:
            self._losses.append(f"{asked - given} of {asked} frames could not be decoded")
        if probe.cut_short and self._to_the_end:
            promised = "" if probe.duration_s is None else f" of the {probe.duration_s:.2f} s it should last"
            reached = float(probe.timeline.times_s[-1])
            self._losses.append(f"the file is cut short: its last frame is at {reached:.2f} s{promised}")
        if given < 2:
            raise TooFewFramesError(
                f"only {given} of {asked} frames of {probe.path.name} could be decoded: flow needs at least two"
            )

    def close(self) -> None:
        """Release the file. While another thread is inside the iteration, that ends itself at its next frame."""
        self._closed = True
        if self._iteration is not None:
            with suppress(ValueError):  # "generator already executing"
                self._iteration.close()

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _reaches_beyond(stop: int | str | None, probe: VideoProbe) -> bool:
    """Whether ``stop`` asks for frames behind the last one found."""
    times_s = probe.timeline.times_s
    if isinstance(stop, str):
        return parse_seconds(stop) > float(times_s[-1] - times_s[0] + 1 / probe.frame_rate)
    return stop is None or stop > len(times_s)


# -- Decoding ----------------------------------------------------------------------------------------------------


def _numbered(probe: VideoProbe, first: int) -> Generator[tuple[int, VideoFrame], None, None]:
    """Decoded frames with their numbers, in rising order, from ``first`` or somewhat before it on.

    When one from ``first`` on does not come, decoding starts over near that place on one thread: with several, how
    many sound frames go down with a damaged one would depend on the number of cores, and FFmpeg may keep the error to
    itself.
    """
    due = first
    with suppress(av.FFmpegError):
        for number, frame in _from(probe, first, careful=False):
            if number > due:
                break
            yield number, frame
            due = max(due, number + 1)
    if due < len(probe.timeline):
        for number, frame in _from(probe, due, careful=True):
            if number >= due:
                yield number, frame


def _key_frame_before(probe: VideoProbe, number: int) -> int:
    """The frame where decoding has to start for this one: the nearest that stands by itself, at it or before."""
    place = bisect_right(probe.key_frames, number) - 1
    return int(probe.key_frames[place]) if place >= 0 and probe.timeline.stamps is not None else 0


def _from(probe: VideoProbe, first: int, careful: bool) -> Iterator[tuple[int, VideoFrame]]:
    """Decoded frames with their numbers, from ``first`` or somewhat before it.

    What follows a key frame on the screen leans on nothing before it. What precedes it there may, although it comes
    after it in the file: a frame's own key frame is the last one that is shown no later. Near damage a whole stretch
    of frames in front is decoded as well.
    """
    start = _key_frame_before(probe, max(first - MOST_REORDERED, 0) if careful else first)
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


def _pass(
    probe: VideoProbe, seek_stamp: int | None, careful: bool, latest: int = 0
) -> Generator[VideoFrame, None, None]:
    """One pass of the decoder, from the start or from the key frame at a stamp; empty when that is not to be found.

    latest: number of the last frame whose key frame will do: containers that seek by decoding order may go too far.

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
        for place, packet in enumerate(packets(container, stream)):
            if seek_stamp is not None and place == 0 and not _is_key(packet, probe, latest):
                return
            yield from decoded(packet) if careful else packet.decode()


def _is_key(packet: Packet[VideoStream], probe: VideoProbe, latest: int) -> bool:
    """Whether decoding can start with this packet for a frame with this number."""
    number = probe.timeline.number_of(packet.pts)
    return packet.is_keyframe and number is not None and number <= latest


def _identity(probe: VideoProbe) -> tuple[int, int]:
    """Bytes and time of the last change: enough to see that a file was replaced while it is being used."""
    status = os.stat(probe.path)
    return status.st_size, status.st_mtime_ns
