"""KITTI pictures: read exactly as OpenCV does, read back after writing, and clear errors for damaged files."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import FlowFileError, SourceNotFoundError
from flowreel.sinks import kitti, open_sink, read_kitti
from flowreel.sinks.color_png import png_pieces


def opencv(path: Path) -> np.ndarray:
    """The picture as OpenCV reads it: (H, W, 3) uint16, RGB."""
    samples = cv2.imread(str(path), cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    assert samples is not None
    return samples[..., ::-1]


def png(header: bytes, pixels: bytes, *more: bytes) -> bytes:
    """A PNG with any header and compressed pixels, and correct checksums; ``more``: chunks in between."""
    chunks = [b"IHDR" + header, *more, b"IDAT" + pixels, b"IEND"]
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def header(width: int, height: int, bits: int = 16, kind: int = 2, interlaced: int = 0) -> bytes:
    return struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced)


def write_kitti(path: Path, flow: np.ndarray) -> None:
    """The picture that the sink writes."""
    path.write_bytes(b"".join(png_pieces(kitti._to_samples(flow))))


ROWS = bytes(2 * (1 + 6 * 3))  # of 3x2 pixels, unfiltered


def test_ground_truth_reads_as_in_opencv(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "pairs" / "kitti2015" / "flow.png"
    samples = opencv(path)
    flow, valid = read_kitti(path)
    assert (flow.dtype, valid.dtype, flow.shape) == (np.float32, np.bool_, (375, 1242, 2))
    assert np.array_equal(valid, samples[..., 2] > 0)
    assert valid.mean() == pytest.approx(0.162, abs=1e-3)
    assert np.array_equal(flow[valid], (samples[valid][:, :2].astype(np.float64) - 32768) / 64)
    assert np.isnan(flow[~valid]).all()
    assert np.linalg.norm(flow[valid], axis=-1).max() == pytest.approx(190.0, abs=0.1)
    write_kitti(tmp_path / "again.png", flow)
    assert np.array_equal(opencv(tmp_path / "again.png"), samples * (samples[..., 2:] > 0))


def test_written_vectors_are_the_nearest_steps(tmp_path: Path) -> None:
    flow = np.random.default_rng(0).uniform(-512, 511.99, (37, 41, 2)).astype(np.float32)
    write_kitti(tmp_path / "x.png", np.asfortranarray(flow)[:, ::-1].astype(np.float64))
    expected = np.rint(64 * flow[:, ::-1].astype(np.float64) + 32768)
    samples = opencv(tmp_path / "x.png")
    assert np.array_equal(samples[..., :2], expected)
    assert (samples[..., 2] == 1).all()
    back, valid = read_kitti(str(tmp_path / "x.png"))
    assert valid.all()
    assert np.abs(back - flow[:, ::-1]).max() <= 1 / 128


@pytest.mark.parametrize(
    ("vector", "samples"),
    [
        ((0, 0), (32768, 32768, 1)),
        ((-512, 511.984375), (0, 65535, 1)),
        ((1 / 64, -1 / 64), (32769, 32767, 1)),
        ((512, 0), (0, 0, 0)),
        ((0, -512.01), (0, 0, 0)),
        ((np.nan, 0), (0, 0, 0)),
        ((0, np.inf), (0, 0, 0)),
        ((1e10, 1e10), (0, 0, 0)),
        ((0, -1e300), (0, 0, 0)),
    ],
)
def test_edges_of_the_range(tmp_path: Path, vector: tuple[float, float], samples: tuple[int, ...]) -> None:
    write_kitti(tmp_path / "x.png", np.array([[vector, (3, 4)]], np.float64))
    assert opencv(tmp_path / "x.png")[0].tolist() == [list(samples), [32768 + 192, 32768 + 256, 1]]
    flow, valid = read_kitti(tmp_path / "x.png")
    assert valid.tolist() == [[bool(samples[2]), True]]
    assert np.isnan(flow[0, 0]).all() == (not samples[2])


def test_the_sink_counts_what_is_invalid(tmp_path: Path) -> None:
    flows = torch.zeros(3, 2, 5, 4)
    flows[1, 0, 0, 0], flows[2, 1, 0, :3] = torch.nan, torch.inf
    flows[2, 0, 4, :2] = 600.0
    flows[2, :, 0, 0] = torch.tensor([torch.nan, 600.0])  # unknown, so not counted as out of range
    sink = open_sink(tmp_path / "%06d.kitti.png", SinkConfig())
    sink.open(FlowInfo(5, 4, frame_rate=None, frame_count=None, source=SourceId("test")))
    frames = np.array([10, 20, 30])
    sink.write(FlowBatch(flows, 0, frames, frames + 10, frames / 10, frames / 10))
    sink.commit()
    unknown, beyond = sink.notes
    assert "4 of 60 vectors (6.7 %) are unknown" in unknown
    assert "first in frame 20" in unknown
    assert "2 of 60 vectors (3.3 %) are beyond KITTI's range of ±512 px" in beyond
    assert "first in frame 30" in beyond
    assert [int(read_kitti(tmp_path / f"{n:06d}.kitti.png")[1].sum()) for n in range(3)] == [20, 19, 15]


def test_comments_and_split_pixels_are_fine(tmp_path: Path) -> None:
    pixels = zlib.compress(ROWS)
    data = png(header(3, 2), pixels[5:], b"tEXtcomment\0" + bytes(2000), b"IDAT", b"IDAT" + pixels[:5])
    (tmp_path / "x.png").write_bytes(data)
    flow, valid = read_kitti(tmp_path / "x.png")
    assert flow.shape == (2, 3, 2)
    assert not valid.any()


def test_any_blue_but_zero_is_valid_as_in_the_development_kit(tmp_path: Path) -> None:
    samples = np.full((1, 3, 3), 32768, np.uint16)
    samples[0, :, 2] = 0, 1, 65535
    (tmp_path / "x.png").write_bytes(b"".join(png_pieces(samples)))
    flow, valid = read_kitti(tmp_path / "x.png")
    assert valid.tolist() == [[False, True, True]]
    assert np.isnan(flow[0, :, 0]).tolist() == [True, False, False]


GOOD = png(header(3, 2), zlib.compress(ROWS))
ADLER_OFF = zlib.compress(ROWS)[:-1] + bytes([zlib.compress(ROWS)[-1] ^ 1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a PNG"),
        (b"PIEH" + bytes(100), "expected a PNG, found a file that starts with b'PIEH"),
        (GOOD[:20], "cut short"),
        (GOOD[:-1], "cut short"),
        (GOOD[:-12], "cut short"),
        (GOOD[:50], "cut short"),
        (GOOD[:45] + bytes([GOOD[45] ^ 1]) + GOOD[46:], "checksum of its b'IDAT' chunk"),
        (GOOD[:31] + b"!" + GOOD[32:], "checksum of its b'IHDR' chunk"),
        (png(header(3, 2, bits=8), zlib.compress(ROWS)), "16 bits, colour type 2 .* found 8 bits, colour type 2"),
        (png(header(3, 2, kind=0), zlib.compress(ROWS)), "found 16 bits, colour type 0"),
        (png(header(3, 2, kind=6), zlib.compress(ROWS)), "found 16 bits, colour type 6"),
        (png(header(3, 2, interlaced=1), zlib.compress(ROWS)), "interlaced"),
        (png(header(0, 2), zlib.compress(ROWS)), "found 0x2"),
        (png(header(99_999, 99_999), zlib.compress(ROWS)), "at most 134217728 pixels, found 99999x99999"),
        (png(header(3, 2), zlib.compress(ROWS[:-1])), "expected 38 bytes of pixels, found 37"),
        (png(header(3, 2), zlib.compress(ROWS + b"!")), "expected 38 bytes of pixels, found 39"),
        (png(header(3, 2), zlib.compress(ROWS)[:-4]), "expected 38 bytes of pixels"),
        (png(header(3, 2), b"not zlib"), "do not decompress"),
        (png(header(3, 2), ADLER_OFF), "do not decompress"),
        (png(header(3, 2), b""), "expected 38 bytes of pixels, found 0"),
        (png(header(3, 2), zlib.compress(b"\5" + ROWS[1:])), "filtered in no way"),
        (png(header(3, 2), zlib.compress(ROWS[:19] + b"\5" + ROWS[20:])), "filtered in no way"),
    ],
)
def test_damaged_files_say_what_is_wrong(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(FlowFileError, match=message) as caught:
        read_kitti(tmp_path / "bad.png")
    assert str(tmp_path / "bad.png") in str(caught.value)


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    bomb = zlib.compressobj(9)
    pixels = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(50)) + bomb.flush()
    for size in ((3, 2), (11_000, 11_000)):  # 50 MB are more than the header declares, then less
        (tmp_path / "x.png").write_bytes(png(header(*size), pixels))
        tracemalloc.start()
        try:
            with pytest.raises(FlowFileError, match=r"bytes of pixels, found"):
                read_kitti(tmp_path / "x.png")
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match=r"none\.png"):
        read_kitti(tmp_path / "none.png")
    with pytest.raises(FlowFileError, match="found a folder"):
        read_kitti(tmp_path)
