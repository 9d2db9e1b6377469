"""The cost volume, compared with golden values, its definition and known answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowreel.kernels import correlation
from flowreel.kernels.correlation import (
    correlation_definition,
    pixel_correlation_backward_definition,
    pixel_correlation_definition,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

CASES = ("flownetc", "pwc", "nopad", "k3", "k3_pad5", "k3_flownetc")


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, np.ndarray]:
    with np.load(golden_dir / "correlation.npz") as file:
        return dict(file)


def maps(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn((2, *shape), generator=generator, dtype=torch.float64).to(dtype)
    return first, second


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", [correlation, correlation_definition])
def test_equals_golden(golden: dict[str, np.ndarray], case: str, version: type[correlation]) -> None:
    first, second = (torch.from_numpy(golden[f"{case}_in{n}"]) for n in (1, 2))
    wanted = golden.get(f"{case}_out_caffe", golden[f"{case}_out"])
    out = version(first, second, *golden[f"{case}_params"].tolist())
    np.testing.assert_allclose(out.numpy(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["pwc", "k3_pad5"])
def test_gradients_equal_golden(golden: dict[str, np.ndarray], case: str) -> None:
    inputs = [torch.from_numpy(golden[f"{case}_in{n}"]).requires_grad_() for n in (1, 2)]
    out = correlation(*inputs, *golden[f"{case}_params"].tolist())
    for n, grad in enumerate(torch.autograd.grad(out, inputs, torch.from_numpy(golden[f"{case}_gout"])), 1):
        np.testing.assert_allclose(grad.numpy(), golden[f"{case}_gin{n}"], rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 12), st.integers(1, 60)),
    radius=st.integers(0, 3),
    stride=st.integers(1, 3),
    scale=st.sampled_from([None, 0.7]),
    slope=st.sampled_from([1.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_fast_version_equals_definition(
    shape: tuple[int, int, int, int], radius: int, stride: int, scale: float | None, slope: float, seed: int
) -> None:
    first, second = maps(*shape, dtype=torch.float64, seed=seed)
    how = radius, stride, scale
    wanted = pixel_correlation_definition(first, second, *how, slope)
    out = torch.ops.flowreel.correlation(first, second, *how, slope)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    grad = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    grads = torch.ops.flowreel.correlation_backward(grad, first, second, *how)
    torch.testing.assert_close(
        grads, pixel_correlation_backward_definition(grad, first, second, *how), rtol=0, atol=1e-11
    )


@settings(deadline=None, max_examples=40)
@given(
    pad=st.integers(0, 5),
    kernel=st.sampled_from([1, 3, 5]),
    displacement=st.integers(0, 4),
    stride1=st.integers(1, 3),
    stride2=st.integers(1, 3),
    size=st.tuples(st.integers(13, 16), st.integers(13, 16)),
)
def test_any_parameters_equal_definition(
    pad: int, kernel: int, displacement: int, stride1: int, stride2: int, size: tuple[int, int]
) -> None:
    first, second = maps(2, 3, *size, dtype=torch.float64)
    out = correlation(first, second, pad, kernel, displacement, stride1, stride2)
    wanted = correlation_definition(first, second, pad, kernel, displacement, stride1, stride2)
    side = 2 * (displacement // stride2) + 1
    left = [-(-(n + 2 * pad - 2 * displacement - (kernel - 1)) // stride1) for n in size]
    assert out.shape == (2, side**2, *left)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)


def test_definition_gradients_are_those_of_the_definition() -> None:
    first, second = (x.requires_grad_() for x in maps(2, 3, 5, 7, dtype=torch.float64))
    out = pixel_correlation_definition(first, second, 2, 2)
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(out, (first, second), grad)
    torch.testing.assert_close(pixel_correlation_backward_definition(grad, first, second, 2, 2), wanted)


def test_a_shifted_map_peaks_at_its_shift() -> None:
    """A shift of dx = +4, dy = -2 from the first map to the second is channel (dy/2 + 10) * 21 + (dx/2 + 10)."""
    first, _ = maps(1, 64, 24, 48)
    out = correlation(first, torch.roll(first, (-2, 4), (2, 3)))
    assert (out[0, :, 4:-4, 6:-6].argmax(0) == (-1 + 10) * 21 + (2 + 10)).all()


def test_one_pixel_meets_only_itself() -> None:
    first, second = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1), torch.tensor([5.0, 7.0]).view(1, 2, 1, 1)
    out = correlation(first, second)
    assert out.shape == (1, 441, 1, 1)
    assert out[0, 220].item() == 11  # (15 + 7) / 2 channels
    assert out.count_nonzero() == 1


@pytest.mark.parametrize("width", [40, 60, 61])  # one tile; several whole tiles; a short last tile
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_flownetc_parameters_in_each_dtype(width: int, dtype: torch.dtype, tolerance: float) -> None:
    first, second = maps(1, 48, 9, width, dtype=dtype)
    out = correlation(first, second)
    assert out.dtype == dtype
    wanted = correlation_definition(first.double(), second.double())
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=tolerance)


def test_half_types_are_summed_in_float32() -> None:
    """The sum of 4096 products of 100 x 100 overflows float16, and in bfloat16 it would stop growing early."""
    for dtype in (torch.float16, torch.bfloat16):
        ones = torch.full((1, 4096, 2, 2), 100.0, dtype=dtype)
        out = correlation(ones, ones, 0, 1, 0, 1, 1)
        torch.testing.assert_close(out.float(), torch.full((1, 1, 2, 2), 1e4), rtol=2**-7, atol=0)


def test_strides_of_the_input_do_not_matter() -> None:
    first, second = maps(2, 6, 10, 14)
    wanted = correlation(first, second)
    last = torch.channels_last
    apart = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (first, second))
    every_other = (torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in (first, second))
    for a, b in ((first.to(memory_format=last), second.to(memory_format=last)), tuple(apart), tuple(every_other)):
        out = correlation(a, b)
        assert out.is_contiguous()
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [15, 60])  # one matrix product per row and phase, and several
@pytest.mark.parametrize("windows", [(4, 1, 4, 1, 2), (5, 3, 4, 2, 1)])
def test_scaled_activated_and_written_into_a_concatenation(
    windows: tuple[int, ...], width: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    first, second = maps(2, 6, 12, width, dtype=dtype)
    wanted = torch.nn.functional.leaky_relu(3 * correlation_definition(first.double(), second.double(), *windows), 0.1)
    alone = correlation(first, second, *windows, scale=0.5, negative_slope=0.1)
    whole = wanted.new_full((2, 5 + wanted.shape[1] + 3, *wanted.shape[2:]), 7).to(dtype).to(memory_format=layout)
    place = whole[:, 5:-3]
    given = correlation(first, second, *windows, scale=0.5, negative_slope=0.1, out=place)
    assert given is place
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    for out in (alone, place):
        torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    assert (whole[:, :5] == 7).all()
    assert (whole[:, -3:] == 7).all()


def test_channels_of_zeros_do_not_count_when_the_scale_says_so() -> None:
    first, second = maps(1, 5, 6, 7)
    more = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 3)) for x in (first, second)]
    torch.testing.assert_close(correlation(*more, scale=1 / 5), correlation(first, second), rtol=0, atol=1e-6)


def test_a_result_that_goes_elsewhere_has_no_gradients() -> None:
    first, second = maps(1, 2, 4, 4)
    out = torch.zeros(1, 441, 4, 4)
    with pytest.raises(RuntimeError, match="no_grad"):
        correlation(first, second, out=out.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="no_grad"):
        correlation(first.requires_grad_(), second, out=out)
    with torch.no_grad():
        assert correlation(first, second, out=out) is out


def test_a_spoilt_pixel_spoils_only_what_it_takes_part_in() -> None:
    first, second = maps(1, 4, 8, 40)
    second[0, 0, 3, 20] = torch.nan
    spoilt = correlation(first, second, 2, 1, 2, 1, 1).isnan()
    assert torch.equal(spoilt, correlation_definition(first, second, 2, 1, 2, 1, 1).isnan())
    assert spoilt.sum() == 25


def test_gradients_survive_expanded_and_half_inputs() -> None:
    first, second = maps(1, 4, 6, 9)
    exact = [x.clone().requires_grad_() for x in (first, second)]
    correlation(*exact, scale=0.5).sum().backward()  # the incoming gradient is a single number, expanded
    rough = [x.bfloat16().requires_grad_() for x in (first, second)]
    correlation(*rough, scale=0.5).sum().backward()
    for x, y in zip(exact, rough, strict=True):
        assert y.grad is not None
        assert y.grad.dtype == torch.bfloat16
        torch.testing.assert_close(y.grad.float(), x.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_size": -1}, "negative"),
        ({"max_displacement": -1}, "negative"),
        ({"stride1": 0}, "at least 1"),
        ({"stride2": 0}, "at least 1"),
        ({"kernel_size": 2}, "odd"),
        ({"kernel_size": 0}, "odd"),
        ({"pad_size": 0}, "too small"),
        ({"a": torch.zeros(1, 2, 4, 5)}, "one shape"),
        ({"a": torch.zeros(2, 4, 4), "b": torch.zeros(2, 4, 4)}, "B, C, H, W"),
        ({"a": torch.zeros(0, 2, 4, 4), "b": torch.zeros(0, 2, 4, 4)}, "hold something"),
        ({"b": torch.zeros(1, 2, 4, 4, device="meta")}, "one device"),
        ({"negative_slope": -0.1}, "negative_slope"),
        ({"out": torch.zeros(1, 440, 4, 4)}, r"out is \(1, 441, 4, 4\)"),
        ({"out": torch.zeros(1, 441, 4, 4, device="meta")}, "out is"),
    ],
)
def test_impossible_arguments_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"a": torch.zeros(1, 2, 4, 4), "b": torch.zeros(1, 2, 4, 4)}
    with pytest.raises(ValueError, match=message):
        correlation(**(arguments | change))  # type: ignore[arg-type]


def test_mixed_and_whole_number_types_are_refused() -> None:
    x = torch.zeros(1, 2, 4, 4)
    for a, b in ((x, x.double()), (x.int(), x.int())):
        with pytest.raises(TypeError, match="floating point"):
            correlation(a, b)
    with pytest.raises(TypeError, match="out is"):
        correlation(x, x, out=torch.zeros(1, 441, 4, 4).half())
