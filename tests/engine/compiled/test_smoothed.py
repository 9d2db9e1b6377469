"""A flow head merged with the smoothing layer before it equals the two layers, at the borders as in the middle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowreel.engine.compiled import buffers, convolution, onednn
from flowreel.engine.compiled.buffers import Buffers
from flowreel.engine.compiled.cpu import Layers
from flowreel.engine.compiled.smoothed import SmoothedHead

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this torch has no oneDNN for this CPU")
SIZES = [(1, 1), (1, 6), (2, 2), (5, 1), (3, 4), (14, 9), (40, 33)]


@pytest.fixture
def pair() -> tuple[nn.Conv2d, nn.Conv2d]:
    torch.manual_seed(0)
    return nn.Conv2d(5, 8, 3, 1, 1), nn.Conv2d(8, 2, 3, 1, 1)


def as_one(pair: tuple[nn.Conv2d, nn.Conv2d]) -> SmoothedHead:
    smooth, head = pair
    assert smooth.bias is not None
    assert head.bias is not None
    return SmoothedHead((smooth.weight, smooth.bias), (head.weight, head.bias))


def one_after_the_other(pair: tuple[nn.Conv2d, nn.Conv2d], x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = pair[1](pair[0](x))
    return found


@pytest.mark.parametrize("large", [False, True], ids=["whole", "in strips"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_it_is_the_two_layers(
    pair: tuple[nn.Conv2d, nn.Conv2d], height: int, width: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(convolution, "STRIP", 0)
        monkeypatch.setattr(buffers, "SMALLEST", 0)
    x = torch.randn(2, 5, height, width)
    found = as_one(pair)(x, Buffers())
    torch.testing.assert_close(found, one_after_the_other(pair, x), rtol=1e-5, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_large_bias_between_them_ends_at_the_border(pair: tuple[nn.Conv2d, nn.Conv2d]) -> None:
    """Beyond the image the head reads zeros, not the smoothing layer's bias."""
    assert pair[0].bias is not None
    with torch.no_grad():
        pair[0].bias.fill_(1e3)
    x = torch.randn(1, 5, 6, 7)
    torch.testing.assert_close(as_one(pair)(x, Buffers()), one_after_the_other(pair, x), rtol=1e-5, atol=1e-3)


def test_what_it_is_given_may_lie_in_memory_in_any_way(pair: tuple[nn.Conv2d, nn.Conv2d]) -> None:
    wide = torch.randn(1, 9, 8, 12).contiguous(memory_format=torch.channels_last)
    for x in (wide[:, 2:7], wide[:, 2:7, 1:-1, 2:-3], wide[:, 2:7].flip(3), wide.bfloat16()[:, 1:6]):
        found = as_one(pair)(x, Buffers())
        torch.testing.assert_close(found, one_after_the_other(pair, x.float()), rtol=1e-5, atol=1e-5)


def test_it_is_nearly_as_exact_as_the_two_layers() -> None:
    """Its sums are longer than theirs, over five by five taps of all inputs."""
    torch.manual_seed(0)
    smooth = torch.randn(64, 194, 3, 3) * (194 * 9) ** -0.5
    head, none = torch.randn(2, 64, 3, 3) * (64 * 9) ** -0.5, torch.zeros(64)
    x = F.leaky_relu(torch.randn(1, 194, 24, 32), 0.1)
    exact = F.conv2d(F.conv2d(x.double(), smooth.double(), None, 1, 1), head.double(), None, 1, 1)
    plain = F.conv2d(F.conv2d(x, smooth, None, 1, 1), head, None, 1, 1)
    found = SmoothedHead((smooth, none), (head, none[:2]))(x, Buffers())
    assert (found - exact).square().mean().sqrt() < 2.5 * (plain - exact).square().mean().sqrt()


def test_the_heads_that_come_behind_such_a_layer_and_no_others(filled: Callable[..., nn.Module]) -> None:
    layers = Layers.of(filled("FlowNet2", width=0.1), torch.float32)
    expected = {f"flownets_d.predict_flow{level}" for level in (2, 3, 4, 5)}
    assert set(layers.smoothed) == expected | {"flownetfusion.predict_flow0", "flownetfusion.predict_flow1"}
    assert not layers.smoothed.keys() & layers.convolutions.keys()
    assert not any("inter_conv" in name for name in layers.convolutions)
    assert not Layers.of(filled("FlowNet2CSS", width=0.1), torch.float32).smoothed
