"""Bias and LeakyReLU: known answers, output into parts of other tensors, rounding, arguments that do not fit."""

from __future__ import annotations

import pytest
import torch

from flowreel.kernels.bias_leaky_relu import bias_leaky_relu, bias_leaky_relu_


def test_known_answer() -> None:
    x = torch.tensor([1.0, -3.0]).view(1, 2, 1, 1)
    bias = torch.tensor([-3.0, 5.0])
    out = torch.empty_like(x)
    bias_leaky_relu(x, bias, 0.1, out)
    torch.testing.assert_close(out.flatten(), torch.tensor([-0.2, 2.0]))
    bias_leaky_relu(x, bias, 1.0, out)
    assert out.flatten().tolist() == [-2.0, 2.0]
    assert x.flatten().tolist() == [1.0, -3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_into_a_part_of_a_concatenation_and_in_place(dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, 5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    bias = torch.linspace(-1, 1, 8)
    expected = torch.nn.functional.leaky_relu(x.float() + bias.view(-1, 1, 1), 0.1).to(dtype)
    whole = torch.full((2, 16, 5, 3), 7.0, dtype=dtype).to(memory_format=torch.channels_last)
    given = x.clone()
    assert bias_leaky_relu_(given, bias, 0.1, whole[:, 3:9]) is given
    assert torch.equal(given, expected)  # rounded once
    assert torch.equal(whole[:, 3:9], expected[:, :6])
    assert bool((whole[:, :3] == 7).all())
    assert bool((whole[:, 9:] == 7).all())
    other = torch.zeros(2, 6, 5, 3)
    bias_leaky_relu(x, bias, 0.1, other)  # into another type, without rounding to x's type first
    torch.testing.assert_close(other.to(dtype), expected[:, :6])


def test_what_does_not_fit() -> None:
    x, bias = torch.zeros(1, 8, 2, 2), torch.zeros(8)
    for out in (torch.zeros(1, 9, 2, 2), torch.zeros(2, 8, 2, 2), torch.zeros(1, 8, 2, 3)):
        with pytest.raises(ValueError, match="does not go into"):
            bias_leaky_relu(x, bias, 0.1, out)
    with pytest.raises(ValueError, match="expected"):
        bias_leaky_relu_(x, torch.zeros(7), 0.1)
    with pytest.raises(ValueError, match="float32"):
        bias_leaky_relu_(x, bias.half(), 0.1)
