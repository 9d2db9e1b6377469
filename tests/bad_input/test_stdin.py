"""Bad YUV4MPEG2 streams: damaged, lying or endless."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

Answer = dict[str, Any]
Catalogue = Any  # the fixture of conftest.py
Mangled = Callable[[bytes, random.Random], bytes]

HEAD = b"YUV4MPEG2 W16 H8 F25:1 Ip A1:1 C420jpeg"
PICTURE = bytes(range(192))  # 16x8 as 4:2:0
SOUND = HEAD + b"\n" + (b"FRAME\n" + PICTURE) * 3


def accounted_for(answer: Answer) -> bool:
    """At least two frames of the promised size; a stream does not say how many frames it has."""
    return bool(answer["value"]["sizes_agree"] and answer["value"]["frames"] >= 2)


def test_mangled_streams(catalogue: Catalogue, mangled: Mangled) -> None:
    for seed in range(100):
        data = mangled(SOUND, random.Random(seed))
        catalogue.read(f"mangled {seed}", "source", "-", stdin=data, right=accounted_for)
    for seed in range(60):
        data = mangled(HEAD, random.Random(seed)) + SOUND[len(HEAD) :]
        catalogue.read(f"head mangled {seed}", "source", "-", stdin=data, right=accounted_for)
    catalogue.judge(150)


VALUES = (
    "",
    "0",
    "-1",
    "1",
    "32768",
    "32769",
    "99999",
    "999999999",
    "9999999999",
    "1" * 4000,
    "x",
    "\xb2",
    "1.5",
    "+7",
    "1:1",
    "0:0",
    "1:0",
    "999999999:999999999",
)


@pytest.mark.parametrize("key", ["W", "H", "F", "I", "A", "C", "XYSCSS=", "XCOLORRANGE=", "X", "Z", ""])
def test_heads_that_lie(key: str, catalogue: Catalogue) -> None:
    rest = b"".join(b" " + word for word in HEAD.split() if not key or not word.startswith(key.encode()))
    for value in (*VALUES, "444alpha", "420p16", "mono", "p", "t", "FULL"):
        head = rest[1:] + b" " + (key + value).encode("latin-1")
        data = head + b"\n" + (b"FRAME\n" + PICTURE) * 3
        catalogue.read(f"{key}{value[:20]}", "source", "-", stdin=data, right=accounted_for)
    catalogue.judge(24)


def test_other_streams(catalogue: Catalogue, tiny: str) -> None:
    frame = b"FRAME\n" + PICTURE
    streams: dict[str, bytes] = {
        "nothing": b"",
        "a newline": b"\n",
        "the magic alone": b"YUV4MPEG2",
        "the magic and a newline": b"YUV4MPEG2\n",
        "a head without an end": HEAD,
        "a head without frames": HEAD + b"\n",
        "one frame": HEAD + b"\n" + frame,
        "half a frame": HEAD + b"\n" + frame[:100],
        "half a marker": HEAD + b"\n" + b"FRA",
        "another marker": HEAD + b"\n" + (b"PHOTO\n" + PICTURE) * 3,
        "a marker without an end": HEAD + b"\n" + b"FRAME " + bytes(100_000),
        "an endless head": HEAD + b" X" + b"x" * 3_000_000,
        "an endless marker": HEAD + b"\nFRAME X" + b"x" * 3_000_000,
        "control characters": b"YUV4MPEG2 \x1b[31mW16 H8\n" + frame * 2,
        "nul bytes": b"YUV4MPEG2 W1\x006 H8\n" + frame * 2,
        "words without end": b"YUV4MPEG2" + b" " * 3000 + b"\n",
        "keys twice": HEAD + b" W8 W32\n" + frame * 2,
        "a video": b"\0\0\0\x18ftypisom" + bytes(4000),
        "text": b"This is no video.\n" * 100,
        "random": random.Random(0).randbytes(100_000),
        "another version": b"YUV4MPEG3" + SOUND[9:],
        "the largest there is": HEAD.replace(b"W16 H8", b"W32768 H32768") + b"\nFRAME\n" + bytes(1000),
        "just too large": HEAD.replace(b"W16 H8", b"W26755 H26755") + b"\nFRAME\n" + bytes(1000),
    }
    right = {"words without end": None, "keys twice": accounted_for}
    for name, data in streams.items():
        catalogue.read(name, "source", "-", stdin=data, right=right.get(name))
        command = ["run", "-", "-o", "a.zarr", "--weights", tiny, "-q"]
        catalogue.call(name, command, stdin=data, right=(lambda answer: True) if right.get(name) else None)
        catalogue.call(name, ["info", "-"], stdin=data)
    for device in ("/dev/zero", "/dev/null", "/dev/full", "/dev/urandom", "/"):
        catalogue.read(device, "source", "-", stdin=device)
        catalogue.call(device, ["run", "-", "-o", "a.zarr", "--weights", tiny], stdin=device)
    cut = SOUND[:-1]
    catalogue.call("the last frame cut", ["run", "-", "-o", "a.zarr", "--weights", tiny], stdin=cut)
    catalogue.call("the last frame cut", ["run", "-", "-o", "a.mp4", "--weights", tiny], stdin=cut)
    catalogue.judge(70)
