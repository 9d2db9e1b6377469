"""What a stream and its packets state in their headers, read in microseconds, without decoding: the picture size,
whether frames may hold two fields, and whether a packet holds the second field of an H.264 frame."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import av

Size = tuple[int, int]  # (width, height) in pixels

ENOUGH_BYTES = 1 << 16  # of a packet: the size comes before the picture data, after whatever else an encoder puts there
# By ITU-T H.262, 6.2.2.3: a start code, the identifier, profile and level; then a bit that is set if progressive.
_MPEG2_SEQUENCE_EXTENSION = re.compile(b"\0\0\1\xb5[\x10-\x1f](.)", re.DOTALL)
_MPEG2_PROGRESSIVE = 8
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

    def golomb(self) -> int:
        """An unsigned Exp-Golomb number, as in H.264."""
        zeros = 0
        while not self.take():
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)


def allows_fields(codec: str, extradata: bytes | None) -> bool:
    """Whether the sequence header of H.264 or MPEG-2 lets frames hold two fields, even where the first ones do not.

    Args:
        codec: FFmpeg's name of the decoder.
        extradata: of the codec context.
    """
    if codec == "h264":
        return SecondFields(extradata).possible
    extension = _MPEG2_SEQUENCE_EXTENSION.search(extradata or b"") if codec == "mpeg2video" else None
    return extension is not None and not extension[1][0] & _MPEG2_PROGRESSIVE


# -- VP9, by its specification (version 0.6, 6.2: uncompressed header) -----------------------------------------------


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


# -- H.264, by ITU-T H.264, 7.3 ---------------------------------------------------------------------------------------

_HIGH_PROFILES = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}
_SPS, _PPS = 7, 8  # types of NAL units
_SLICES = {1, 2, 5}
_UNIT_BYTES = 512  # of a NAL unit: far more than the fields that are read here take


@dataclass(frozen=True)
class _Sequence:
    """What a sequence parameter set says about the headers of slices."""

    has_planes: bool  # each colour plane is coded on its own
    number_bits: int  # of the frame number
    has_fields: bool  # a picture may be a single field


class SecondFields:
    """Finds the packets of an H.264 stream that complete the frame of the packet before.

    Of interlaced video, each field may be coded as a picture of its own (DVB and AVCHD do so). From transport and
    elementary streams, and from files made of those, FFmpeg then gives each field as a packet, but its decoder outputs
    both as one frame.
    """

    def __init__(self, extradata: bytes | None) -> None:
        """``extradata``: of the codec context."""
        self.any_field = False  # whether any packet so far held a field, first or second
        self._sequences: dict[int, _Sequence] = {}
        self._sequence_of: dict[int, int] = {}  # by the number of the picture parameter set
        self._awaited: tuple[int, int] | None = None  # the field that would complete the frame: frame number, parity
        head = memoryview(extradata or b"")
        # As in MP4 and Matroska ("avcC"): each unit comes after its length, which takes so many bytes.
        self._length_bytes = (head[4] & 3) + 1 if len(head) > 6 and head[0] == 1 else 0
        for _ in self._slices(_avcc_units(head) if self._length_bytes else _units(head)):
            pass

    @property
    def possible(self) -> bool:
        """Whether frames may hold two fields, by the parameter sets so far."""
        return any(sequence.has_fields for sequence in self._sequences.values())

    def holds(self, data: memoryview, is_key: bool = False) -> bool:
        """Whether the packet holds a second field. To be called with every packet in file order.

        is_key: of a key frame, which may bring other parameter sets, where recordings were joined.
        """
        field = next(self._slices(_units(data, self._length_bytes)), None) if is_key or self.possible else None
        self.any_field |= field is not None
        second = field is not None and field == self._awaited
        self._awaited = None if second or field is None else (field[0], 1 - field[1])
        return second

    def _slices(self, units: Iterator[memoryview]) -> Iterator[tuple[int, int] | None]:
        """Frame number and parity (1: bottom) of each slice of a field, None for one of a frame."""
        for unit in units:
            bits = _Bits(bytes(unit[:_UNIT_BYTES]).replace(b"\0\0\3", b"\0\0"))
            with suppress(EOFError, KeyError):
                kind = bits.take(8) & 31
                if kind == _SPS:
                    self._keep_sequence(bits)
                elif kind == _PPS:
                    picture = bits.golomb()
                    self._sequence_of[picture] = bits.golomb()
                elif kind in _SLICES:
                    yield self._field(bits)

    def _keep_sequence(self, bits: _Bits) -> None:
        profile = bits.take(8)
        bits.take(16)  # constraints and level
        number = bits.golomb()
        chroma = has_planes = 0
        if profile in _HIGH_PROFILES:
            chroma = bits.golomb()
            has_planes = chroma == 3 and bits.take()
            bits.golomb(), bits.golomb(), bits.take()  # bit depths, lossless bypass
            if bits.take():
                _skip_scaling_lists(bits, 12 if chroma == 3 else 8)
        number_bits = bits.golomb() + 4
        order = bits.golomb()
        if order == 0:
            bits.golomb()
        elif order == 1:
            bits.take(), bits.golomb(), bits.golomb()
            for _ in range(bits.golomb()):
                bits.golomb()
        bits.golomb(), bits.take(), bits.golomb(), bits.golomb()  # references, gaps, width, height
        self._sequences[number] = _Sequence(bool(has_planes), number_bits, has_fields=not bits.take())

    def _field(self, bits: _Bits) -> tuple[int, int] | None:
        bits.golomb(), bits.golomb()  # first macroblock, type
        sequence = self._sequences[self._sequence_of[bits.golomb()]]
        if sequence.has_planes:
            bits.take(2)
        number = bits.take(sequence.number_bits)
        return (number, bits.take()) if sequence.has_fields and bits.take() else None


def _units(data: memoryview, length_bytes: int = 0) -> Iterator[memoryview]:
    """The NAL units of a packet: each after its length, or (0) after a start code, and then up to the packet's end."""
    if not length_bytes:
        yield from (data[code.end() :] for code in re.finditer(b"\0\0\1", data))
    while length_bytes and len(data) > length_bytes:
        end = length_bytes + int.from_bytes(data[:length_bytes], "big")
        yield data[length_bytes:end]
        data = data[end:]


def _avcc_units(data: memoryview) -> Iterator[memoryview]:
    """The parameter sets of an MP4's or Matroska's header (ISO/IEC 14496-15, 5.3.3.1)."""
    data = data[5:]
    for most in (31, 255):  # sequences, pictures
        count, data = data[0] & most if data else 0, data[1:]
        for _ in range(count):
            end = 2 + int.from_bytes(data[:2], "big")
            yield data[2:end]
            data = data[end:]


def _skip_scaling_lists(bits: _Bits, count: int) -> None:
    for place in range(count):
        if bits.take():
            last = after = 8
            for _ in range(16 if place < 6 else 64):
                if after:
                    coded = bits.golomb()
                    after = (last + (coded + 1) // 2 * (1 if coded % 2 else -1)) % 256
                last = after or last
