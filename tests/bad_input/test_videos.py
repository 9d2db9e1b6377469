"""Bad video files: not videos at all, damaged, or meant to make the reader open something else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

Answer = dict[str, Any]
Catalogue = Any  # the fixture of conftest.py
Mangled = Callable[[bytes, random.Random], bytes]

CLIPS = ("mp4 h264", "mkv h264", "ts h264", "mp4 mpeg4", "avi mpeg4", "mkv libvpx-vp9", "webm libvpx-vp9", "mkv ffv1")
FRAMES = 8
ENDINGS = (
    "mp4",
    "mkv",
    "avi",
    "ts",
    "mov",
    "webm",
    "m4v",
    "flv",
    "wmv",
    "mpg",
    "ogv",
    "gif",
    "h264",
    "ivf",
    "y4m",
    "nut",
)


def accounted_for(answer: Answer) -> bool:
    """Frames have the promised size, and missing ones are reported. Damage may show in the pixels."""
    value = answer["value"]
    return bool(value["sizes_agree"] and (value["frames"] == value["promised"] or value["losses"]))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small clip of each kind, by "container codec"."""
    folder = tmp_path_factory.mktemp("clips")
    return {kind: encoded(folder, *kind.split()) for kind in CLIPS}


def encoded(folder: Path, container: str, codec: str) -> bytes:
    path = folder / f"{codec}.{container}"
    options = {"movflags": "faststart"} if container == "mp4" else {}
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 4
        for number in range(FRAMES):
            noise = np.random.default_rng(number // 2).integers(0, 256, (48, 64, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        out.mux(stream.encode())
    return path.read_bytes()


@pytest.mark.parametrize("kind", CLIPS)
def test_damaged_clips(kind: str, clips: dict[str, bytes], catalogue: Catalogue, mangled: Mangled) -> None:
    name = f"x.{kind.split()[0]}"
    whole = clips[kind]
    for seed in range(25):
        data = mangled(whole, random.Random(seed))
        catalogue.read(f"mangled {seed}", "source", name, {name: data}, right=accounted_for)
    for seed in range(15):  # the first bytes matter most
        data = mangled(whole[:800], random.Random(seed)) + whole[800:]
        catalogue.read(f"start mangled {seed}", "source", name, {name: data}, right=accounted_for)
    for length in (1, 4, 8, 12, 32, 100, len(whole) // 2, len(whole) - 1):
        catalogue.read(f"{length} bytes", "source", name, {name: whole[:length]}, right=accounted_for)
    catalogue.judge(40)


def test_no_video_at_all(catalogue: Catalogue) -> None:
    contents = (
        b"\0",
        bytes(4000),
        b"text\n" * 400,
        b"<!doctype html><title>404</title>",
        b"\x1b[31m" * 100,
        b"RIFF",
        b"\x1aE\xdf\xa3",
    )
    for place, ending in enumerate(ENDINGS):
        for number, data in enumerate((*contents, random.Random(place).randbytes(2000))):
            if (place + number) % 2:
                catalogue.read(f"{data[:8]!r}", "source", f"x.{ending}", {f"x.{ending}": data})
            else:
                catalogue.call(f"{data[:8]!r}", ["info", f"x.{ending}"], {f"x.{ending}": data})
        catalogue.read("nothing", "source", f"x.{ending}", {f"x.{ending}": b""})
        catalogue.call("a folder", ["run", f"x.{ending}", "-o", "a.zarr"], {f"x.{ending}/x": b""})
    catalogue.judge(140)


LISTS = {
    "a playlist": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.ts\n#EXT-X-ENDLIST\n",
    "a live playlist": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.ts\n",
    "a playlist of itself": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{name}\n#EXT-X-ENDLIST\n",
    "a playlist of playlists": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{name}\n",
    "a playlist of a pipe": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/dev/zero\n#EXT-X-ENDLIST\n",
    "a playlist from afar": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
    "a list": "ffconcat version 1.0\nfile clip.ts\nfile clip.ts\n",
    "a list of itself": "ffconcat version 1.0\nfile {name}\n",
    "a list of a device": "ffconcat version 1.0\nfile /dev/zero\n",
    "a list without end": "ffconcat version 1.0\n" + "file clip.ts\n" * 50_000,
    "a session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 50004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "a manifest": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="dynamic"><Period>'
    '<AdaptationSet><Representation id="1"><BaseURL>clip.ts</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "a list of pictures": "ffconcat version 1.0\nfile %06d.png\noption pattern_type sequence\n",
    "subtitles": "1\n00:00:00,000 --> 00:00:01,000\nhello\n",
    "a playlist of media": "[playlist]\nFile1=clip.ts\n",
    "a drawing": "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "a script": "LoadPlugin('x')\nDirectShowSource('clip.ts')\n",
    "metadata": ";FFMETADATA1\ntitle=x\n",
}


def test_lists_of_other_files_are_no_videos(clips: dict[str, bytes], catalogue: Catalogue) -> None:
    """A downloaded "video" must not make other files be read, addresses be contacted, or the reader wait for ever."""
    for name, text in LISTS.items():
        for ending in ("mp4", "m3u8", "txt"):
            files = {f"x.{ending}": text.format(name=f"x.{ending}").encode(), "clip.ts": clips["ts h264"]}
            catalogue.read(f"{name} as {ending}", "source", f"x.{ending}", files)
            catalogue.call(f"{name} as {ending}", ["info", f"x.{ending}"], files)
    catalogue.judge(100)


def boxes(*parts: tuple[bytes, int | None, bytes]) -> bytes:
    """MP4 boxes from (kind, length, contents); length None: the right one."""
    return b"".join(
        (len(body) + 8 if length is None else length).to_bytes(4, "big") + kind + body for kind, length, body in parts
    )


def test_containers_that_lie(clips: dict[str, bytes], catalogue: Catalogue) -> None:
    brand = b"isom\0\0\2\0isomiso2avc1mp41"
    cases: dict[str, tuple[str, bytes]] = {}
    for length in (0, 1, 7, 2**31, 2**32 - 1):
        cases[f"a moov of {length}"] = ("mp4", boxes((b"ftyp", None, brand), (b"moov", length, bytes(100))))
        cases[f"a first box of {length}"] = ("mp4", boxes((b"ftyp", length, brand)) + clips["mp4 h264"])
    deep = b""
    for _ in range(3000):
        deep = boxes((b"moov", None, deep))
    cases["boxes in boxes"] = ("mp4", boxes((b"ftyp", None, brand)) + deep)
    cases["thousands of boxes"] = ("mp4", boxes((b"ftyp", None, brand), *[(b"free", None, b"")] * 20_000))
    whole = clips["mp4 h264"]
    for kind in (
        b"stts",
        b"ctts",
        b"stsc",
        b"stsz",
        b"stco",
        b"stss",
        b"tkhd",
        b"mdhd",
        b"mvhd",
        b"elst",
        b"avcC",
        b"avc1",
        b"hdlr",
        b"trak",
    ):
        place = whole.find(kind)
        for value in (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff"):
            for offset in (4, 8, 12, 16):
                data = whole[: place + offset] + value + whole[place + offset + 4 :]
                cases[f"{kind!r} says {value!r} at {offset}"] = ("mp4", data)
    size = clips["avi mpeg4"].find(b"avih")
    for offset in range(4, 64, 8):
        data = bytearray(clips["avi mpeg4"])
        data[size + offset : size + offset + 4] = b"\xff\xff\xff\x7f"
        cases[f"an AVI with a lie at {offset}"] = ("avi", bytes(data))
    for name, (ending, data) in cases.items():
        catalogue.read(name, "source", f"x.{ending}", {f"x.{ending}": data}, right=accounted_for)
    catalogue.judge(160)


def test_damaged_clips_on_the_command_line(
    clips: dict[str, bytes], catalogue: Catalogue, mangled: Mangled, tiny: str
) -> None:
    run = ["--weights", tiny, "-q"]
    for number, kind in enumerate(CLIPS):
        name = f"x.{kind.split()[0]}"
        for seed in range(4):
            data = mangled(clips[kind], random.Random(seed))
            catalogue.call(f"{kind} {seed}", ["info", name], {name: data}, right=bool)
            output = ("a.zarr", "a.mp4", "a.mkv", "a.zarr")[(number + seed) % 4]
            command = ["run", name, "-o", output, *run]
            catalogue.call(f"{kind} {seed}", command, {name: data}, right=lambda answer: answer["err"] == "")
        half = clips[kind][: len(clips[kind]) // 2]
        right = bool if name == "x.ts" else None  # a transport stream does not say how long it is
        catalogue.call(f"half of {kind}", ["run", name, "-o", "a.zarr", *run], {name: half}, right=right)
    catalogue.judge(70)
