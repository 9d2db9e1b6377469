"""The size of the pictures, as one packet of a stream states it: known without decoding, for microseconds of work."""

from __future__ import annotations

from contextlib import suppress

import av

Size = tuple[int, int]  # (width, height) in pixels

ENOUGH_BYTES = 1 << 16  # of a packet: the size stands in front of the picture, behind whatever an encoder says there
_VP9_SYNC = 0x498342
_VP9_RGB = 7  # a colour space


def stated_size(codec: str, data: bytes) -> Size | None:
    """Size of the pictures from this packet on, cropped as shown; None where it does not say.

    Args:
        codec: FFmpeg's name of the decoder.
        data: a packet's first bytes, of H.264 and HEVC with start codes; ``ENOUGH_BYTES`` of them are enough.

    H.264, HEVC, AV1 and MPEG-4 say so at key frames where the parameter sets come with the packet, VP8 and MPEG-2 at
    every key frame, and VP9 wherever the size is not that of a picture it refers to.
    """
    if "vp9" in codec:  # of which FFmpeg's parser does not tell
        return _vp9_size(data)
    context = av.CodecContext.create(codec, "r")  # anew, since a parser fills in a size only where there is none
    with suppress(av.FFmpegError):
        context.parse(data)
        context.parse(None)
    width, height = getattr(context, "width", 0), getattr(context, "height", 0)
    return (width, height) if width and height else None


# -- VP9, by its specification (version 0.6, 6.2: uncompressed header) -----------------------------------------------


class _Bits:
    """Reads numbers of so many bits, the highest first. Raises EOFError behind the last."""

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
        if bits.take():  # a picture that was decoded before is shown
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
            bits.take(8)  # what it replaces
        if inter and not intra_only:
            bits.take(3 * 4)  # what it refers to
            if any(bits.take() for _ in range(3)):
                return None  # of the size of the first of them that is marked
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
