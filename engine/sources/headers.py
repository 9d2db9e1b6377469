"""The picture size that a packet of a stream states: read from its headers in microseconds, without decoding."""

from __future__ import annotations

from contextlib import suppress

import av

Size = tuple[int, int]  # (width, height) in pixels

ENOUGH_BYTES = 1 << 16  # of a packet: the size comes before the picture data, after whatever else an encoder puts there
_VP9_SYNC = 0x498342
_VP9_RGB = 7  # a colour space


def stated_size(codec: str, data: bytes) -> Size | None:
    """Size of the pictures from this packet on, after cropping; None if the packet does not state it.

    Args:
        codec: FFmpeg's name of the decoder.
        data: a packet's first bytes, for H.264 and HEVC with start codes; ``ENOUGH_BYTES`` are enough.

    H.264, HEVC, AV1 and MPEG-4 state it at key frames whose packet carries the parameter sets, VP8 and MPEG-2 at every
    key frame, and VP9 wherever the size is not taken over from a reference frame.
    """
    if "vp9" in codec:  # FFmpeg's parser does not tell its size
        return _vp9_size(data)
    context = av.CodecContext.create(codec, "r")  # a new one each time: a parser sets the size only if it is unset
    with suppress(av.FFmpegError):
        context.parse(data)
        context.parse(None)
    width, height = getattr(context, "width", 0), getattr(context, "height", 0)
    return (width, height) if width and height else None


# -- VP9, by its specification (version 0.6, 6.2: uncompressed header) -----------------------------------------------


class _Bits:
    """Reads unsigned numbers bit by bit, most significant bit first. Raises EOFError past the end."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def take(self, count: int = 1) -> int:
        self._left -= count
        if self._left < 0:
            raise EOFError
        return self._value >> self._left & ((1 << count) - 1)


def _vp9_size(data: bytes) -> Size | None:
    bits = _Bits(data[:32])
    with suppress(EOFError):
        if bits.take(2) != 2:
            return None
        profile = bits.take() | bits.take() << 1
        if profile == 3:
            bits.take()
        if bits.take():  # show_existing_frame: an earlier picture is shown again
            return None
        inter, shown, resilient = bits.take(), bits.take(), bits.take()
        intra_only = inter and not shown and bits.take()
        if inter and not resilient:
            bits.take(2)
        if not inter or intra_only:
            if bits.take(24) != _VP9_SYNC:
                return None
            if not inter or profile > 0:
                _skip_vp9_colour(bits, profile)
        if inter:
            bits.take(8)  # refresh_frame_flags
        if inter and not intra_only:
            bits.take(3 * 4)  # the three reference frames
            if any(bits.take() for _ in range(3)):
                return None  # it has the size of the first reference frame whose bit is set
        return bits.take(16) + 1, bits.take(16) + 1
    return None


def _skip_vp9_colour(bits: _Bits, profile: int) -> None:
    if profile >= 2:
        bits.take()
    is_rgb = bits.take(3) == _VP9_RGB
    if not is_rgb:
        bits.take()
    if profile in (1, 3):
        bits.take(1 if is_rgb else 3)
