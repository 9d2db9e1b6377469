"""KITTI flow pictures: 16-bit RGB PNGs of u, v and validity, read exactly and written one per flow.

The format (Menze, Geiger, "Object Scene Flow for Autonomous Vehicles", CVPR 2015, and its development kit): red is
64 u + 32768, green 64 v + 32768, rounded; blue is 1 where the vector is valid and 0 where it is not. So steps are
1/64 px, and the range is -512 to 511.98 px.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from flowreel.engine.data import UNKNOWN_WORDS
from flowreel.engine.errors import FlowFileError
from flowreel.engine.files import PathLike
from flowreel.sinks.color_png import PNG_RGB, PNG_SIGNATURE, png_pieces
from flowreel.sinks.numbered import (
    FlowFiles,
    NumberedFilesSink,
    SingleFlow,
    known_vectors,
    read_errors,
    require_size,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    UInt16Array = npt.NDArray[np.uint16]
    from flowreel.engine.data import BoolArray, Float32Array

STEPS_PER_PIXEL = 64
ZERO = 32768  # the sample that stands for no motion
PNG_START_BYTES = 33  # signature and header chunk
OTHER_CHUNKS_BYTES = 1 << 20  # besides the pixels: times, comments
FILTERS = {0, 1, 2, 3, 4}  # PNG's numbers for them; each row begins with that of its filter
INFLATE_BLOCK_BYTES = 1 << 20


def read_kitti(path: PathLike) -> tuple[Float32Array, BoolArray]:
    """Read a KITTI flow picture.

    Returns:
        flow (H, W, 2) float32, pixels, x (right) then y (down), NaN where invalid; and valid (H, W) bool.

    Raises:
        SourceNotFoundError: no such file.
        FlowFileError: not a PNG, not one of 16-bit RGB, an impossible size, cut short, or damaged.
    """
    name = os.fspath(path)
    with read_errors(path, "KITTI flow picture"), open(path, "rb") as file:
        start = file.read(PNG_START_BYTES)
        height, width = _read_size(name, start)
        pixel_bytes = height * (1 + 6 * width)
        file_bytes = os.fstat(file.fileno()).st_size
        data = start + file.read(min(file_bytes, 2 * pixel_bytes + OTHER_CHUNKS_BYTES))  # a valid picture has no more
    _check_contents(name, data, height, 1 + 6 * width)
    try:
        decoder = av.CodecContext.create("png", "r")
        decoder.thread_count = 1
        frames = [*decoder.decode(av.Packet(data)), *decoder.decode(None)]
    except (av.FFmpegError, ValueError) as error:
        raise FlowFileError(f"{name}: does not decode as a PNG ({error})") from error
    if [frame.format.name for frame in frames] != ["rgb48be"]:
        raise FlowFileError(f"{name}: expected a 16-bit RGB PNG, found another kind of picture")
    samples = frames[0].to_ndarray()  # (H, W, 3) uint16
    valid: BoolArray = samples[..., 2] != 0
    flow: Float32Array = (samples[..., :2].astype(np.float32) - ZERO) / np.float32(STEPS_PER_PIXEL)  # exact
    flow[~valid] = np.nan
    return flow, valid


class KittiSink(NumberedFilesSink):
    """One KITTI picture per flow: ``DIR/%06d.kitti.png``. See ``NumberedFilesSink``.

    Vectors that are unknown or beyond the format's range are invalid: ``notes`` counts them.
    """

    example = "flows/%06d.kitti.png"

    def encode(self, flow: SingleFlow) -> FlowFiles:
        samples = _to_samples(flow.flow)
        unknown = int(np.count_nonzero(~known_vectors(flow.flow)))
        invalid = int(np.count_nonzero(samples[..., 2] == 0))
        lost = {
            f"{UNKNOWN_WORDS} and stored as invalid": unknown,
            "beyond KITTI's range of ±512 px and stored as invalid": invalid - unknown,
        }
        return FlowFiles((png_pieces(samples),), lost)


def _to_samples(flow: npt.NDArray[np.floating[Any]]) -> UInt16Array:
    """(H, W, 2) pixels -> (H, W, 3) samples of the picture; 0, 0, 0 where invalid."""
    samples = np.zeros((*flow.shape[:2], 3), np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):  # values beyond float32 are beyond the range, too
        steps = [np.rint(flow[..., axis].astype(np.float32) * STEPS_PER_PIXEL) + ZERO for axis in (0, 1)]
        u, v = ((plane >= 0) & (plane <= 65535) for plane in steps)
        valid = u & v
        for axis, plane in enumerate(steps):
            np.copyto(samples[..., axis], plane, where=valid, casting="unsafe")
    samples[..., 2] = valid
    return samples


def _read_size(name: str, start: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the first bytes of a PNG, once it has been checked to be of KITTI's kind."""
    if not start.startswith(PNG_SIGNATURE):
        raise FlowFileError(f"{name}: expected a PNG, found a file that starts with {start[:8]!r}")
    if len(start) < PNG_START_BYTES or start[8:16] != b"\0\0\0\x0dIHDR":
        raise FlowFileError(f"{name}: it is cut short or damaged, a PNG starts with its header")
    width, height, bits, kind, _, _, interlaced = struct.unpack(">IIBBBBB", start[16:29])
    if (bits, kind, interlaced) != (16, PNG_RGB, 0):
        found = f"{bits} bits, colour type {kind}{', interlaced' if interlaced else ''}"
        raise FlowFileError(f"{name}: expected a flow picture of 16 bits, colour type {PNG_RGB} (RGB), found {found}")
    require_size(name, height, width)
    return height, width


def _check_contents(name: str, data: bytes, rows: int, row_bytes: int) -> None:
    """Raises FlowFileError unless the PNG is whole and decompresses to so many rows of so many bytes.

    FFmpeg fills in what is missing and ignores wrong checksums and unknown filters, so these are checked here.
    """
    inflater, found, expected = zlib.decompressobj(), 0, rows * row_bytes
    filters: set[int] = set()
    try:
        for kind, body in _chunks(name, data):
            left: bytes | memoryview = body if kind == b"IDAT" else b""
            while left and not inflater.eof and found <= expected:
                block = inflater.decompress(left, INFLATE_BLOCK_BYTES)
                filters.update(block[-found % row_bytes :: row_bytes])
                found += len(block)
                left = inflater.unconsumed_tail
    except zlib.error as error:
        raise FlowFileError(f"{name}: it is damaged, its pixels do not decompress ({error})") from error
    if found != expected or not inflater.eof:
        raise FlowFileError(f"{name}: it is damaged, expected {expected} bytes of pixels, found {found} or more")
    if not filters <= FILTERS:
        raise FlowFileError(f"{name}: it is damaged, a row of its pixels is filtered in no way that PNG knows")


def _chunks(name: str, data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and contents of every chunk up to IEND, after checking its checksum."""
    kind, place = b"", len(PNG_SIGNATURE)
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", data[place : place + 8].ljust(8, b"\0"))
        end = place + 12 + length
        if end > len(data):
            raise FlowFileError(f"{name}: it is cut short, {len(data)} bytes are not the whole PNG")
        body = memoryview(data)[place + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(kind)).to_bytes(4, "big") != data[end - 4 : end]:
            raise FlowFileError(f"{name}: it is damaged, the checksum of its {kind!r} chunk is wrong")
        yield kind, body
        place = end
