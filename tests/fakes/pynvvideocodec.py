"""A stand-in for PyNvVideoCodec 2.2.4: its signatures and its manners, with PyAV decoding underneath, on the CPU.

The signatures and the demuxer's manners were taken from the real package, whose demuxer runs without a GPU; those of
the decoder from its documentation, and await a GPU:

- one packet object, filled anew for each packet; its bytes are gone when the next one is asked for;
- an empty packet at the end, which makes the decoder give what it holds; packets of hidden frames come like all others;
- ``BitDepth`` 8 and no matrix, whatever the stream; ``Seek`` takes a packet's number, lands on a key frame or raises;
- surfaces are the decoder's own and overwritten at the next ``Decode``: here they are also filled with junk, at once;
- errors are ``PyNvVCException``, whose message goes on for lines; a session that failed must not be used again.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch

NO_STAMP = -(1 << 63)
PITCH = 24  # samples that the rows of a surface are longer than the picture
JUNK = 0xAA


class PyNvVCException(Exception):
    pass


class PyNvVCExceptionUnsupported(Exception):
    pass


cudaVideoCodec = enum.Enum("cudaVideoCodec", "MPEG1 MPEG2 MPEG4 VC1 H264 JPEG HEVC VP8 VP9 AV1 NumCodecs")
cudaVideoChromaFormat = enum.Enum("cudaVideoChromaFormat", "Monochrome 420 422 444")
OutputColorType = enum.Enum("OutputColorType", "NATIVE RGB RGBP")
DisplayDecodeLatencyType = enum.Enum("DisplayDecodeLatencyType", "NATIVE LOW ZERO")
Pixel_Format = enum.Enum("Pixel_Format", "NV12 YUV444 P016 YUV444_16Bit NV16 P216 RGB RGBP")

_CODECS = {
    "h264": cudaVideoCodec.H264,
    "hevc": cudaVideoCodec.HEVC,
    "libdav1d": cudaVideoCodec.AV1,
    "vp8": cudaVideoCodec.VP8,
    "vp9": cudaVideoCodec.VP9,
    "mpeg4": cudaVideoCodec.MPEG4,
    "mpeg2video": cudaVideoCodec.MPEG2,
}


def _error(where: str, what: str) -> PyNvVCException:
    return PyNvVCException(f"{where} : \nError code : 1\nError Type : {what}\nat /project/somewhere.h:1752\n")


class PacketData:
    """What the demuxer gives and the decoder takes."""

    def __init__(self) -> None:
        self.key = self.pts = self.dts = self.pos = self.bsl = self.bsl_data = self.duration = 0
        self.decode_flag = self.discardable = self.stream_index = 0
        self.memory: tuple[av.Packet, bytes] | None = None  # what bsl_data points to, and the stream's header


@dataclass
class Behaviour:
    """What the stand-in does beside decoding, and what it has seen."""

    caps: dict[str, int] = field(
        default_factory=lambda: {
            "num_decoder_engines": 7,
            "width_min": 48,
            "height_min": 16,
            "width_max": 8192,
            "height_max": 8192,
            "mb_num_max": 262144,
        }
    )
    engines_for: set[tuple[str, str, int]] | None = None  # (codec, chroma, bits) that are decoded; None: all
    fail_at: int | None = None  # number of the packet at which a session fails, from 0
    fail_bare: bool = False  # with a plain Exception, as some of it does
    dropped: frozenset[int] = frozenset()  # stamps whose frames never come
    packets: int | None = None  # that come before the demuxer finds the file broken
    seek_error: bool = False
    seek_shift: int = 0  # packets by which a seek misses the key frame
    seek_late: bool = False  # it lands on the last key frame
    stream_id: int | None = None
    time_base: Fraction | None = None
    log: list[str] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)  # what each was created with
    alive: int = 0  # sessions that still hold memory


class Demuxer:
    """PyNvDemuxer."""

    def __init__(self, behaviour: Behaviour, filename: str) -> None:
        self._behaviour = behaviour
        try:
            self._container = av.open(filename)
        except (av.FFmpegError, OSError) as error:
            raise _error("CreateFormatContext", f'avformat_open_input returned error " {error}"') from error
        stream = self._container.streams.best("video")
        assert isinstance(stream, av.VideoStream)
        self._stream = stream
        self._packets: Iterator[Any] | None = None
        self._packet = PacketData()
        self._number = 0
        self._ended = False

    def __del__(self) -> None:
        if hasattr(self, "_container"):
            self._container.close()

    def __iter__(self) -> Demuxer:
        return self

    def __next__(self) -> PacketData:
        if self._ended:
            raise StopIteration
        if self._packets is None:
            self._packets = self._container.demux(self._stream)
        number, self._number = self._number, self._number + 1
        broken = self._behaviour.packets is not None and number >= self._behaviour.packets
        given = None if broken else next((packet for packet in self._packets if packet.size), None)
        self._ended = given is None
        return self._fill(given)

    def _fill(self, given: Any) -> PacketData:
        packet = self._packet
        vars(packet).update(vars(PacketData()))  # its memory is gone
        if given is not None:
            packet.key, packet.bsl, packet.discardable = int(given.is_keyframe), given.size, int(given.is_discard)
            packet.pts, packet.dts = (NO_STAMP if stamp is None else stamp for stamp in (given.pts, given.dts))
            plain = av.Packet(bytes(given))  # without the mark of a hidden frame: the chip knows of none
            plain.pts, plain.dts, plain.time_base = given.pts, given.dts, given.time_base
            packet.memory = (plain, self._stream.codec_context.extradata or b"")
        return packet

    def Seek(self, index: int) -> PacketData:
        self._behaviour.log.append(f"seek {index}")
        stamps = [packet.pts for packet in self._demuxed() if packet.size]
        if self._behaviour.seek_error or index >= len(stamps) or None in stamps:
            raise _error("Seek", "Seek target index is out of range (no matching index entry).")
        keys = [n for n, packet in enumerate(self._demuxed()) if packet.is_keyframe]
        place = keys[-1] if self._behaviour.seek_late else max(n for n in keys if n <= index)
        place += self._behaviour.seek_shift
        self._packets = (packet for n, packet in enumerate(self._demuxed()) if n >= place)
        return next(self)

    def _demuxed(self) -> Iterator[Any]:
        self._container.seek(0)
        return self._container.demux(self._stream)

    def GetNvCodecId(self) -> cudaVideoCodec:
        return _CODECS.get(self._stream.codec_context.name, cudaVideoCodec.NumCodecs)

    def GetTimebaseNum(self) -> int:
        return (self._behaviour.time_base or self._stream.time_base).numerator

    def GetTimebaseDen(self) -> int:
        return (self._behaviour.time_base or self._stream.time_base).denominator

    def GetVideoStreamId(self) -> int:
        return self._stream.index if self._behaviour.stream_id is None else self._behaviour.stream_id

    def BitDepth(self) -> int:
        return 8


class DecodedFrame:
    """A surface of the decoder's, lent until the next ``Decode``."""

    def __init__(self, surface: np.ndarray, stamp: int) -> None:
        self._surface = surface
        self._stamp = stamp

    def getPTS(self) -> int:
        return self._stamp

    @property
    def shape(self) -> list[int]:
        return list(self._surface.shape)

    def __dlpack__(self, stream: object = 0) -> object:
        return torch.from_numpy(self._surface).__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # the CPU; the real one: (2, gpu)


