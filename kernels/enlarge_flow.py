"""Flow upsampled to twice its size by learned weights, written straight into a concatenation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from flowreel.kernels.launch import SUFFIXES, launch, sizes, view
from flowreel.kernels.operation import operation
from flowreel.kernels.pixels import aligned, check_types, tiles_for

if TYPE_CHECKING:
    from collections.abc import Callable

# --- the definition: any device ---------------------------------------------------------------------------------------


def enlarge_flow_definition(flow: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """What ``enlarge_flow`` means. In float64, because a process may allow TF32 for float32: it keeps only 10 bits."""
    out.copy_(F.conv_transpose2d(flow.double(), weight.double(), bias.double(), stride=2, padding=1))


# --- the CUDA version -------------------------------------------------------------------------------------------------


_ROWS = 8  # rows of threads in a block; each thread computes 2x2 pixels


def _enlarge_flow_cuda(flow: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    batch, _, height, width = flow.shape
    weight = weight.contiguous()
    if not aligned(weight):  # a row of weights is one 16-byte load
        weight = weight.clone()
    arguments = (*view(flow), weight, bias.contiguous(), *view(out), *sizes(height, width))
    grid = tiles_for(batch, height + 1, width + 1, _ROWS)
    launch("enlarge_flow", f"enlarge_flow_{SUFFIXES[out.dtype]}", grid, arguments)


# --- registration -----------------------------------------------------------------------------------------------------

_enlarge: Callable[[Tensor, Tensor, Tensor, Tensor], None] = operation(
    "enlarge_flow(Tensor flow, Tensor weight, Tensor bias, Tensor(a!) out) -> ()",
    enlarge_flow_definition,
    on_cuda=_enlarge_flow_cuda,
)

# --- the function -----------------------------------------------------------------------------------------------------


def enlarge_flow(flow: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """A transposed convolution of flow, 4x4, stride 2, padding 1, into ``out``.

    Args:
        flow: (B, 2, h, w) float32, any strides.
        weight: (2, 2, 4, 4) float32: input channel, output channel, row, column.
        bias: (2,) float32.
        out: (B, 2, 2h, 2w) float32, bfloat16 or float16, any strides, e.g. a part of a concatenation; shares no memory
            with flow.

    Computed in float32 and rounded once. Without gradients: for inference.

    Raises:
        TypeError: flow, weight or bias is not float32, or out has another dtype than these.
        ValueError: shapes or devices do not fit together.
    """
    check_types(out, flow, weight, bias)
    if weight.shape != (2, 2, 4, 4) or bias.shape != (2,):
        raise ValueError(f"expected (2, 2, 4, 4) and (2,), got {tuple(weight.shape)} and {tuple(bias.shape)}")
    if flow.ndim != 4 or flow.shape[1] != 2 or flow.numel() == 0:
        raise ValueError(f"flow is (B, 2, h, w) and holds something, got {tuple(flow.shape)}")
    batch, _, height, width = flow.shape
    if out.shape != (batch, 2, 2 * height, 2 * width):
        raise ValueError(f"{tuple(flow.shape)} does not go into {tuple(out.shape)}")
    _enlarge(flow, weight, bias, out)
