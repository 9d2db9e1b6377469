"""Convolutions to very few channels: a product for every tap at once, then the taps' sum.

oneDNN works on 16 output channels at a time, so a 3x3 layer to two of them leaves most of it idle. As one 1x1 layer to
two channels a tap, and a second layer that puts each tap in its place, it is up to three times as fast.
"""

from __future__ import annotations

from copy import copy
from functools import partial

import torch
from torch import Tensor

from flowreel.engine.compiled.onednn import PackedConvolution

MOST = 32  # channels of all taps together
NARROWEST = 48  # channels in; below it, putting the taps in place takes longer than it saves


class Taps:
    """A square layer of stride one, without activation; called as ``PackedConvolution`` is, equal up to rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """``weight`` and ``bias`` as torch's layer has them."""
        outputs, inputs, kernel, _ = weight.shape
        each = weight.permute(2, 3, 0, 1).reshape(-1, inputs, 1, 1)  # (tap, output), as in the places below
        eye = partial(torch.eye, dtype=weight.dtype, device=weight.device)
        taps = eye(kernel * kernel).view(kernel * kernel, kernel, kernel)
        places = torch.einsum("tyx,op->otpyx", taps, eye(outputs)).flatten(1, 2)
        self._each = PackedConvolution(each, None, (1, 1), 0)
        self._sum = PackedConvolution(places, bias, (1, 1), kernel // 2)
        self.bytes_a_pixel = inputs * weight.itemsize

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, stride: int, *, transposed: bool, leaky: bool) -> Taps | None:
        """For a layer that gains by it."""
        outputs, inputs, height, width = weight.shape
        if transposed or leaky or stride != 1 or outputs * height * width > MOST or inputs < NARROWEST:
            return None
        return cls(weight, bias)

    def for_another_size(self) -> Taps:
        """The same weights; what it settles for the sizes it meets goes when it goes."""
        other = copy(self)
        other._each, other._sum = self._each.for_another_size(), self._sum.for_another_size()
        return other

    def __call__(self, x: Tensor, rows: int) -> Tensor:
        """``x``: (B, C, H, W), channels last; ``rows`` of padding above and below."""
        return self._sum(self._each(x, 0), rows)
