"""Finds out what is in a video file before it is decoded. The reading of packets here also serves decoding.

``probe_video`` reads all packets once, which is cheap, and decodes only the first frame. That gives the number of
frames, the time of each, where decoding can start, and the pictures' rotation and colour.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.stream import Disposition

from flowreel.engine.errors import SourceNotFoundError, UnsupportedSourceError, UsageError, counted
from flowreel.engine.sources.file_ends import is_cut_short
from flowreel.engine.sources.headers import SecondFields, allows_fields
from flowreel.engine.sources.kinds import RECIPE, as_weights
from flowreel.engine.sources.picture import Turn, colour_notes, field_notes, is_full_range, matrix_of, shape_notes
from flowreel.engine.sources.timecode import MOST_REORDERED, NO_STAMP, Timeline

if TYPE_CHECKING:
    import numpy.typing as npt
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from flowreel.engine.data import Int64Array

_READ_ERRORS = 16  # in a row, after which the rest of a damaged file is given up
_TEXT_FORMATS = {"tty"}  # demuxers that would render any text file as a video of a terminal
# Demuxers of lists, not of videos: FFmpeg would open whatever files a list names, or wait for a playlist to grow.
_LISTS = {"avisynth", "concat", "dash", "hls", "imf", "lavfi", "rtsp", "sdp", "vapoursynth", "webm_dash_manifest"}
_PFM = {"pfm_pipe"}  # a file with floats, mostly flow or depth: FFmpeg would open it as a video of one frame
_FORMATS = ",".join(sorted(av.formats_available - _LISTS - _PFM))
# Before PyAV 19 a tag in another encoding than UTF-8 fails the file; from then on its bytes are kept as surrogates.
_IS_STRICT = hasattr(av.container.InputContainer, "metadata_errors")
_ANY_TAGS: dict[str, Any] = {"metadata_errors": "surrogateescape"} if _IS_STRICT else {}

# FFmpeg's names of the colour code points of ITU-T H.273, from 0; "-": unspecified or unknown.
_RANGES = "- limited full"
_MATRICES = "gbr bt709 - - fcc bt470bg smpte170m smpte240m ycgco bt2020nc bt2020c - - - ictcp"
_PRIMARIES = "- bt709 - - bt470m bt470bg smpte170m smpte240m film bt2020 smpte428 smpte431 smpte432"
_TRANSFERS = (
    "- bt709 - - gamma22 gamma28 smpte170m smpte240m linear log100 log316 iec61966-2-4 bt1361e iec61966-2-1 "
    "bt2020-10 bt2020-12 smpte2084 smpte428 arib-std-b67"
)


@dataclass(frozen=True)
class PixelFormat:
    """How pixels are stored, as the first frame says. None: not stated."""

    name: str  # FFmpeg's: yuv420p, yuv420p10le, ...
    bit_depth: int  # of the deepest component
    matrix: str | None  # FFmpeg's name, as for the next three
    value_range: str | None
    primaries: str | None
    transfer: str | None
    used_matrix: str  # for the conversion to RGB: the stated one, else an assumed one
    used_range: str  # "full" or "limited", likewise

    @classmethod
    def of(cls, frame: VideoFrame, stream: VideoStream) -> PixelFormat:
        context = stream.codec_context
        return cls(
            name=frame.format.name,
            bit_depth=max((component.bits for component in frame.format.components), default=8),
            matrix=_named(_MATRICES, frame.colorspace),
            value_range=_named(_RANGES, frame.color_range),
            primaries=_named(_PRIMARIES, context.color_primaries),
            transfer=_named(_TRANSFERS, context.color_trc),
            used_matrix=matrix_of(frame),
            used_range="full" if is_full_range(frame) else "limited",
        )


def _named(names: str, code: int) -> str | None:
    known = dict(enumerate(names.split())).get(int(code), "-")
    return None if known == "-" else known


@dataclass(frozen=True, eq=False)
class VideoProbe:
    """What is known about a video file before it is decoded. Can be shared by any number of sources of that file."""

    path: Path
    stream_index: int  # of the chosen stream, among all streams of the container
    codec: str  # FFmpeg's name of the decoder
    timeline: Timeline
    key_frames: Int64Array  # (K,) numbers of the key frames, ascending
    seekable: bool  # decoding may begin at a key frame
    pixel_format: PixelFormat
    frame_rate: Fraction  # average frames per second
    time_base: Fraction  # seconds, the unit of the timeline's stamps
    interlaced: bool  # frames hold two fields of different times, or may do so according to ``allows_fields``
    stored_size: tuple[int, int]  # (width, height) in pixels before ``turn``
    turn: Turn
    duration_s: float | None  # as the container states
    cut_short: bool  # the file is shorter than its structure says
    notes: tuple[str, ...]

    @property
    def shown_size(self) -> tuple[int, int]:
        """(width, height) in pixels as shown."""
        width, height = self.stored_size
        return (height, width) if self.turn.transpose else (width, height)

    @property
    def loss(self) -> str:
        """What to say of a file that is cut short."""
        promised = "" if self.duration_s is None else f" of the {self.duration_s:.2f} s it should last"
        return f"the file is cut short: its last frame is at {self.timeline.times_s[-1]:.2f} s{promised}"


def probe_video(name: str, stream: int | None = None) -> VideoProbe:
    """Read all packets of a video file and decode its first frame.

    Args:
        name: path of the file.
        stream: which of its video streams, counted from 0 without cover art; None: FFmpeg's choice.

    Raises:
        SourceNotFoundError: there is no such file.
        UnsupportedSourceError: it is not a video that can be decoded.
        UsageError: it has no such stream.
    """
    path = Path(name)
    with opened(path) as container:
        chosen, notes = _choose_stream(container, path, stream)
        chosen.thread_count = 1  # enough for one frame, and there where the system allows no more threads
        shown, decoding, is_key = array("q"), array("q"), bytearray()  # 17 bytes a frame: a whole day of video fits
        first: VideoFrame | None = None
        hidden = _Hidden(chosen)
        for packet in packets(container, chosen):
            if packet.size and not hidden.holds(packet) and not packet.is_discard:
                shown.append(NO_STAMP if packet.pts is None else packet.pts)
                decoding.append(NO_STAMP if packet.dts is None else packet.dts)
                is_key.append(packet.is_keyframe)
            if first is None:
                first = next(iter(decoded(packet)), None)
        if first is None:
            raise UnsupportedSourceError(
                f"{path.name} holds {counted(len(shown), 'frame')}, none of which could be decoded"
            )
        kept = ~_unfounded(np.asarray(shown), np.flatnonzero(is_key), first)
        if left_out := int(np.count_nonzero(~kept)):
            frames = "1 frame references" if left_out == 1 else f"{left_out} frames reference"
            notes.append(f"{frames} what came before the start of the file, and cannot be decoded: left out")
        stamps, decoding_stamps = np.asarray(shown)[kept], np.asarray(decoding)[kept]
        keys = np.flatnonzero(np.asarray(is_key)[kept])
        average, stated = chosen.average_rate, chosen.guessed_rate
        if (stamps == NO_STAMP).all():  # an elementary stream: its average rate is made up by FFmpeg
            average, stated = stated, average
        assert chosen.time_base  # only an encoder's stream may have none
        exact = average or stated or 25, chosen.time_base  # of PyAV's own class from PyAV 19 on, Fractions before
        rate, time_base = (Fraction(number.numerator, number.denominator) for number in exact)
        if hidden.has_fields:
            rate = _in_frames(rate, stamps, time_base)
        trusted = _tells_presentation(container, chosen, stamps, decoding_stamps, len(keys))
        timeline = Timeline.from_packets(stamps, time_base, rate, decoded=decoding_stamps, keys=keys, trusted=trusted)
        # Where an AVI's index is damaged, FFmpeg marks all its packets as key frames.
        keys_hold = container.format.name != "avi" or chosen.codec_context.codec.intra_only
        turn, turn_notes = Turn.of(first)
        interlaced = bool(first.interlaced_frame) or hidden.has_fields
        look_notes = (*colour_notes(first), *field_notes(interlaced), *shape_notes(chosen))
        return VideoProbe(
            path=path,
            stream_index=chosen.index,
            codec=chosen.codec_context.name,
            timeline=timeline,
            key_frames=keys if timeline.stamps is None else np.sort(np.searchsorted(timeline.stamps, stamps[keys])),
            seekable=timeline.stamps is not None and keys_hold,
            pixel_format=PixelFormat.of(first, chosen),
            frame_rate=rate,
            time_base=time_base,
            interlaced=interlaced or allows_fields(chosen.codec_context.name, chosen.codec_context.extradata),
            stored_size=(first.width, first.height),
            turn=turn,
            duration_s=None if container.duration is None else container.duration / 1e6,
            cut_short=is_cut_short(path),
            notes=(*notes, *timeline.notes, *turn_notes, *look_notes),
        )


def _unfounded(stamps: Int64Array, keys: Int64Array, first: VideoFrame) -> npt.NDArray[np.bool_]:
    """Which frames are shown before the first key frame, where that one is the first to be decoded: (T,).

    A recording that was cut out of a longer one may begin inside a group of pictures, or with the key frame of an open
    one, whose B-frames may be shown before it. All these reference what is not in the file; decoders drop them.
    """
    none = np.zeros(len(stamps), bool)
    if not len(keys) or (stamps == NO_STAMP).any() or first.pts != stamps[keys[0]]:
        return none
    key = keys[0]
    before = stamps < stamps[key]
    end = min([*keys[1:2], key + MOST_REORDERED + 1])  # farther on they would be of another, joined recording
    return none if before[end:].any() else before


def _tells_presentation(
    container: InputContainer, stream: VideoStream, stamps: Int64Array, decoding: Int64Array, keys: int
) -> bool:
    """Whether the packets' presentation stamps are what they are called.

    AVI stores only the decoding order, which is the same for codecs that never reorder. Other files may lack them too,
    though frames are reordered: in FFmpeg's MXF they repeat the decoding stamps, and for H.264 in ASF FFmpeg makes up
    some that rise from packet to packet.
    """
    kind, codec = container.format.name, stream.codec_context
    if kind == "avi":
        return not codec.codec.reorder
    in_file_order = kind == "asf" and bool((np.diff(stamps) >= 0).all())
    reordered = codec.has_b_frames and keys < len(stamps)
    return not (reordered and (in_file_order or np.array_equal(stamps, decoding)))


def _in_frames(rate: Fraction, stamps: Int64Array, time_base: Fraction) -> Fraction:
    """The average rate of a stream whose fields are packets: MP4 states it in fields, other containers in frames."""
    known = np.sort(stamps[stamps != NO_STAMP])
    gap = float(np.median(np.diff(known))) if len(known) > 1 else 0.0
    return rate / 2 if rate * time_base * gap > 1.5 else rate


# -- The container and its packets -------------------------------------------------------------------------------


def opened(path: Path) -> InputContainer:
    """The open container; the caller closes it. Raises SourceNotFoundError or UnsupportedSourceError."""
    if not path.exists():
        pattern = re.sub(r"%0?\d*d", "*", str(path))
        hint = "" if pattern == str(path) else f"; images are named by their folder, or by a quoted glob: '{pattern}'"
        raise SourceNotFoundError(f"there is no file {path}{hint}")
    if not path.is_file():
        hint = f"; what comes through a pipe is read from -, as YUV4MPEG2: {RECIPE}" if _is_pipe(path) else ""
        raise UnsupportedSourceError(f"{path} is neither a file nor a folder{hint}")
    if path.stat().st_size == 0:
        raise UnsupportedSourceError(f"{path.name} is empty")
    try:
        # The prefix keeps FFmpeg from taking "take:2.mp4" for a URL.
        container: InputContainer = av.open(f"file:{path}", "r", options={"format_whitelist": _FORMATS}, **_ANY_TAGS)
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or str(error)
        if isinstance(error, OSError):
            raise UnsupportedSourceError(f"{path.name} cannot be opened: {reason}") from error
        with path.open("rb") as file:
            head = file.read(8)
        if head[4:] == b"ftyp":
            reason += " (its index, moov, is missing or damaged: was the recording or the download cut off?)"
        if head.startswith((b"#EXTM3U", b"ffconcat")):
            reason = "it is a list of other files; name one of those"
        if head.startswith((b"PF\n", b"Pf\n")):
            reason = "it is a PFM file, which flowreel does not read; convert flow in such files to .flo"
        reason = as_weights(path.name) or reason
        raise UnsupportedSourceError(f"{path.name} is not a video that FFmpeg can read: {reason}") from error
    if container.format.name in _TEXT_FORMATS:
        container.close()
        raise UnsupportedSourceError(f"{path.name} is not a video that FFmpeg can read: it looks like text")
    return container


def _is_pipe(path: Path) -> bool:
    return path.is_fifo() or path.is_socket() or path.is_char_device()


def _choose_stream(container: InputContainer, path: Path, number: int | None) -> tuple[VideoStream, list[str]]:
    videos = [video for video in container.streams.video if not is_cover(video)]
    if not videos:
        cover = " (only a cover picture)" if container.streams.video else ""
        raise UnsupportedSourceError(f"{path.name} holds no video stream{cover}")
    if number is not None and number >= len(videos):
        have = counted(len(videos), "video stream")
        raise UsageError(f"stream {number} of {path.name}: it has {have}, counted from 0")
    if number is None:
        best = container.streams.best("video")
        number = next((n for n, video in enumerate(videos) if best is not None and video.index == best.index), 0)
    chosen = videos[number]
    if chosen.codec_context is None:
        raise UnsupportedSourceError(f"video stream {number} of {path.name} has a codec that FFmpeg cannot decode")
    return chosen, [f"video stream {number} of {len(videos)} is used"] if len(videos) > 1 else []


def is_cover(video: VideoStream) -> bool:
    return bool(video.disposition & Disposition.attached_pic)


def packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """The stream's packets and the empty one that ends them. Reads on after damage."""
    errors = 0
    while errors < _READ_ERRORS:
        try:
            for packet in container.demux(stream):
                yield packet
                errors = 0
            return
        except av.FFmpegError:
            errors += 1


class _Hidden:
    """Finds the packets that give no frame of their own; to be asked about every packet in file order.

    VP8 puts frames that are never shown, but used as references, in packets of their own. H.264: see ``SecondFields``.
    """

    def __init__(self, stream: VideoStream) -> None:
        codec = stream.codec_context
        self._is_vp8 = codec.name in ("vp8", "libvpx")
        self._second_fields = SecondFields(codec.extradata) if codec.name == "h264" else None

    @property
    def has_fields(self) -> bool:
        """Whether any picture so far is known to be a field."""
        return self._second_fields is not None and self._second_fields.any_field

    def holds(self, packet: Packet[VideoStream]) -> bool:
        if self._second_fields is not None:
            return self._second_fields.holds(memoryview(packet), packet.is_keyframe)
        return self._is_vp8 and not memoryview(packet)[0] & 0x10


def decoded(packet: Packet[VideoStream]) -> list[VideoFrame]:
    """The frames this packet completes; none if it is damaged. The source counts the missing ones when it ends."""
    try:
        return packet.decode()
    except av.FFmpegError:
        return []
