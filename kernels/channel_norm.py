"""Length of each pixel's vector of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowreel.kernels.launch import SUFFIXES, blocks_for, launch, sizes, view
from flowreel.kernels.operation import operation, refuse_gradient, set_gradient, widened

if TYPE_CHECKING:
    from collections.abc import Callable

# --- the definition: any device, and fast enough on a CPU -------------------------------------------------------------


def channel_norm_definition(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W): what ``channel_norm`` means."""
    wide = widened(x)
    return (wide * wide).sum(1, keepdim=True).sqrt_().to(x.dtype)  # linalg.vector_norm(dim=1) is far slower


def channel_norm_backward_definition(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Gradient for ``x``, from the gradient (B, 1, H, W) of its norm."""
    wide, length = (widened(y) for y in (x, norm))
    gradient = wide * (widened(grad) / (length + 1e-9))  # the term that keeps a zero vector's gradient zero
    return gradient.to(x.dtype, memory_format=torch.contiguous_format)


# --- the CUDA version -------------------------------------------------------------------------------------------------


def _channel_norm_cuda(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    out = x.new_empty(batch, 1, height, width)
    arguments = (*view(x), *view(out), *sizes(batch, channels, height, width))
    launch("channel_norm", f"channel_norm_{SUFFIXES[x.dtype]}", blocks_for(out.numel()), arguments)
    return out


def _channel_norm_backward_cuda(grad: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    out = x.new_empty(x.shape)
    arguments = (*view(grad), *view(x), *view(norm), *view(out), *sizes(batch, channels, height, width))
    launch("channel_norm", f"channel_norm_backward_{SUFFIXES[x.dtype]}", blocks_for(norm.numel()), arguments)
    return out


# --- registration -----------------------------------------------------------------------------------------------------

_norm: Callable[[Tensor], Tensor] = operation(
    "channel_norm(Tensor x) -> Tensor",
    channel_norm_definition,
    on_cuda=_channel_norm_cuda,
    shape=lambda x: x.new_empty(x.shape[0], 1, *x.shape[2:]),
)
_gradient: Callable[[Tensor, Tensor, Tensor], Tensor] = operation(
    "channel_norm_backward(Tensor grad, Tensor x, Tensor norm) -> Tensor",
    channel_norm_backward_definition,
    on_cuda=_channel_norm_backward_cuda,
    shape=lambda grad, x, norm: x.new_empty(x.shape),
)


def _remember(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _gradient(grad, *ctx.saved_tensors)


set_gradient("channel_norm", _backward, _remember)
refuse_gradient("channel_norm_backward")

# --- the public function ----------------------------------------------------------------------------------------------


def channel_norm(x: Tensor) -> Tensor:
    """Euclidean length over the channels, e.g. the speed of a flow or the size of a brightness difference.

    Args:
        x: (B, C, H, W) float32, float64, bfloat16 or float16, any unit and strides, none of the sizes zero.

    Returns:
        (B, 1, H, W) in x's unit and dtype, contiguous. Half-precision types are squared and summed in float32, so that
        only a length beyond their own range overflows; float32 itself overflows from about 1.8e19.

    Differentiable (once); the gradient x / (length + 1e-9) is zero where x is. Against the definition: equal on a CPU;
    on a GPU 1e-6 relative for float32, one rounding of the result for half precision.

    Raises:
        TypeError: x is not a floating point tensor.
        ValueError: x is not (B, C, H, W), or a size is zero.

    Source: Ilg et al., FlowNet 2.0: Evolution of Optical Flow Estimation with Deep Networks, CVPR 2017, section 4.
    """
    if not x.is_floating_point():
        raise TypeError(f"channel_norm takes a floating point tensor, got {x.dtype}")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"channel_norm takes (B, C, H, W) that holds something, got {tuple(x.shape)}")
    return _norm(x)
