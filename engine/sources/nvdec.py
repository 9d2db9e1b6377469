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
when every stream has done with a block. A ring of our own would have to learn that from each consumer.

*What is not asked of the demuxer.* It calls 10-bit HEVC 8 bits deep and knows no BT.2020 (seen with 2.2.4), so depth,
matrix, range and rotation come from our own probe. Its ``Seek`` takes the number of a packet and may land anywhere, or
raise: the stamp of the packet it gives decides whether decoding can start there.

Nothing of this has run on a GPU yet: it is tested against a stand-in (``tests/fakes``) that decodes with PyAV.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from flowreel.engine.device import WorkStream, free_bytes
from flowreel.engine.errors import DeviceError, FlowreelError, FrameSizeError
from flowreel.engine.pipeline import OneAtATime
from flowreel.engine.sources import nvcodec
from flowreel.engine.sources.pyav import PyAVDecoder, key_frame_before
from flowreel.engine.timecode import MOST_REORDERED
from flowreel.kernels import yuv_to_rgb

if TYPE_CHECKING:
    from types import ModuleType

    from flowreel.engine.sources.probe import VideoProbe

SESSION_BYTES = 412 << 20  # of device memory that a session was seen to take
LEAST_FREE_BYTES = 2 * SESSION_BYTES  # a session begun with too little has been seen to crash the process
# FFmpeg's pixel formats whose surfaces are known: NV12 or P016 of 4:2:0, three planes below one another of 4:4:4.
_PIXEL_FORMAT = re.compile(r"yuvj?(420|444)p(?:(10|12)le)?")
_BLOCK = 16  # pixels, the side of a macroblock


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
        demuxer = codec.CreateDemuxer(filename=_plain(probe.path))
        kind = demuxer.GetNvCodecId()
        time_base = (demuxer.GetTimebaseNum(), demuxer.GetTimebaseDen())
        stream = demuxer.GetVideoStreamId()
    except Exception as error:  # its own kinds, and plain ones
        return nvcodec.first_line(error)
    if stream != probe.stream_index:
        return f"its demuxer takes stream {stream} of the file, not {probe.stream_index}"
    if time_base != (probe.time_base.numerator, probe.time_base.denominator):
        return f"its demuxer counts time in units of {time_base[0]}/{time_base[1]} s, not of {probe.time_base} s"
    caps = nvcodec.decodes(codec, gpu, kind, chroma, bits)
    if not caps.get("num_decoder_engines"):
        return f"this GPU decodes no {probe.codec} with {chroma} chroma and {bits} bits"
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


def _gpu(device: str) -> int:
    return torch.device(device).index or 0


def _plain(path: Path) -> str:
    """With every folder before it, so that no name is taken for an address."""
    return str(path.absolute())


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
        self._layout = _layout(probe.pixel_format.name)

    @property
    def name(self) -> str:
        taken_over = f", then {self._instead.name}" if self._relieved and self._instead is not None else ""
        return f"NVDEC ({self._probe.codec}){taken_over}"

    def pictures(self, first: int) -> Generator[tuple[int, Any], None, None]:
        """See ``VideoDecoder``."""
        due = first
        with closing(self._surfaces(first)) as surfaces:
            while True:
                try:
                    number, surface = next(surfaces)
                except StopIteration:
                    return
                except Exception as error:  # of many kinds, plain ones among them
                    why = nvcodec.first_line(error)
                    if self._instead is None:
                        raise DeviceError(f"NVDEC failed at frame {due} of {self._probe.path.name}: {why}") from error
                    break
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
        return self._stream.run(lambda: self._converted(picture, number))

    def _converted(self, picture: Any, number: int) -> Tensor:
        """Reads the surface and writes RGB, both on the decoder's stream."""
        assert self._layout is not None
        chroma_kind, bits = self._layout
        pixels, turn, (width, height) = self._probe.pixel_format, self._probe.turn, self._probe.stored_size
        surface = from_dlpack(picture)  # (rows of all planes, W), one below the other
        luma, rest = surface[:height], surface[height:]
        rows = height // 2 if chroma_kind == "420" else 2 * height
        if surface.shape[1] != width or rest.shape[0] != rows:
            raise FrameSizeError(
                f"frame {number} of {self._probe.path.name} came as a surface of {tuple(surface.shape)}, but the first "
                f"is {width}x{height}; the size must not change within a source"
            )
        interleaved = chroma_kind == "420"
        chroma = rest.view(rows, -1, 2) if interleaved else rest.view(2, height, width).permute(1, 2, 0)
        size = (width, height) if turn.transpose else (height, width)
        shown = torch.empty((3, *size), dtype=torch.uint8, device=surface.device)
        out = shown.transpose(1, 2) if turn.transpose else shown
        yuv_to_rgb(luma, chroma, matrix=pixels.used_matrix, full_range=pixels.used_range == "full", bits=bits, out=out)
        mirrored = [dim for dim, asked in ((2, turn.flip_x), (1, turn.flip_y)) if asked]
        return shown.flip(mirrored) if mirrored else shown

    def _surfaces(self, first: int) -> Generator[tuple[int, Any], None, None]:
        """Numbered surfaces in rising order, from ``first`` or somewhat before it."""
        codec = nvcodec.load()
        stream = self._stream = WorkStream(self._device)
        session = _begin(codec, self._probe, stream, first)
        timeline, last = self._probe.timeline, -1
        try:
            for surface in session:
                # Where stamps do not tell, frames are counted: there decoding has begun at the start of the file.
                number = last + 1 if timeline.stamps is None else timeline.number_of(surface.getPTS())
                if number is None or number <= last:
                    continue  # one that an edit list hides, which NVDEC cannot know; or the same again
                if number >= len(timeline):
                    return
                yield number, surface
                last = number
        finally:
            stream.finish()  # the last conversions still read what the decoder is about to free


