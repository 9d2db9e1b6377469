"""A network's convolutions on a CPU, whole or in strips, each in the form that is fastest for it.

Results larger than the caches are computed in strips of rows. Each strip is computed into memory still in the cache
from the last one, then copied to its place, e.g. between other channels of a concatenation. In one piece, the same
layer takes up to four times as long, because of fresh memory alone (see ``buffers``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from flowreel.engine.compiled.buffers import Buffers, apart
from flowreel.engine.compiled.onednn import PackedConvolution
from flowreel.engine.compiled.taps import Taps
from flowreel.engine.compiled.winograd import Winograd

AnyConv = nn.Conv2d | nn.ConvTranspose2d
STRIP = 4 << 20  # bytes of working memory for one strip
WHOLE = 16 << 20  # bytes of output up to which a layer is done in one piece


class Convolution:
    """A 2-d convolution or transposed convolution, square, one group, with its bias and LeakyReLU, if it has them."""

    def __init__(self, layer: AnyConv, leaky: bool, dtype: torch.dtype, gives: torch.dtype) -> None:
        """Copies the layer's values. Computes in ``dtype``; ``gives``: the dtype of what it returns when called."""
        self.transposed = isinstance(layer, nn.ConvTranspose2d)
        self.kernel, self.stride, self.padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        self.inputs, self.outputs, self.dtype = layer.in_channels, layer.out_channels, dtype
        self.gives = gives
        own = apart(layer.weight.shape, dtype).copy_(layer.weight.detach())
        own_bias = None if layer.bias is None else layer.bias.detach().to(dtype, copy=True)
        self._form = _fastest(own, own_bias, self.stride, self.padding, transposed=self.transposed, leaky=leaky)

    def __call__(self, x: Tensor, buffers: Buffers) -> Tensor:
        """(B, inputs, H, W) of any dtype and strides to (B, outputs, H', W'), channels last."""
        batch, height, width = x.shape[0], *self._size(x)
        small = batch * height * width * self._form.bytes_a_pixel <= WHOLE
        if small and x.dtype == self.dtype == self.gives:
            return channels_last(self._form(channels_last(x), self.padding, buffers.layouts))
        out = buffers.empty(batch, self.outputs, height, width, self.gives)
        self.into(out, x, buffers)
        return out

    def into(self, out: Tensor, x: Tensor, buffers: Buffers) -> None:
        """The same, written to ``out``: channels last, of any dtype, perhaps a slice of another tensor's channels."""
        x = channels_last(x)
        bytes_a_pixel = self._form.bytes_a_pixel
        if x.dtype != self.dtype:  # then a strip's input is a copy, which takes memory too
            bytes_a_pixel = max(bytes_a_pixel, self.inputs * self.dtype.itemsize)
        for sample in range(x.shape[0]):
            for top, bottom in strips(*self._size(x), bytes_a_pixel):
                out[sample : sample + 1, :, top:bottom] = self.rows(x[sample : sample + 1], top, bottom, buffers)

    def rows(
        self, x: Tensor, top: int, bottom: int, buffers: Buffers, *, first: int = 0, height: int | None = None
    ) -> Tensor:
        """Rows ``top`` to ``bottom`` of the output; both even if transposed.

        ``x`` may hold only those of the input's ``height`` rows that are needed, starting at row ``first``.
        """
        height = x.shape[2] if height is None else height
        if self.transposed:  # output row y reads input rows from y/2 - 1 on
            low, high = max(0, top // 2 - 1), min(height, bottom // 2 + 1)
            return self._run(x[:, :, low - first : high - first], 1, buffers)[:, :, top - 2 * low : bottom - 2 * low]
        low, high = top * self.stride - self.padding, (bottom - 1) * self.stride - self.padding + self.kernel
        if low >= 0 and high <= height:
            return self._run(x[:, :, low - first : high - first], 0, buffers)
        # oneDNN pads both ends or neither. An end that lies inside the image gets wrong rows, which are cut off.
        spoilt = 0 if low < 0 else -(-self.padding // self.stride)
        start = max(0, (top - spoilt) * self.stride)
        made = self._run(x[:, :, start - first : min(high, height) - first], self.padding, buffers)
        return made[:, :, spoilt : spoilt + bottom - top]

    def _run(self, x: Tensor, rows: int, buffers: Buffers) -> Tensor:
        return self._form(x.to(self.dtype), rows, buffers.layouts)

    def _size(self, x: Tensor) -> tuple[int, int]:
        height, width = x.shape[2:]
        return (2 * height, 2 * width) if self.transposed else (-(-height // self.stride), -(-width // self.stride))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _fastest(
    weight: Tensor, bias: Tensor | None, stride: int, padding: int, *, transposed: bool, leaky: bool
) -> PackedConvolution | Winograd | Taps:
    return (
        Winograd.of(weight, bias, stride, transposed=transposed, leaky=leaky)
        or Taps.of(weight, bias, stride, transposed=transposed, leaky=leaky)
        or PackedConvolution(weight, bias, (stride, stride), padding, transposed=transposed, leaky=leaky)
    )


def strips(height: int, width: int, bytes_a_pixel: int) -> Iterator[tuple[int, int]]:
    """(top, bottom) of nearly equal strips, an even number of rows each but for the last."""
    rows = max(2, STRIP // (width * bytes_a_pixel))
    count = -(-height // rows)
    rows = -(-height // count)
    rows += rows % 2
    for top in range(0, height, rows):
        yield top, min(height, top + rows)


def chained(first: Convolution, second: Convolution, x: Tensor, buffers: Buffers, keep: Tensor | None = None) -> Tensor:
    """A full-size layer and the one that halves its output, strip by strip: the map between is never held whole.

    keep: (B, first.outputs, H, W), which also gets the first layer's output.
    """
    x = channels_last(x)
    batch, _, height, width = x.shape
    out = buffers.empty(batch, second.outputs, height // 2, width // 2, second.gives)
    for sample in range(batch):
        one = x[sample : sample + 1]
        for top, bottom in strips(height // 2, width // 2, 4 * first.outputs * first.dtype.itemsize):
            low = max(0, 2 * top - 1)
            between = first.rows(one, low, 2 * bottom, buffers)
            if keep is not None:
                keep[sample : sample + 1, :, low : 2 * bottom] = between
            between = channels_last(between)
            made = second.rows(between, top, bottom, buffers, first=low, height=height)
            out[sample : sample + 1, :, top:bottom] = made
    return out
