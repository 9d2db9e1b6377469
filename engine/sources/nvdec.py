"""Frames of a video file through the GPU's hardware decoder (NVDEC), as RGB that never leaves the GPU.

*Why Demuxer + Decoder*, of PyNvVideoCodec's three interfaces. Each surface carries the time stamp of its packet, so
frames are numbered by the same timeline as on the CPU, whatever was dropped or repeated on the way; the demuxer's
stream and time base can be compared with ours; it owns no thread. SimpleDecoder numbers frames by counting, takes the
count from the header (which can be wrong, and is 0 for elementary streams), and drops indices silently. ThreadedDecoder
does the same, and adds a thread that we could not stop and that overwrites surfaces as it runs ahead.

*Surfaces are borrowed.* A surface belongs to the decoder, which overwrites it once it is given the next packet. The
conversion to RGB is the only copy. Both run on the decoder's stream, so the copy precedes whatever the decoder writes
next, and the CPU waits for neither. The copy's memory comes from torch and is handed on as ``engine/device.py``
demands: an event for whoever reads it, ``record_stream`` for the allocator. That allocator is the buffer pool: all
frames of a run have one size and the channels bound their number, so after the first few nothing new is allocated, and
the allocator knows when every stream has finished with a block. A ring buffer of our own would have to learn that from
each consumer. Several small frames share one block, because each allocation releases the GIL, and in a fast run the
thread then has to wait to get it back.

*What differs from the CPU.* Both decoders conceal damage, but NVDEC does not tell in which pictures: they count as
good, with a line on stdout that cannot be suppressed, and only frames that do not come at all are reported as lost. And
PyNvVideoCodec has NVDEC deinterlace interlaced frames of any stream whose header does not rule them out. So a file is
left to the CPU if its header, H.264's or MPEG-2's, allows them, and in other formats if its first frame is one.

On a GPU H.264, HEVC (4:4:4 too) and VP9 were seen to give the CPU's frames and times. The rest is tested against a
stand-in (``tests/fakes``) that decodes with PyAV and behaves like the real package.
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

# FFmpeg's pixel formats whose surface layout is known: NV12 or P016 for 4:2:0, three stacked planes for 4:4:4.
_PIXEL_FORMAT = re.compile(r"yuvj?(420|444)p(?:(10|12)le)?")
_SURFACES = {  # (subsampling, more than 8 bits) -> name of the surface format
    ("420", False): "NV12",
    ("420", True): "P016",
    ("444", False): "YUV444",
    ("444", True): "YUV444_16Bit",
}
_BLOCK = 16  # pixels, the side of a macroblock
_TOGETHER, _TOGETHER_BYTES = 8, 16 << 20  # most frames, and bytes, of one allocation; it lives as long as any of them


def why_not(probe: VideoProbe, device: str) -> FlowreelError | None:
    """Why NVDEC cannot decode this file on this device, ready to be raised; None: nothing is known against it.

    A MissingDependencyError if PyNvVideoCodec does not load, else a DeviceError.
    """
    try:
        codec = nvcodec.load()
    except FlowreelError as error:
        return error
    reason = _unsuitable(codec, probe, torch.device(device).index or 0)
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
        return "its frames are or may become interlaced, which NVDEC would mend and the CPU leaves as it is"
    try:
        demuxer = codec.CreateDemuxer(filename=nvsession.plain(probe.path))
        kind = demuxer.GetNvCodecId()
        time_base = (demuxer.GetTimebaseNum(), demuxer.GetTimebaseDen())
        stream = demuxer.GetVideoStreamId()
    except Exception as error:  # its own types, and plain ones
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
    """Subsampling and bit depth of a pixel format; None if the layout of its surfaces is not known."""
    match = _PIXEL_FORMAT.fullmatch(pixel_format)
    return None if match is None else (match[1], int(match[2] or 8))


def _format(probe: VideoProbe) -> str:
    """Name of the codec, not of FFmpeg's decoder for it: av1, not libdav1d."""
    return Codec(probe.codec, "r").canonical_name


class NvdecDecoder:
    """A ``VideoDecoder`` that gives pictures on the GPU.

    A session that fails is never used again. The rest of the file is then decoded on the CPU, with a note to the user,
    or, if NVDEC was asked for by name, the failure is raised.
    """

    def __init__(
        self, probe: VideoProbe, device: str, instead: PyAVDecoder | None, say: Callable[[str], object]
    ) -> None:
        """``instead``: takes over when a session fails; None: nothing. ``say``: called with notes for the user."""
        self._probe = probe
        self._device = torch.device(device)
        self._instead = instead
        self._say = say
        self._stream: WorkStream | None = None
        self._relieved = False  # the CPU has taken over
        self._checked = False  # whether a surface has passed ``_check``
        self._room: list[Tensor] = []  # allocated for the next frames
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
                    break  # its demuxer takes damage for the end of the file, PyAV reads on after it
                except Exception as error:  # of many types, some plain
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

    def patched(self, picture: Any) -> bool:
        """See ``VideoDecoder``; the chip does not tell."""
        return self._relieved and self._instead is not None and self._instead.patched(picture)

    def interlaced(self, picture: Any) -> bool:
        """See ``VideoDecoder``; of what may be interlaced the chip decodes nothing."""
        return self._relieved and self._instead is not None and self._instead.interlaced(picture)

    def rgb(self, picture: Any, number: int) -> Tensor:
        """See ``VideoDecoder``."""
        if self._relieved:
            assert self._instead is not None
            return self._instead.rgb(picture, number)
        assert self._stream is not None, "a picture comes from pictures()"
        return self._stream.run(lambda: self._converted(picture))

    def _converted(self, picture: Any) -> Tensor:
        """Reads the surface and writes RGB; called on the decoder's stream."""
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
        """Luma and chroma of a surface, which is (rows of all planes, W) with the planes stacked."""
        width, height = self._probe.stored_size
        luma, rest = surface[:height], surface[height:]
        interleaved = self._chroma == "420"
        return luma, rest.view(height // 2, -1, 2) if interleaved else rest.view(2, height, width).permute(1, 2, 0)

    def _surfaces(self, first: int) -> Generator[tuple[int, Any], None, None]:
        """Numbered surfaces, from ``first`` or somewhat before it; in rising order, but it may start over once."""
        codec = nvcodec.load()
        stream = self._stream = WorkStream(self._device)
        try:
            good = yield from self._numbered(nvsession.begin(codec, self._probe, stream, first), stream)
            if not good:
                yield from self._numbered(nvsession.begin(codec, self._probe, stream, 0), stream)
        finally:
            self._room.clear()

    def _numbered(self, session: Session, stream: WorkStream) -> Generator[tuple[int, Any], None, bool]:
        """A session's surfaces with their numbers. Returns False if it could not begin at its key frame.

        In an open GOP the decoder may output nothing before the next closed GOP, or frames whose references are
        missing. So the key frame itself has to come before any frame that is shown after it.
        """
        timeline, last = self._probe.timeline, -1
        awaited = session.key_frame
        try:
            for surface in session.surfaces:
                # Without usable stamps, frames are counted: decoding has then begun at the start of the file.
                number = last + 1 if timeline.stamps is None else timeline.number_of(surface.getPTS())
                if number is None or number <= last:
                    continue  # hidden by an edit list, of which NVDEC does not know; or a repeated frame
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
        """Raises DeviceError if the first surface is not as the probe predicts, FrameSizeError if a later one is not.

        A decoder that cannot give 4:4:4 silently gives 4:2:0.
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
