"""The vector length over channels, compared with golden values and known answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowreel.kernels import channel_norm

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, Tensor]:
    with np.load(golden_dir / "channelnorm.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.mark.parametrize("case", ["a", "b"])
def test_equals_golden(golden: dict[str, Tensor], case: str) -> None:
    x = golden[f"{case}_in"].clone().requires_grad_()
    out = channel_norm(x)
    torch.testing.assert_close(out.detach(), golden[f"{case}_out"], rtol=1e-6, atol=1e-9)
    (grad,) = torch.autograd.grad(out, x, golden[f"{case}_gout"])
    torch.testing.assert_close(grad, golden[f"{case}_gin"], rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)),
    last=st.booleans(),
)
def test_equals_numpy(shape: tuple[int, int, int, int], last: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    out = channel_norm(x.to(memory_format=torch.channels_last) if last else x)
    wanted = np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(out.numpy(), wanted, rtol=1e-6)


def test_three_and_four_make_five() -> None:
    x = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    assert channel_norm(x).item() == 5
    assert channel_norm(-x).item() == 5


def test_zero_vector_has_length_and_gradient_zero() -> None:
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    out = channel_norm(x)
    out.sum().backward()
    assert x.grad is not None
    assert not out.any()
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_do_not_overflow(dtype: torch.dtype) -> None:
    x = torch.tensor([1800.0, -2400.0]).view(1, 2, 1, 1).to(dtype).requires_grad_()
    out = channel_norm(x)
    assert out.dtype == dtype
    assert out.item() == pytest.approx(3000, rel=2**-7)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.flatten().float(), torch.tensor([0.6, -0.8]), rtol=2**-7, atol=0)


def test_half_zero_vector_has_gradient_zero() -> None:
    x = torch.zeros(1, 2, 1, 1, dtype=torch.float16, requires_grad=True)
    channel_norm(x).sum().backward()  # 1e-9 is zero in float16, so the quotient must be computed in float32
    assert x.grad is not None
    assert not x.grad.any()


def test_strides_of_the_input_do_not_matter() -> None:
    x = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    wanted = channel_norm(x)
    for y in (x.transpose(2, 3).contiguous().transpose(2, 3), torch.stack([x, x * torch.nan], -1)[..., 0]):
        torch.testing.assert_close(channel_norm(y), wanted)


@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 2, 4, 4), (1, 0, 4, 4), (1, 2, 0, 4)])
def test_empty_and_misshapen_input_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="B, C, H, W"):
        channel_norm(torch.zeros(shape))


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        channel_norm(torch.zeros(1, 2, 3, 3, dtype=torch.int64))
