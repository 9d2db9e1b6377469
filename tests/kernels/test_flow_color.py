"""Flow colours, compared with pictures painted by the original C++ program and with the rules of the colour wheel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowreel.kernels.flow_color import color_wheel, flow_to_color, percentile_magnitude

GOLDEN = {
    "wheel_201x201": ("wheel_201x201.npy", None),
    "wheel_201x201.maxmotion5": ("wheel_201x201.npy", 5.0),
    "sintel_alley1_crop_384x256": ("sintel_alley1_crop_384x256.npy", None),
    "rubberwhale_unknown_584x388": ("rubberwhale_unknown_584x388.npy", None),
    "rubberwhale_unknown_584x388_zeroed": ("rubberwhale_unknown_584x388.npy", None),
}


def paint_both(flow: np.ndarray, max_flow: float | None = None) -> np.ndarray:
    """Paints an array; checks that painting it as a tensor gives the same colours within one level."""
    colors = flow_to_color(flow, max_flow)
    tensor = flow_to_color(torch.from_numpy(flow).permute(2, 0, 1), max_flow)
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, *flow.shape[:2])
    assert levels_apart(colors, tensor.permute(1, 2, 0).numpy()) <= 1
    return colors


def levels_apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def row(*vectors: tuple[float, float]) -> np.ndarray:
    return np.array([vectors], dtype=np.float32)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_pictures(data_dir: Path, name: str) -> None:
    array, max_flow = GOLDEN[name]
    flow = np.load(data_dir / "golden_color" / array)
    if name.endswith("_zeroed"):
        flow[(np.abs(flow) > 1e9).any(axis=-1)] = 0
    golden = picture(data_dir / "golden_color" / f"{name}.middlebury_cpp.png")
    assert levels_apart(paint_both(flow, max_flow), golden) <= 1


def test_a_real_flownet2_field(data_dir: Path) -> None:
    stem = data_dir / "flo" / "flownet2_caffe_result_960x540"
    flow = np.fromfile(f"{stem}.flo", "<f4", offset=12).reshape(540, 960, 2)
    assert levels_apart(paint_both(flow), picture(Path(f"{stem}.middlebury_color_flow.png"))) <= 1


def test_wheel_is_the_published_one(data_dir: Path) -> None:
    assert np.array_equal(color_wheel(), np.load(data_dir / "golden_color" / "colorwheel_55x3_uint8.npy"))


def test_known_values_of_the_c_program(data_dir: Path) -> None:
    stats = json.loads((data_dir / "golden_color" / "stats.json").read_text())
    seam = row((1, 0), (1, -0.0), (1, 1e-7), (-1, 0), (-1, -0.0), (0, 1))
    key = next(key for key in stats if key.startswith("seam"))
    assert levels_apart(paint_both(seam, 1.0)[0], np.array(stats[key]["mb"])) <= 1


def test_compass() -> None:
    angles = np.deg2rad(np.arange(0, 360, 45))
    flow = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[None].astype(np.float32)
    flow[np.abs(flow) < 1e-6] = 0  # the cosine of a right angle is not exactly 0 in floats
    expected = "255,0,0 255,114,0 255,229,0 32,255,0 0,209,255 0,52,255 87,0,255 220,0,255"
    expected_colors = np.array([color.split(",") for color in expected.split()], dtype=int)
    assert levels_apart(paint_both(flow * 7)[0], expected_colors) <= 1


@pytest.mark.parametrize(
    ("max_flow", "expected"), [(None, (0, 28, 255)), (5.0, (154, 165, 255)), (10.0, (204, 210, 255))]
)
def test_one_vector_at_several_scales(max_flow: float | None, expected: tuple[int, int, int]) -> None:
    assert levels_apart(paint_both(row((-1.2117167, -1.557275)), max_flow)[0, 0], np.array(expected)) <= 1


def test_beyond_the_scale_is_darker_and_at_it_is_not() -> None:
    colors = paint_both(row((5, 0), (5.01, 0), (500, 0)), 5.0)
    assert colors[0].tolist() == [[255, 0, 0], [191, 0, 0], [191, 0, 0]]


def test_own_maximum_is_never_beyond_itself() -> None:
    flow = np.random.default_rng(3).normal(size=(40, 50, 2)).astype(np.float32)
    longest = np.unravel_index(np.hypot(*flow.transpose(2, 0, 1)).argmax(), (40, 50))
    assert paint_both(flow)[longest].max() == 255


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.1e9, -1e10, 3e38])
@pytest.mark.parametrize("component", [0, 1])
def test_unknown_is_black_and_does_not_set_the_scale(bad: float, component: int) -> None:
    flow = np.random.default_rng(4).normal(size=(6, 5, 2)).astype(np.float32)
    expected = paint_both(flow)
    flow[2, 3] = 0  # so that the pixel is not the longest vector, which would change the scale
    flow[2, 3, component] = bad
    before = flow.copy()
    colors = paint_both(flow)
    assert np.array_equal(flow, before, equal_nan=True)
    assert colors[2, 3].tolist() == [0, 0, 0]
    others = np.ones((6, 5), bool)
    others[2, 3] = False
    assert np.array_equal(colors[others], expected[others])
    assert paint_both(flow, 2.0)[2, 3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_no_motion_is_white(value: float) -> None:
    flow = np.full((3, 4, 2), value, np.float32)
    assert (paint_both(flow) == 255).all()
    paint_both(flow, 1e-40)  # an absurd scale raises no warning either
    assert (paint_both(np.zeros_like(flow), 1e-50) == 255).all()  # also one that float32 rounds to zero


def test_everything_unknown() -> None:
    assert (paint_both(np.full((3, 4, 2), np.nan, np.float32)) == 0).all()


def test_each_picture_of_a_batch_has_its_own_maximum() -> None:
    generator = np.random.default_rng(5)
    flows = torch.from_numpy(generator.normal(size=(3, 2, 7, 9)).astype(np.float32)) * torch.tensor(
        [1.0, 10.0, 0.0]
    ).reshape(3, 1, 1, 1)
    colors = flow_to_color(flows)
    assert colors.shape == (3, 3, 7, 9)
    for one, batched in zip(flows, colors, strict=True):
        assert torch.equal(flow_to_color(one), batched)
    assert flow_to_color(flows[:0], 1.0).shape == (0, 3, 7, 9)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_any_strides(dtype: type) -> None:
    flow = np.random.default_rng(6).normal(size=(9, 8, 2))
    flow[1, 1] = np.nan if dtype == np.float16 else 1e30
    expected = flow_to_color(flow.astype(dtype), 2.0)
    turned = np.asfortranarray(flow.astype(dtype))[::-1]
    assert np.array_equal(flow_to_color(turned, 2.0), expected[::-1])
    assert levels_apart(flow_to_color(flow.astype(np.float32), 2.0), expected) <= 1


def test_blocks_of_rows_join_seamlessly() -> None:
    flow = np.random.default_rng(7).normal(size=(75, 1000, 2)).astype(np.float32)  # more than two blocks
    flow[70, 1] = (30, 40)  # the longest vector is in the last block
    whole = flow_to_color(flow)
    assert np.array_equal(whole[30:40], flow_to_color(flow[30:40], 50.0))
    assert np.array_equal(whole[70:], flow_to_color(flow[70:], 50.0))


def test_tensors_of_a_training_step_may_be_painted_in_any_mode() -> None:
    flow = torch.ones(2, 3, 3, requires_grad=True)
    with torch.inference_mode():
        inside = flow_to_color(flow)
    outside = flow_to_color(flow)
    assert torch.equal(inside, outside)
    assert not outside.requires_grad


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5), (4, 5, 3), (0, 5, 2), (1, 4, 5, 2)])
def test_wrong_array_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="H, W, 2"):
        flow_to_color(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2), (1, 3, 4, 5), (2, 0, 5)])
def test_wrong_tensor_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2, H, W"):
        flow_to_color(torch.zeros(shape))


@pytest.mark.parametrize("max_flow", [0.0, -1.0, float("nan"), float("inf"), "auto"])
def test_wrong_scales(max_flow: Any) -> None:
    with pytest.raises(ValueError, match="positive"):
        flow_to_color(np.zeros((2, 2, 2), np.float32), max_flow)


def test_percentile_of_known_vectors_over_all_flows() -> None:
    lengths = np.random.default_rng(8).permutation(np.arange(1, 101, dtype=np.float32))
    flow = np.stack([0.6 * lengths, -0.8 * lengths], axis=-1).reshape(10, 10, 2)
    whole = percentile_magnitude([flow])
    assert whole == pytest.approx(np.percentile(lengths, 95), rel=1e-6)
    tensor = torch.from_numpy(flow).permute(2, 0, 1)
    unknown = np.full((10, 10, 2), 1e10, np.float32)
    assert percentile_magnitude([flow[:5], unknown, flow[5:]]) == pytest.approx(whole)
    assert percentile_magnitude([tensor]) == pytest.approx(whole)
    assert percentile_magnitude([tensor[:, :5], tensor[None, :, 5:]]) == pytest.approx(whole)
    assert percentile_magnitude([flow], percentile=50) == pytest.approx(50.5)


def test_percentile_of_a_sample_is_near_the_whole() -> None:
    y, x = np.mgrid[:300, :400].astype(np.float32)
    flow = np.stack([x / 40, y / 40], axis=-1)
    whole = percentile_magnitude([flow], samples_per_flow=300 * 400)
    assert percentile_magnitude([flow], samples_per_flow=1000) == pytest.approx(whole, rel=0.02)


def test_percentile_is_always_a_usable_scale() -> None:
    still = np.zeros((30, 30, 2), np.float32)
    moving = still.copy()
    moving[4, 4] = (3, 4)
    assert percentile_magnitude([still]) == 1.0
    assert percentile_magnitude([]) == 1.0
    assert percentile_magnitude([np.full((2, 2, 2), np.nan, np.float32)]) == 1.0
    assert percentile_magnitude([moving]) == 5.0


def test_lists_and_masked_arrays() -> None:
    flow = np.array([[[1.0, 2.0], [3.0, -1.0], [0.0, 0.5]]], np.float32)
    np.testing.assert_array_equal(flow_to_color(flow.tolist(), 4.0), flow_to_color(flow, 4.0))  # type: ignore[call-overload]
    masked = np.ma.masked_array(flow, [[[False, False], [True, False], [False, False]]])
    expected = flow_to_color(flow, 4.0)
    expected[0, 1] = 0
    np.testing.assert_array_equal(flow_to_color(masked, 4.0), expected)
    in_pixels = np.ma.masked_array(flow.astype(int), masked.mask)  # integers have no NaN
    assert flow_to_color(in_pixels, 4.0)[0, 1].tolist() == [0, 0, 0]


def test_masked_entries_do_not_count_for_the_scale() -> None:
    flow = np.ma.masked_array(row((3, 4), (900, 0)), [[[False, False], [True, True]]])
    assert percentile_magnitude([flow], 100) == 5
