"""Bad flow files: .flo, KITTI pictures, .npz, two-stream pictures."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

Answer = dict[str, Any]
Catalogue = Any  # the fixture of conftest.py
Mangled = Callable[[bytes, random.Random], bytes]

CANARY = b"cos\nsystem\n(S'echo > canary'\ntR."  # a pickle that runs a command when it is loaded
SIDES = (-(2**31), -1, 0, 1, 2, 12, 46341, 65536, 99_999, 100_000, 2**31 - 1)


def digest(flow: np.ndarray) -> str:
    """The digest that the worker computes of a flow."""
    flow = np.ascontiguousarray(flow, np.float32)
    return hashlib.sha256(repr((flow.shape, "float32")).encode() + flow.tobytes()).hexdigest()


def reads_as(flow: np.ndarray) -> Callable[[Answer], bool]:
    return lambda answer: answer["value"]["digest"] == digest(flow)


def some_flow(seed: int = 0, height: int = 5, width: int = 7) -> np.ndarray:
    """(H, W, 2) float32, in whole KITTI steps."""
    steps = np.random.default_rng(seed).integers(-500, 500, size=(height, width, 2))
    return (steps / 64).astype(np.float32)


# -- .flo --------------------------------------------------------------------------------------------------------


def flo(width: int, height: int, vectors: bytes = b"", tag: bytes = b"PIEH") -> bytes:
    return tag + struct.pack("<ii", width, height) + vectors


def flo_truth(data: bytes) -> Callable[[Answer], bool] | None:
    """The flow in a damaged file that is still valid by the definition of the format; None if it is not."""
    if len(data) < 12 or data[:4] != b"PIEH":
        return None
    width, height = struct.unpack("<ii", data[4:12])
    if width < 1 or height < 1 or len(data) != 12 + 8 * width * height:
        return None
    return reads_as(np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2))


def test_flo(catalogue: Catalogue, mangled: Mangled) -> None:
    whole = flo(7, 5, some_flow().tobytes())
    for seed in range(80):
        data = mangled(whole, random.Random(seed))
        catalogue.read(f"mangled {seed}", "flo", "x.flo", {"x.flo": data}, right=flo_truth(data))
    for width, height in itertools.product(SIDES, SIDES):
        data = flo(width, height, bytes(96))
        catalogue.read(f"says {width}x{height}", "flo", "x.flo", {"x.flo": data}, right=flo_truth(data))
    for seed in range(40):
        chance = random.Random(seed)
        data = chance.choice((b"", b"PIEH", b"HEIP")) + chance.randbytes(chance.randrange(60))
        catalogue.read(f"random {seed}", "flo", "x.flo", {"x.flo": data}, right=flo_truth(data))
    for side in (20_000, 99_999):
        path = catalogue.place() / "x.flo"
        path.write_bytes(flo(side, side))
        os.truncate(path, 12 + 8 * side * side)  # a sparse file of the right length
        catalogue.read(f"{side}x{side}, all there", "flo", "x.flo")
    catalogue.judge(240)


@pytest.mark.parametrize("command", [["info"], ["info", "--json"], ["export", "-o", "a.zarr"], ["color", "-o", "a"]])
def test_flow_files_on_the_command_line(command: list[str], catalogue: Catalogue, mangled: Mangled) -> None:
    files = {
        "x.flo": flo(7, 5, some_flow().tobytes()),
        "x.kitti.png": png(kitti_rows(some_flow())),
        "x.npz": npz(npy(some_flow())),
        "x.png": png(kitti_rows(some_flow())),
    }
    for seed in range(6):
        for name, data in files.items():
            catalogue.call(f"{seed}", [*command, name], {name: mangled(data, random.Random(seed))}, right=bool)
    catalogue.call("among sound ones", [*command, "."], {"1.flo": files["x.flo"], "2.flo": files["x.flo"][:-1]})
    sizes = {"1.flo": files["x.flo"], "2.flo": flo(1, 1, bytes(8))}
    catalogue.call("two sizes", [*command, "."], sizes, right=lambda answer: "color" in command)
    catalogue.judge(24)


# -- KITTI -------------------------------------------------------------------------------------------------------


def kitti_rows(flow: np.ndarray) -> bytes:
    """A PNG's rows before compression, each after the number of its filter."""
    samples = np.dstack([flow * 64 + 32768, np.ones(flow.shape[:2])]).astype(">u2")
    return b"".join(b"\0" + row.tobytes() for row in samples)


def chunk(kind: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return struct.pack(">I", length) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(
    width: int = 7, height: int = 5, bits: int = 16, kind: int = 2, packing: int = 0, filters: int = 0, lace: int = 0
) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, packing, filters, lace)
    )


def png(rows: bytes, **said: int) -> bytes:
    return header(**said) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")


