"""Convolutions the way oneDNN runs them fastest on a CPU: weights packed once, bias and activation inside.

Results larger than the caches are made in strips of rows. A strip is computed into memory that is still warm from the
last one and copied from there to where it belongs, e.g. between other channels of a concatenation; in one piece, the
same layer takes up to four times as long for fresh memory alone. ``Buffers`` says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from flowreel.engine.compiled.buffers import Buffers
from flowreel.engine.models.layers import SLOPE

AnyConv = nn.Conv2d | nn.ConvTranspose2d
_ops: Any = torch.ops.mkldnn
_NEEDED = (  # none of them a documented interface of torch, so any may be missing
    "_convolution_pointwise",
    "_convolution_transpose_pointwise",
    "_reorder_convolution_weight",
    "_reorder_convolution_transpose_weight",
    "_get_mkldnn_serialized_md",
    "_is_mkldnn_bf16_supported",
)
STRIP = 4 << 20  # bytes of output a strip
WHOLE = 16 << 20  # bytes of output up to which a layer is done in one piece


def available(dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch have it, in that type."""
    if not torch._C._has_mkldnn or not all(hasattr(_ops, name) for name in _NEEDED):
        return False
    on_arm = getattr(_ops, "_is_mkldnn_acl_supported", None)  # ARM's library behind oneDNN packs weights otherwise
    if on_arm is not None and on_arm():
        return False
    return dtype == torch.float32 or bool(_ops._is_mkldnn_bf16_supported())


class PackedWeights:
    """One layer's weights in the layouts that oneDNN chooses for its inputs' sizes; many sizes agree in one layout.

    A layout lives as long as somebody uses it, and the last one as long as this. So the weights are in memory once for
    frames of one size, however many sizes there were before.
    """

    def __init__(self, plain: Tensor, stride: int, columns: int, transposed: bool) -> None:
        """``plain`` as torch's layer has it; ``columns``: of padding, left and right."""
        self.stride, self.columns, self.transposed = stride, columns, transposed
        self._last = plain
        self._layouts: WeakValueDictionary[bytes, Tensor] = WeakValueDictionary()

    def for_input(self, size: torch.Size, rows: int) -> Tensor:
        """For inputs of (B, C, H, W), and so many rows of padding above and below."""
        plain = self._last
        if plain.is_mkldnn:
            plain = plain.to_dense()
            plain = plain.transpose(0, 1).contiguous() if self.transposed else plain
        around, step, close = [rows, self.columns], [self.stride] * 2, [1, 1]
        if self.transposed:
            form = _ops._reorder_convolution_transpose_weight(plain, around, [0, 0], step, close, 1, list(size))
        else:
            form = _ops._reorder_convolution_weight(plain, around, step, close, 1, list(size))
        layout = bytes(_ops._get_mkldnn_serialized_md(form).numpy())
        self._last = self._layouts.setdefault(layout, form)
        return self._last