# -- Sessions ----------------------------------------------------------------------------------------------------


_beginning = OneAtATime()


def _begin(codec: ModuleType, probe: VideoProbe, stream: WorkStream, first: int) -> Iterator[Any]:
    """Surfaces of a new session, from a key frame at or before frame ``first``, else from the start of the file.

    Alone, the first packet included, with which the driver makes the decoder proper: sessions begun by several threads
    at once have been seen to crash. Raises DeviceError when too little device memory is free, and what PyNvVideoCodec
    raises.
    """
    with _beginning:
        return _begun(codec, probe, stream, first)


def _begun(codec: ModuleType, probe: VideoProbe, stream: WorkStream, first: int) -> Iterator[Any]:
    free = free_bytes(stream.device)
    if free < LEAST_FREE_BYTES:
        raise DeviceError(f"{free >> 20} MiB of device memory are free, a session needs {LEAST_FREE_BYTES >> 20}")
    demuxer, packet = _sought(codec, probe, first) or _started(codec, probe)
    decoder = codec.CreateDecoder(
        gpuid=_gpu(str(stream.device)),
        codec=demuxer.GetNvCodecId(),
        cudacontext=0,  # the primary one, which is torch's
        cudastream=stream.handle,
        usedevicememory=True,
    )
    return _rest(demuxer, decoder, decoder.Decode(packet))


def _started(codec: ModuleType, probe: VideoProbe) -> tuple[Any, Any]:
    """A demuxer, and the first packet of the file."""
    demuxer = codec.CreateDemuxer(filename=_plain(probe.path))
    return demuxer, next(iter(demuxer))


def _sought(codec: ModuleType, probe: VideoProbe, first: int) -> tuple[Any, Any] | None:
    """A demuxer, and the packet of a key frame from which ``first`` can be decoded; None: seeking does not find it."""
    if key_frame_before(probe, first) == 0:
        return None
    for aim in (first, first - MOST_REORDERED):  # packets are not in the order of the screen: the first may go too far
        demuxer = codec.CreateDemuxer(filename=_plain(probe.path))
        try:
            packet = demuxer.Seek(max(aim, 0))
        except Exception:  # no index, or not of so many packets
            return None
        landed = probe.timeline.number_of(packet.pts)
        if packet.key and landed is not None and landed <= first:
            return demuxer, packet
    return None


def _rest(demuxer: Any, decoder: Any, surfaces: list[Any]) -> Iterator[Any]:
    """``surfaces`` of the first packet, and those of all that follow."""
    yield from surfaces
    for packet in demuxer:
        yield from decoder.Decode(packet)
        if not packet.bsl:  # the empty packet at the end, which has just made the decoder give what it held
            return
