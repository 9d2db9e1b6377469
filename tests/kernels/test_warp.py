"""Warping, compared with golden values, its definition, and pictures moved by a known amount."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowreel.kernels import warp
from flowreel.kernels.warp import warp_definition, warp_flow_gradient_definition, warp_image_gradient_definition

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Tensor]:
    with np.load(golden_dir / "resample2d.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def pictures(*shape: int, spread: float = 4.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """An image (B, C, H, W) and a flow of that many pixels' standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=generator, dtype=torch.float64)
    flow = torch.randn((shape[0], 2, *shape[2:]), generator=generator, dtype=torch.float64) * spread
    return [image.to(dtype), flow.to(dtype)]


@pytest.mark.parametrize("version", [warp, warp_definition])
@pytest.mark.parametrize("case", ["random", "outside", "huge", "integer", "half", "zero"])
def test_equals_golden(golden: dict[str, Tensor], case: str, version: Callable[[Tensor, Tensor], Tensor]) -> None:
    out = version(golden["image"], golden[f"{case}_flow"])
    torch.testing.assert_close(out, golden[f"{case}_bilinear"], rtol=0, atol=1e-5)


def test_larger_image_than_flow_is_a_crop(golden: dict[str, Tensor]) -> None:
    flow = golden["big_flow"]
    out = warp(golden["big_image"][:, :, : flow.shape[2], : flow.shape[3]], flow)
    torch.testing.assert_close(out, golden["big_bilinear"], rtol=0, atol=1e-5)


