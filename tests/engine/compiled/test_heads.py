"""The half-precision flow heads of the form for GPUs, run on a CPU, equal the layers that they replace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowreel.engine.compiled.composed import composed
from flowreel.engine.compiled.heads import Head, pack_part
from flowreel.engine.compiled.padded import padded
from flowreel.engine.config import Precision
from flowreel.engine.models import build_model
from flowreel.kernels.flow_head import take_off_borders_

Filled = Callable[..., nn.Module]
SIZES = [(1, 1), (1, 6), (2, 2), (5, 1), (3, 4), (14, 9), (9, 40)]
TOLERANCE: dict[Precision, float] = {"fp16": 2**-9, "bf16": 2**-6}  # two roundings, relative to the largest value


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_two_layers_as_one_are_the_two(height: int, width: int) -> None:
    smooth, head = (torch.randn(6, 24, 3, 3), 10 * torch.randn(6)), (torch.randn(2, 6, 3, 3), torch.randn(2))
    x = torch.randn(2, 24, height, width)
    one = composed(smooth, head)
    found = take_off_borders_(F.conv2d(x, one.weight, one.bias, padding=2), x, one.borders)
    expected = F.conv2d(F.conv2d(x, *smooth, padding=1), *head, padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("precision", TOLERANCE)
def test_heads_of_networks_take_padded_maps(precision: Precision, batch_norm: bool, filled: Filled) -> None:
    net = filled("FlowNet2", width=0.13, batch_norm=batch_norm).eval()
    found = 0
    for part, smoothing in (("flownetc", 0), ("flownets_d", 4), ("flownetfusion", 2)):
        module = net.get_submodule(part)
        layers = pack_part(module, precision)
        assert not any("inter_conv" in name for name in layers)
        heads = {name: layer for name, layer in layers.items() if isinstance(layer, Head)}
        assert set(heads) == {name for name, _ in module.named_children() if name.startswith("predict_flow")}
        assert sum(head.borders is not None for head in heads.values()) == smoothing
        for name, head in heads.items():
            smooth = dict(module.named_children()).get(name.replace("predict_flow", "inter_conv"), nn.Identity())
            last = module.get_submodule(name)
            first = smooth[0] if isinstance(smooth, nn.Sequential) else last
            assert isinstance(first, nn.Conv2d)
            x = torch.zeros(2, padded(first.in_channels), 6, 8).to(head.weight.dtype)
            x[:, : first.in_channels] = torch.randn(2, first.in_channels, 6, 8)
            wanted = last(smooth(x[:, : first.in_channels].float()))
            flow = head(x)
            assert flow.dtype == torch.float32
            largest = float(wanted.abs().max())
            torch.testing.assert_close(flow, wanted, rtol=0, atol=TOLERANCE[precision] * largest)
            found += 1
    assert found == 5 + 5 + 3


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_float32_keeps_both_layers(precision: Precision) -> None:
    net = build_model("FlowNet2SD", width=0.05)
    assert set(pack_part(net, precision)) == {name for name, _ in net.named_children()}