class Decoder:
    """PyNvDecoder."""

    def __init__(self, behaviour: Behaviour, codec: cudaVideoCodec) -> None:
        self._behaviour = behaviour
        self._name = next(name for name, kind in _CODECS.items() if kind is codec)
        self._context: Any = None
        self._surfaces: list[np.ndarray] = []
        self._count = 0
        self._failed = False
        behaviour.alive += 1

    def __del__(self) -> None:
        self._behaviour.alive -= 1
        self._behaviour.log.append("freed")

    def Decode(self, packet: PacketData) -> list[DecodedFrame]:
        assert not self._failed, "a session that failed is used again"
        for surface in self._surfaces:
            surface[:] = JUNK
        count, self._count = self._count, self._count + 1
        if count == self._behaviour.fail_at:
            self._failed = True
            raise Exception("HW decoder faced error") if self._behaviour.fail_bare else _error("Decode", "it is broken")
        frames = [frame for frame in self._decoded(packet) if frame.pts not in self._behaviour.dropped]
        return [self._lent(place, frame) for place, frame in enumerate(frames)]

    def _decoded(self, packet: PacketData) -> list[Any]:
        if not packet.bsl:
            return [] if self._context is None else list(self._context.decode(None))
        memory = packet.memory
        assert memory is not None
        if self._context is None:
            self._context = av.CodecContext.create(self._name, "r")
            self._context.extradata = memory[1]
            self._context.thread_count = 1
        try:
            return list(self._context.decode(memory[0]))
        except av.FFmpegError:
            return []  # the chip gives something or nothing, and no error

    def _lent(self, place: int, frame: Any) -> DecodedFrame:
        planes = _planes(frame)
        while len(self._surfaces) <= place or self._surfaces[place].shape != planes.shape:
            del self._surfaces[place:]
            rows, width = planes.shape
            self._surfaces.append(np.full((rows, width + PITCH), JUNK, planes.dtype)[:, :width])
        self._surfaces[place][:] = planes
        return DecodedFrame(self._surfaces[place], 0 if frame.pts is None else frame.pts)


