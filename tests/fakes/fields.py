"""Interlaced H.264 in which each field is a picture of its own.

No available encoder produces that, so it is written here bit by bit: every macroblock is grey and uncompressed.
"""

from __future__ import annotations

WIDTH, HEIGHT = 64, 64  # px of a frame
_BLOCKS = (WIDTH // 16) * (HEIGHT // 32)  # macroblocks of a field
_MAIN, _HIGH = 77, 100


class _Bits:
    def __init__(self) -> None:
        self._bits = ""

    def put(self, *fields: tuple[int, int]) -> _Bits:
        """Appends unsigned numbers, given as (value, number of bits)."""
        self._bits += "".join(f"{value:0{count}b}" for value, count in fields)
        return self

    def golomb(self, *values: int) -> _Bits:
        for value in values:
            self._bits += f"{value + 1:0{2 * (value + 1).bit_length() - 1}b}"
        return self

    def aligned(self) -> _Bits:
        self._bits += "0" * (-len(self._bits) % 8)
        return self

    def unit(self, kind: int) -> bytes:
        self.put((1, 1)).aligned()
        payload = bytes(int(self._bits[place : place + 8], 2) for place in range(0, len(self._bits), 8))
        safe = bytearray()
        for byte in payload:
            if byte <= 3 and safe[-2:] == b"\0\0":
                safe.append(3)
            safe.append(byte)
        return b"\0\0\0\1" + bytes([0x60 | kind]) + bytes(safe)


def parameter_sets(high: bool = False) -> bytes:
    """SPS and PPS for 25 frames a second. ``high``: with scaling lists, whose lengths depend on their contents."""
    sequence = _Bits().put((_HIGH if high else _MAIN, 8), (0, 8), (30, 8)).golomb(0)
    if high:
        sequence.golomb(1, 0, 0).put((0, 1), (1, 1))
        for place in range(8):
            sequence.put((1, 1))
            # Coded as differences: either all zero, or first to 11 and then to 0, which ends the list early.
            sequence.golomb(*[0] * 16) if place < 6 else sequence.golomb(5, 22)
    sequence.golomb(4, 0, 4, 1).put((0, 1)).golomb(WIDTH // 16 - 1, HEIGHT // 32 - 1)
    sequence.put((0, 1), (0, 1), (1, 1), (0, 1))  # fields, no cropping
    sequence.put((1, 1), (0, 4), (1, 1), (1, 32), (50, 32), (1, 1), (0, 3))  # the rate
    sequence.put((1, 1), (1, 1)).golomb(0, 0, 10, 10, 0, 1)  # no reordering
    pictures = _Bits().golomb(0, 0).put((0, 2)).golomb(0, 0, 0).put((0, 3)).golomb(0, 0, 0).put((0, 3))
    return sequence.unit(7) + pictures.unit(8)


def field(frame: int, bottom: bool | None, grey: int) -> bytes:
    """One field of flat grey, or (``bottom`` None) a frame that is not made of fields; every eighth is a key frame."""
    number, first = frame % 8, frame % 8 == 0 and not bottom
    slice_ = _Bits().golomb(0, 7, 0).put((number, 8), *([(0, 1)] if bottom is None else [(1, 1), (bottom, 1)]))
    if first:
        slice_.golomb(frame // 8 % 2)
    slice_.put((2 * number + bool(bottom), 8)).put((0, 2 if first else 1)).golomb(0)
    for _ in range(_BLOCKS if bottom is not None else 2 * _BLOCKS):
        slice_.golomb(25).aligned().put(*[(grey, 8)] * 256, *[(128, 8)] * 128)
    return slice_.unit(5 if first else 1)
