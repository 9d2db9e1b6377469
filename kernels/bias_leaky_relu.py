"""A convolution's bias and LeakyReLU, with the result stored where the next layers read it.

The convolution's result is read and written once more anyway, so a copy into a concatenation costs only its writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowreel.kernels.launch import SUFFIXES, THREADS, launch, parts, sizes, view
from flowreel.kernels.operation import operation

if TYPE_CHECKING:
    from collections.abc import Callable

# --- the definition: any device ---------------------------------------------------------------------------------------


def bias_leaky_relu_definition(x: Tensor, bias: Tensor, slope: float, out: Tensor) -> None:
    """(B, C, H, W) and (C,) to ``out`` (B, up to C, H, W), which takes the first channels. Slope 1: no activation."""
    channels = out.shape[1]
    value = x[:, :channels].float() + bias[:channels].view(-1, 1, 1)
    out.copy_(F.leaky_relu_(value, slope) if slope != 1 else value)


def bias_leaky_relu_in_place_definition(x: Tensor, bias: Tensor, slope: float, also: Tensor | None) -> None:
    """The same in place, and once more in ``also``."""
    bias_leaky_relu_definition(x, bias, slope, x)
    if also is not None:
        also.copy_(x[:, : also.shape[1]])


# --- the CUDA version -------------------------------------------------------------------------------------------------

_TOGETHER = 8  # channels per thread


def _takes(x: Tensor, bias: Tensor, slope: float, out: Tensor | None) -> bool:
    return out is None or out.dtype == x.dtype


def _bias_leaky_relu_cuda(x: Tensor, bias: Tensor, slope: float, out: Tensor) -> None:
    _launched(x, bias, slope, out, None)


def _bias_leaky_relu_in_place_cuda(x: Tensor, bias: Tensor, slope: float, also: Tensor | None) -> None:
    _launched(x, bias, slope, x, also)


def _launched(x: Tensor, bias: Tensor, slope: float, out: Tensor, also: Tensor | None) -> None:
    batch, channels, height, width = x.shape
    blocks_a_row = parts(width * parts(channels, _TOGETHER), THREADS)
    counts = sizes(channels, out.shape[1], 0 if also is None else also.shape[1], height, width)
    views = (*view(x), bias.contiguous(), *view(out), *view(out if also is None else also))
    entry, grid = f"bias_leaky_relu_{SUFFIXES[x.dtype]}", (batch * height * blocks_a_row,)
    launch("bias_leaky_relu", entry, grid, (*views, *counts, np.float32(slope)))


# --- registration -----------------------------------------------------------------------------------------------------

_into: Callable[[Tensor, Tensor, float, Tensor], None] = operation(
    "bias_leaky_relu(Tensor x, Tensor bias, float slope, Tensor(a!) out) -> ()",
    bias_leaky_relu_definition,
    on_cuda=_bias_leaky_relu_cuda,
    takes=_takes,
)
_in_place: Callable[[Tensor, Tensor, float, Tensor | None], None] = operation(
    "bias_leaky_relu_(Tensor(a!) x, Tensor bias, float slope, Tensor(b!)? also) -> ()",
    bias_leaky_relu_in_place_definition,
    on_cuda=_bias_leaky_relu_in_place_cuda,
    takes=_takes,
)

# --- the functions ----------------------------------------------------------------------------------------------------


def bias_leaky_relu(x: Tensor, bias: Tensor, slope: float, out: Tensor) -> None:
    """LeakyReLU of x + bias into ``out``, which may be a part of another tensor and narrower than x.

    Args:
        x: (B, C, H, W) float32, bfloat16 or float16, any strides.
        bias: (C,) float32.
        slope: of the LeakyReLU for negative values; 1: no activation.
        out: (B, up to C, H, W), any floating point type and strides, sharing no memory with x: takes the first
            channels.

    Computed in float32 and rounded once. Without gradients: for inference.

    Raises:
        ValueError: shapes do not fit together, or the bias is not float32.
    """
    _check(x, bias, out)
    _into(x, bias, slope, out)


def bias_leaky_relu_(x: Tensor, bias: Tensor, slope: float, also: Tensor | None = None) -> Tensor:
    """The same in place in x, which is returned; ``also`` gets its first channels, as ``out`` above does.

    Raises:
        ValueError: shapes do not fit together, or the bias is not float32.
    """
    _check(x, bias, x if also is None else also)
    _in_place(x, bias, slope, also)
    return x


def _check(x: Tensor, bias: Tensor, out: Tensor) -> None:
    if x.ndim != 4 or bias.shape != x.shape[1:2]:
        raise ValueError(f"expected (B, C, H, W) and (C,), got {tuple(x.shape)} and {tuple(bias.shape)}")
    if bias.dtype != torch.float32:
        raise ValueError(f"a bias is float32, got {bias.dtype}")
    batch, channels, *size = out.shape
    if batch != x.shape[0] or channels > x.shape[1] or size != list(x.shape[2:]):
        raise ValueError(f"{tuple(x.shape)} does not go into {tuple(out.shape)}")
