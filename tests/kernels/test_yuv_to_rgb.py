"""Surfaces to RGB, compared with FFmpeg's scaler on frames of real clips and with the standards; and edge cases."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from flowreel.engine.restore import Fit
from flowreel.engine.sources.picture import Converter, Turn, is_full_range, matrix_of
from flowreel.kernels.yuv_to_rgb import LUMA_WEIGHTS, yuv_to_rgb

if TYPE_CHECKING:
    from pathlib import Path

CLIPS = (
    "videos/bbb_1080p60.mp4",  # BT.709
    "videos/person_asl_walk_640x480.mkv",  # full range
    "videos_corner/av1_640x360.mkv",
    "videos_corner/hevc_main10_320x240.mp4",  # BT.2020, 10 bits
    "videos_corner/odd_321x241_vp9.mp4",
)
FORMATS = {"yuv420p": (2, 2), "yuv422p": (1, 2), "yuv444p": (1, 1)}  # pixels per chroma sample: down, across


def semi_planar(planes: list[np.ndarray], bits: int, pitch: int = 0) -> tuple[Tensor, Tensor]:
    """Luma and chroma laid out as in NV12 or P010; rows have ``pitch`` more samples than the picture, full of junk."""
    luma, cb, cr = (plane << (16 - bits) if bits > 8 else plane for plane in planes)

    def pitched(rows: np.ndarray) -> Tensor:
        memory = np.full((rows.shape[0], rows.shape[1] + pitch), 77, rows.dtype)
        memory[:, : rows.shape[1]] = rows
        return torch.from_numpy(memory)[:, : rows.shape[1]]

    return pitched(luma), pitched(np.stack([cb, cr], -1).reshape(cb.shape[0], -1)).unflatten(1, (-1, 2))


def frame_of(planes: list[np.ndarray], pix_fmt: str, matrix: int = 1, value_range: int = 1) -> av.VideoFrame:
    frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], pix_fmt)
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
        rows[:, : plane.width] = values
        plane.update(rows.tobytes())
    frame.colorspace, frame.color_range = matrix, value_range
    return frame


def planes_of(frame: av.VideoFrame) -> tuple[list[np.ndarray], int]:
    bits = frame.format.components[0].bits
    dtype = np.dtype(np.uint8 if bits == 8 else "<u2")
    return [np.frombuffer(p, dtype).reshape(p.height, -1)[:, : p.width] for p in frame.planes], bits


def by_ffmpeg(frame: av.VideoFrame) -> Tensor:
    return torch.from_numpy(Converter("it", (frame.width, frame.height), Turn())(frame, 0)).permute(2, 0, 1)


def levels_apart(one: Tensor, other: Tensor) -> Tensor:
    assert one.shape == other.shape
    return (one.int() - other.int()).abs()


def noise(shape: tuple[int, ...], low: int = 60, high: int = 196) -> np.ndarray:
    """Noise that stays inside the RGB cube: far outside of it, FFmpeg's integers overflow."""
    return np.random.default_rng(sum(shape)).integers(low, high, shape).astype(np.uint8)


@pytest.mark.parametrize("name", CLIPS)
def test_frames_of_real_clips_are_those_of_the_cpu_path(data_dir: Path, name: str) -> None:
    with av.open(str(data_dir / name)) as container:
        container.streams.video[0].thread_type = "AUTO"
        frame = next(islice(container.decode(video=0), 6, None))
    planes, bits = planes_of(frame)
    luma, chroma = semi_planar(planes, bits, pitch=13)
    rgb = yuv_to_rgb(luma, chroma, matrix=matrix_of(frame), full_range=is_full_range(frame), bits=bits)
    apart = levels_apart(rgb, by_ffmpeg(frame))
    assert apart.max() <= 1
    assert apart.float().mean() < 0.02


