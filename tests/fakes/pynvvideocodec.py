"""A fake PyNvVideoCodec 2.2.4 with the real one's signatures and behaviour, which decodes with PyAV on the CPU.

Signatures and behaviour were observed on the real package: its demuxer runs without a GPU, and its decoder was run on
stand-ins for the driver's libraries. What the decoding hardware does can only be checked on a GPU.

- There is one packet object, refilled for each packet; its bytes are invalid once the next packet is requested. For
  H.264 and HEVC, the bytes have start codes, and parameter sets before each IDR picture.
- An empty packet at the end flushes the decoder. Packets of hidden frames are delivered like all others.
- ``BitDepth`` is always 8, and no colour matrix is reported. ``Seek`` takes a packet's number; it lands on a key frame
  or raises, as it does for formats without an index.
- The demuxer contains no decoders, so time stamps of P-frames are missing in some formats.
- The actual decoder is created, and has a width, once the next packet shows where the first picture ends.
- Surfaces belong to the decoder, and the next ``Decode`` overwrites them: here they are filled with junk at once, and
  when the decoder is freed. They keep their size when pictures become smaller, follow a changed cropping of the same
  picture, and larger pictures are an error.
- A damaged picture is delivered like a good one.
- A failed query of what a GPU can decode leaves a CUDA context current on the calling thread.
- Errors are ``PyNvVCException`` with messages of several lines. A session that failed must not be used again.
"""

from __future__ import annotations

import copy
import ctypes
import enum
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.bitstream import BitStreamFilterContext

from flowreel.engine.sources import nvdec, nvsession

NO_STAMP = -(1 << 63)
PITCH = 24  # samples by which a surface's rows exceed the picture: 0 in 2.2.4, but more in other versions
JUNK = 0xAA


class PyNvVCException(Exception):
    pass


class PyNvVCExceptionUnsupported(Exception):
    pass


cudaVideoCodec = enum.Enum(
    "cudaVideoCodec", "MPEG1 MPEG2 MPEG4 VC1 H264 JPEG H264_SVC H264_MVC HEVC VP8 VP9 AV1", start=0
)
cudaVideoChromaFormat = enum.Enum("cudaVideoChromaFormat", "Monochrome 420 422 444", start=0)
OutputColorType = enum.Enum("OutputColorType", "NATIVE RGB RGBP", start=0)
DisplayDecodeLatencyType = enum.Enum("DisplayDecodeLatencyType", "NATIVE LOW ZERO", start=0)
Pixel_Format = enum.Enum("Pixel_Format", "NV12 YUV444 P016 YUV444_16Bit NV16 P216 RGB RGBP", start=3)
UNKNOWN_CODEC = enum.Enum("cudaVideoCodec", {"???": 12})["???"]  # prints like the real one, which is no member either

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
    """The packet that the demuxer returns and the decoder takes."""

    def __init__(self) -> None:
        self.key = self.pts = self.dts = self.pos = self.bsl = self.bsl_data = self.duration = 0
        self.decode_flag = self.discardable = self.stream_index = 0
        self.memory: Any = None  # the bytes that bsl_data points to
        self.coded: tuple[av.Packet, bytes] | None = None  # for PyAV: the packet and the stream's header

    def point_to(self, packet: av.Packet, header: bytes) -> None:
        self.coded = packet, header
        self.bsl = packet.size
        self.memory = ctypes.create_string_buffer(bytes(packet), packet.size)
        self.bsl_data = ctypes.addressof(self.memory)


