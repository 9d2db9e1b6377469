"""Writes pictures to an H.264 file through FFmpeg, for the colour video and the demo's clip.

A GPU's encoder (NVENC) is used through FFmpeg, too, as one more encoder. PyNvVideoCodec would give a raw stream, which
needs FFmpeg all the same for its headers, timestamps and the order of frames in a container.

x264's own threads each encode one frame, and wait for rows of the one before it. Where pictures have few rows for many
threads, several encoders each encode short parts of the video instead, every part from a key frame on, independently.
There are no B-frames: moving flow was not seen to gain from them (half the speed, the same size), and without them
nothing is reordered, so that the parts are simply concatenated. Of smooth flow with many rows x264's own threads
encoded more, in files a third smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import av.logging
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from flowreel.engine.errors import OutputWriteError
from flowreel.engine.publish import remove, write_errors
from flowreel.sinks.parallel import MOST_BYTES, OrderedPool

if TYPE_CHECKING:
    import numpy.typing as npt

CONTAINERS = {".mp4": ("mp4", {"movflags": "+faststart"}), ".mkv": ("matroska", {})}
ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first one that this FFmpeg has
NVENC = "h264_nvenc"
PART = 16  # frames. Key frames this often make files of most flow 1 % larger, of smooth flow half as large again
MACROBLOCK = 16  # pixels per side
ROWS_OF_A_THREAD = 3  # macroblocks; fewer: parts. x264's threads beat parts at 4.5; 1.9 was not timed without B-frames
# keyint_min: only one key frame per part. Key frames are numbered alternately, from the beginning again in each part,
# and two consecutive key frames, the second being the next part's, must not have the same number.
_X264 = {"crf": "18", "preset": "veryfast", "bf": "0", "keyint_min": str(PART)}
_FALLBACK_RATE = Fraction(25)
_MATROSKA_TICKS = 1_000  # per second; finer times would be rounded to these, and two could coincide
_FINEST_TICKS = 60_000  # per second; MPEG-4 part 2 allows 65535, and the usual frame rates divide it
_LONGEST_TICKS = (1 << 31) - 2  # of one frame: FFmpeg writes no longer one to an .mp4
_CONVERTS_IN_THREADS = int(av.__version__.split(".")[0]) >= 18  # older PyAVs use one, and have no such argument
# Meant to look like crf 18; not looked at yet. NVENC's presets use B-frames, for each of which older FFmpegs allow one
# tick of our fine clock instead of one frame: a frame would be decoded after it is shown, which no container accepts.
_NVENC_OPTIONS = {"preset": "p4", "tune": "hq", "rc": "constqp", "qp": "20", "bf": "0"}
_BT709 = 1  # FFmpeg's number for it among matrices, primaries and transfer curves alike


class VideoWriter:
    """One video file being written: pictures with times go in, yuv420p BT.709 limited range comes out."""

    def __init__(
        self,
        path: Path,
        suffix: str,
        height: int,
        width: int,
        frame_rate: Fraction | None,
        *,
        gpu: int | None = None,
        threads: int = 1,
    ) -> None:
        """gpu: number of the GPU whose NVENC encodes, see ``why_no_nvenc``. threads: for encoding on the CPU."""
        rate = frame_rate if frame_rate is not None and frame_rate > 0 else _FALLBACK_RATE
        self.codec = NVENC if gpu is not None else next(name for name in ENCODERS if _has_encoder(name))
        self.fallback: str | None = None  # what to tell the user where the best encoder is missing
        if self.codec not in (NVENC, ENCODERS[0]):
            self.fallback = f"encoded with {self.codec}, as this FFmpeg has no {ENCODERS[0]}"
        self.frames = 0
        self._gpu = gpu
        self._threads = threads
        self._part: list[av.VideoFrame] = []  # the part being filled
        few_rows = -(-height // MACROBLOCK) < threads * ROWS_OF_A_THREAD
        all_fit = threads * PART * height * width * 3 // 2 <= MOST_BYTES
        in_parts = self.codec == "libx264" and threads > 1 and few_rows and all_fit
        self._parts: OrderedPool[list[av.Packet[Any]]] | None = OrderedPool(self._mux, threads) if in_parts else None
        self._ticks = _MATROSKA_TICKS if suffix == ".mkv" else _ticks_per_second(rate)
        self._frame_ticks = max(1, round(self._ticks / rate))
        self._zero_s: float | None = None  # the source's time at tick 0
        self._last_tick = -1
        self._padding = ((0, height % 2), (0, width % 2), (0, 0))
        self._to_yuv = VideoReformatter()
        container_format, options = CONTAINERS[suffix]
        # The unfinished name does not reveal the format, so it is given. The prefix keeps FFmpeg from taking
        # "take:2.mp4" for a URL.
        self._container = av.open(f"file:{path}", "w", format=container_format, options=options)
        try:
            self._open_stream(rate, height + height % 2, width + width % 2)
        except BaseException:
            self._container.close()
            remove(path, ignore_errors=True)
            raise

    def _open_stream(self, rate: Fraction, height: int, width: int) -> None:
        bit_rate = max(1_000_000, int(height * width * rate / 4))  # generous, for encoders without constant quality
        quality = _X264 if self.codec == "libx264" else {"b": str(bit_rate)}
        options = quality if self._gpu is None else _nvenc_options(self._gpu)
        stream = self._container.add_stream(self.codec, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        self._stream = stream
        self._set_up(stream.codec_context, height, width)
        stream.time_base = stream.codec_context.time_base
        stream.codec_context.thread_count = self._threads if self._parts is None else 1
        stream.codec_context.thread_type = "AUTO"  # by frames, where it can; PyAV's default is by slices of one
        self._container.start_encoding()  # opens the encoder and writes the header: what can fail early fails now

    def _set_up(self, context: av.VideoCodecContext, height: int, width: int) -> None:
        context.height, context.width, context.pix_fmt = height, width, "yuv420p"
        context.time_base = Fraction(1, self._ticks)
        context.color_range = ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = _BT709

    def encode(self, picture: npt.NDArray[np.uint8], time_s: float) -> None:
        """Takes a picture to be shown from ``time_s`` seconds on; the video begins at the first one's time.

        (H, W, 3) uint8 RGB, or (h * 3 / 2, w) uint8 as ``painting.yuv420`` makes it.
        """
        planes = picture.ndim == 2
        frame = av.VideoFrame.from_ndarray(picture, format="yuv420p") if planes else self._converted(picture)
        frame.pts = self._tick(time_s)
        frame.time_base = Fraction(1, self._ticks)
        self.frames += 1
        if self._parts is None:
            self._container.mux(self._stream.encode(frame))
            return
        self._part.append(frame)
        if len(self._part) == PART:
            self._encode_part()

    def _encode_part(self) -> None:
        part, self._part = self._part, []
        nbytes = sum(plane.buffer_size for frame in part for plane in frame.planes)
        assert self._parts is not None
        self._parts.submit(partial(self._encoded, part), nbytes=nbytes)

    def _encoded(self, part: list[av.VideoFrame]) -> list[av.Packet[Any]]:
        """Encodes a part with an encoder of its own, set up like the stream's, whose header the file has."""
        context = self._encoder_of_part()
        packets = [packet for frame in part for packet in context.encode(frame)]
        return packets + context.encode(None)

    def _encoder_of_part(self) -> av.VideoCodecContext:
        like = self._stream.codec_context
        context = av.CodecContext.create(self.codec, "w")
        assert isinstance(context, av.VideoCodecContext)
        self._set_up(context, like.height, like.width)
        context.framerate, context.options, context.flags = like.framerate, _X264, like.flags
        context.thread_count = 1
        return context

    def _mux(self, packets: list[av.Packet[Any]]) -> None:
        for packet in packets:
            packet.stream = self._stream
        self._container.mux(packets)

    def _converted(self, colors: npt.NDArray[np.uint8]) -> av.VideoFrame:
        padded = np.pad(colors, self._padding, mode="edge") if any(map(any, self._padding)) else colors
        return self._to_yuv.reformat(
            av.VideoFrame.from_ndarray(padded, format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.AREA,  # each chroma the mean of 2x2 pixels, as ``painting.yuv420`` makes it
            **({"threads": self._threads} if _CONVERTS_IN_THREADS else {}),
        )

    def finish(self) -> None:
        """Flushes the encoder, writes the index and closes the file."""
        if self._parts is None:
            self._container.mux(self._stream.encode(None))
        else:
            if self._part:
                self._encode_part()
            self._parts.drain()
            self._parts.close()
        self._container.close()

    def discard(self) -> None:
        """Closes the file, whose contents no longer matter."""
        if self._parts is not None:
            self._parts.close()
        self._part.clear()
        with suppress(OSError, av.FFmpegError):
            self._container.close()

    def _tick(self, time_s: float) -> int:
        """Presentation time in ticks, from 0. Always later than the one before, or players refuse the file.

        A frame that would be shown for too long ends early, and so do the next ones until they are in step again.
        """
        wanted = self._last_tick + self._frame_ticks if self._last_tick >= 0 else 0
        if math.isfinite(time_s):
            if self._zero_s is None:
                self._zero_s = time_s - wanted / self._ticks
            wanted = round((time_s - self._zero_s) * self._ticks)
        self._last_tick = min(max(wanted, self._last_tick + 1), self._last_tick + _LONGEST_TICKS)
        return self._last_tick


def _ticks_per_second(rate: Fraction) -> int:
    """The finest clock in which a frame at ``rate`` lasts a whole number of ticks, so that no rounding drifts."""
    times = min(_FINEST_TICKS // rate.numerator, _LONGEST_TICKS // rate.denominator)
    return rate.numerator * times if times else _FINEST_TICKS


def why_no_nvenc(gpu: int, height: int, width: int) -> str | None:
    """Why GPU number ``gpu`` cannot encode pictures of this size, in FFmpeg's words; None: it was tried and can."""
    if not _has_encoder(NVENC):
        return f"this FFmpeg has no {NVENC}"
    context = av.CodecContext.create(NVENC, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.height, context.width, context.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
    context.time_base = 1 / _FALLBACK_RATE
    context.options = _nvenc_options(gpu)
    level, (errors_before, _) = av.logging.get_level(), av.logging.get_last_error()
    av.logging.set_level(av.logging.ERROR)  # otherwise the error is only a number
    try:
        with av.logging.Capture():  # and keeps it from stderr
            context.open()
    except av.FFmpegError as error:
        errors, last = av.logging.get_last_error()
        return last[2].strip() if last and errors > errors_before else str(error)
    finally:
        av.logging.set_level(level)
    return None


def _nvenc_options(gpu: int) -> dict[str, str]:
    return {**_NVENC_OPTIONS, "gpu": str(gpu)}


def _has_encoder(name: str) -> bool:
    try:
        av.Codec(name, "w")
    except ValueError:
        return False
    return True


@contextmanager
def video_write_errors(path: Path) -> Iterator[None]:
    """Turns errors of FFmpeg or the operating system on writing ``path`` into OutputWriteError."""
    with write_errors(path):
        try:
            yield
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise OutputWriteError(f"cannot write {path}: {error}") from error
