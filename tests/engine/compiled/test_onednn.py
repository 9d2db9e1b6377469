"""Weights in oneDNN's layouts: sizes that need the same layout share them, others get a layout of their own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flowreel.engine.compiled import onednn
from flowreel.engine.compiled.buffers import Layouts
from flowreel.engine.compiled.onednn import PackedConvolution, PackedWeights

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this torch has no oneDNN for this CPU")
SIZES = [*itertools.product((1, 2), (32, 64), (8, 128))]


@pytest.fixture(autouse=True)
def _the_same_numbers() -> None:
    torch.manual_seed(0)


def pictures(channels: int, batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, channels, height, width).contiguous(memory_format=torch.channels_last)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_another_size_shares_the_weights_or_has_them_in_its_own_layout(groups: int) -> None:
    weight, bias = torch.randn(groups * 48, 32, 3, 1), torch.randn(groups * 48)
    convolution = PackedConvolution(weight, bias, (2, 1), 0, groups=groups, leaky=True)
    layouts: Layouts = {}
    for rows, size in itertools.product((0, 1), SIZES):
        x = pictures(groups * 32, *size)
        expected = F.leaky_relu(F.conv2d(x, weight, bias, (2, 1), (rows, 0), groups=groups), 0.1)
        same(convolution(x, rows, layouts), expected)
    assert len(set(map(id, layouts.values()))) == len(convolution._weights._layouts) < len(layouts) == 2 * len(SIZES)


def test_another_size_of_a_transposed_one() -> None:
    weight, bias = torch.randn(32, 48, 4, 4), torch.randn(48)
    convolution = PackedConvolution(weight, bias, (2, 2), 1, transposed=True)
    layouts: Layouts = {}
    for size in SIZES:
        x = pictures(32, *size)
        same(convolution(x, 1, layouts), F.conv_transpose2d(x, weight, bias, 2, 1))
    assert len(convolution._weights._layouts) < len(layouts) == len(SIZES)


def test_layouts_go_with_the_sizes_that_asked_for_them() -> None:
    weight = torch.randn(48, 32, 3, 3)
    convolution = PackedConvolution(weight, None, (1, 1), 1)
    for width in (8, 128, 8):
        layouts: Layouts = {}
        x = pictures(32, 1, 32, width)
        same(convolution(x, 1, layouts), F.conv2d(x, weight, padding=1))
        del layouts
        assert len(convolution._weights._layouts) == 1


def test_weights_that_another_thread_packs_meanwhile() -> None:
    plain = torch.randn(48, 32, 3, 3)
    packed = PackedWeights(plain, (1, 1), 1, False, 1).for_input(torch.Size((1, 32, 32, 8)), 1)

    class PackedMeanwhile(PackedWeights):
        reads = 0

        @property
        def _last(self) -> Tensor:
            self.reads += 1
            return plain if self.reads == 1 else packed

        @_last.setter
        def _last(self, tensor: Tensor) -> None:
            pass

    assert torch.equal(PackedMeanwhile(plain, (1, 1), 1, False, 1)._plain(), plain)
