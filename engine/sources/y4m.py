"""YUV4MPEG2 on stdin: uncompressed pictures after a line of text, as ``ffmpeg ... -f yuv4mpegpipe -`` writes them.

    YUV4MPEG2 W640 H480 F25:1 Ip A1:1 C420jpeg XCOLORRANGE=LIMITED     the header, a line
    FRAME                                                              a line, then one picture's planes: Y', Cb, Cr
    FRAME                                                              and so on until the stream ends

The number of frames is not known before the end. The writer may pause for any length of time, so the source waits in
short intervals and checks after each whether it has been interrupted.
"""

from __future__ import annotations

import math
import os
import re
import select
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av

from flowreel.engine.config import MOST_FRAMES, SelectConfig
from flowreel.engine.data import FlowInfo, Frame, SourceId
from flowreel.engine.errors import TooFewFramesError, UnsupportedSourceError, UsageError, concerning, counted
from flowreel.engine.sources.kinds import RECIPE
from flowreel.engine.sources.picture import Converter, Turn, colour_notes, field_notes
from flowreel.engine.sources.timecode import parse_seconds, require_no_video_file, require_order

MAGIC = b"YUV4MPEG2"
MARKER = b"FRAME"
LONGEST_LINE = 4096  # bytes of a header or a frame's marker; real ones are far shorter
LONGEST_SIDE = 32_768  # pixels
MOST_FRAME_BYTES = 1 << 30

_TICK_S = 0.2  # the longest single wait
_CHUNK_BYTES = 1 << 16  # what a pipe holds
# Colour tag -> FFmpeg's pixel format, and the chroma sample location if the tag tells it.
_FORMATS = {
    "420": ("yuv420p", "center"),
    "420jpeg": ("yuv420p", "center"),
    "420mpeg2": ("yuv420p", "left"),
    "420paldv": ("yuv420p", "topleft"),
    "411": ("yuv411p", ""),
    "422": ("yuv422p", ""),
    "444": ("yuv444p", ""),
    "444alpha": ("yuva444p", ""),
    "mono": ("gray", ""),
    **{f"{kind}p{bits}": (f"yuv{kind}p{bits}le", "") for kind in ("420", "422", "444") for bits in (9, 10, 12, 14, 16)},
    **{f"mono{bits}": (f"gray{bits}le", "") for bits in (9, 10, 12, 16)},
}
_RANGES = {"FULL": "pc", "LIMITED": "tv"}  # tag -> FFmpeg's name


