"""Folders of bad images."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

Answer = dict[str, Any]
Catalogue = Any  # the fixture of conftest.py
Mangled = Callable[[bytes, random.Random], bytes]

KINDS = {"png": "PNG", "jpg": "JPEG", "ppm": "PPM", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}


def whole_source(answer: Answer) -> bool:
    """Whether a source gave all frames it promised, in the promised size. Damage may show in the pixels."""
    value = answer["value"]
    return bool(value["sizes_agree"] and value["frames"] == value["promised"] and not value["losses"])


def picture(kind: str, seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (48, 32), **options: Any) -> bytes:
    noise = random.Random(seed).randbytes(3 * size[0] * size[1])
    image = Image.frombytes("RGB", size, noise)
    file = io.BytesIO()
    (image.convert("L").convert(mode) if mode.startswith("I") else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bits: int = 8, kind: int = 2, pixels: bytes = b"", before: bytes = b"") -> bytes:
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return start + before + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND")


@pytest.mark.parametrize("ending", list(KINDS))
def test_damaged_images(ending: str, catalogue: Catalogue, mangled: Mangled) -> None:
    sound = [picture(KINDS[ending], seed) for seed in range(3)]
    pixels = hashlib.sha256(
        b"".join(np.asarray(Image.open(io.BytesIO(each))).transpose(2, 0, 1).tobytes() for each in sound)
    ).hexdigest()

    def right(answer: Answer) -> bool:
        """Only PNG has checksums: damage to other formats may go unnoticed and show in the pixels."""
        return whole_source(answer) and (ending != "png" or answer["value"]["pixels"] == pixels)

    for seed in range(60):
        data = [*sound]
        data[seed % 3] = mangled(data[seed % 3], random.Random(seed))
        files = {f"frames/{number}.{ending}": each for number, each in enumerate(data)}
        catalogue.read(f"mangled {seed}", "source", "frames", files, right=right)
    catalogue.judge(60)


def test_images_that_lie_about_their_size(catalogue: Catalogue) -> None:
    sound = picture("PNG")
    blank = zlib.compress(bytes(1000))
    sides = (0, 1, 8191, 32_768, 100_000, 2**31 - 1, 2**31, 2**32 - 1)
    for width, height in itertools.product(sides, sides):
        if min(width, height) > 1 or 0 in (width, height):
            files = {"frames/0.png": png(width, height, pixels=blank), "frames/1.png": png(width, height, pixels=blank)}
            catalogue.read(f"{width}x{height}", "source", "frames", files)
    bomb = png(100_000, 100_000, pixels=bytes(100 << 20))
    text = b"k\0\0" + zlib.compress(bytes(100 << 20))
    other = {
        "bombs": [bomb, bomb],
        "a bomb behind a sound one": [sound, bomb],
        "bombs in the text": [png(48, 32, pixels=bytes(32 * 145), before=chunk(b"zTXt", text))] * 2,
        "bombs in the colour profile": [png(48, 32, pixels=bytes(32 * 145), before=chunk(b"iCCP", text))] * 2,
        "bits that do not exist": [png(48, 32, 7, pixels=bytes(10_000))] * 2,
        "colours that do not exist": [png(48, 32, 8, 5, pixels=bytes(10_000))] * 2,
        "no palette": [png(48, 32, 8, 3, pixels=bytes(10_000))] * 2,
        "a palette that is too short": [png(48, 32, 8, 3, pixels=b"\xff" * 2000, before=chunk(b"PLTE", b"abc"))] * 2,
        "no pixels": [png(48, 32)] * 2,
        "pixels for one row": [png(48, 32, pixels=bytes(145))] * 2,
    }
    ppm = (
        "P6 99999 99999 255\n",
        "P6 -1 4 255\n",
        "P6 4 4 0\n",
        "P6 4 4 99999999\n",
        "P6 " + "9" * 5000,
        "P6 4",
        "P9 4 4 255\n",
    )
    other |= {repr(head[:20]): [head.encode() + bytes(48), head.encode() + bytes(48)] for head in ppm}
    # Pillow accepts the last two: it uses grey for a missing palette, and black for missing rows.
    may_be = {"bombs in the text", "bombs in the colour profile", "no palette", "pixels for one row"}
    may_be.add("a palette that is too short")
    for name, data in other.items():
        files = {f"frames/{number}.{'ppm' if data[0][:1] == b'P' else 'png'}": each for number, each in enumerate(data)}
        catalogue.read(name, "source", "frames", files, right=whole_source if name in may_be else None)
    catalogue.judge(50)


def tiff(*tags: tuple[int, int, int, int]) -> bytes:
    """A TIFF with these tags: number, kind, count, value."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0" + bytes(64)


