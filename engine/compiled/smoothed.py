"""A flow head and the smoothing layer before it as one layer (``composed``), on a CPU.

oneDNN would leave most of its 16 output channels idle, as ``taps`` explains. So the 5x5 layer is split into a 1x5
layer, to two channels for each of the filter's five rows, and a 5x1 layer that shifts those rows into place and sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowreel.engine.compiled.buffers import Buffers
from flowreel.engine.compiled.composed import composed
from flowreel.engine.compiled.convolution import channels_last, strips
from flowreel.engine.compiled.onednn import PackedConvolution
from flowreel.kernels.flow_head import take_off_borders_definition

KERNEL = 5  # of two 3x3 layers


class SmoothedHead:
    """Both layers in one; equal to the two in sequence up to rounding."""

    def __init__(self, smooth: tuple[Tensor, Tensor], head: tuple[Tensor, Tensor]) -> None:
        """Weight and bias of each layer, as in torch's layers. Computes in float32 whatever the input's dtype."""
        whole = composed(smooth, head)
        outputs, inputs = whole.weight.shape[:2]
        each = whole.weight.permute(2, 0, 1, 3).reshape(KERNEL * outputs, inputs, 1, KERNEL)  # (row, output), as below
        rows, columns = (
            torch.eye(size, dtype=whole.weight.dtype, device=whole.weight.device) for size in (KERNEL, outputs)
        )
        places = torch.einsum("ry,op->orpy", rows, columns)
        self.outputs = outputs
        self._rows = PackedConvolution(each.contiguous(), None, (1, 1), KERNEL // 2)
        self._sum = PackedConvolution(places.reshape(outputs, KERNEL * outputs, KERNEL, 1), whole.bias, (1, 1), 0)
        self._borders = whole.borders

    def __call__(self, x: Tensor, buffers: Buffers) -> Tensor:
        """(B, inputs, H, W) of any dtype and strides to (B, 2, H, W) float32, channels last."""
        x = channels_last(x)
        batch, _, height, width = x.shape
        out = buffers.empty(batch, self.outputs, height, width, torch.float32)
        reach = KERNEL // 2
        bytes_a_pixel = KERNEL * self.outputs * torch.float32.itemsize
        if x.dtype != torch.float32:  # then a strip's input is a copy, which takes memory too
            bytes_a_pixel = max(bytes_a_pixel, x.shape[1] * torch.float32.itemsize)
        for sample in range(batch):
            one = x[sample : sample + 1]
            for top, bottom in strips(height, width, bytes_a_pixel):
                low, high = max(0, top - reach), min(height, bottom + reach)
                rows = self._rows(one[:, :, low:high].float(), 0, buffers.layouts)
                made = self._sum(rows, reach, buffers.layouts)
                out[sample : sample + 1, :, top:bottom] = made[:, :, top - low : bottom - low]
        take_off_borders_definition(out, x, *self._borders)
        return out
