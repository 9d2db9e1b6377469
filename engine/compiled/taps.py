"""Convolutions to very few channels: the products of all taps first, then the sum over the taps.

oneDNN works on 16 output channels at a time, so a 3x3 layer to two channels leaves most of its lanes idle. As a 1x1
layer to two channels per tap, and a second layer that shifts each tap into place and sums, it is up to three times as
fast.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flowreel.engine.compiled.buffers import Layouts
from flowreel.engine.compiled.onednn import PackedConvolution

MOST = 32  # channels, over all taps
NARROWEST = 48  # input channels; with fewer, shifting and summing the taps takes longer than it saves


class Taps:
    """A square layer of stride 1, without activation; called like ``PackedConvolution``, equal to it up to rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """``weight`` and ``bias`` as torch's layer has them."""
        outputs, inputs, kernel, _ = weight.shape
        each = weight.permute(2, 3, 0, 1).reshape(-1, inputs, 1, 1)  # (tap, output), as in ``places`` below
        eye = partial(torch.eye, dtype=weight.dtype, device=weight.device)
        taps = eye(kernel * kernel).view(kernel * kernel, kernel, kernel)
        places = torch.einsum("tyx,op->otpyx", taps, eye(outputs)).flatten(1, 2)
        self._each = PackedConvolution(each, None, (1, 1), 0)
        self._sum = PackedConvolution(places, bias, (1, 1), kernel // 2)
        self.bytes_a_pixel = inputs * weight.itemsize

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, stride: int, *, transposed: bool, leaky: bool) -> Taps | None:
        """None where this form would be no faster."""
        outputs, inputs, height, width = weight.shape
        if transposed or leaky or stride != 1 or outputs * height * width > MOST or inputs < NARROWEST:
            return None
        return cls(weight, bias)

    def __call__(self, x: Tensor, rows: int, layouts: Layouts) -> Tensor:
        """``x``: (B, C, H, W), channels last; ``rows``: of padding, above and below."""
        return self._sum(self._each(x, 0, layouts), rows, layouts)