@dataclass
class Behaviour:
    """How the fake behaves, set by the tests, and what it has recorded."""

    caps: dict[str, int] = field(
        default_factory=lambda: {
            "supported": 1,
            "num_decoder_engines": 7,
            "width_min": 48,
            "height_min": 16,
            "width_max": 8192,
            "height_max": 8192,
            "mb_num_max": 262144,
        }
    )
    engines_for: set[tuple[str, str, int]] | None = None  # (codec, chroma, bits) that can be decoded; None: all
    caps_error: Exception | None = None  # raised instead of an answer
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    left_current: list[int] = field(default_factory=list)  # threads on which a failed query left a context current
    fail_at: int | None = None  # number of the packet at which a session fails, from 0
    fail_bare: bool = False  # fails with a plain Exception, as parts of the package do
    plain_surfaces: bool = False  # silently converts 4:4:4 or more than 8 bits to 8-bit 4:2:0
    skips_to_idr: bool = False  # when started in an open GOP, gives no frames before an IDR picture
    on_making: Callable[[], object] | None = None  # called while the actual decoder is created
    making: int = 0
    dropped: frozenset[int] = frozenset()  # presentation stamps whose frames never arrive
    packets: int | None = None  # packets delivered before the demuxer finds the file broken
    seek_error: bool = False
    seek_shift: int = 0  # packets by which a seek misses the key frame
    seek_late: bool = False  # a seek always lands on the last key frame
    stream_id: int | None = None
    time_base: Fraction | None = None
    log: list[str] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)  # the arguments that each was created with
    alive: int = 0  # sessions that still hold memory
    most_alive: int = 0


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
        self._begun = False  # reading
        self._filter: BitStreamFilterContext | None = None
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
            self._packets = self._from_packet(0)
        number, self._number = self._number, self._number + 1
        broken = self._behaviour.packets is not None and number >= self._behaviour.packets
        given = None if broken else next(self._packets, None)
        self._ended = given is None
        return self._fill(given)

    def _fill(self, given: Any) -> PacketData:
        packet = self._packet
        vars(packet).update(vars(PacketData()))  # frees its memory
        if given is not None:
            packet.key, packet.discardable = int(given.is_keyframe), int(given.is_discard)
            packet.pts, packet.dts = (NO_STAMP if stamp is None else stamp for stamp in (given.pts, given.dts))
            codec, shown_late = self._stream.codec_context.name, given.pts != given.dts and not given.is_keyframe
            if shown_late and codec in ("mpeg2video", "mpeg4") and self._container.format.name in ("mpeg", "asf"):
                given.pts, packet.pts = None, NO_STAMP
            plain = av.Packet(bytes(given))  # drops the flag of a hidden frame, which the hardware does not know
            plain.pts, plain.dts, plain.time_base = given.pts, given.dts, given.time_base
            packet.point_to(plain, b"" if self._filter is not None else self._stream.codec_context.extradata or b"")
        return packet

    def Seek(self, index: int) -> PacketData:
        self._behaviour.log.append(f"seek {index}")
        packets = list(self._from_packet(0))
        stamps = [packet.pts for packet in packets]
        if None in stamps:  # an elementary stream
            return self._fill(None)
        if self._behaviour.seek_error or index >= len(stamps) or self._container.format.name in ("mpegts", "mpeg"):
            raise _error("Seek", "Seek target index is out of range (no matching index entry).")
        keys = [n for n, packet in enumerate(packets) if packet.is_keyframe]
        place = keys[-1] if self._behaviour.seek_late else max(n for n in keys if n <= index)
        self._packets = self._from_packet(place + self._behaviour.seek_shift)
        packet = next(self)
        if self._filter is not None and packet.coded is not None:
            bare, header = packet.coded
            whole = av.Packet(_parameter_sets(bytes(packets[0])) + bytes(bare))
            whole.pts, whole.dts, whole.time_base = bare.pts, bare.dts, bare.time_base
            packet.point_to(whole, header)
        return packet

    def _from_packet(self, first: int) -> Iterator[Any]:
        """All packets from number ``first`` on, in the form that the decoder needs."""
        if self._begun:
            self._container.seek(0)
        self._begun = True
        name = self._stream.codec_context.name
        self._filter = BitStreamFilterContext(f"{name}_mp4toannexb", self._stream) if name in ("h264", "hevc") else None
        return _filtered(self._container.demux(self._stream), self._filter, first)

    def GetNvCodecId(self) -> Any:
        return _CODECS.get(self._stream.codec_context.name, UNKNOWN_CODEC)

    def GetTimebaseNum(self) -> int:
        return (self._behaviour.time_base or self._stream.time_base).numerator

    def GetTimebaseDen(self) -> int:
        return (self._behaviour.time_base or self._stream.time_base).denominator

    def GetVideoStreamId(self) -> int:
        return self._stream.index if self._behaviour.stream_id is None else self._behaviour.stream_id

    def BitDepth(self) -> int:
        return 8


def _filtered(packets: Iterator[Any], through: BitStreamFilterContext | None, first: int) -> Iterator[Any]:
    """Packets from number ``first`` on. A function without a reference to the demuxer, so that this can be freed."""
    for number, packet in enumerate(packet for packet in packets if packet.size):
        if number >= first:
            yield from [packet] if through is None else through.filter(packet)


