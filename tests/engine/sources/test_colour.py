"""Known colours, stored with every matrix, range and depth, are decoded to what they were."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest

from flowreel.engine.config import SelectConfig
from flowreel.engine.sources.video import open_video

Clip = Callable[..., Path]

# name: (weight of red, weight of blue, AVColorSpace)
MATRICES = {"bt601": (0.299, 0.114, 5), "bt709": (0.2126, 0.0722, 1), "bt2020": (0.2627, 0.0593, 9)}
LIMITED, FULL = 1, 2
PATCH = 16


def patches() -> np.ndarray:
    """(64, 96, 3) uint8: flat squares, the corners of the colour cube first."""
    corners = np.stack(np.meshgrid([0, 255], [0, 255], [0, 255]), -1).reshape(-1, 3)
    others = np.random.default_rng(7).integers(0, 256, (16, 3))
    return np.kron(np.concatenate([corners, others]).reshape(4, 6, 3), np.ones((PATCH, PATCH, 1))).astype(np.uint8)


def planes(rgb: np.ndarray, matrix: str, value_range: int, bits: int) -> list[np.ndarray]:
    """Y', Cb, Cr by the definition in BT.601/709/2020, rounded to ``bits``."""
    red, blue, _ = MATRICES[matrix]
    r, g, b = np.moveaxis(rgb / 255, -1, 0)
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = [(b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)]
    unit, top = 2 ** (bits - 8), 2**bits - 1
    if value_range == FULL:
        values = [luma * top, *(c * top + 128 * unit for c in chroma)]
    else:
        values = [(16 + 219 * luma) * unit, *((128 + 224 * c) * unit for c in chroma)]
    return [np.clip(np.round(v), 0, top) for v in values]