def _planes(frame: Any) -> np.ndarray:
    """NV12, P016 or three full planes, one below the other."""
    bits = frame.format.components[0].bits
    dtype = np.dtype(np.uint8 if bits == 8 else "<u2")
    luma, cb, cr = (
        np.frombuffer(plane, dtype).reshape(plane.height, -1)[:, : plane.width] << (0 if bits == 8 else 16 - bits)
        for plane in frame.planes
    )
    if cb.shape == luma.shape:
        return np.concatenate([luma, cb, cr])
    return np.concatenate([luma, np.stack([cb, cr], -1).reshape(cb.shape[0], -1)])


def fake_module() -> types.ModuleType:
    """A module to stand where ``PyNvVideoCodec`` is imported from; its ``behaviour`` can be set."""
    module = types.ModuleType("PyNvVideoCodec")
    behaviour = Behaviour()
    creating = []

    def CreateDemuxer(filename: str) -> Demuxer:
        return Demuxer(behaviour, filename)

    def CreateDecoder(
        gpuid: int = 0,
        codec: cudaVideoCodec = cudaVideoCodec.H264,
        cudacontext: int = 0,
        cudastream: int = 0,
        usedevicememory: bool = False,
        maxwidth: int = 0,
        maxheight: int = 0,
        outputColorType: OutputColorType = OutputColorType.NATIVE,
        enableSEIMessage: bool = False,
        bWaitForSessionWarmUp: bool = False,
        latency: DisplayDecodeLatencyType = DisplayDecodeLatencyType.NATIVE,
        enableDecodeStats: bool = False,
    ) -> Decoder:
        assert not creating, "two sessions are begun at once"
        creating.append(1)
        behaviour.sessions.append({"gpuid": gpuid, "cudastream": cudastream, "usedevicememory": usedevicememory})
        decoder = Decoder(behaviour, codec)
        creating.pop()
        return decoder

    def GetDecoderCaps(
        gpuid: int = 0,
        codec: cudaVideoCodec = cudaVideoCodec.H264,
        chromaformat: cudaVideoChromaFormat = cudaVideoChromaFormat["420"],
        bitdepth: int = 8,
    ) -> dict[str, int]:
        if codec is cudaVideoCodec.NumCodecs:
            raise PyNvVCExceptionUnsupported("codec not supported")
        asked = (codec.name, chromaformat.name, bitdepth)
        none = behaviour.engines_for is not None and asked not in behaviour.engines_for
        return behaviour.caps | ({"num_decoder_engines": 0} if none else {})

    vars(module).update(
        __version__="2.2.4",
        behaviour=behaviour,
        CreateDemuxer=CreateDemuxer,
        CreateDecoder=CreateDecoder,
        GetDecoderCaps=GetDecoderCaps,
        PyNvVCException=PyNvVCException,
        PyNvVCExceptionUnsupported=PyNvVCExceptionUnsupported,
        cudaVideoCodec=cudaVideoCodec,
        cudaVideoChromaFormat=_by_name(cudaVideoChromaFormat),
        OutputColorType=OutputColorType,
        PacketData=PacketData,
    )
    return module


def _by_name(kind: Any) -> types.SimpleNamespace:
    """Their enumerations have members called 420 and 444, which an Enum of Python's gives only by subscript."""
    return types.SimpleNamespace(**{member.name: member for member in kind})