def _parameter_sets(data: bytes) -> bytes:
    """The SPS and PPS in H.264 data, the only codec that seeks are tested with."""
    units = re.split(rb"\x00?\x00\x00\x01", data)[1:]
    return b"".join(b"\0\0\0\1" + unit for unit in units if unit[0] & 0x1F in (7, 8))


class DecodedFrame:
    """A surface of the decoder, valid until the next ``Decode``."""

    def __init__(self, surface: np.ndarray, stamp: int, kind: Pixel_Format) -> None:
        self._surface = surface
        self._stamp = stamp
        self.format = kind

    def getPTS(self) -> int:
        return self._stamp

    @property
    def shape(self) -> tuple[int, ...]:
        return self._surface.shape

    def __dlpack__(self, stream: Any = -1) -> object:  # the real default is 0, which it refuses
        if stream is None:
            raise RuntimeError("Unable to cast Python instance to C++ type")
        if stream == 0:
            raise _error("dlpack", "Invalid value for stream parameter. Passed value of 0 which is not allowed")
        return torch.from_numpy(self._surface).__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # the CPU; the real one returns (2, gpu)


class Decoder:
    """PyNvDecoder."""

    def __init__(self, behaviour: Behaviour, codec: cudaVideoCodec) -> None:
        self._behaviour = behaviour
        self._name = next(name for name, kind in _CODECS.items() if kind is codec)
        self._context: Any = None
        self._pending: tuple[av.Packet, bytes] | None = None  # decoded once the next packet shows where it ends
        self._size: tuple[int, int] | None = None  # of the first picture
        self._surfaces: list[np.ndarray] = []
        self._count = 0
        self._failed = False
        behaviour.alive += 1
        behaviour.most_alive = max(behaviour.most_alive, behaviour.alive)

    def __del__(self) -> None:
        self._spoil()
        self._behaviour.alive -= 1
        self._behaviour.log.append("freed")

    def GetWidth(self) -> int:
        return 0 if self._context is None else self._context.width or self._context.coded_width or 1

    def Decode(self, packet: PacketData) -> list[DecodedFrame]:
        assert not self._failed, "a session that failed is used again"
        self._spoil()
        count, self._count = self._count, self._count + 1
        if count == self._behaviour.fail_at:
            self._failed = True
            raise Exception("HW decoder faced error") if self._behaviour.fail_bare else _error("Decode", "it is broken")
        pending, self._pending = self._pending, packet.coded
        frames = [] if pending is None else self._decoded(*pending)
        if not packet.bsl and self._context is not None:
            frames += self._context.decode(None)
        frames = [self._fitted(frame) for frame in frames if frame.pts not in self._behaviour.dropped]
        return [self._lent(place, frame) for place, frame in enumerate(frames)]

    def _spoil(self) -> None:
        for surface in self._surfaces:
            surface[:] = JUNK

    def _decoded(self, packet: av.Packet, header: bytes) -> list[Any]:
        if self._context is None:
            self._make(header)
            if self._behaviour.skips_to_idr and not _has_idr(bytes(packet)):
                self._context = None
                return []
        try:
            return list(self._context.decode(packet))
        except av.FFmpegError:  # the real decoder only prints such errors
            if self._size is None:
                return []
            damaged = av.VideoFrame(*self._size, self._context.pix_fmt)
            damaged.pts = packet.pts
            return [damaged]

    def _make(self, header: bytes) -> None:
        """Creates the actual decoder; the driver must not create two at once."""
        self._behaviour.making += 1
        assert self._behaviour.making == 1, "two sessions are begun at once"
        if self._behaviour.on_making is not None:
            self._behaviour.on_making()
        self._context = av.CodecContext.create(self._name, "r")
        self._context.extradata = header
        self._context.thread_count = 1
        self._behaviour.making -= 1

    def _fitted(self, frame: Any) -> Any:
        """The picture in the size and format that it has in a surface."""
        size = (frame.width, frame.height)
        self._size = self._size or size
        if self._behaviour.plain_surfaces:
            frame = _reformatted(frame, size, "yuv420p")
        if _coded(size) == _coded(self._size):
            return frame
        if any(now > most for now, most in zip(_coded(size), _coded(self._size), strict=True)):
            self._failed = True
            raise _error("Reconfigure", "Reconfigure Not supported when width/height > maxwidth/maxheight")
        return _reformatted(frame, self._size, frame.format.name)

    def _lent(self, place: int, frame: Any) -> DecodedFrame:
        kind, planes = _planes(frame)
        while len(self._surfaces) <= place or self._surfaces[place].shape != planes.shape:
            del self._surfaces[place:]
            rows, width = planes.shape
            self._surfaces.append(np.full((rows, width + PITCH), JUNK, planes.dtype)[:, :width])
        self._surfaces[place][:] = planes
        return DecodedFrame(self._surfaces[place], NO_STAMP if frame.pts is None else frame.pts, kind)


