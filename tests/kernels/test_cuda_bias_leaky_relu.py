"""The CUDA kernel of bias and LeakyReLU equals the definition: odd sizes, types, layouts, parts of concatenations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowreel.kernels.bias_leaky_relu import (
    _bias_leaky_relu_in_place_cuda,
    bias_leaky_relu_definition,
    bias_leaky_relu_in_place_definition,
)
from tests.kernels.conftest import as_on_a_gpu

SHAPES = ((1, 1, 1, 1), (2, 2, 5, 3), (2, 24, 4, 5), (1, 21, 2, 40), (2, 264, 2, 9))
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype).to(device)


def place_of(shape: tuple[int, int, int, int], channels: int, start: int, like: Tensor) -> Tensor:
    """A concatenation filled with 7, with room for ``channels`` channels from ``start`` on."""
    batch, _, *size = shape
    return channels_last(torch.full((batch, start + channels + 3, *size), 7, dtype=like.dtype, device=like.device))


def compare(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    card: torch.device,
    into: torch.dtype | None = None,
    layout: Callable[[Tensor], Tensor] = channels_last,
) -> None:
    bias = random((shape[1], 2), torch.float32, card)[:, 0]
    x = layout(random(shape, dtype, card))
    for slope in (0.1, 1.0):
        for start, channels in {(0, shape[1]), (8, shape[1]), (3, -(-shape[1] // 2))}:
            ours, wanted = (place_of(shape, channels, start, x.to(into or dtype)) for _ in range(2))
            part = slice(start, start + channels)
            if into is None:
                ours_x, wanted_x = (layout(x.clone()) for _ in range(2))
                _bias_leaky_relu_in_place_cuda(ours_x, bias, slope, ours[:, part])
                bias_leaky_relu_in_place_definition(wanted_x, bias, slope, wanted[:, part])
                torch.testing.assert_close(ours_x, wanted_x, rtol=1e-6, atol=1e-7)
            else:
                how = as_on_a_gpu(torch.ops.flowreel.bias_leaky_relu.default, x, bias, slope, ours[:, part])
                assert how == ("cuda" if into == dtype else "torch")
                bias_leaky_relu_definition(x, bias, slope, wanted[:, part])
            torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-7)  # rounded once; nothing written beside it


@pytest.mark.parametrize("dtype", TYPES)
def test_in_place_and_into_a_part_of_a_concatenation(dtype: torch.dtype, card: torch.device) -> None:
    for shape in SHAPES:
        compare(shape, dtype, card)


@pytest.mark.parametrize("into", TYPES)
def test_into_every_type(into: torch.dtype, card: torch.device) -> None:
    """The kernel writes x's own type; other types are left to torch."""
    for shape in SHAPES[1:4]:
        compare(shape, torch.float16, card, into)


@pytest.mark.parametrize("layout", [Tensor.contiguous, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)])
def test_other_layouts(layout: Callable[[Tensor], Tensor], card: torch.device) -> None:
    compare((2, 19, 3, 5), torch.float32, card, layout=layout)
    compare((2, 19, 3, 5), torch.float16, card, torch.float16, layout)


def test_in_place_and_into_another_type(card: torch.device) -> None:
    x, bias = random((1, 8, 2, 3), torch.float16, card), random((8,), torch.float32, card)
    also, wanted = torch.empty(1, 8, 2, 3, device=card), torch.empty(1, 8, 2, 3, device=card)
    bias_leaky_relu_in_place_definition(x.clone(), bias, 0.1, wanted)
    assert as_on_a_gpu(torch.ops.flowreel.bias_leaky_relu_.default, x, bias, 0.1, also) == "torch"
    assert torch.equal(also, wanted)


def test_alone_in_place(card: torch.device) -> None:
    x, bias = channels_last(random((2, 16, 3, 5), torch.float16, card)), random((16,), torch.float32, card)
    wanted = x.clone()
    bias_leaky_relu_in_place_definition(wanted, bias, 0.1, None)
    assert as_on_a_gpu(torch.ops.flowreel.bias_leaky_relu_.default, x, bias, 0.1, None) == "cuda"
    torch.testing.assert_close(x, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("wide[k] < 0", "wide[k] > 0"),
        ("wide[k] += added[k];", ""),
        ("place >= in_row", "place > in_row"),
        ("(step == 1 && count == TOGETHER && aligned(place))", "(count == TOGETHER && aligned(place))"),
        ("rest(also_channels, first)", "rest(channels, first)"),
        ("count < TOGETHER ? count : TOGETHER", "TOGETHER"),
        ("channels + TOGETHER - 1", "channels"),
    ],
)
def test_a_planted_fault_is_caught(plant: Callable[..., torch.device], right: str, wrong: str) -> None:
    device = plant("bias_leaky_relu.cu", right, wrong)
    with pytest.raises(AssertionError):  # noqa: PT012
        compare((2, 24, 4, 5), torch.float32, device)
        compare((2, 19, 3, 5), torch.float32, device)
        compare((2, 16, 3, 5), torch.float32, device, layout=Tensor.contiguous)
