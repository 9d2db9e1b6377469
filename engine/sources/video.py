"""Video files through PyAV (FFmpeg), decoded on the CPU.

``probe_video`` reads all packets once, which is cheap, and decodes only the first frame: it knows the count and the
time of every frame and how the picture has to be turned. ``VideoSource`` then decodes in a second pass.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import torch

from flowreel.engine.config import SelectConfig
from flowreel.engine.data import FlowInfo, Frame, SourceId
from flowreel.engine.errors import (
    DeviceError,
    FrameSizeError,
    SourceNotFoundError,
    TooFewFramesError,
    UnsupportedSourceError,
    UsageError,
)
from flowreel.engine.timecode import MOST_REORDERED, NO_STAMP, Timeline, parse_seconds, select_frames

if TYPE_CHECKING:
    import numpy.typing as npt
    from av.container import InputContainer
    from av.filter import Graph
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    Picture = npt.NDArray[np.uint8]

_ATTACHED_PICTURE = 0x400  # FFmpeg's disposition flag of cover art
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
# AVColorSpace -> the scale filter's name for that matrix
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
_UNSTATED = 2  # AVCOL_SPC_UNSPECIFIED
_READ_ERRORS = 16  # in a row, before the rest of a damaged file is given up
_TEXT_FORMATS = {"tty"}  # demuxers that would render any text file as a video of a terminal


def open_video(name: str, select: SelectConfig) -> VideoSource:
    """Open a video file. Raises what :func:`probe_video` and :class:`VideoSource` raise."""
    if select.decoder == "nvdec":
        raise DeviceError("decoding with NVDEC is not available in this version; use --decoder auto or pyav")
    return VideoSource(probe_video(name, select.stream), select)


@dataclass(frozen=True, eq=False)
class VideoProbe:
    """What is known of a video file before it is decoded. Serves any number of sources of the same file."""

    path: Path
    stream_index: int  # of the chosen stream, among all streams of the container
    codec: str  # FFmpeg's name of the decoder
    timeline: Timeline
    frame_rate: Fraction  # average frames per second
    stored_size: tuple[int, int]  # (width, height) in pixels before it is turned
    turn: Turn
    duration_s: float | None  # as the container tells
    cut_short: bool  # the file is smaller than it says itself
    notes: tuple[str, ...]

    @property
    def shown_size(self) -> tuple[int, int]:
        """(width, height) in pixels as shown."""
        width, height = self.stored_size
        return (height, width) if self.turn.transpose else (width, height)


class VideoSource:
    """Selected frames of one video stream, in order of presentation.

    A frame that cannot be decoded is left out; the others keep their numbers and times. ``losses`` then tells how
    many, and whether the file itself ends too early.
    """

    def __init__(self, probe: VideoProbe, select: SelectConfig) -> None:
        """Raises TooFewFramesError or UsageError when ``select`` leaves nothing to pair or makes no sense."""
        times_s = probe.timeline.times_s
        self._probe = probe
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
            source=SourceId(probe.path.name, probe.path.stat().st_size, probe.duration_s),
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

    def __iter__(self) -> Iterator[Frame]:
        """Decode. At the end TooFewFramesError when fewer than two came; FrameSizeError when the size changes."""
        if self._iteration is not None:
            raise RuntimeError(f"{self._info.source.name} is already being read; open it again to read it twice")
        self._iteration = self._frames()
        return self._iteration

    def _frames(self) -> Generator[Frame, None, None]:
        given = 0
        convert = _Converter(self._probe)
        with closing(_numbered(self._probe, self._wanted[0])) as numbered:
            for number, picture in numbered:
                if self._closed:
                    return
                if number in self._wanted:
                    rgb = torch.from_numpy(convert(picture, number)).permute(2, 0, 1)
                    yield Frame(rgb, number, float(self._probe.timeline.times_s[number]))
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


# -- Reading ahead: what is in the file --------------------------------------------------------------------------


def probe_video(name: str, stream: int | None = None) -> VideoProbe:
    """Read all packets of a video file and decode its first frame.

    Args:
        name: path of the file.
        stream: which of its video streams, from 0, cover pictures left out; None: FFmpeg's choice.

    Raises:
        SourceNotFoundError: there is no such file.
        UnsupportedSourceError: it is not a video that can be decoded.
        UsageError: it has no such stream.
    """
    path = Path(name)
    with _opened(path) as container:
        chosen, notes = _choose_stream(container, path, stream)
        stamps = array("q")  # eight bytes a frame, also for a whole day of video
        first: VideoFrame | None = None
        for packet in _packets(container, chosen):
            if packet.size and not packet.is_discard and not _is_hidden(packet, chosen):
                stamps.append(NO_STAMP if packet.pts is None else packet.pts)
            if first is None:
                first = next(iter(_decoded(packet)), None)
        if first is None:
            raise UnsupportedSourceError(f"{path.name} holds {len(stamps)} frames, none of which could be decoded")
        rate = chosen.average_rate or chosen.guessed_rate or Fraction(25)
        assert chosen.time_base is not None  # only an encoder's stream may lack it
        timeline = Timeline.from_packets(stamps, chosen.time_base, rate, trusted=container.format.name != "avi")
        turn, turn_notes = Turn.of(first)
        return VideoProbe(
            path=path,
            stream_index=chosen.index,
            codec=chosen.codec_context.name,
            timeline=timeline,
            frame_rate=rate,
            stored_size=(first.width, first.height),
            turn=turn,
            duration_s=None if container.duration is None else container.duration / 1e6,
            cut_short=_is_cut_short(path),
            notes=(*notes, *timeline.notes, *turn_notes, *_colour_notes(first), *_shape_notes(chosen)),
        )


def _opened(path: Path) -> InputContainer:
    if not path.exists():
        raise SourceNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise UnsupportedSourceError(f"{path} is neither a file nor a folder")
    if path.stat().st_size == 0:
        raise UnsupportedSourceError(f"{path.name} is empty")
    try:
        # The prefix keeps FFmpeg from taking "take:2.mp4" for an address.
        container = av.open(f"file:{path}")
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or str(error)
        if isinstance(error, OSError):
            raise UnsupportedSourceError(f"{path.name} cannot be opened: {reason}") from error
        with path.open("rb") as file:
            if file.read(8)[4:] == b"ftyp":
                reason += " (its index, moov, is missing or damaged: was the recording or the download cut off?)"
        raise UnsupportedSourceError(f"{path.name} is not a video that FFmpeg can read: {reason}") from error
    if container.format.name in _TEXT_FORMATS:
        container.close()
        raise UnsupportedSourceError(f"{path.name} is not a video that FFmpeg can read: it looks like text")
    return container


def _choose_stream(container: InputContainer, path: Path, number: int | None) -> tuple[VideoStream, list[str]]:
    videos = [video for video in container.streams.video if not _is_cover(video)]
    if not videos:
        cover = " (only a cover picture)" if container.streams.video else ""
        raise UnsupportedSourceError(f"{path.name} holds no video stream{cover}")
    if number is not None and number >= len(videos):
        plural = "" if len(videos) == 1 else "s"
        raise UsageError(f"stream {number} of {path.name}: it has {len(videos)} video stream{plural}, counted from 0")
    if number is None:
        best = container.streams.best("video")
        number = next((n for n, video in enumerate(videos) if best is not None and video.index == best.index), 0)
    chosen = videos[number]
    if chosen.codec_context is None:
        raise UnsupportedSourceError(f"video stream {number} of {path.name} has a codec that FFmpeg cannot decode")
    return chosen, [f"video stream {number} of {len(videos)} is used"] if len(videos) > 1 else []


def _is_cover(video: VideoStream) -> bool:
    disposition = getattr(video, "disposition", 0)  # PyAV 14 lacks it; 15 to 17 have a Flag, 18 an IntFlag
    return bool(getattr(disposition, "value", disposition) & _ATTACHED_PICTURE)


def _is_hidden(packet: Packet[VideoStream], stream: VideoStream) -> bool:
    """VP8 puts frames that are only referred to, never shown, into packets of their own."""
    return stream.codec_context.name in ("vp8", "libvpx") and not memoryview(packet)[0] & 0x10


def _is_cut_short(path: Path) -> bool:
    """Whether the outermost elements of an MP4/MOV, Matroska/WebM or AVI file reach beyond its end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if head.startswith(b"\x1a\x45\xdf\xa3"):
            return _matroska_end(head) > size
        position = 0
        riff = head.startswith(b"RIFF")
        while position + 8 <= size:
            file.seek(position)
            box = file.read(16)
            kind, length = (box[:4], _riff_length(box)) if riff else (box[4:8], int.from_bytes(box[:4], "big"))
            if length == 1:
                length = int.from_bytes(box[8:16], "big")
            if length < 8 or not kind.isalnum():  # to the end of the file; or not such a file at all
                return False
            position += length
        return position > size


