"""A flow head behind a smoothing layer, as the one layer that the two are together.

FlowNetSD and the fusion smooth before they predict: a 3x3 layer makes many channels (``inter_conv``), the 3x3 head two
of them, and neither has an activation. So they are one 5x5 layer to two channels, and most of the arithmetic, which is
in the first, need not be done.

At the borders the two differ: the head meets zeros beyond the image, where the 5x5 layer goes on with what the first
layer would give there. That depends on the outermost row or column of the input alone, and is taken off again
(``kernels.flow_head.Borders``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowreel.kernels.flow_head import Borders

HEAD, SMOOTHING = "predict_flow", "inter_conv"  # layers' names: of flow heads, and of what comes before some of them


class Composed(NamedTuple):
    """Two layers of 3x3 as one. All float32."""

    weight: Tensor  # (N, C, 5, 5)
    bias: Tensor  # (N,)
    borders: Borders


def composed(smooth: tuple[Tensor, Tensor], head: tuple[Tensor, Tensor]) -> Composed:
    """Of weights (M, C, 3, 3) and (N, M, 3, 3) and biases (M,) and (N,), formed in float64."""
    first, second = smooth[0].detach().double(), head[0].detach().double()
    between = smooth[1].detach().double()
    # Beyond the first row, at row -1, only the last row of the first filter meets the image, and only the first row of
    # the second filter meets what that gives. So for each of the sides.
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