def test_gradients_equal_golden(golden: dict[str, Tensor]) -> None:
    image, flow = golden["image"].clone().requires_grad_(), golden["random_flow"].clone().requires_grad_()
    to_image, to_flow = torch.autograd.grad(warp(image, flow), (image, flow), golden["random_gout"])
    torch.testing.assert_close(to_image, golden["random_gimage"], rtol=0, atol=1e-5)
    torch.testing.assert_close(to_flow, golden["random_gflow"], rtol=0, atol=3e-5)  # looser: values are up to 9


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 150), st.integers(1, 40)),
    spread=st.sampled_from([0.3, 5.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_fast_version_equals_definition(shape: tuple[int, int, int, int], spread: float, seed: int) -> None:
    image, flow = pictures(*shape, spread=spread, seed=seed, dtype=torch.float64)
    close = {"rtol": 0.0, "atol": 1e-9}
    out = torch.ops.flowreel.warp(image, flow)
    torch.testing.assert_close(out, warp_definition(image, flow), **close)
    grad = image.flip(2)
    fast = torch.ops.flowreel.warp_image_gradient(grad, flow)
    torch.testing.assert_close(fast, warp_image_gradient_definition(grad, flow), **close)
    fast = torch.ops.flowreel.warp_flow_gradient(grad, image, flow)
    torch.testing.assert_close(fast, warp_flow_gradient_definition(grad, image, flow), **close)


def test_definition_gradients_are_those_of_the_definition() -> None:
    image, flow = (x.requires_grad_() for x in pictures(2, 3, 5, 7, dtype=torch.float64))
    out = warp_definition(image, flow)
    grad = torch.randn_like(out)
    to_image, to_flow = torch.autograd.grad(out, (image, flow), grad)
    torch.testing.assert_close(warp_image_gradient_definition(grad, flow), to_image)
    torch.testing.assert_close(warp_flow_gradient_definition(grad, image, flow), to_flow)


def test_flow_points_to_where_the_pixel_is_fetched() -> None:
    image = torch.arange(12.0).view(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4)
    flow[:, 0], flow[:, 1] = 1, -1  # one to the right, one up
    expected = torch.tensor([[1.0, 2, 3, 3], [1, 2, 3, 3], [5, 6, 7, 7]])
    for version in (warp, warp_definition):
        torch.testing.assert_close(version(image, flow)[0, 0], expected)


def test_half_a_pixel_is_the_mean_of_neighbours() -> None:
    image = torch.tensor([[0.0, 10.0], [100.0, 110.0]]).view(1, 1, 2, 2)
    assert warp(image, torch.full((1, 2, 2, 2), 0.5))[0, 0, 0, 0].item() == pytest.approx(55, abs=1e-4)


@pytest.mark.parametrize("size", [(2, 1024), (1024, 2), (2, 1025), (2, 4096), (4096, 2)])
def test_coordinates_are_exact_to_a_ten_thousandth_of_a_pixel(size: tuple[int, int]) -> None:
    """With stripes of 0 and 1, one pixel wide, an error of the coordinate is the same error in the picture."""
    _, flow = pictures(1, 1, *size, spread=20)
    axis = 0 if size[1] > size[0] else 1
    length = max(size)
    flow[:, 1 - axis] = 0
    stripes = (torch.arange(length) % 2.0).view((1, 1, 1, -1) if axis == 0 else (1, 1, -1, 1)).expand(1, 1, *size)
    place = torch.arange(length, dtype=torch.float64).view((1, -1) if axis == 0 else (-1, 1)) + flow[0, axis].double()
    phase = place.clamp(0, length - 1) % 2
    wanted = torch.minimum(phase, 2 - phase)
    for version in (warp, warp_definition):
        assert (version(stripes, flow)[0, 0].double() - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("version", [warp, warp_definition])
@pytest.mark.parametrize("size", [(5, 6), (1, 6), (5, 1), (1, 1)])
def test_infinity_reads_the_border_and_nan_stays(
    version: Callable[[Tensor, Tensor], Tensor], size: tuple[int, int]
) -> None:
    image, flow = pictures(1, 2, *size)
    flow[0, 0, 0, 0], flow[0, 1, 0, 0] = torch.inf, 0
    torch.testing.assert_close(version(image, flow)[..., 0, 0], image[..., 0, -1])
    flow[0, 0, 0, 0], flow[0, 1, 0, 0] = -3e38, torch.inf
    torch.testing.assert_close(version(image, flow)[..., 0, 0], image[..., -1, 0])
    flow[0, 1, -1, -1] = torch.nan
    spoilt = version(image, flow).isnan()
    assert spoilt[..., -1, -1].all()
    assert spoilt.sum() == 2


@pytest.mark.parametrize("size", [(5, 6), (1, 6), (5, 1), (1, 1)])
@pytest.mark.parametrize("length", [torch.inf, -torch.inf, 3e38])
def test_flow_to_infinity_has_the_gradients_of_the_definition(length: float, size: tuple[int, int]) -> None:
    """Nor does it crash: torch's own way back leaves an image of one row or column there."""
    image, flow = (x.requires_grad_() for x in pictures(1, 2, *size))
    with torch.no_grad():
        flow[0, 0, 0, 0] = flow[0, 1, -1, -1] = length
    warp(image, flow).sum().backward()
    grad = torch.ones_like(image)
    torch.testing.assert_close(image.grad, warp_image_gradient_definition(grad, flow.detach()))
    to_flow = warp_flow_gradient_definition(grad, image.detach(), flow.detach())
    torch.testing.assert_close(flow.grad, to_flow, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (5, 70), (3, 1100)])
def test_no_gradient_comes_from_flow_that_is_nan(size: tuple[int, int], dtype: torch.dtype) -> None:
    """The gradient is that of the known flow alone.

    It must not crash either: torch's own backward pass reads and writes outside the image where flow is NaN.
    """
    image, flow = pictures(2, 3, *size)
    image, flow = image.to(dtype), flow.double() if dtype == torch.float64 else flow
    unknown = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(3)) < 0.3
    unknown[0, 0, 0, 0] = True
    spoilt = flow.masked_fill(unknown & torch.tensor([True, False]).view(1, 2, 1, 1), torch.nan)
    found = []
    for used in (spoilt, flow):
        inputs = image.clone().requires_grad_(), used.clone().requires_grad_()
        torch.where(unknown, 0, warp(*inputs)).sum().backward()
        found.append([x.grad for x in inputs])
    grad = torch.where(unknown, torch.nan, 1.0).expand_as(image).to(dtype)  # must be ignored where flow is unknown
    defined = warp_image_gradient_definition(grad, spoilt), warp_flow_gradient_definition(grad, image, spoilt)
    for ours, of_the_rest, expected in zip(*found, defined, strict=True):
        assert ours is not None
        assert of_the_rest is not None
        torch.testing.assert_close(ours, of_the_rest, rtol=0, atol=0)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize("version", [warp, warp_definition])
def test_half_images_keep_float32_coordinates(
    version: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    image, flow = pictures(1, 3, 4, 700, spread=200)
    out = version(image.to(dtype), flow)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), warp(image.to(dtype).float(), flow), rtol=tolerance, atol=1e-3)


def test_strides_of_the_inputs_do_not_matter() -> None:
    image, flow = pictures(2, 3, 70, 9)
    wanted = warp(image, flow)
    last = torch.channels_last
    apart = [torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in (image, flow)]
    for pair in ([x.to(memory_format=last) for x in (image, flow)], apart):
        out = warp(*pair)
        assert out.is_contiguous()
        torch.testing.assert_close(out, wanted, rtol=0, atol=0)


def test_only_the_gradient_that_is_wanted_is_formed() -> None:
    image, flow = pictures(1, 3, 4, 5)
    flow.requires_grad_()
    calls = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with calls:
        warp(image, flow).sum().backward()
    names = {event.key for event in calls.key_averages()}
    assert "flowreel::warp_flow_gradient" in names
    assert "flowreel::warp_image_gradient" not in names
    assert flow.grad is not None


@pytest.mark.parametrize(
    ("image", "flow", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 2, 4), "B, C, H, W"),
        (torch.zeros(0, 3, 4, 4), torch.zeros(0, 2, 4, 4), "holds something"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), "B, 2, H, W"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 5), "B, 2, H, W"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(1, 2, 4, 4), "B, 2, H, W"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 4, device="meta"), "one device"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(image: Tensor, flow: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warp(image, flow)


def test_whole_number_images_are_refused() -> None:
    with pytest.raises(TypeError, match="uint8"):
        warp(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 2, 4, 4))
