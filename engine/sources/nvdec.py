"""Frames of a video file through the GPU's own decoder (NVDEC), as RGB that never leaves the card.

*Why Demuxer + Decoder*, of PyNvVideoCodec's three ways in. Each surface carries the time stamp of its packet, so a
frame's number comes from the same timeline as on the CPU, whatever was dropped or repeated on the way; the stream it
takes and its time base can be compared with ours; it owns no thread. SimpleDecoder numbers frames by counting, takes
the count from the header (which can be wrong, and is 0 for elementary streams), and drops indices silently.
ThreadedDecoder does too, and adds a thread that nobody here could stop and that overwrites surfaces as it runs ahead.

*Surfaces are borrowed.* A surface belongs to the decoder and is overwritten once it is given the next packet. The
conversion to RGB is the one copy. Both run on the decoder's stream: the copy comes before whatever the decoder writes
next, and the CPU waits for neither. The copy's memory is torch's, handed on by the rule of ``engine/device.py``: an
event for whoever reads it, ``record_stream`` for the allocator. That allocator is the pool: a run's frames are all of
one size and the channels bound their number, so after the first few nothing new is allocated, and it alone knows
when every stream has done with a block. A ring of our own would have to learn that from each consumer. Small frames
get one block for several: to ask for memory lets go of the GIL, which a fast run's thread then has to wait for.

*What differs from the CPU.* Both patch damaged pictures up, but the chip does not tell which: there they count as good,
with a line on stdout that cannot be stopped; only what does not come at all is told as lost. And it mends
interlaced pictures, so a file whose first frame is interlaced is left to the CPU; later frames are not looked at.

On a GPU H.264, HEVC (4:4:4 too) and VP9 were seen to give the CPU's frames and times. The rest is tested against a
stand-in (``tests/fakes``) that decodes with PyAV and has the manners of the real package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch
from av import Codec
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from flowreel.engine.device import WorkStream
from flowreel.engine.errors import DeviceError, FlowreelError, FrameSizeError
from flowreel.engine.sources import nvcodec, nvsession
from flowreel.engine.sources.nvsession import Session
from flowreel.engine.sources.pyav import PyAVDecoder
from flowreel.kernels.yuv_to_rgb import SurfacesToRgb

if TYPE_CHECKING:
    from types import ModuleType

    from flowreel.engine.sources.probe import VideoProbe

# FFmpeg's pixel formats whose surfaces are known: NV12 or P016 of 4:2:0, three planes below one another of 4:4:4.
_PIXEL_FORMAT = re.compile(r"yuvj?(420|444)p(?:(10|12)le)?")
_SURFACES = {  # by subsampling, and whether they are of more than 8 bits: the names of these
    ("420", False): "NV12",
    ("420", True): "P016",
    ("444", False): "YUV444",
    ("444", True): "YUV444_16Bit",
}
_BLOCK = 16  # pixels, the side of a macroblock
_TOGETHER, _TOGETHER_BYTES = 8, 16 << 20  # frames of one allocation at most; it lasts as long as any of them


def why_not(probe: VideoProbe, device: str) -> FlowreelError | None:
    """Why NVDEC cannot decode this file on this device, ready to be raised; None: it can, as far as can be known.

    A MissingDependencyError where PyNvVideoCodec does not load, else a DeviceError.
    """
    try:
        codec = nvcodec.load()
    except FlowreelError as error:
        return error
    reason = _unsuitable(codec, probe, _gpu(device))
    return None if reason is None else DeviceError(f"NVDEC cannot decode {probe.path.name}: {reason}")


def _unsuitable(codec: ModuleType, probe: VideoProbe, gpu: int) -> str | None:
    pixels, (width, height) = probe.pixel_format, probe.stored_size
    layout = _layout(pixels.name)
    if layout is None:
        return f"pictures of the kind {pixels.name}"
    chroma, bits = layout
    if chroma == "420" and (width % 2 or height % 2):
        return f"an odd size, {width}x{height}, which its surfaces do not have"
    if probe.interlaced:
        return "it is interlaced, which NVDEC would mend and the CPU leaves as it is"
    try:
        demuxer = codec.CreateDemuxer(filename=nvsession.plain(probe.path))
        kind = demuxer.GetNvCodecId()
        time_base = (demuxer.GetTimebaseNum(), demuxer.GetTimebaseDen())
        stream = demuxer.GetVideoStreamId()
    except Exception as error:  # its own kinds, and plain ones
        return nvcodec.reason(error)
    if stream != probe.stream_index:
        return f"its demuxer takes stream {stream} of the file, not {probe.stream_index}"
    if time_base != (probe.time_base.numerator, probe.time_base.denominator):
        return f"its demuxer counts time in units of {time_base[0]}/{time_base[1]} s, not of {probe.time_base} s"
    try:
        caps = nvcodec.decodes(codec, gpu, kind, chroma, bits)
    except DeviceError as error:
        return f"this GPU cannot be asked about {_format(probe)}: {error}"
    if not (caps.get("supported") and caps.get("num_decoder_engines")):
        return f"this GPU decodes no {_format(probe)} with {chroma} chroma and {bits} bits"
    return _unsuitable_size(caps, width, height)


def _unsuitable_size(caps: dict[str, int], width: int, height: int) -> str | None:
    blocks = -(-width // _BLOCK) * -(-height // _BLOCK)
    least = (caps.get("width_min", 0), caps.get("height_min", 0))
    most = (caps.get("width_max", width), caps.get("height_max", height))
    if width < least[0] or height < least[1]:
        return f"{width}x{height} is smaller than the {least[0]}x{least[1]} it begins with"
    if width > most[0] or height > most[1] or blocks > caps.get("mb_num_max", blocks):
        return f"{width}x{height} is larger than it goes ({most[0]}x{most[1]}, {caps.get('mb_num_max')} macroblocks)"
    return None


def _layout(pixel_format: str) -> tuple[str, int] | None:
    """Subsampling and bits of a pixel format; None where what its surfaces look like is not known."""
    match = _PIXEL_FORMAT.fullmatch(pixel_format)
    return None if match is None else (match[1], int(match[2] or 8))


def _format(probe: VideoProbe) -> str:
    """What the stream is, and not the decoder that FFmpeg has for it: av1, of libdav1d."""
    return Codec(probe.codec, "r").canonical_name


def _gpu(device: str) -> int:
    return torch.device(device).index or 0


class NvdecDecoder:
    """A ``VideoDecoder`` that gives pictures on the GPU.

    A session that fails is never used again. The rest of the file is then decoded on the CPU and said so, or, where
    NVDEC was asked for by name, the failure is raised.
    """

    def __init__(
        self, probe: VideoProbe, device: str, instead: PyAVDecoder | None, say: Callable[[str], object]
    ) -> None:
        """``instead``: who takes over when a session fails; None: nobody. ``say`` takes what the user should know."""
        self._probe = probe
        self._device = torch.device(device)
        self._instead = instead
        self._say = say
        self._stream: WorkStream | None = None
        self._relieved = False  # the CPU has taken over
        self._checked = False  # whether a good surface has come
        self._room: list[Tensor] = []  # for the next frames
        layout = _layout(probe.pixel_format.name)
        assert layout is not None, "why_not() tells"
        self._chroma, self._bits = layout
        pixels = probe.pixel_format
        self._to_rgb = SurfacesToRgb(
            self._planes, matrix=pixels.used_matrix, full_range=pixels.used_range == "full", bits=self._bits
        )

    @property
    def name(self) -> str:
        taken_over = f", then {self._instead.name}" if self._relieved and self._instead is not None else ""
        return f"NVDEC ({_format(self._probe)}){taken_over}"

    def pictures(self, first: int) -> Generator[tuple[int, Any], None, None]:
        """See ``VideoDecoder``."""
        due, why = first, "no more frames came"
        with closing(self._surfaces(first)) as surfaces:
            while True:
                try:
                    number, surface = next(surfaces)
                except StopIteration:
                    if self._instead is None or due >= len(self._probe.timeline):
                        return
                    break  # its demuxer takes a damaged place for the end of the file, PyAV reads on behind it
                except Exception as error:  # of many kinds, plain ones among them
                    why = nvcodec.reason(error)
                    if self._instead is not None:
                        break
                    if isinstance(error, FrameSizeError):
                        raise
                    raise DeviceError(f"NVDEC failed at frame {due} of {self._probe.path.name}: {why}") from error
                if number >= due:
                    yield number, surface
                    due = number + 1
                del surface
        self._relieved = True
        self._say(f"NVDEC failed at frame {due}: {why}. From there on the CPU decoded")
        with closing(self._instead.pictures(due)) as pictures:
            yield from ((number, picture) for number, picture in pictures if number >= due)

    def rgb(self, picture: Any, number: int) -> Tensor:
        """See ``VideoDecoder``."""
        if self._relieved:
            assert self._instead is not None
            return self._instead.rgb(picture, number)
        assert self._stream is not None, "a picture comes from pictures()"
        return self._stream.run(lambda: self._converted(picture))

    def _converted(self, picture: Any) -> Tensor:
        """Reads the surface and writes RGB, both on the decoder's stream."""
        assert self._stream is not None
        turn, (width, height) = self._probe.turn, self._probe.stored_size
        surface = from_dlpack(picture.__dlpack__(stream=self._stream.handle))  # its own stream: nothing to wait for
        if not self._room:
            count = max(1, min(_TOGETHER, _TOGETHER_BYTES // (3 * height * width)))
            size = (width, height) if turn.transpose else (height, width)
            self._room.extend(torch.empty((count, 3, *size), dtype=torch.uint8, device=surface.device).unbind())
        shown = self._room.pop()
        self._to_rgb(surface, shown.transpose(1, 2) if turn.transpose else shown)
        mirrored = [dim for dim, asked in ((2, turn.flip_x), (1, turn.flip_y)) if asked]
        return shown.flip(mirrored) if mirrored else shown

    def _planes(self, surface: Tensor) -> tuple[Tensor, Tensor]:
        """Luma and chroma of a surface, (rows of all planes, W), one below the other."""
        width, height = self._probe.stored_size
        luma, rest = surface[:height], surface[height:]
        interleaved = self._chroma == "420"
        return luma, rest.view(height // 2, -1, 2) if interleaved else rest.view(2, height, width).permute(1, 2, 0)

    def _surfaces(self, first: int) -> Generator[tuple[int, Any], None, None]:
        """Numbered surfaces, from ``first`` or somewhat before it; in rising order, but it may begin once again."""
        codec = nvcodec.load()
        stream = self._stream = WorkStream(self._device)
        try:
            good = yield from self._numbered(nvsession.begin(codec, self._probe, stream, first), stream)
            if not good:
                yield from self._numbered(nvsession.begin(codec, self._probe, stream, 0), stream)
        finally:
            self._room.clear()

    def _numbered(self, session: Session, stream: WorkStream) -> Generator[tuple[int, Any], None, bool]:
        """A session's surfaces with their numbers. Returns False when it cannot begin where it was told to.

        Where key frames lean on others than themselves (an open GOP), the chip may give none before one that does not,
        or such as lean on nothing: so the key frame itself has to come before any that follows it on the screen.
        """
        timeline, last = self._probe.timeline, -1
        awaited = session.key_frame
        try:
            for surface in session.surfaces:
                # Where stamps do not tell, frames are counted: there decoding has begun at the start of the file.
                number = last + 1 if timeline.stamps is None else timeline.number_of(surface.getPTS())
                if number is None or number <= last:
                    continue  # one that an edit list hides, which NVDEC cannot know; or the same again
                if number >= len(timeline):
                    return True
                if awaited is not None and number > awaited:
                    return False
                if number == awaited:
                    awaited = None
                self._check(surface, number)
                yield number, surface
                last = number
            return awaited is None
        finally:
            stream.finish()  # the last conversions still read what the decoder is about to free

    def _check(self, surface: Any, number: int) -> None:
        """Raises DeviceError when not even the first surface is as the probe lets expect, FrameSizeError for others.

        A decoder that cannot give 4:4:4 gives 4:2:0 and says nothing.
        """
        width, height = self._probe.stored_size
        expected = (_SURFACES[self._chroma, self._bits > 8], (height * 3 // (2 if self._chroma == "420" else 1), width))
        got = (surface.format.name, tuple(surface.shape))
        if got != expected:
            raise (FrameSizeError if self._checked else DeviceError)(
                f"frame {number} of {self._probe.path.name} came as {got[0]} of {got[1]}, "
                f"not as {expected[0]} of {expected[1]}"
            )
        self._checked = True
