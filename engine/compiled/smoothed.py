"""A flow head behind a smoothing layer, as the one layer that the two are together.

FlowNetSD and the fusion smooth before they predict: a 3x3 layer makes many channels (``inter_conv``), the 3x3 head two
of them, and neither has an activation. So they are one 5x5 layer to two channels, and most of the arithmetic, which is
in the first, need not be done. oneDNN would leave most of 16 output channels idle, as in ``taps``; so it is a 1x5 layer
first, to two channels for each of the five rows of the filter, and a 5x1 layer that puts those rows in their places.

At the borders the two differ: the head meets zeros beyond the image, where the 5x5 layer goes on with what the first
layer would give there. That depends on the outermost row or column of the input alone, and is taken off again.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from flowreel.engine.compiled.buffers import Buffers
from flowreel.engine.compiled.convolution import channels_last, strips
from flowreel.engine.compiled.onednn import PackedConvolution

KERNEL = 5  # two layers of 3x3


class SmoothedHead:
    """Both layers; equal to one after the other up to rounding."""

    def __init__(self, smooth: tuple[Tensor, Tensor], head: tuple[Tensor, Tensor]) -> None:
        """Weights and biases of the two layers, as torch has them. It computes in float32, whatever it is given."""
        first, second = smooth[0].detach().float(), head[0].detach().float()
        between = smooth[1].detach().float()
        whole = F.conv_transpose2d(second, first)  # (2, inputs, 5, 5)
        outputs, inputs = whole.shape[:2]
        each = whole.permute(2, 0, 1, 3).reshape(KERNEL * outputs, inputs, 1, KERNEL)  # (row, output), as below
        places = torch.einsum("ry,op->orpy", torch.eye(KERNEL), torch.eye(outputs))
        bias = head[1].detach().float() + torch.einsum("omyx,m->o", second, between)
        self.outputs = outputs
        self._rows = PackedConvolution(each.contiguous(), None, (1, 1), KERNEL // 2)
        self._sum = PackedConvolution(places.reshape(outputs, KERNEL * outputs, KERNEL, 1), bias, (1, 1), 0)
        self._borders = _Borders(first, between, second)

    def for_another_size(self) -> SmoothedHead:
        """The same weights; what it settles for the sizes it meets goes when it goes."""
        other = copy(self)
        other._rows, other._sum = self._rows.for_another_size(), self._sum.for_another_size()
        return other

    def __call__(self, x: Tensor, buffers: Buffers) -> Tensor:
        """(B, inputs, H, W) of any type and strides to (B, 2, H, W) float32, channels last."""
        x = channels_last(x)
        batch, _, height, width = x.shape
        out = buffers.empty(batch, self.outputs, height, width, torch.float32)
        reach = KERNEL // 2
        bytes_a_pixel = KERNEL * self.outputs * torch.float32.itemsize
        if x.dtype != torch.float32:  # then a strip's input is memory of its own as well
            bytes_a_pixel = max(bytes_a_pixel, x.shape[1] * torch.float32.itemsize)
        for sample in range(batch):
            one = x[sample : sample + 1]
            for top, bottom in strips(height, width, bytes_a_pixel):
                low, high = max(0, top - reach), min(height, bottom + reach)
                rows = self._rows(one[:, :, low:high].float(), 0)
                out[sample : sample + 1, :, top:bottom] = self._sum(rows, reach)[:, :, top - low : bottom - low]
        self._borders.take_off(out, x)
        return out


class _Borders:
    """What the 5x5 layer adds for places beyond the image, by the side that they lie on."""

    def __init__(self, first: Tensor, between: Tensor, second: Tensor) -> None:
        """Weights of the first layer (M, C, 3, 3), its bias (M,), and the second's weights (N, M, 3, 3)."""
        # Beyond the first row, at row -1, only the last row of the first filter meets the image, and only the first
        # row of the second filter meets what that gives. So for each of the sides.
        self._above = _along(second[:, :, 0], first[:, :, 2], between)
        self._below = _along(second[:, :, 2], first[:, :, 0], between)
        self._left = _along(second[..., 0], first[..., 2], between)
        self._right = _along(second[..., 2], first[..., 0], between)
        # A corner lies beyond two sides and is taken off with both: once too often.
        self._corners = [
            (y, x, second[:, :, y, x] @ first[:, :, 2 - y, 2 - x], second[:, :, y, x] @ between)
            for y in (0, 2)
            for x in (0, 2)
        ]

    def take_off(self, out: Tensor, x: Tensor) -> None:
        """``out`` (B, N, H, W), of inputs ``x`` (B, C, H, W)."""
        out[:, :, 0] -= self._side(x[:, :, 0], self._above)
        out[:, :, -1] -= self._side(x[:, :, -1], self._below)
        out[..., 0] -= self._side(x[..., 0], self._left)
        out[..., -1] -= self._side(x[..., -1], self._right)
        for row, column, weight, constant in self._corners:
            y, z = (0 if place == 0 else -1 for place in (row, column))
            out[:, :, y, z] += x[:, :, y, z].float() @ weight.T + constant

    def _side(self, edge: Tensor, layer: tuple[Tensor, Tensor]) -> Tensor:
        return F.conv1d(edge.float(), *layer, padding=KERNEL // 2)


def _along(second: Tensor, first: Tensor, between: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers of three taps along a side as one of five, (N, C, 5), with its bias."""
    return F.conv_transpose1d(second, first), second.sum(2) @ between
