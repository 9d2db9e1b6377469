"""Convolutions by the CUDA kernel, against the definition: odd sizes, ragged tiles, parts of concatenations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flowreel.kernels.convolution import _convolution_cuda, convolution_definition, pack, padding_of, tiling

TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}  # relative: one rounding


class Layer(NamedTuple):
    """One that the kernel computes, and a picture that is little work for the acting CPU."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    transposed: bool
    size: tuple[int, int, int]  # batch, height, width

    def weight(self, dtype: torch.dtype, card: torch.device) -> Tensor:
        ends = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        made = torch.randn(*ends, self.kernel, self.kernel, generator=torch.Generator().manual_seed(5))
        return (made / (self.inputs * self.kernel**2) ** 0.5).to(card, dtype)


LAYERS = {
    "C conv1": Layer(3, 64, 7, 2, False, (2, 37, 35)),
    "S conv1 alone": Layer(6, 64, 7, 2, False, (1, 8, 33)),
    "S conv1": Layer(12, 64, 7, 2, False, (1, 33, 6)),
    "SD conv0": Layer(6, 64, 3, 1, False, (2, 9, 17)),
    "fusion conv0": Layer(11, 64, 3, 1, False, (2, 9, 17)),
    "SD conv1": Layer(64, 64, 3, 2, False, (1, 17, 35)),
    "SD conv1_1": Layer(40, 128, 3, 1, False, (1, 3, 17)),
    "fusion inter_conv0": Layer(82, 16, 3, 1, False, (1, 17, 18)),
    "fusion inter_conv1": Layer(30, 32, 3, 1, False, (2, 5, 3)),
    "fusion deconv0": Layer(40, 16, 4, 2, True, (2, 5, 18)),
}
SMALLEST = {name: layer._replace(size=(1, 1, 1)) for name, layer in LAYERS.items()}


def compare(layer: Layer, dtype: torch.dtype, card: torch.device) -> None:
    """Into a map of its own and a part of a concatenation; then into that part alone."""
    generator = torch.Generator().manual_seed(3)
    batch, *size = layer.size
    made = torch.randn(batch, -(-layer.inputs // 8) * 8, *size, generator=generator)
    x = made.to(card, dtype).contiguous(memory_format=torch.channels_last)
    bias, weight = torch.randn(layer.outputs, generator=generator).to(card), layer.weight(dtype, card)
    step = layer.stride
    size = [side * step if layer.transposed else -(-side // step) for side in size]
    packed = pack(weight, step, layer.transposed)
    for slope in (0.1, 1.0):
        ours, wanted = (
            torch.full((batch, layer.outputs + 24, *size), 7, dtype=dtype, device=card).to(
                memory_format=torch.channels_last
            )
            for _ in range(2)
        )
        own, wanted_own = (
            torch.empty(batch, layer.outputs, *size, dtype=dtype, device=card).to(memory_format=torch.channels_last)
            for _ in range(2)
        )
        part = slice(8, 8 + layer.outputs)
        given = x, weight, packed, bias, step, layer.transposed, slope
        if slope == 1:
            _convolution_cuda(*given, ours[:, part], None)
            convolution_definition(*given, wanted[:, part], None)
        else:
            _convolution_cuda(*given, own, ours[:, part])
            convolution_definition(*given, wanted_own, wanted[:, part])
            assert_close(own, wanted_own)
        assert_close(ours, wanted)


def assert_close(ours: Tensor, wanted: Tensor) -> None:
    """Both are rounded once, from sums in float32 of different orders."""
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance / 64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_kernel_equals_its_definition(layer: Layer, dtype: torch.dtype, card: torch.device) -> None:
    compare(layer, dtype, card)
