"""Convolution with bias and LeakyReLU: known answers, rounding, bad arguments, and which layers the kernel takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowreel.kernels.convolution import Tiling, convolution, pack, tiling


def weight_of(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_known_answer() -> None:
    """The picture is moved one pixel to the right and reduced by one; LeakyReLU quarters what is negative."""
    weight = torch.zeros(64, 8, 3, 3, dtype=torch.float16)
    weight[5, 2, 1, 0] = 1
    x = torch.zeros(1, 8, 2, 3, dtype=torch.float16)
    x[0, 2] = torch.tensor([[1, 2, 3], [4, 5, 6]])
    also = torch.full((1, 66, 2, 3), 7, dtype=torch.float16)
    out = convolution(x, weight, pack(weight, 1, False), -torch.ones(64), 0.25, 1, also=also[:, 1:65])
    assert out[0, 5].tolist() == [[-0.25, 0, 1], [-0.25, 3, 4]]
    assert bool((out[0, 6] == -0.25).all())
    assert torch.equal(also[:, 1:65], out)
    assert bool((also[:, [0, 65]] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_once(dtype: torch.dtype) -> None:
    """The sum is formed in float32, where the small term survives although the large ones cancel."""
    weight = torch.zeros(64, 3, 7, 7, dtype=dtype)
    weight[:, :, 3, 3] = 1
    x = torch.tensor([1024.0, 0.25, -1024.0, 0, 0, 0, 0, 0], dtype=dtype).view(1, 8, 1, 1)
    out = convolution(x, weight, pack(weight, 2, False), torch.zeros(64), 1.0, 2)
    assert out.dtype == dtype
    assert out.flatten().tolist() == [0.25] * 64


def test_a_deconvolution_doubles_the_size() -> None:
    weight, x = weight_of(12, 16, 4, 4), weight_of(2, 16, 3, 5)
    whole = torch.zeros(2, 24, 6, 10, dtype=torch.float16)
    out = convolution(x, weight, pack(weight, 2, True), torch.zeros(16), 0.1, 2, transposed=True, out=whole[:, 8:])
    wanted = torch.nn.functional.conv_transpose2d(x[:, :12].float(), weight.float(), None, 2, 1)
    torch.testing.assert_close(out.float(), torch.nn.functional.leaky_relu(wanted, 0.1), rtol=1e-3, atol=1e-3)
    assert torch.equal(whole[:, 8:], out)


def test_what_does_not_fit() -> None:
    weight, bias = weight_of(64, 11, 3, 3), torch.zeros(64)
    packed, x = pack(weight, 1, False), torch.zeros(1, 16, 4, 5, dtype=torch.float16)
    for map_of, its_bias in ((x[:, :8], bias), (x[:, :11], bias), (x, bias[:63]), (x[0], bias)):
        with pytest.raises(ValueError, match="do not fit together"):
            convolution(map_of, weight, packed, its_bias, 0.1, 1)
    for shape, dtype in (
        ((1, 64, 4, 4), torch.float16),
        ((1, 72, 4, 5), torch.float16),
        ((1, 64, 4, 5), torch.float32),
    ):
        with pytest.raises(ValueError, match="the result is"):
            convolution(x, weight, packed, bias, 0.1, 1, also=torch.zeros(shape, dtype=dtype))
    for its_weight, its_packed, its_bias in (
        (weight.bfloat16(), packed, bias),
        (weight, packed.bfloat16(), bias),
        (weight, packed, bias.half()),
    ):
        with pytest.raises(ValueError, match="weights of their type and float32 biases"):
            convolution(x, its_weight, its_packed, its_bias, 0.1, 1)
    apart = torch.stack((packed, packed), 1)[:, 0]
    for its_packed in (packed[:-1], packed[: packed.numel() // 2], pack(weight[:, :8], 1, False), apart):
        with pytest.raises(ValueError, match="not what pack makes"):
            convolution(x, weight, its_packed, bias, 0.1, 1)
    with pytest.raises(ValueError, match="no kernel"):
        convolution(x, weight, packed, bias, 0.1, 2)
    with pytest.raises(ValueError, match="slope"):
        convolution(x, weight, packed, bias, 2.0, 1)
    with pytest.raises(ValueError, match="no kernel"):
        pack(weight.float(), 1, False)


@pytest.mark.parametrize(
    ("shape", "stride", "transposed"),
    [
        ((128, 3, 7, 7), 2, False),
        ((64, 12, 7, 7), 2, False),
        ((64, 6, 3, 3), 1, False),
        ((64, 11, 3, 3), 1, False),
        ((162, 32, 4, 4), 2, True),
    ],
)
def test_packed_weights_are_of_the_size_that_is_asked_for(
    shape: tuple[int, ...], stride: int, transposed: bool
) -> None:
    weight = weight_of(*shape)
    outputs, inputs = (shape[1], shape[0]) if transposed else shape[:2]
    x = torch.zeros(1, -(-inputs // 8) * 8, 2, 2, dtype=torch.float16)
    out = convolution(x, weight, pack(weight, stride, transposed), torch.ones(outputs), 1.0, stride, transposed)
    assert bool((out == 1).all())


@pytest.mark.parametrize(
    ("shape", "stride", "transposed", "expected"),
    [
        ((64, 3, 7, 7), 2, False, Tiling(7, 2, 4, 64, 4, False)),
        ((64, 12, 7, 7), 2, False, Tiling(7, 2, 12, 64, 4, False)),
        ((64, 6, 3, 3), 1, False, Tiling(3, 1, 8, 64, 2, False)),
        ((64, 11, 3, 3), 1, False, Tiling(3, 1, 16, 64, 2, False)),
        ((162, 16, 4, 4), 2, True, Tiling(3, 1, 16, 64, 4, True)),
        ((64, 14, 7, 7), 2, False, None),
        ((48, 6, 3, 3), 1, False, None),
        ((16, 6, 3, 3), 1, False, None),
        ((64, 64, 3, 3), 1, False, None),
        ((128, 32, 4, 4), 2, True, Tiling(3, 1, 16, 64, 4, True)),
        ((386, 64, 4, 4), 2, True, None),
        ((64, 64, 5, 5), 2, False, None),
        ((64, 3, 7, 7), 1, False, None),
    ],
)
def test_which_layers(shape: tuple[int, ...], stride: int, transposed: bool, expected: Tiling | None) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert tiling(torch.empty(shape, dtype=dtype), stride, transposed) == expected
    assert tiling(torch.empty(shape), stride, transposed) is None