def test_kitti(catalogue: Catalogue, mangled: Mangled) -> None:
    flow = some_flow()
    rows = kitti_rows(flow)
    whole, packed = png(rows), zlib.compress(rows)
    right = reads_as(flow)

    def read(name: str, data: bytes, right: Callable[[Answer], bool] | None = None) -> None:
        catalogue.read(name, "kitti", "x.kitti.png", {"x.kitti.png": data}, right=right)

    for seed in range(100):  # checksums detect all damage to the pixels
        read(f"mangled {seed}", mangled(whole, random.Random(seed)), right)
    for width, height in itertools.product((0, 1, 6, 7, 8, 99_999, 100_000, 2**31, 2**32 - 1), (0, 4, 5, 6, 65_536)):
        read(
            f"says {width}x{height}",
            png(rows, width=width, height=height),
            right if (width, height) == (7, 5) else None,
        )
    for bits, kind, lace in itertools.product((0, 1, 2, 4, 8, 16, 32, 255), (0, 2, 3, 4, 6, 7), (0, 1, 2)):
        if (bits, kind, lace) != (16, 2, 0):
            read(f"{bits} bits, {kind}, {lace}", png(rows, bits=bits, kind=kind, lace=lace))
    for value in (1, 8, 255):
        read(f"packed in way {value}", png(rows, packing=value), right)
        read(f"filtered in way {value}", png(rows, filters=value), right)
    for place in range(0, len(rows), 1 + 6 * 7):
        read(f"row {place} has an unknown filter", png(rows[:place] + b"\x09" + rows[place + 1 :]))
    end = chunk(b"IEND")
    odd = {
        "no pixels": header() + end,
        "no end": header() + chunk(b"IDAT", packed),
        "two headers": header() + header()[8:] + chunk(b"IDAT", packed) + end,
        "header twice, another size": header() + header(9, 9)[8:] + chunk(b"IDAT", packed) + end,
        "pixels after the end": header() + end + chunk(b"IDAT", packed),
        "unpacked pixels": header() + chunk(b"IDAT", rows) + end,
        "a chunk of 4 GB": header() + chunk(b"IDAT", packed, 2**32 - 1) + end,
        "a bomb": header() + chunk(b"IDAT", zlib.compress(bytes(200 << 20), 1)) + end,
        "a bomb that tells": header(99_000, 99_000) + chunk(b"IDAT", zlib.compress(bytes(50 << 20), 1)) + end,
        "a row too many": png(rows + rows[:43]),
        "a row too few": png(rows[:-43]),
        "bytes behind the stream": header() + chunk(b"IDAT", packed + b"more") + end,
        "only the signature": header()[:8],
        "a gif": b"GIF89a" + bytes(40),
        "text": b"This is no picture.\n",
        "nothing": b"",
        "many chunks of nothing": header() + chunk(b"IDAT") * 50_000 + end,
    }
    for name, data in odd.items():
        read(name, data, right if name in ("bytes behind the stream", "two headers") else None)
    read("one byte a chunk", header() + b"".join(chunk(b"IDAT", bytes([byte])) for byte in packed) + end, right)
    read("an unknown chunk", header() + chunk(b"teXt", b"\x1b[31m") + chunk(b"IDAT", packed) + end, right)
    catalogue.judge(280)


# -- .npz --------------------------------------------------------------------------------------------------------


def npy(flow: np.ndarray, said: str | None = None, version: bytes = b"\1\0") -> bytes:
    """An .npy whose header may not match its contents."""
    text = said if said is not None else f"{{'descr': '<f4', 'fortran_order': False, 'shape': {flow.shape}}}"
    words = text.encode("latin-1", "replace").ljust(117) + b"\n"
    length = struct.pack("<H" if version == b"\1\0" else "<I", len(words))
    return b"\x93NUMPY" + version + length + words + np.ascontiguousarray(flow, "<f4").tobytes()


