"""Whether a file is complete, from its structure alone. Each kind is made by hand: whole, cut, and without lengths."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowreel.engine.sources.file_ends import is_cut_short


def box(kind: bytes, content: bytes, *, long: bool = False) -> bytes:
    """A box of an MP4."""
    if long:
        return (1).to_bytes(4, "big") + kind + (16 + len(content)).to_bytes(8, "big") + content
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of an AVI."""
    return kind + len(content).to_bytes(4, "little") + content


def asf(file_bytes: int, flags: int = 0) -> bytes:
    """The header of an ASF file with its properties, and 112 bytes after it."""
    properties = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365") + bytes(24) + file_bytes.to_bytes(8, "little")
    head = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + bytes(14) + properties
    return head + 40 * b"\xaa" + flags.to_bytes(4, "little") + bytes(112)


MP4 = box(b"ftyp", b"isom") + box(b"free", b"") + box(b"mdat", bytes(70), long=True) + box(b"moov", bytes(20))
AVI = chunk(b"RIFF", b"AVI " + bytes(60)) + chunk(b"RIFF", b"AVIX" + bytes(60))
MATROSKA = b"\x1a\x45\xdf\xa3\x84" + bytes(4) + b"\x18\x53\x80\x67\x01" + (90).to_bytes(7, "big") + bytes(90)
ASF = asf(30 + 92 + 112)
SCREEN = b"GIF89a" + bytes(4) + b"\x80\0\0" + bytes(6)  # with a table of two colours
PICTURE = b"\x2c" + bytes(8) + b"\x81" + bytes(12) + b"\x02\x03abc\0"  # with a table of four
GIF = SCREEN + b"\x21\xf9\x04" + bytes(4) + b"\0" + PICTURE + b"\x3b"
Y4M = b"YUV4MPEG2 W4 H2 F25:1 C420jpeg\n" + 3 * (b"FRAME\n" + bytes(12))


@pytest.mark.parametrize("whole", [MP4, AVI, MATROSKA, ASF, GIF, Y4M], ids=["mp4", "avi", "mkv", "asf", "gif", "y4m"])
def test_the_last_byte_counts(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "clip"
    for count, cut in ((len(whole) + 7, False), (len(whole), False), (len(whole) - 1, True), (len(whole) - 10, True)):
        path.write_bytes((whole + bytes(7))[:count])
        assert is_cut_short(path) == cut


@pytest.mark.parametrize("kind", ["ftyp", "moov", "mdat", "free", "skip", "wide", "pnot", "styp", "uuid"])
def test_an_mp4_may_begin_with_any_of_its_boxes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "clip"
    first = box(kind.encode(), bytes(9))
    path.write_bytes(first)
    assert not is_cut_short(path)
    path.write_bytes(first + box(b"mdat", bytes(70))[:8])  # cut after the head of a box
    assert is_cut_short(path)


@pytest.mark.parametrize(
    "content",
    [
        box(b"ftyp", b"isom") + bytes(4) + b"mdat" + bytes(70),  # a length of 0: up to the end of the file
        box(b"ftyp", b"isom") + b"\0\0\0\x07mdat" + bytes(70),
        box(b"ftyp", b"isom") + b"\xff\xff\xff\xff\0\0\0\0" + bytes(70),  # no box
        chunk(b"RIFF", b"AVI " + bytes(60)) + b"RIFF\0\0\0\0AVIXLIST" + bytes(70),  # never finished
        b"\x1a\x45\xdf\xa3\x84" + bytes(4) + b"\x18\x53\x80\x67\x01" + b"\xff" * 7 + bytes(90),  # live
        b"\x1a\x45\xdf\xa3",
        b"\x1a\x45\xdf\xa3\x84" + bytes(4) + b"\x18\x53\x80\x67",
        asf(1 << 40, flags=1),  # a broadcast
        asf(1 << 40)[:100],
        SCREEN + b"\x07" + bytes(9),  # damaged, which does not mean cut
        Y4M + b"XRAME\n" + bytes(5),
        b"YUV4MPEG2 W4 H2 F25:1 C999\nFRAME\n",
        b"",
        b"OggS" + bytes(99),
    ],
)
def test_what_does_not_say_is_not_cut(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "clip").write_bytes(content)
    assert not is_cut_short(tmp_path / "clip")


def test_a_length_may_be_of_eight_bytes(tmp_path: Path) -> None:
    (tmp_path / "clip").write_bytes(asf(1 << 56))
    assert is_cut_short(tmp_path / "clip")