@dataclass(frozen=True)
class Header:
    """The contents of the first line."""

    width: int  # pixels
    height: int
    rate: Fraction  # frames per second
    colour: str  # a key of ``_FORMATS``
    value_range: str  # "FULL", "LIMITED", or "" if not stated
    notes: tuple[str, ...]  # what was assumed or ignored

    @classmethod
    def parse(cls, line: bytes) -> Header:
        """Read the line without its newline. Raises UnsupportedSourceError naming the part that is wrong."""
        fields: dict[str, str] = {}
        for word in line.decode("ascii", "replace").split()[1:]:
            key, value = (word[0], word[1:]) if word[0] != "X" else word.partition("=")[::2]
            fields[key] = value
        rate, notes = _rate(fields.get("F", ""))
        colour = (fields.get("C") or fields.get("XYSCSS") or "420").lower()
        if colour not in _FORMATS:
            known = ", ".join(_FORMATS)
            raise UnsupportedSourceError(
                f"stdin: pictures of the kind C{colour[:40]} are not known; expected one of {known}"
            )
        interlaced = fields.get("I", "") not in ("", "p", "?")
        return cls(
            width=_side(fields, "W", line),
            height=_side(fields, "H", line),
            rate=rate,
            colour=colour,
            value_range=fields.get("XCOLORRANGE", "").upper(),
            notes=(*notes, *field_notes(interlaced), *_aspect_notes(fields.get("A", "0:0"))),
        )

    @property
    def pixel_format(self) -> str:
        """FFmpeg's name."""
        return _FORMATS[self.colour][0]

    @property
    def frame_bytes(self) -> int:
        """Bytes of one picture: its planes one after another, without gaps."""
        planes = av.VideoFormat(self.pixel_format, self.width, self.height).components
        return sum(plane.width * plane.height * -(-plane.bits // 8) for plane in planes)

    def decoder(self) -> av.VideoCodecContext:
        """FFmpeg's rawvideo decoder, set up as FFmpeg's own ``.y4m`` reader does, so that colours agree."""
        decoder = av.CodecContext.create("rawvideo", "r")
        assert isinstance(decoder, av.VideoCodecContext)
        decoder.width, decoder.height, decoder.pix_fmt = self.width, self.height, self.pixel_format
        said = {"chroma_sample_location": _FORMATS[self.colour][1], "color_range": _RANGES.get(self.value_range, "")}
        decoder.options = {name: value for name, value in said.items() if value}
        return decoder


def _side(fields: dict[str, str], key: str, line: bytes) -> int:
    text = fields.get(key, "")
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not 1 <= int(text) <= LONGEST_SIDE:
        raise UnsupportedSourceError(
            f"stdin: expected {key} with 1 to {LONGEST_SIDE} pixels in the YUV4MPEG2 header, found {_excerpt(line)}"
        )
    return int(text)


def _rate(text: str) -> tuple[Fraction, list[str]]:
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
    if match is not None and int(match[1]) and int(match[2]):
        return Fraction(int(match[1]), int(match[2])), []
    return Fraction(25), ["stdin does not tell its frame rate: 25 frames per second are assumed"]


def _aspect_notes(text: str) -> list[str]:
    across, _, down = text.partition(":")
    return [] if across == down else [f"pixels are not square ({text}): flow is in stored pixels"]


def open_stdin(_: str, select: SelectConfig, device: str = "cpu") -> Y4MSource:
    """Read the header from stdin; waits until it has arrived.

    Raises:
        UsageError: stdin is a terminal, or the selection makes no sense for it.
        UnsupportedSourceError: stdin is closed, empty, or no YUV4MPEG2 that this version can read.
        TooFewFramesError: the selection leaves fewer than two frames, however many arrive.
    """
    require_no_video_file(select, "stdin holds one uncompressed video")
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, ValueError, OSError) as error:  # None, closed, or something without a descriptor
        raise UnsupportedSourceError(f"stdin cannot be read; expected a pipe: {RECIPE}") from error
    if os.isatty(descriptor):
        raise UsageError(f"the source - reads YUV4MPEG2 from a pipe, but stdin is a terminal: try {RECIPE}")
    return Y4MSource(descriptor, select)


def identify(_: str) -> SourceId:
    """See ``Kind``: what will arrive is not known."""
    return SourceId("stdin")


class Y4MSource:
    """Selected frames of a YUV4MPEG2 stream; the others are read and dropped.

    Reading ends with the last frame that ``select`` takes, so the writer may see a broken pipe. A stream that ends
    inside a frame gives the frames before it, and ``losses`` says so.
    """

    def __init__(self, descriptor: int, select: SelectConfig) -> None:
        """Raises what :func:`open_stdin` does. ``descriptor``: a file descriptor, which stays open."""
        self._bytes = _PolledBytes(descriptor)
        self._header = header = _read_header(self._bytes)
        if header.frame_bytes > MOST_FRAME_BYTES:
            raise UnsupportedSourceError(
                f"stdin: frames of {header.width}x{header.height} pixels, C{header.colour}, take "
                f"{header.frame_bytes} bytes each; at most {MOST_FRAME_BYTES} are accepted"
            )
        self._wanted = _wanted(select, header.rate)
        self.losses: list[str] = []
        look = av.VideoFrame(header.width, header.height, header.pixel_format)
        self.notes = [*header.notes, *colour_notes(look)]
        self._started = False
        self.decoder = f"YUV4MPEG2 ({header.colour})"
        self.info = FlowInfo(
            height=header.height,
            width=header.width,
            frame_rate=header.rate / select.step,
            frame_count=None,
            source=SourceId("stdin"),
        )

    def __iter__(self) -> Iterator[Frame]:
        """Raises TooFewFramesError at the end if fewer than two came; UnsupportedSourceError if a marker is missing."""
        if self._started:
            raise RuntimeError("stdin is already being read, and can be read only once")
        self._started = True
        return self._frames()

    def _frames(self) -> Generator[Frame, None, None]:
        import torch

        header = self._header
        convert = Converter("stdin", (header.width, header.height), Turn())
        decoder = header.decoder()
        picture = bytearray(header.frame_bytes)
        number = given = 0
        try:
            while number <= self._wanted[-1] and self._read(picture, number):
                if number in self._wanted:
                    (frame,) = decoder.decode(av.Packet(bytes(picture)))
                    rgb = torch.from_numpy(convert(frame, number)).permute(2, 0, 1)
                    yield Frame(rgb, number, float(number / header.rate))
                    given += 1
                    if not self._bytes.wanted:  # closed meanwhile, even if more has arrived
                        return
                number += 1
        except _Interrupted:
            return
        if given < 2:
            left = "" if given == number else f", of which start, stop and step leave {given}"
            lost = f" ({self.losses[0]})" if self.losses else ""
            raise TooFewFramesError(f"stdin gave {counted(number, 'frame')}{left}{lost}: flow needs at least two")

    def _read(self, picture: bytearray, number: int) -> bool:
        """Reads frame ``number``. False if the stream ends before it, or inside it, which is recorded as a loss."""
        marker = self._bytes.line()
        if not marker:
            return False
        whole = marker.endswith(b"\n")
        if marker.split(maxsplit=1)[:1] == [MARKER] and whole:
            came = self._bytes.into(memoryview(picture))
            if came == len(picture):
                return True
            self.losses.append(f"the stream ends inside frame {number}: {came} of {len(picture)} bytes came")
            return False
        if not whole and (marker.startswith(MARKER) or MARKER.startswith(marker)) and len(marker) < LONGEST_LINE:
            self.losses.append(f"the stream ends inside the marker of frame {number}")
            return False
        with concerning(number):
            raise UnsupportedSourceError(
                f"stdin: expected {MARKER.decode()} before frame {number}, found {_excerpt(marker)}: are the frames "
                f"{self._header.width}x{self._header.height}, C{self._header.colour}, as the header says?"
            )

    def interrupt(self) -> None:
        """Ends the iteration within ``_TICK_S``, even while no data arrives; may be called from any thread."""
        self._bytes.wanted = False

    def close(self) -> None:
        """Does the same; stdin itself stays open, as it belongs to the process."""
        self.interrupt()


def _read_header(stream: _PolledBytes) -> Header:
    expected = MAGIC + b" "
    head = bytearray(len(expected))
    came = stream.into(memoryview(head))  # before the line, so as not to wait for a newline in an MP4
    if not came:
        raise UnsupportedSourceError(f"nothing came on stdin: did the program before the pipe fail? Expected {RECIPE}")
    if head[:came] != expected[:came]:
        raise UnsupportedSourceError(
            f"stdin: expected a stream that begins with {MAGIC.decode()}, found {_excerpt(head[:came])}: "
            f"make it with {RECIPE}"
        )
    line = bytes(head) + stream.line() if came == len(head) else bytes(head[:came])
    if not line.endswith(b"\n"):
        trouble = "ends inside" if len(line) < LONGEST_LINE else f"has more than {LONGEST_LINE} bytes in"
        raise UnsupportedSourceError(f"stdin {trouble} its YUV4MPEG2 header: {_excerpt(line)}")
    return Header.parse(line.rstrip(b"\n"))


def _wanted(select: SelectConfig, rate: Fraction) -> range:
    """Numbers of the frames to give, if they arrive."""
    require_order(select)
    start, stop = (_frame_number(where, rate) for where in (select.start, select.stop))
    assert start is not None
    wanted = range(start, sys.maxsize if stop is None else stop, select.step)
    if len(wanted) < 2:
        left = counted(len(wanted), "frame")
        raise TooFewFramesError(f"start, stop and step leave {left} of stdin: flow needs at least two")
    return wanted


def _frame_number(where: int | str | None, rate: Fraction) -> int | None:
    """First frame at or after ``where``, with the same microsecond of tolerance as for video files.

    At most ``MOST_FRAMES``, which no stream reaches.
    """
    if where is None or isinstance(where, int):
        return where
    number = math.ceil((Fraction(parse_seconds(where)) - Fraction(1, 10**6)) * rate)
    return min(max(number, 0), MOST_FRAMES)


def _excerpt(found: bytes | bytearray) -> str:
    shown = bytes(found[:80].rstrip(b"\n"))
    return f"{shown.decode()!r}" if shown.isascii() and shown.decode().isprintable() else f"{shown[:16]!r}"


# -- Waiting for bytes -------------------------------------------------------------------------------------------


class _Interrupted(Exception):
    """The reading was interrupted."""


class _PolledBytes:
    """Reads a file descriptor, polling it so that no single wait exceeds ``_TICK_S``."""

    def __init__(self, descriptor: int) -> None:
        self.wanted = True  # setting it to False, from any thread, ends every wait
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._ahead = bytearray()  # read, but not yet returned

    def line(self) -> bytes:
        """The next line with its newline. Without a newline, the stream has ended or the line is too long."""
        while (end := self._ahead.find(b"\n", 0, LONGEST_LINE)) < 0 and len(self._ahead) < LONGEST_LINE:
            chunk = bytearray(_CHUNK_BYTES)
            came = self._some(memoryview(chunk))
            if not came:
                break
            self._ahead += chunk[:came]
        length = end + 1 if end >= 0 else min(len(self._ahead), LONGEST_LINE)
        line = bytes(self._ahead[:length])
        del self._ahead[:length]
        return line

    def into(self, target: memoryview) -> int:
        """Fills ``target`` and returns the bytes read, fewer only at the end of the stream."""
        came = min(len(target), len(self._ahead))
        target[:came] = self._ahead[:came]
        del self._ahead[:came]
        while came < len(target):
            more = self._some(target[came:])
            if not more:
                break
            came += more
        return came

    def _some(self, target: memoryview) -> int:
        """Waits for data and reads what is available; returns the bytes read, 0 at the end of the stream."""
        while self.wanted:
            if self._poll.poll(1000 * _TICK_S):
                try:
                    return os.readv(self._descriptor, [target])
                except BlockingIOError:
                    continue  # another reader was quicker
                except OSError as error:
                    raise UnsupportedSourceError(f"stdin cannot be read: {error.strerror or error}") from error
        raise _Interrupted