def npz(entry: bytes, name: str = "flow.npy", packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        archive.writestr(zipfile.ZipInfo(name), entry, packing, 1)
    return file.getvalue()


def said(descr: object = "<f4", order: object = False, shape: object = (5, 7, 2)) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': {order!r}, 'shape': {shape!r}}}"


DTYPES = ("O", "|O", "<i4", "<c8", "<U4", "|S4", "|V4", "<f16", "<f1", "f4,f4", "<M8[s]", "", "\x1b[31m", None, 4)
SHAPES = (
    *((), (70,), (35, 2), (5, 7, 2, 1), (5, 7, 3), (7, 5, 3), (0, 7, 2), (-5, -7, 2), (10, 7, 2), (5, 7.0, 2)),
    *((True, 7, 2), "572", 70, None, [5, 7, 2], (10**6, 10**6, 2), (10**40, 1, 2), (2**61, 4, 2), (99_999, 99_999, 2)),
)
HEADERS = ("", "{}", "[]", "{'descr': '<f4'}", "(" * 300, "[" * 900, "-" * 900 + "1", "__import__('os')", "{1: 2", "\0")


def test_npz(catalogue: Catalogue, mangled: Mangled) -> None:
    flow = some_flow()
    right = reads_as(flow)

    def read(name: str, data: bytes, right: Callable[[Answer], bool] | None = None) -> None:
        catalogue.read(name, "npz", "x.npz", {"x.npz": data}, right=right)

    for packing in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for seed in range(60):
            read(f"mangled {seed}", mangled(npz(npy(flow), packing=packing), random.Random(seed)), right)
    for dtype in DTYPES:
        read(f"of dtype {dtype!r}", npz(npy(flow, said(descr=dtype))))
        read(f"a pickle of dtype {dtype!r}", npz(npy(flow[:0], said(descr=dtype)) + CANARY))
    for shape in SHAPES:
        read(f"of shape {shape!r}", npz(npy(flow, said(shape=shape))))
    for text in HEADERS:
        read(f"header {text[:20]!r}", npz(npy(flow, text)))
    for length in (0, 1, 100, 60_000, 2**32 - 1):
        read(f"a header of {length} bytes", npz(b"\x93NUMPY\2\0" + struct.pack("<I", length) + npy(flow)[10:]))
    for name in ("flow.npy", "\x1b[31m.npy", "../flow.npy", "/flow.npy", "a\nb.npy", "x" * 60_000, "", "\udcff.npy"):
        name = name.encode("utf-8", "replace").decode()
        read(f"entry {name[:20]!r}", npz(b"nothing of use", name))
    for packing in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        read(f"packed in way {packing}", npz(npy(flow), packing=packing))
        read(f"a bomb packed in way {packing}", npz(npy(flow) + bytes(30 << 20), packing=packing))
    read("a bomb", npz(npy(flow) + bytes(200 << 20)))
    read("a bomb that tells", npz(npy(flow, said(shape=(9_000, 9_000, 2))) + bytes(100 << 20)))
    read("a zip of zips", npz(npz(npy(flow)), "flow.zip"))
    read("no zip", npy(flow))
    read("a bare pickle", CANARY)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(3000):
            archive.writestr(f"{number}.npy", npy(flow))
    read("three thousand fields", file.getvalue())
    file = io.BytesIO()
    np.savez(file, flow=np.array([lambda: 1, None], object)[1:], allow_pickle=True)
    read("an array of objects", file.getvalue())
    entry = npz(npy(flow))
    place = entry.rindex(b"PK\1\2")
    for field, size in ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)):  # of the central directory
        for value in (b"\0" * size, b"\xff" * size, b"\x01" + b"\0" * (size - 1)):
            lies = entry[: place + field] + value + entry[place + field + size :]
            read(f"directory says {value!r} at {field}", lies, right)
    catalogue.judge(220)


# -- Two-stream pictures -----------------------------------------------------------------------------------------


def picture(kind: str, mode: str = "L", size: tuple[int, int] = (7, 5)) -> bytes:
    file = io.BytesIO()
    noise = random.Random(0).randbytes(size[0] * size[1])
    Image.frombytes("L", size, noise).convert(mode).save(file, kind)
    return file.getvalue()


def test_two_stream(catalogue: Catalogue, mangled: Mangled) -> None:
    def is_a_field(answer: Answer) -> bool:
        """JPEG has no checksums, so damage may go unnoticed and show in the values."""
        return len(answer["value"]["shape"]) == 3

    for kind, ending in (("JPEG", "jpg"), ("PNG", "png")):
        whole = picture(kind)
        x, y = f"flow_x_1.{ending}", f"flow_y_1.{ending}"
        for seed in range(50):
            files = {x: mangled(whole, random.Random(seed)), y: whole}
            catalogue.read(f"x mangled {seed}", "two-stream", x, files, right=is_a_field)
            catalogue.read(f"y mangled {seed}", "two-stream", x, {x: whole, y: files[x]}, right=is_a_field)
        for mode in ("1", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"):
            if (ending == "jpg" and mode in ("LA", "P", "RGBA", "I;16")) or (ending == "png" and mode == "CMYK"):
                continue
            grey = is_a_field if (kind, mode) == ("JPEG", "1") else None  # a JPEG stores mode 1 as 8-bit grey
            catalogue.read(f"mode {mode}", "two-stream", x, {x: picture(kind, mode), y: whole}, right=grey)
        catalogue.read("another size", "two-stream", x, {x: whole, y: picture(kind, size=(5, 7))})
        catalogue.read("half a pair", "two-stream", x, {x: whole})
        catalogue.read("the other half", "two-stream", y, {y: whole})
        catalogue.read("other halves of another kind", "two-stream", x, {x: whole, y: b"text"})
        catalogue.read("a folder", "two-stream", x, {x: whole, f"{y}/z": b""})
    huge = header(99_999, 99_999, 8, 0) + chunk(b"IDAT", zlib.compress(bytes(50 << 20), 1)) + chunk(b"IEND")
    names = {"flow_x_1.png": huge, "flow_y_1.png": huge}
    catalogue.read("bombs", "two-stream", "flow_x_1.png", names)
    catalogue.judge(210)