def test_other_pictures(catalogue: Catalogue) -> None:
    def add(name: str, *data: bytes, ending: str = "png", right: Callable[[Answer], bool] | None = None) -> None:
        files = {f"frames/{number}.{ending}": each for number, each in enumerate(data)}
        catalogue.read(name, "source", "frames", files, right=right)

    for ending in KINDS:
        for name, data in (
            ("text", b"This is no picture.\n" * 9),
            ("nothing", b""),
            ("one byte", b"\x89"),
            ("a page", b"<!doctype html><title>404"),
            (
                "a script for a printer",
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file closefile\n",
            ),
            ("a drawing", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
            ("zeros", bytes(5000)),
        ):
            add(f"{name} as {ending}", data, data, ending=ending)
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        add(f"mode {mode}", picture("PNG", 0, mode), picture("PNG", 1, mode), right=whole_source)
    add("mode CMYK", *[picture("JPEG", 0, "CMYK")] * 2, ending="jpg", right=whole_source)
    add("mode F", *[picture("TIFF", 0, "F")] * 2, ending="tif")
    add("kinds mixed", picture("PNG"), picture("JPEG"), picture("BMP"), right=whole_source)
    add("sizes mixed", picture("PNG"), picture("PNG", size=(32, 48)))
    add("single pixels", *[picture("PNG", size=(1, 1))] * 2, right=whole_source)
    more = [Image.new("RGB", (48, 32), (level, 0, 0)) for level in (50, 100)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        moving = picture(kind, mode="P" if kind == "GIF" else "RGB", save_all=True, append_images=more)
        add(f"moving {kind}", moving, moving, right=whole_source)
    for orientation in (0, 6, 9, 65_535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        add(f"turned by {orientation}", *[picture("JPEG", exif=exif)] * 2, ending="jpg", right=whole_source)
    for exif_data in (b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(60), b"no EXIF"):
        add(f"EXIF {exif_data!r}", *[picture("JPEG", exif=exif_data)] * 2, ending="jpg", right=whole_source)
        add(f"EXIF {exif_data!r}", *[picture("PNG", exif=exif_data)] * 2, right=whole_source)
    add(
        "EXIF that is no number",
        *[picture("JPEG", exif=b"Exif\0\0" + tiff((0x0112, 2, 4, 0x41414141)))] * 2,
        ending="jpg",
        right=whole_source,
    )
    for width, height, strip in ((99_999, 99_999, 8), (0, 0, 8), (8, 8, 2**32 - 1), (2**31, 2, 8), (8, 8, 8)):
        tags = ((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, strip))
        add(
            f"a TIFF of {width}x{height}, {strip}",
            *[tiff(*tags, (279, 4, 1, 64))] * 2,
            ending="tif",
            right=whole_source,
        )
    for tag in (254, 258, 259, 262, 277, 284, 317, 322, 339):
        tags = ((256, 4, 1, 8), (257, 4, 1, 8), (tag, 3, 1, 65_535), (273, 4, 1, 8), (279, 4, 1, 64))
        add(f"a TIFF with tag {tag}", *[tiff(*tags)] * 2, ending="tif", right=whole_source)
    loop = b"II*\0\x08\0\0\0\0\0\x08\0\0\0" + bytes(64)  # its list of pictures is circular
    add("a TIFF that goes round", loop, loop, ending="tif")
    catalogue.judge(80)


def test_images_on_the_command_line(catalogue: Catalogue, mangled: Mangled, tiny: str) -> None:
    sound = picture("PNG", 0), picture("PNG", 1)
    for seed in range(10):
        files = {"frames/0.png": sound[0], "frames/1.png": mangled(sound[1], random.Random(seed))}
        catalogue.call(f"mangled {seed}", ["info", "frames"], files, right=bool)
        catalogue.call(f"mangled {seed}", ["info", "frames/1.png"], files, right=bool)
        arguments = ["run", "frames", "-o", "a.zarr", "--weights", tiny, "-q"]
        catalogue.call(f"mangled {seed}", arguments, files, right=lambda answer: (answer["folder"] / "a.zarr").is_dir())
    half = sound[0][: len(sound[0]) // 2]  # has a sound header, so the damage is found only during the run
    for output in ("a.zarr", "a.mp4", "a/%06d.flo"):
        files = {"frames/0.png": sound[0], "frames/1.png": half}
        catalogue.call(f"cut, to {output}", ["run", "frames", "-o", output, "--weights", tiny], files)
    catalogue.judge(33)
