"""One session of NVDEC: a file's packets from a key frame on, and the surfaces that the GPU's decoder makes of them.

*What is not asked of the demuxer.* It calls 10-bit HEVC 8 bits deep and knows no BT.2020 (seen with 2.2.4), so depth,
matrix, range and rotation come from our own probe. Its ``Seek`` takes the number of a packet and may land anywhere, or
raise: the stamp of the packet it gives decides whether decoding can start there.

*Why packets are looked into.* When the pictures of a stream become smaller, the decoder tells nobody: it goes on giving
surfaces of the first size, with the small picture blown up in them (seen with 2.2.4; a larger one fails inside
``Decode``). So a session ends at the first packet that states another size than the one it began with.
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
from flowreel.engine.sources.headers import ENOUGH_BYTES, stated_size
from flowreel.engine.sources.pyav import key_frame_before
from flowreel.engine.sources.timecode import MOST_REORDERED

if TYPE_CHECKING:
    from types import ModuleType

    from flowreel.engine.sources.probe import VideoProbe

SESSION_BYTES = 412 << 20  # of device memory that a session was seen to take
LEAST_FREE_BYTES = 2 * SESSION_BYTES  # a session begun with too little has been seen to crash the process

_beginning = OneAtATime()


@dataclass(frozen=True)
class Session:
    """Made by ``begin``, used once. Freed with its last reference, surfaces and all."""

    key_frame: int | None  # number of the frame it was told to begin with; None: the start of the file
    surfaces: Iterator[Any]  # in the order of the screen; each is good until the next one is asked for


def begin(codec: ModuleType, probe: VideoProbe, stream: WorkStream, first: int) -> Session:
    """A new session, from a key frame at or before frame ``first``, else from the start of the file.

    Alone, until the driver has made the decoder proper: sessions begun by several threads at once have been seen to
    crash. That is when it has seen the first picture's end, which may take a second packet.

    Raises DeviceError when too little device memory is free, and what PyNvVideoCodec raises; so do the surfaces, and
    FrameSizeError before the first that would be of another size.
    """
    with _beginning:
        free = free_bytes(stream.device)
        if free < LEAST_FREE_BYTES:
            raise DeviceError(f"{free >> 20} MiB of device memory are free, a session needs {LEAST_FREE_BYTES >> 20}")
        demuxer, packet, key_frame = _sought(codec, probe, first) or _started(codec, probe)
        decoder = codec.CreateDecoder(
            gpuid=stream.device.index or 0,
            codec=demuxer.GetNvCodecId(),
            cudacontext=0,  # the primary one, which is torch's
            cudastream=stream.handle,
            usedevicememory=True,
        )
        packets = _of_one_size(codec, probe, packet, demuxer)
        surfaces: list[Any] = []
        for packet in packets:
            surfaces = decoder.Decode(packet)
            if decoder.GetWidth():  # 0 until it is made
                break
        return Session(key_frame, _decoded(decoder, packets, surfaces))


def plain(path: Path) -> str:
    """With every folder before it, so that no name is taken for an address."""
    return str(path.absolute())


def _started(codec: ModuleType, probe: VideoProbe) -> tuple[Any, Any, None]:
    """A demuxer, and the first packet of the file."""
    demuxer = codec.CreateDemuxer(filename=plain(probe.path))
    return demuxer, next(iter(demuxer)), None


def _sought(codec: ModuleType, probe: VideoProbe, first: int) -> tuple[Any, Any, int] | None:
    """A demuxer, the packet of a key frame from which ``first`` can be decoded, its number; None: no seek finds it."""
    if key_frame_before(probe, first) == 0:
        return None
    for aim in (first, first - MOST_REORDERED):  # packets are not in the order of the screen: the first may go too far
        demuxer = codec.CreateDemuxer(filename=plain(probe.path))
        try:
            packet = demuxer.Seek(max(aim, 0))
        except Exception:  # no index, or not of so many packets
            return None
        landed = probe.timeline.number_of(packet.pts)
        if packet.key and landed is not None and landed <= first:
            return demuxer, packet, landed
    return None


def _of_one_size(codec: ModuleType, probe: VideoProbe, head: Any, demuxer: Any) -> Iterator[Any]:
    """``head`` and the packets behind it, the empty one that ends the file included.

    Before one that states another size comes an empty one, which makes the decoder give what it holds, and then the
    error. VP9 may change at any picture, the others at key frames.
    """
    first: tuple[int, int] | None = None
    for packet in chain([head], demuxer):
        size = None
        if packet.bsl and (packet.key or "vp9" in probe.codec):
            size = stated_size(probe.codec, ctypes.string_at(packet.bsl_data, min(packet.bsl, ENOUGH_BYTES)))
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
    """``surfaces``, and those of the packets that are left."""
    yield from surfaces
    for packet in packets:
        yield from decoder.Decode(packet)
