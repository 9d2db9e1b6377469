"""Detects truncated video files from their container structure; how much of a file decodes would not tell."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from flowreel.engine.errors import UnsupportedSourceError
from flowreel.engine.sources import y4m

_MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp", b"uuid")
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_LONGEST_HEADER = 1 << 20  # bytes; a script index may make it long, but the file properties come early


def is_cut_short(path: Path) -> bool:
    """Whether a file is shorter than its own structure says it should be.

    Works for MP4/MOV, Matroska/WebM, AVI, ASF (WMV), GIF and YUV4MPEG2. False for other formats: they do not state
    their length (transport and elementary streams, live recordings), or FFmpeg notices by itself (FLV).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        for fits, end in _ENDS:
            if fits(head):
                file.seek(0)
                return end(file, size) > size
    return False


# Each returns the offset at which the file should end, or any offset within the file if it does not say.


def _elements_end(file: BinaryIO, size: int, head_bytes: int, length_of: Callable[[bytes], int]) -> int:
    """End of a sequence of adjacent elements; ``length_of`` gives an element's length, 0 if it states none."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        length = length_of(file.read(head_bytes))
        if not length:
            return 0
        position += length
    return position


def _box_bytes(box: bytes) -> int:
    """MP4: length, type, and for large boxes a 64-bit length. 0: the box extends to the end of the file, or is none."""
    length = int.from_bytes(box[:4], "big")
    if length == 1:
        length = int.from_bytes(box[8:16], "big")
    return length if length >= 8 and box[4:8].isalnum() else 0


def _chunk_bytes(chunk: bytes) -> int:
    """AVI: type and length; a recording that was never finalised leaves the length at 0."""
    payload = int.from_bytes(chunk[4:], "little")
    return 8 + payload if payload and chunk[:4].isalnum() else 0


def _matroska_end(file: BinaryIO, _: int) -> int:
    """End of the segment; 0 if its length is unknown (a live recording)."""
    head = file.read(64)

    def number(position: int) -> tuple[int | None, int]:
        """An EBML length of 1..8 bytes, its width given by leading zeros, and the offset after it. None: unknown."""
        width = 9 - head[position].bit_length()
        value = int.from_bytes(head[position : position + width], "big") & ~(1 << 7 * width)
        return (None if value == (1 << 7 * width) - 1 else value), position + width

    with suppress(IndexError):
        length, position = number(4)
        position += length or 0
        if head[position : position + 4] == b"\x18\x53\x80\x67":
            length, position = number(position + 4)
            return 0 if length is None else position + length
    return 0


def _asf_end(file: BinaryIO, _: int) -> int:
    """File size from the file properties; 0 for a broadcast, which does not know it."""
    head = file.read(_ASF_LONGEST_HEADER)
    place = head.find(_ASF_FILE_PROPERTIES)
    properties = head[place : place + 92]
    if place < 0 or len(properties) < 92 or properties[88] & 1:
        return 0
    return int.from_bytes(properties[40:48], "little")


def _gif_end(file: BinaryIO, size: int) -> int:
    """Just after the trailer, found by following the blocks; beyond the file if they lead past its end."""
    beyond = size + 1

    def skip(count: int) -> None:
        file.seek(count, os.SEEK_CUR)

    def byte() -> int:
        found = file.read(1)
        if not found:
            raise EOFError
        return found[0]

    def table(flags: int) -> int:
        """Bytes of the colour table that follows."""
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    try:
        file.seek(10)
        flags = byte()
        skip(2 + table(flags))
        while (kind := byte()) != 0x3B:
            if kind == 0x2C:  # an image: position and size, perhaps a local colour table, LZW code size
                skip(8)
                flags = byte()
                skip(table(flags) + 1)
            elif kind == 0x21:
                skip(1)
            else:
                return 0  # damaged, which is not for this function to report
            while length := byte():
                skip(length)
    except EOFError:
        return beyond
    return file.tell()


def _y4m_end(file: BinaryIO, size: int) -> int:
    """Where the last frame that has begun should end."""
    try:
        header = y4m.Header.parse(file.readline(y4m.LONGEST_LINE).rstrip(b"\n"))
    except UnsupportedSourceError:  # FFmpeg may accept headers that this parser does not
        return 0
    position = file.tell()
    while position < size:
        file.seek(position)
        marker = file.readline(y4m.LONGEST_LINE)
        if not y4m.MARKER.startswith(marker[: len(y4m.MARKER)]):
            return 0
        position += len(marker) + header.frame_bytes
    return position


_ENDS: tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO, int], int]], ...] = (
    (lambda head: head.startswith(b"\x1a\x45\xdf\xa3"), _matroska_end),
    (lambda head: head.startswith(b"RIFF"), partial(_elements_end, head_bytes=8, length_of=_chunk_bytes)),
    (lambda head: head[4:8] in _MP4_FIRST_BOXES, partial(_elements_end, head_bytes=16, length_of=_box_bytes)),
    (lambda head: head.startswith(_ASF_HEADER), _asf_end),
    (lambda head: head.startswith((b"GIF87a", b"GIF89a")), _gif_end),
    (lambda head: head.startswith(y4m.MAGIC + b" "), _y4m_end),
)
