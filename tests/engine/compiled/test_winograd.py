"""Minimal filtering (Winograd): equal to plain convolution, nearly as exact, and used for the right layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowreel.engine.compiled import onednn
from flowreel.engine.compiled.cpu import Layers
from flowreel.engine.compiled.onednn import PackedConvolution
from flowreel.engine.compiled.taps import Taps
from flowreel.engine.compiled.winograd import Filtering, Winograd, filtering, minimal
from flowreel.engine.models import build_model

KINDS = [(3, 1), (5, 2)]
needs_onednn = pytest.mark.skipif(not onednn.available(torch.float32), reason="this torch has no oneDNN for this CPU")


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("outputs", [2, 3])
def test_as_few_products_as_there_can_be(outputs: int, taps: int) -> None:
    random = np.random.default_rng(0)
    spread, weigh, collect = minimal(outputs, taps)
    x, w = random.normal(size=outputs + taps - 1), random.normal(size=taps)
    assert len(weigh) == outputs + taps - 1
    np.testing.assert_allclose(spread @ ((weigh @ w) * (collect @ x)), np.correlate(x, w, "valid"), atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride"), KINDS)
def test_a_tile(kernel: int, stride: int) -> None:
    by = found(kernel, stride)
    random = np.random.default_rng(0)
    x, w = random.normal(size=by.collect.shape[1]), random.normal(size=kernel)
    expected = np.correlate(x, w, "valid")[::stride]
    np.testing.assert_allclose(by.spread @ ((by.weigh @ w) * (by.collect @ x)), expected, atol=1e-12)
    np.testing.assert_allclose(by.spread @ by.constant, np.ones(len(expected)))
    assert (by.before, by.step) == (kernel // 2, stride * len(expected))


def test_how_many_products_are_saved() -> None:
    assert {kind: len(found(*kind).collect) / (kind[0] * 4) for kind in KINDS} == {(3, 1): 6 / 12, (5, 2): 11 / 20}


@needs_onednn
@pytest.mark.parametrize("width", [1, 2, 5, 6, 8, 10, 22, 24])
@pytest.mark.parametrize(("kernel", "stride"), KINDS)
def test_widths_that_are_no_whole_tiles_and_channels_that_are_no_whole_blocks(
    kernel: int, stride: int, width: int
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(19, 33, kernel, kernel), torch.randn(19)
    x = torch.randn(2, 33, 10, width).contiguous(memory_format=torch.channels_last)
    fewer = Winograd(found(kernel, stride), weight, bias, stride, leaky=True)
    expected = F.leaky_relu(F.conv2d(x, weight, bias, stride, kernel // 2), 0.1)
    torch.testing.assert_close(fewer(x, kernel // 2, {}), expected, rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize(("kernel", "stride"), KINDS)
def test_it_is_nearly_as_exact_as_the_plain_form(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256, kernel, kernel) * (2 / (256 * kernel * kernel)) ** 0.5
    x = F.leaky_relu(torch.randn(1, 256, 16, 32), 0.1).contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), weight.double(), None, stride, kernel // 2)
    plain = F.conv2d(x, weight, None, stride, kernel // 2)
    fewer = Winograd(found(kernel, stride), weight, None, stride, leaky=False)(x, kernel // 2, {})
    assert error(fewer, exact) < 2.5 * error(plain, exact)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).square().mean().sqrt())


def found(kernel: int, stride: int) -> Filtering:
    by = filtering(kernel, stride)
    assert by is not None
    return by


@needs_onednn
def test_which_layers_are_done_in_which_form() -> None:
    """For a network of the published width in float32."""
    layers = Layers.of(build_model("FlowNet2C"), torch.float32)
    forms: dict[type, set[str]] = {}
    for name, convolution in layers.convolutions.items():
        forms.setdefault(type(convolution._form), set()).add(name)
    assert forms[Winograd] == {"conv2", "conv3", "conv3_1", "conv4_1", "conv5_1"}
    assert forms[Taps] == {f"predict_flow{level}" for level in range(2, 7)}
    assert {"conv1", "conv4", "conv6_1", "deconv5"} < forms[PackedConvolution]


@needs_onednn
def test_half_types_multiply_in_full(filled: Callable[..., nn.Module]) -> None:
    """Minimal filtering is not used: it would round the sums that it multiplies once more."""
    layers = Layers.of(filled("FlowNet2S", width=0.5), torch.bfloat16)
    assert not any(isinstance(convolution._form, Winograd) for convolution in layers.convolutions.values())