@pytest.mark.parametrize("pix_fmt", FORMATS)
@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 11), (33, 17), (17, 64)])
def test_every_subsampling_and_odd_sizes_as_ffmpeg_has_them(pix_fmt: str, size: tuple[int, int]) -> None:
    down, across = FORMATS[pix_fmt]
    chroma_size = (-(-size[0] // down), -(-size[1] // across))
    planes = [noise(size), 128 + noise(chroma_size) // 8, 110 + noise(chroma_size) // 8]
    separate = torch.from_numpy(np.stack(planes[1:])).permute(1, 2, 0)
    rgb = yuv_to_rgb(torch.from_numpy(planes[0]), separate)
    assert levels_apart(rgb, by_ffmpeg(frame_of(planes, pix_fmt))).max() <= 1
    assert torch.equal(rgb, yuv_to_rgb(*semi_planar(planes, 8)))


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", LUMA_WEIGHTS)
def test_colours_come_back_as_the_standards_say(matrix: str, full_range: bool, bits: int) -> None:
    rgb = np.stack(np.meshgrid(*[[0, 64, 128, 191, 255]] * 3, indexing="ij"), 0).reshape(3, 5, 25) / 255
    red, blue = LUMA_WEIGHTS[matrix]
    luma = red * rgb[0] + (1 - red - blue) * rgb[1] + blue * rgb[2]
    cb, cr = (rgb[2] - luma) / (2 - 2 * blue), (rgb[0] - luma) / (2 - 2 * red)
    unit, top = 1 << bits - 8, (1 << bits) - 1
    spans = (0, top, top) if full_range else (16 * unit, 219 * unit, 224 * unit)
    stored = (spans[0] + spans[1] * luma, 128 * unit + spans[2] * cb, 128 * unit + spans[2] * cr)
    planes = [np.clip(p.round(), 0, top).astype(np.uint8 if bits == 8 else np.uint16) for p in stored]
    back = yuv_to_rgb(*semi_planar(planes, bits), matrix=matrix, full_range=full_range, bits=bits)
    # Rounding costs half a step each of the stored luma and chroma, and half a level of the result.
    assert levels_apart(back, torch.from_numpy((rgb * 255).round().astype(np.uint8))).max() <= (2 if bits == 8 else 1)


def test_a_known_picture() -> None:
    luma = torch.tensor([[16, 235], [126, 81]], dtype=torch.uint8)
    grey = torch.full((1, 1, 2), 128, dtype=torch.uint8)
    assert yuv_to_rgb(luma, grey)[0].tolist() == [[0, 255], [128, 76]]
    assert yuv_to_rgb(luma, grey, full_range=True)[2].tolist() == luma.tolist()
    ramp = torch.tensor([[[128, 128], [128, 178]]], dtype=torch.uint8)  # 50 steps of Cr from left to right
    red = yuv_to_rgb(torch.full((2, 4), 126, dtype=torch.uint8), ramp, matrix="bt601")[0, 0]
    assert red.tolist() == [round(128.08 + part * 50 * 1.402 * 255 / 224) for part in (0, 0.25, 0.75, 1)]


def test_what_lies_outside_the_colour_cube_is_held_at_its_faces() -> None:
    luma = torch.tensor([[0, 255]], dtype=torch.uint8)
    low, high = (yuv_to_rgb(luma, torch.full((1, 1, 2), value, dtype=torch.uint8)) for value in (0, 255))
    assert low[:, 0].tolist() == [[0, 49], [77, 255], [0, 8]]
    assert high[:, 0].tolist() == [[209, 255], [0, 184], [250, 255]]


@pytest.mark.parametrize("size", [(64, 64), (50, 70), (33, 63), (1, 1), (65, 129)])
def test_padding_is_that_of_fit(size: tuple[int, int]) -> None:
    half = (-(-size[0] // 2), -(-size[1] // 2))
    luma, chroma = torch.from_numpy(noise(size)), torch.from_numpy(noise((*half, 2)))
    plain = yuv_to_rgb(luma, chroma)
    fit = Fit("pad", *size)
    out = torch.full((3, *fit.network_size), 99, dtype=torch.uint8)
    assert yuv_to_rgb(luma, chroma, out=out) is out
    assert torch.equal(out.float(), fit.apply(plain[None].float())[0])


def test_out_may_have_any_strides() -> None:
    luma, chroma = torch.from_numpy(noise((6, 8))), torch.from_numpy(noise((3, 4, 2)))
    memory = torch.full((6, 20, 3), 99, dtype=torch.uint8)
    yuv_to_rgb(luma, chroma, out=memory[:, 5:13].permute(2, 0, 1))
    assert torch.equal(memory[:, 5:13].permute(2, 0, 1), yuv_to_rgb(luma, chroma))
    assert (memory[:, :5] == 99).all()
    assert (memory[:, 13:] == 99).all()


def test_op_is_registered_correctly() -> None:
    for dtype in (torch.uint8, torch.uint16):
        inputs = (
            torch.zeros(3, 5, 8, dtype=torch.uint8),
            torch.zeros(5, 7, dtype=dtype),
            torch.zeros(3, 4, 2, dtype=dtype),
        )
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.flowreel.yuv_to_rgb.default, (*inputs, "bt709", False, 8), test_utils=checks)


def test_compiles_whole_and_gives_the_same() -> None:
    luma, chroma = torch.from_numpy(noise((6, 8))), torch.from_numpy(noise((3, 4, 2)))
    torch._dynamo.reset()
    compiled = torch.compile(lambda y, c: yuv_to_rgb(y, c).float() / 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(luma, chroma), yuv_to_rgb(luma, chroma).float() / 2)


Y, C = torch.zeros(4, 6, dtype=torch.uint8), torch.zeros(2, 3, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("luma", "chroma", "options", "error"),
    [
        (Y.float(), C.float(), {}, TypeError),
        (Y, C.to(torch.uint16), {}, TypeError),
        (Y[None], C, {}, ValueError),
        (Y[:0], C, {}, ValueError),
        (Y, C.to("meta"), {}, ValueError),
        (Y, C[:1], {}, ValueError),
        (Y, C[:, :2], {}, ValueError),
        (Y, C[..., :1], {}, ValueError),
        (Y, C, {"matrix": "rgb"}, ValueError),
        (Y, C, {"bits": 10}, ValueError),
        (Y, C, {"bits": 7}, ValueError),
        (Y, C, {"out": torch.zeros(3, 4, 6)}, TypeError),
        (Y, C, {"out": torch.zeros(3, 4, 5, dtype=torch.uint8)}, ValueError),
        (Y, C, {"out": torch.zeros(4, 6, 3, dtype=torch.uint8)}, ValueError),
        (Y, C, {"out": torch.zeros(3, 4, 6, dtype=torch.uint8, device="meta")}, ValueError),
    ],
)
def test_what_cannot_be(luma: Tensor, chroma: Tensor, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        yuv_to_rgb(luma, chroma, **options)