class Convolution:
    """A 2-d convolution or transposed convolution with its bias and, mostly, its LeakyReLU; square, one group."""

    def __init__(
        self,
        layer: AnyConv,
        weight: Tensor,
        bias: Tensor | None,
        leaky: bool,
        dtype: torch.dtype,
        gives: torch.dtype,
    ) -> None:
        """``layer`` says of what kind; the numbers are copied from ``weight`` and ``bias``.

        It computes in ``dtype``; ``gives`` is the type of what it gives when called.
        """
        self.transposed = isinstance(layer, nn.ConvTranspose2d)
        self.kernel, self.stride, self.padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        self.inputs, self.outputs, self.dtype = layer.in_channels, layer.out_channels, dtype
        self.gives = gives
        self._bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self._activation: tuple[str, list[float], str] = ("leaky_relu", [SLOPE], "") if leaky else ("none", [], "")
        own = weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        self._weights = PackedWeights(own, self.stride, self.padding, self.transposed)
        self._chosen: dict[tuple[int, ...], Tensor] = {}  # by the input's size and the rows of padding

    def for_another_size(self) -> Convolution:
        """The same layer, the same weights; what it settles for the sizes it meets goes when it goes."""
        other = copy(self)
        other._chosen = {}
        return other

    def __call__(self, x: Tensor, buffers: Buffers) -> Tensor:
        """(B, inputs, H, W) of any type and strides to (B, outputs, H', W') channels last."""
        batch, height, width = x.shape[0], *self._size(x)
        if self.gives == self.dtype and batch * self.outputs * height * width * self.dtype.itemsize <= WHOLE:
            return self._run(self._ready(x), self.padding)
        out = buffers.empty(batch, self.outputs, height, width, self.gives)
        self.into(out, x)
        return out

    def into(self, out: Tensor, x: Tensor) -> None:
        """The same, written to ``out``, channels last, of any type; it may be some of another tensor's channels."""
        x = self._ready(x)
        for sample in range(x.shape[0]):
            for top, bottom in strips(*self._size(x), self.outputs * self.dtype.itemsize):
                out[sample : sample + 1, :, top:bottom] = self.rows(x[sample : sample + 1], top, bottom)

    def rows(self, x: Tensor, top: int, bottom: int, *, first: int = 0, height: int | None = None) -> Tensor:
        """Rows ``top`` to ``bottom`` of the output; even numbers where it is transposed.

        ``x`` may hold only some of the input's rows, from ``first`` on, of ``height`` in all: those that are needed.
        """
        height = x.shape[2] if height is None else height
        if self.transposed:  # output row y meets input rows from y/2 - 1 on
            low, high = max(0, top // 2 - 1), min(height, bottom // 2 + 1)
            return self._run(x[:, :, low - first : high - first], 1)[:, :, top - 2 * low : bottom - 2 * low]
        low, high = top * self.stride - self.padding, (bottom - 1) * self.stride - self.padding + self.kernel
        if low >= 0 and high <= height:
            return self._run(x[:, :, low - first : high - first], 0)
        # Padding comes at both ends or none. Where one of them is inside the image, what it spoils is cut off.
        spoilt = 0 if low < 0 else -(-self.padding // self.stride)
        start = max(0, (top - spoilt) * self.stride)
        made = self._run(x[:, :, start - first : min(high, height) - first], self.padding)
        return made[:, :, spoilt : spoilt + bottom - top]

    def _size(self, x: Tensor) -> tuple[int, int]:
        height, width = x.shape[2:]
        return (2 * height, 2 * width) if self.transposed else (-(-height // self.stride), -(-width // self.stride))

    def _ready(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _run(self, x: Tensor, padding: int) -> Tensor:
        """``padding``: rows above and below; left and right there is always the layer's own."""
        key = (*x.shape, padding)
        weight = self._chosen.get(key)
        if weight is None:
            weight = self._chosen[key] = self._weights.for_input(x.shape, padding)
        around, step, close = [padding, self.padding], [self.stride] * 2, [1, 1]
        if self.transposed:
            made: Tensor = _ops._convolution_transpose_pointwise(
                x, weight, self._bias, around, [0, 0], step, close, 1, *self._activation
            )
            return made
        made = _ops._convolution_pointwise(x, weight, self._bias, around, step, close, 1, *self._activation)
        return made


def strips(height: int, width: int, bytes_a_pixel: int) -> Iterator[tuple[int, int]]:
    """(top, bottom) of nearly equal strips, an even number of rows each but for the last."""
    rows = max(2, STRIP // (width * bytes_a_pixel))
    count = -(-height // rows)
    rows = -(-height // count)
    rows += rows % 2
    for top in range(0, height, rows):
        yield top, min(height, top + rows)


def chained(first: Convolution, second: Convolution, x: Tensor, buffers: Buffers, keep: Tensor | None = None) -> Tensor:
    """A full-size layer and the one that halves its output, strip by strip: what is between them is never whole.

    keep: (B, first.outputs, H, W), where the first one's output goes as well.
    """
    x = first._ready(x)
    batch, _, height, width = x.shape
    out = buffers.empty(batch, second.outputs, height // 2, width // 2, second.gives)
    for sample in range(batch):
        one = x[sample : sample + 1]
        for top, bottom in strips(height // 2, width // 2, 4 * first.outputs * first.dtype.itemsize):
            low = max(0, 2 * top - 1)
            between = first.rows(one, low, 2 * bottom)
            if keep is not None:
                keep[sample : sample + 1, :, low : 2 * bottom] = between
            between = second._ready(between)
            out[sample : sample + 1, :, top:bottom] = second.rows(between, top, bottom, first=low, height=height)
    return out
