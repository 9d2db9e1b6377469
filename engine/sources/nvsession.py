"""One NVDEC session: a file's packets from a key frame on, and the surfaces that the GPU decodes from them.

*What is not asked of the demuxer.* It reports 10-bit HEVC as 8 bits deep and knows no BT.2020 (seen with 2.2.4), so
depth, matrix, range and rotation come from our own probe. Its ``Seek`` takes the number of a packet and may land
anywhere, or raise: the time stamp of the packet it returns decides whether decoding can start there. It contains no
decoders, without which FFmpeg cannot tell all time stamps in program streams and ASF: those of P-frames of MPEG-1, 2
and 4 are missing. A session fails at the first such packet.

*Why packets are looked into.* When the pictures of a stream become smaller, the decoder gives no sign: it goes on
returning surfaces of the first size, with the small picture scaled up to them (seen with 2.2.4; larger pictures fail
inside ``Decode``). So a session ends at the first packet that states another size than the one it began with.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowreel.engine.device import WorkStream, free_bytes
from flowreel.engine.errors import DeviceError, FrameSizeError
from flowreel.engine.pipeline import OneAtATime
from flowreel.engine.sources.headers import ENOUGH_BYTES, Size, stated_size
from flowreel.engine.sources.pyav import key_frame_before
from flowreel.engine.sources.timecode import MOST_REORDERED, NO_STAMP

if TYPE_CHECKING:
    from types import ModuleType

    from flowreel.engine.sources.probe import VideoProbe

SESSION_BYTES = 412 << 20  # of device memory that a session was seen to take
LEAST_FREE_BYTES = 2 * SESSION_BYTES  # with too little, a new session has been seen to crash the process

_beginning = OneAtATime()


@dataclass(frozen=True)
class Session:
    """Made by ``begin``, used once. Freed with its last reference, including all surfaces."""

    key_frame: int | None  # number of the frame it begins at; None: the start of the file
    surfaces: Iterator[Any]  # in presentation order; each is valid until the next one is requested


def begin(codec: ModuleType, probe: VideoProbe, stream: WorkStream, first: int) -> Session:
    """A new session, from a key frame at or before frame ``first``, else from the start of the file.

    A lock is held until the driver has created the decoder itself, because sessions begun by several threads at once
    have been seen to crash. It does so when it has seen the end of the first picture, which may take a second packet.

    Raises DeviceError when too little device memory is free or a packet lacks its time stamp, and what PyNvVideoCodec
    raises. Iterating the surfaces may raise the last two as well, and FrameSizeError before the first surface of
    another size.
    """
    with _beginning:
        free = free_bytes(stream.device)
        if free < LEAST_FREE_BYTES:
            raise DeviceError(f"{free >> 20} MiB of device memory are free, a session needs {LEAST_FREE_BYTES >> 20}")
        demuxer, packet, key_frame = _sought(codec, probe, first) or _started(codec, probe)
        decoder = codec.CreateDecoder(
            gpuid=stream.device.index or 0,
            codec=demuxer.GetNvCodecId(),
            cudacontext=0,  # the primary context, which torch uses
            cudastream=stream.handle,
            usedevicememory=True,
        )
        packets = _of_one_size(codec, probe, packet, demuxer)
        surfaces: list[Any] = []
        for packet in packets:
            surfaces = decoder.Decode(packet)
            if decoder.GetWidth():  # 0 until the decoder is created
                break
        return Session(key_frame, _decoded(decoder, packets, surfaces))


def plain(path: Path) -> str:
    """The absolute path, so that no file name is taken for a URL."""
    return str(path.absolute())


def _started(codec: ModuleType, probe: VideoProbe) -> tuple[Any, Any, None]:
    """A demuxer, the first packet of the file, and None for its key frame."""
    demuxer = codec.CreateDemuxer(filename=plain(probe.path))
    return demuxer, next(iter(demuxer)), None


def _sought(codec: ModuleType, probe: VideoProbe, first: int) -> tuple[Any, Any, int] | None:
    """A demuxer, the packet of a key frame from which ``first`` can be decoded, its number; None: the file's start."""
    key = key_frame_before(probe, first)
    if key == 0:
        return None
    for aim in (first, first - MOST_REORDERED):  # packets are not in presentation order: the first may go too far
        demuxer = codec.CreateDemuxer(filename=plain(probe.path))
        try:
            packet = demuxer.Seek(max(aim, 0))
        except Exception:  # no index, or one with fewer packets
            break
        landed = probe.timeline.number_of(packet.pts)
        if packet.key and landed is not None and landed <= first:
            return demuxer, packet, landed
    return _read_up_to(codec, probe, key)


def _read_up_to(codec: ModuleType, probe: VideoProbe, key: int) -> tuple[Any, Any, int] | None:
    """The same, from key frame ``key`` on; None if its packet lacks the parameter sets, without which none decodes.

    Transport streams have no index. What comes before is read, but not decoded.
    """
    demuxer = codec.CreateDemuxer(filename=plain(probe.path))
    for packet in demuxer:
        if packet.key and probe.timeline.number_of(packet.pts) == key:
            return None if _size(probe, packet) is None else (demuxer, packet, key)
    return None


def _size(probe: VideoProbe, packet: Any) -> Size | None:
    return stated_size(probe.codec, ctypes.string_at(packet.bsl_data, min(packet.bsl, ENOUGH_BYTES)))


def _of_one_size(codec: ModuleType, probe: VideoProbe, head: Any, demuxer: Any) -> Iterator[Any]:
    """``head`` and the packets after it, including the empty one that ends the file.

    In place of a packet that states another size comes an empty one, which flushes the decoder, and then
    FrameSizeError. VP9 may change size at any picture, other codecs at key frames. Raises DeviceError at a packet
    without the time stamp by which its frame would be numbered.
    """
    first: tuple[int, int] | None = None
    for packet in chain([head], demuxer):
        if packet.bsl and packet.pts == NO_STAMP and probe.timeline.stamps is not None:
            raise DeviceError("its demuxer cannot tell the time stamps of all frames")
        size = None
        if packet.bsl and (packet.key or "vp9" in probe.codec):
            size = _size(probe, packet)
        first = first or size
        if size is not None and first is not None and size != first:
            yield codec.PacketData()
            raise FrameSizeError(
                f"from some frame on {probe.path.name} is {size[0]}x{size[1]}, but the first is {first[0]}x{first[1]}; "
                "the size must not change within a source"
            )
        yield packet
        if not packet.bsl:
            return


def _decoded(decoder: Any, packets: Iterator[Any], surfaces: list[Any]) -> Iterator[Any]:
    """``surfaces``, then those of the remaining packets."""
    yield from surfaces
    for packet in packets:
        yield from decoder.Decode(packet)
