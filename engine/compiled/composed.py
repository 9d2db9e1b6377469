"""A smoothing layer and the flow head after it, composed into a single convolution.

FlowNetSD and the fusion network smooth before they predict: a 3x3 layer (``inter_conv``) to many channels, then the 3x3
head to two, neither with an activation. Together they are one 5x5 layer to two channels, which saves most of the
arithmetic, that of the first layer.

At the image borders the two forms differ: the head is padded with zeros beyond the image, where the 5x5 layer uses what
the smoothing layer would compute there. That difference depends only on the outermost row or column of the input, and
is subtracted again (``kernels.flow_head.Borders``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowreel.kernels.flow_head import Borders

HEAD, SMOOTHING = "predict_flow", "inter_conv"  # in layers' names: flow heads, and the layers before some of them


class Composed(NamedTuple):
    """Two 3x3 layers as one. All float32."""

    weight: Tensor  # (N, C, 5, 5)
    bias: Tensor  # (N,)
    borders: Borders


def values_of(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias."""
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    return layer.weight.detach(), layer.bias.detach()


def composed(smooth: tuple[Tensor, Tensor], head: tuple[Tensor, Tensor]) -> Composed:
    """Composes layers of weights (M, C, 3, 3) and (N, M, 3, 3), biases (M,) and (N,). Computed in float64."""
    first, second = smooth[0].detach().double(), head[0].detach().double()
    between = smooth[1].detach().double()
    # At row -1, just above the image, only the last row of the first filter overlaps the image, and only the first row
    # of the second filter reads the result. The other three sides are alike.
    sides = [
        (second[:, :, 0], first[:, :, 2]),
        (second[:, :, 2], first[:, :, 0]),
        (second[..., 0], first[..., 2]),
        (second[..., 2], first[..., 0]),
    ]
    corners = [(second[:, :, y, x], first[:, :, 2 - y, 2 - x]) for y in (0, 2) for x in (0, 2)]
    borders = (
        torch.stack([F.conv_transpose1d(of_second, of_first).permute(2, 0, 1) for of_second, of_first in sides]),
        torch.stack([of_second.sum(2) @ between for of_second, _ in sides]),
        torch.stack([of_second @ of_first for of_second, of_first in corners]),
        torch.stack([of_second @ between for of_second, _ in corners]),
    )
    bias = head[1].detach().double() + torch.einsum("omyx,m->o", second, between)
    whole = F.conv_transpose2d(second, first)
    return Composed(whole.float(), bias.float(), Borders(*(part.float() for part in borders)))