def _coded(size: tuple[int, int]) -> tuple[int, int]:
    """The size in whole macroblocks."""
    width, height = size
    return -(-width // 16), -(-height // 16)


def _has_idr(data: bytes) -> bool:
    """Whether H.264 data contain an IDR picture."""
    return any(match[1][0] & 0x1F == 5 for match in re.finditer(rb"\x00\x00\x01(.)", data, re.DOTALL))


def _reformatted(frame: Any, size: tuple[int, int], pix_fmt: str) -> Any:
    changed = frame.reformat(*size, pix_fmt)
    changed.pts = frame.pts
    return changed


def _planes(frame: Any) -> tuple[Pixel_Format, np.ndarray]:
    """NV12, P016 or three full planes, one below the other."""
    bits = frame.format.components[0].bits
    dtype = np.dtype(np.uint8 if bits == 8 else "<u2")
    luma, cb, cr = (
        np.frombuffer(plane, dtype).reshape(plane.height, -1)[:, : plane.width] << (0 if bits == 8 else 16 - bits)
        for plane in frame.planes
    )
    if cb.shape == luma.shape:
        return Pixel_Format.YUV444 if bits == 8 else Pixel_Format.YUV444_16Bit, np.concatenate([luma, cb, cr])
    interleaved = np.stack([cb, cr], -1).reshape(cb.shape[0], -1)
    return Pixel_Format.NV12 if bits == 8 else Pixel_Format.P016, np.concatenate([luma, interleaved])


def fake_module() -> types.ModuleType:
    """A module to import in place of ``PyNvVideoCodec``; tests set its ``behaviour``."""
    module = types.ModuleType("PyNvVideoCodec")
    behaviour = Behaviour()

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
        behaviour.sessions.append({"gpuid": gpuid, "cudastream": cudastream, "usedevicememory": usedevicememory})
        return Decoder(behaviour, codec)

    def GetDecoderCaps(
        gpuid: int = 0,
        codec: cudaVideoCodec = cudaVideoCodec.H264,
        chromaformat: cudaVideoChromaFormat = cudaVideoChromaFormat["420"],
        bitdepth: int = 8,
    ) -> dict[str, int]:
        asked = (codec.name, chromaformat.name, bitdepth)
        behaviour.asked.append(asked)
        error = behaviour.caps_error
        if codec is UNKNOWN_CODEC:  # the real package passes it on to the driver
            error = _error("GetDecoderCaps", "CUDA_ERROR_INVALID_VALUE")
        if error is not None:
            behaviour.left_current.append(threading.get_ident())
            raise copy.copy(error)  # a test parameter lives on, and would keep the frames of its traceback alive
        none = behaviour.engines_for is not None and asked not in behaviour.engines_for
        return behaviour.caps | ({"supported": 0, "num_decoder_engines": 0} if none else {})

    vars(module).update(
        __version__="2.2.4",
        behaviour=behaviour,
        CreateDemuxer=CreateDemuxer,
        CreateDecoder=CreateDecoder,
        GetDecoderCaps=GetDecoderCaps,
        PyNvVCException=PyNvVCException,
        PyNvVCExceptionUnsupported=PyNvVCExceptionUnsupported,
        cudaVideoCodec=cudaVideoCodec,
        cudaVideoChromaFormat=cudaVideoChromaFormat,
        OutputColorType=OutputColorType,
        PacketData=PacketData,
    )
    return module


STREAM = 0x5EED  # handle of the decoder's CUDA stream


def installed(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Installs the fake module, with streams that only record calls in ``behaviour.log``."""
    module = fake_module()

    class Stream:
        handle = STREAM

        def __init__(self, device: torch.device) -> None:
            self.device = device

        def run(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
            return work()

        def finish(self) -> None:
            module.behaviour.log.append("finished")

    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", module)
    monkeypatch.setattr(nvdec, "WorkStream", Stream)
    monkeypatch.setattr(nvsession, "free_bytes", lambda device: 80 << 30)
    return module