def _riff_length(chunk: bytes) -> int:
    payload = int.from_bytes(chunk[4:8], "little")
    return 8 + payload if payload else 0  # 0 is what a recording leaves that was never finished


def _matroska_end(head: bytes) -> int:
    """Where the segment says it ends; 0 when it does not say (a live recording)."""

    def number(position: int) -> tuple[int | None, int]:
        """A length of 1..8 bytes, the leading zeros of the first telling how many; and where it ends."""
        width = 9 - head[position].bit_length()
        value = int.from_bytes(head[position : position + width], "big") & ~(1 << 7 * width)
        return (None if value == (1 << 7 * width) - 1 else value), position + width

    try:
        length, position = number(4)
        position += length or 0
        if head[position : position + 4] != b"\x18\x53\x80\x67":
            return 0
        length, position = number(position + 4)
    except IndexError:
        return 0
    return 0 if length is None else position + length


# -- Decoding ----------------------------------------------------------------------------------------------------


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """The stream's packets and the empty one that ends them, reading on after a damaged place."""
    errors = 0
    while errors < _READ_ERRORS:
        try:
            for packet in container.demux(stream):
                yield packet
                errors = 0
            return
        except av.FFmpegError:
            errors += 1


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
    with _opened(probe.path) as container:
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
        for packet in _packets(container, stream):
            yield from _decoded(packet) if careful else packet.decode()


