"""oneDNN's convolutions with weights packed once, and bias and activation fused in.

torch has them as operators for its own compiler. None is a documented interface, so ``available`` checks for each.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from flowreel.engine.compiled.buffers import Layouts
from flowreel.engine.models.layers import SLOPE

_ops: Any = torch.ops.mkldnn
_NEEDED = (
    "_convolution_pointwise",
    "_convolution_transpose_pointwise",
    "_reorder_convolution_weight",
    "_reorder_convolution_transpose_weight",
    "_get_mkldnn_serialized_md",
    "_is_mkldnn_bf16_supported",
)


def available(dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch have these operators, for that dtype."""
    if not torch._C._has_mkldnn or not all(hasattr(_ops, name) for name in _NEEDED):
        return False
    on_arm = getattr(_ops, "_is_mkldnn_acl_supported", None)  # oneDNN with ARM's library packs weights differently
    if on_arm is not None and on_arm():
        return False
    return dtype == torch.float32 or bool(_ops._is_mkldnn_bf16_supported())


class PackedWeights:
    """One layer's weights in the layouts that oneDNN chooses by input size; many sizes share a layout.

    A layout is freed when no program uses it any more; the most recent one lives as long as this object.
    So for frames of one size the weights are in memory once, however many sizes came before.
    """

    def __init__(self, plain: Tensor, strides: tuple[int, int], columns: int, transposed: bool, groups: int) -> None:
        """``plain``: as in torch's layer, in one group if transposed. ``columns``: of padding, left and right."""
        self.strides, self.columns, self.transposed, self.groups = list(strides), columns, transposed, groups
        self._last = plain
        self._layouts: WeakValueDictionary[bytes, Tensor] = WeakValueDictionary()

    def for_input(self, size: torch.Size, rows: int) -> Tensor:
        """The layout for inputs of (B, C, H, W) with ``rows`` of padding above and below."""
        plain = self._plain()
        padding, dilation = [rows, self.columns], [1, 1]
        if self.transposed:
            form = _ops._reorder_convolution_transpose_weight(
                plain, padding, [0, 0], self.strides, dilation, self.groups, list(size)
            )
        else:
            form = _ops._reorder_convolution_weight(plain, padding, self.strides, dilation, self.groups, list(size))
        layout = bytes(_ops._get_mkldnn_serialized_md(form).numpy())
        self._last = self._layouts.setdefault(layout, form)
        return self._last

    def _plain(self) -> Tensor:
        last = self._last  # read once: another thread may replace it at any time
        if not last.is_mkldnn:
            return last
        plain = last.to_dense()
        if not self.transposed:
            return plain
        return plain.transpose(0, 1).contiguous()  # oneDNN puts outputs first


class PackedConvolution:
    """A 2-d convolution or transposed convolution with its bias and, if asked, its LeakyReLU.

    Args:
        weight, bias: as in torch's layer, in the dtype to compute in; they are kept, not copied.
        strides: of rows and of columns.
        columns: of padding, left and right; rows of padding are an argument of each call.
        groups: 1 if transposed.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        strides: tuple[int, int],
        columns: int,
        *,
        transposed: bool = False,
        groups: int = 1,
        leaky: bool = False,
    ) -> None:
        self._weights = PackedWeights(weight, strides, columns, transposed, groups)
        self._bias = bias
        outputs = weight.shape[1] * groups if transposed else weight.shape[0]
        self.bytes_a_pixel = outputs * weight.itemsize  # of output
        self._activation: tuple[str, list[float], str] = ("leaky_relu", [SLOPE], "") if leaky else ("none", [], "")

    def __call__(self, x: Tensor, rows: int, layouts: Layouts) -> Tensor:
        """``x``: (B, C, H, W), channels last; ``rows``: of padding, above and below."""
        packed, key = self._weights, (self, *x.shape, rows)
        weight = layouts.get(key)
        if weight is None:
            weight = layouts[key] = packed.for_input(x.shape, rows)
        padding, dilation = [rows, packed.columns], [1, 1]
        if packed.transposed:
            made: Tensor = _ops._convolution_transpose_pointwise(
                x, weight, self._bias, padding, [0, 0], packed.strides, dilation, packed.groups, *self._activation
            )
            return made
        made = _ops._convolution_pointwise(
            x, weight, self._bias, padding, packed.strides, dilation, packed.groups, *self._activation
        )
        return made