def yuv_frame(rgb: np.ndarray, matrix: str, value_range: int, bits: int, pix_fmt: str) -> av.VideoFrame:
    height, width, _ = rgb.shape
    frame = av.VideoFrame(width, height, pix_fmt)
    step = 2 if "420" in pix_fmt else 1
    for plane, values in zip(frame.planes, planes(rgb, matrix, value_range, bits), strict=True):
        kept = values if values.shape == (plane.height, plane.width) else values[::step, ::step]
        dtype = np.dtype(np.uint8 if bits == 8 else "<u2")
        rows = np.zeros((plane.height, plane.line_size // dtype.itemsize), dtype)
        rows[:, : kept.shape[1]] = kept
        plane.update(rows.tobytes())
    return frame


def error(path: Path, rgb: np.ndarray) -> float:
    """Largest difference in levels at the middle of any patch."""
    with closing(open_video(str(path), SelectConfig())) as source:
        shown = next(iter(source)).rgb.permute(1, 2, 0).numpy()
    middle = slice(PATCH // 2, None, PATCH)
    return float(np.abs(shown.astype(int) - rgb)[middle, middle].max())


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuv444p"])
@pytest.mark.parametrize("value_range", [LIMITED, FULL])
@pytest.mark.parametrize("matrix", MATRICES)
def test_stated_matrix_and_range(clip: Clip, matrix: str, value_range: int, pix_fmt: str) -> None:
    rgb = patches()
    frames = [yuv_frame(rgb, matrix, value_range, 10 if "10" in pix_fmt else 8, pix_fmt) for _ in range(2)]
    colour = {"colorspace": MATRICES[matrix][2], "color_range": value_range}
    name = f"{matrix}_{value_range}_{pix_fmt}.mkv"
    path = clip(name, codec="ffv1", pix_fmt=pix_fmt, size=(96, 64), pictures=frames, colour=colour)
    assert error(path, rgb) <= 2


@pytest.mark.parametrize(("height", "matrix", "other"), [(718, "bt601", "bt709"), (720, "bt709", "bt601")])
def test_unstated_matrix_follows_the_height(clip: Clip, height: int, matrix: str, other: str) -> None:
    rgb = np.tile(patches(), (12, 1, 1))[:height]
    for made_with, good in ((matrix, True), (other, False)):
        frames = [yuv_frame(rgb, made_with, LIMITED, 8, "yuv420p") for _ in range(2)]
        path = clip(f"{height}_{made_with}.mkv", codec="ffv1", size=(96, height), pictures=frames)
        assert (error(path, rgb) <= 2) == good
        notes = open_video(str(path), SelectConfig()).notes
        assert any(matrix.upper() in note and "no colour matrix is stated" in note for note in notes)


def test_full_range_h264(clip: Clip) -> None:
    """yuvj420p, which cameras and motion JPEG write, is full range, whatever else the file states."""
    rgb = patches()
    frames = [yuv_frame(rgb, "bt601", FULL, 8, "yuvj420p") for _ in range(2)]
    options = {"qp": "0"}
    assert error(clip("j.mp4", pix_fmt="yuvj420p", size=(96, 64), pictures=frames, options=options), rgb) <= 2


@pytest.mark.parametrize(
    ("pix_fmt", "codec", "container"),
    [("bgr0", "ffv1", "mkv"), ("gbrp", "utvideo", "avi"), ("rgb24", "qtrle", "mov"), ("rgb24", "png", "mov")],
)
def test_rgb_passes_unchanged(clip: Clip, pix_fmt: str, codec: str, container: str) -> None:
    rgb = patches()
    frames = [av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format=pix_fmt) for _ in range(2)]
    path = clip(f"{pix_fmt}_{codec}.{container}", codec=codec, pix_fmt=pix_fmt, size=(96, 64), pictures=frames)
    assert error(path, rgb) == 0
    assert open_video(str(path), SelectConfig()).notes == []


def test_xyz_of_cinema_has_no_matrix(clip: Clip) -> None:
    rgb = np.full((64, 96, 3), (90, 120, 60), np.uint8)
    frames = [av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format="xyz12le") for _ in range(2)]
    path = clip("xyz.nut", codec="rawvideo", pix_fmt="xyz12le", size=(96, 64), pictures=frames)
    assert error(path, rgb) <= 2
    assert open_video(str(path), SelectConfig()).notes == []


def test_alpha_is_dropped(clip: Clip) -> None:
    rgb = patches()
    alpha = np.random.default_rng(1).integers(0, 255, (*rgb.shape[:2], 1)).astype(np.uint8)
    frames = [av.VideoFrame.from_ndarray(np.concatenate([rgb, alpha], -1), "rgba") for _ in range(2)]
    assert error(clip("alpha.mov", codec="png", pix_fmt="rgba", size=(96, 64), pictures=frames), rgb) == 0


@pytest.mark.parametrize(("pix_fmt", "shift"), [("gray", 0), ("gray16le", 8)])
def test_grey(clip: Clip, pix_fmt: str, shift: int) -> None:
    grey = patches()[..., 0]
    values = grey if not shift else grey.astype(np.uint16) * 257
    frames = [av.VideoFrame.from_ndarray(values, pix_fmt) for _ in range(2)]
    path = clip(f"{pix_fmt}.mkv", codec="ffv1", pix_fmt=pix_fmt, size=(96, 64), pictures=frames)
    assert error(path, np.repeat(grey[..., None], 3, -1)) <= 1


@pytest.mark.parametrize("size", [(33, 17), (17, 2), (1, 1)])
def test_odd_sizes(clip: Clip, size: tuple[int, int]) -> None:
    width, height = size
    rgb = np.full((height, width, 3), (200, 60, 90), np.uint8)
    frames = [yuv_frame(rgb, "bt601", LIMITED, 8, "yuv420p") for _ in range(2)]
    path = clip(f"{width}x{height}.mkv", codec="ffv1", size=size, pictures=frames)
    with closing(open_video(str(path), SelectConfig())) as source:
        shown = next(iter(source)).rgb
    assert shown.shape == (3, height, width)
    assert np.abs(shown.permute(1, 2, 0).numpy().astype(int) - rgb).max() <= 2