def _decoded(packet: Packet[VideoStream]) -> list[VideoFrame]:
    """The frames this packet completes; none when it is damaged. What is missing is counted at the end."""
    try:
        return packet.decode()
    except av.FFmpegError:
        return []


# -- From the decoder's picture to RGB as shown ------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """How a stored picture becomes the one shown: transpose first, then flip."""

    transpose: bool = False
    flip_x: bool = False  # left and right change places
    flip_y: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> tuple[Turn, list[str]]:
        """Read the display matrix, which sends (x, y) to (a x + c y, b x + d y), y down; and what to say about it."""
        side_data: Any = frame.side_data.get("DISPLAYMATRIX")
        if side_data is None:
            return cls(), []
        matrix = np.frombuffer(bytes(side_data), np.int32)
        a, b, c, d = (int(matrix[place]) for place in (0, 1, 3, 4))
        if a and d and not b and not c:
            return cls(False, a < 0, d < 0), []
        if b and c and not a and not d:
            return cls(True, c < 0, b < 0), []
        return cls(), ["the container asks for a rotation by less than a quarter turn: ignored"]

    def __call__(self, picture: Picture) -> Picture:
        """(H, W, 3) as stored -> (H', W', 3) as shown, contiguous."""
        if self.transpose:
            picture = picture.transpose(1, 0, 2)
        if self.flip_x:
            picture = picture[:, ::-1]
        if self.flip_y:
            picture = picture[::-1]
        return np.ascontiguousarray(picture)


class _Converter:
    """Pictures in the decoder's own format -> (H, W, 3) uint8 full-range RGB, as shown.

    FFmpeg's scale filter does it, with matrix and range given outright; its shortcuts are off (full chroma
    interpolation, accurate rounding), which keeps flat colours within one level instead of three.
    """

    def __init__(self, probe: VideoProbe) -> None:
        self._probe = probe
        self._graph: Graph | None = None
        self._made_for: tuple[str, str, str] | None = None

    def __call__(self, frame: VideoFrame, number: int) -> Picture:
        width, height = self._probe.stored_size
        if (frame.width, frame.height) != (width, height):
            raise FrameSizeError(
                f"frame {number} of {self._probe.path.name} is {frame.width}x{frame.height}, "
                f"but the first is {width}x{height}; the size must not change within a source"
            )
        look = (frame.format.name, _matrix(frame), "full" if _is_full_range(frame) else "limited")
        if self._graph is None or look != self._made_for:
            self._graph, self._made_for = _scale_graph(frame, *look[1:]), look
        self._graph.push(frame)
        rgb = self._graph.pull()
        assert isinstance(rgb, av.VideoFrame)
        return self._probe.turn(np.asarray(rgb.to_ndarray(), dtype=np.uint8))


def _scale_graph(frame: VideoFrame, matrix: str, value_range: str) -> Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
    )  # stamps do not matter here
    options = f"in_color_matrix={matrix}:in_range={value_range}:out_range=full"
    # One thread: the decoder has its own, and the model needs the rest.
    scale = graph.add("scale", f"{options}:flags=bilinear+full_chroma_int+accurate_rnd:threads=1")
    graph.link_nodes(source, scale, graph.add("format", "rgb24"), graph.add("buffersink"))
    graph.configure()
    return graph


def _matrix(frame: VideoFrame) -> str:
    """Name of the YUV matrix; where the file states none, that of its time: BT.601 below 720 rows, else BT.709."""
    return _MATRICES.get(frame.colorspace) or ("bt601" if frame.height < 720 else "bt709")


def _is_full_range(frame: VideoFrame) -> bool:
    return frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj") or not _is_yuv(frame)


def _is_yuv(frame: VideoFrame) -> bool:
    """False for RGB, palettes and plain grey, where there is no matrix and all values are used."""
    return not frame.format.is_rgb and not frame.format.name.startswith(("pal8", "gray", "ya", "mono"))


def _colour_notes(frame: VideoFrame) -> list[str]:
    if not _is_yuv(frame) or frame.colorspace in _MATRICES:
        return []
    said = "no colour matrix is stated" if frame.colorspace == _UNSTATED else "the colour matrix is an unusual one"
    return [f"{said}: {_matrix(frame).upper()} is assumed, as players do at {frame.height} rows"]


def _shape_notes(stream: VideoStream) -> list[str]:
    aspect = stream.sample_aspect_ratio
    if aspect is None or aspect in (0, 1):
        return []
    return [f"pixels are not square ({aspect.numerator}:{aspect.denominator}): flow is in stored pixels"]
