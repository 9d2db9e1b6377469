"""Cost volume: how well each pixel of one feature map matches each displaced pixel of another.

Every use is reduced to one operation, the *pixel correlation*: out[dy, dx, y, x] = scale times the sum over c of
a[c, y, x] b[c, y + dy, x + dx], for displacements that are multiples of a stride. Padding, windows and output strides
follow from it by a pad and an average. The same kernel can apply a LeakyReLU and write the result into a part of a
concatenation.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowreel.kernels import correlation_bands, correlation_products
from flowreel.kernels.correlation_bands import scale_of
from flowreel.kernels.launch import MOST_DEEP, SUFFIXES, blocks_for, launch, parts, sizes, view
from flowreel.kernels.operation import operation, refuse_gradient, set_gradient, widened

if TYPE_CHECKING:
    from collections.abc import Callable

# --- the definition: any device, any parameters -----------------------------------------------------------------------


def correlation_definition(
    a: Tensor,
    b: Tensor,
    pad_size: int = 20,
    kernel_size: int = 1,
    max_displacement: int = 20,
    stride1: int = 1,
    stride2: int = 2,
) -> Tensor:
    """What ``correlation`` means, one displacement and one window position at a time. Slow."""
    dtype, reach, radius = a.dtype, kernel_size // 2, max_displacement // stride2
    margin = max_displacement + reach  # from the edge of the padded map to the centre of the first window
    rows, columns = (-(-(size + 2 * (pad_size - margin)) // stride1) for size in a.shape[2:])
    a, b = (F.pad(widened(x), (pad_size,) * 4) for x in (a, b))

    def at_centres(x: Tensor, dy: int, dx: int) -> Tensor:
        y, x0 = margin + dy, margin + dx
        return x[:, :, y : y + (rows - 1) * stride1 + 1 : stride1, x0 : x0 + (columns - 1) * stride1 + 1 : stride1]

    volume = a.new_zeros(a.shape[0], (2 * radius + 1) ** 2, rows, columns)
    for channel, (dy, dx) in enumerate(_displacements(radius, stride2)):
        for j in range(-reach, reach + 1):
            for i in range(-reach, reach + 1):
                volume[:, channel] += (at_centres(a, j, i) * at_centres(b, j + dy, i + dx)).mean(1)
    return (volume / kernel_size**2).to(dtype)


def pixel_correlation_definition(
    a: Tensor, b: Tensor, radius: int, stride: int, scale: float | None = None, slope: float = 1.0
) -> Tensor:
    """(B, C, H, W) twice -> (B, (2 radius + 1)^2, H, W): the pixel correlation, zero where b ends.

    scale None: 1 / C. slope: of the LeakyReLU for negative values; 1: no activation.
    """
    reach = radius * stride
    mean = correlation_definition(widened(a), widened(b), reach, 1, reach, 1, stride)
    return F.leaky_relu(mean * (a.shape[1] * scale_of(a, scale)), slope).to(a.dtype)


def pixel_correlation_backward_definition(
    grad: Tensor, a: Tensor, b: Tensor, radius: int, stride: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients for ``a`` and ``b`` from that of the volume before its LeakyReLU, one displacement at a time."""
    edge, (height, width) = radius * stride, a.shape[2:]
    grad, wide_a, padded_b = widened(grad) * scale_of(a, scale), widened(a), F.pad(widened(b), (edge,) * 4)
    grad_a, padded_grad_b = torch.zeros_like(wide_a), torch.zeros_like(padded_b)
    for channel, (dy, dx) in enumerate(_displacements(radius, stride)):
        shifted = (..., slice(edge + dy, edge + dy + height), slice(edge + dx, edge + dx + width))
        weight = grad[:, channel, None]
        grad_a += weight * padded_b[shifted]
        padded_grad_b[shifted] += weight * wide_a
    grad_b = padded_grad_b[..., edge : edge + height, edge : edge + width]
    return grad_a.to(a.dtype), grad_b.to(b.dtype, copy=True, memory_format=torch.contiguous_format)


def _displacements(radius: int, stride: int) -> list[tuple[int, int]]:
    """(dy, dx) of each channel in pixels: dy outer, dx inner."""
    steps = range(-radius * stride, radius * stride + 1, stride)
    return [(dy, dx) for dy in steps for dx in steps]


def _into(made_by: Callable[..., Tensor], out: Tensor, *arguments: Any) -> None:
    """Copies the result of ``made_by`` to ``out``."""
    out.copy_(made_by(*arguments))


# --- the CUDA version -------------------------------------------------------------------------------------------------

_TILE, _ROWS, _SHIFTS, _COLUMNS = 64, 3, 7, (21, 9)  # pixels, rows, dy and dx that a block computes, as in the source
_BLOCK, _GROUP = 384, 8  # threads of a block; channels of a gradient that one thread computes: also as there


def _pixel_correlation_cuda(
    a: Tensor, b: Tensor, radius: int, stride: int, scale: float | None = None, slope: float = 1.0
) -> Tensor:
    out = _shape_of_correlation(a, b, radius, stride)
    _pixel_correlation_into_cuda(out, a, b, radius, stride, scale, slope)
    return out


def _shape_of_correlation(a: Tensor, b: Tensor, radius: int, stride: int, *_: object) -> Tensor:
    return a.new_empty(a.shape[0], (2 * radius + 1) ** 2, *a.shape[2:])


def _pixel_correlation_into_cuda(
    out: Tensor, a: Tensor, b: Tensor, radius: int, stride: int, scale: float | None = None, slope: float = 1.0
) -> None:
    if correlation_products.fits(a, radius):
        correlation_products.pixel_correlation_into(out, a, b, radius, stride, scale_of(a, scale), slope)
    else:
        pixel_correlation_on_cuda_cores(out, a, b, radius, stride, scale, slope)


def pixel_correlation_on_cuda_cores(
    out: Tensor, a: Tensor, b: Tensor, radius: int, stride: int, scale: float | None = None, slope: float = 1.0
) -> None:
    batch, channels, height, width = a.shape
    side, phases = 2 * radius + 1, 2 if stride == 2 else 1  # phases in x that one block computes
    columns = min(_COLUMNS, key=lambda n: parts(side, n) * n)  # the least waste
    across = stride // phases * parts(parts(width, stride), _TILE // phases)
    down = stride * parts(parts(height, stride), _ROWS)
    deep = parts(side, columns) * parts(side, _SHIFTS)
    entry = f"correlation_{columns}_{SUFFIXES[a.dtype]}"
    for first in range(0, batch, MOST_DEEP // deep):
        some = slice(first, first + MOST_DEEP // deep)
        count = len(range(batch)[some])
        views = (*view(a[some]), *view(b[some]), *view(out[some]))
        numbers = sizes(count, channels, height, width, radius, stride)
        arguments = (*views, *numbers, np.float32(scale_of(a, scale)), np.float32(slope))
        launch("correlation", entry, (across, down, deep * count), arguments, (_BLOCK,))


def _pixel_correlation_backward_cuda(
    grad: Tensor, a: Tensor, b: Tensor, radius: int, stride: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = a.shape
    grads = a.new_empty(a.shape), b.new_empty(b.shape)
    grid = (*blocks_for(batch * height * width), parts(channels, _GROUP))
    for of_b, (out, other) in enumerate(zip(grads, (b, a), strict=True)):
        numbers = sizes(batch, channels, height, width, radius, stride)
        arguments = (*view(grad), *view(other), *view(out), *numbers, np.float32(scale_of(a, scale)), np.int32(of_b))
        launch("correlation", f"correlation_gradient_{SUFFIXES[a.dtype]}", grid, arguments)
    return grads


# --- registration -----------------------------------------------------------------------------------------------------

_MAPS, _HOW = "Tensor a, Tensor b, int radius, int stride, float? scale=None", "float slope=1."
_pixel_correlation: Callable[..., Tensor] = operation(
    f"correlation({_MAPS}, {_HOW}) -> Tensor",
    pixel_correlation_definition,
    on_cpu=correlation_bands.pixel_correlation,
    on_cuda=_pixel_correlation_cuda,
    shape=_shape_of_correlation,
)
_pixel_correlation_into: Callable[..., None] = operation(
    f"correlation_into(Tensor(a!) out, {_MAPS}, {_HOW}) -> ()",
    partial(_into, pixel_correlation_definition),
    on_cpu=correlation_bands.pixel_correlation_into,
    on_cuda=_pixel_correlation_into_cuda,
)
_gradients: Callable[..., tuple[Tensor, Tensor]] = operation(
    f"correlation_backward(Tensor grad, {_MAPS}) -> (Tensor, Tensor)",
    pixel_correlation_backward_definition,
    on_cpu=correlation_bands.pixel_correlation_backward,
    on_cuda=_pixel_correlation_backward_cuda,
    shape=lambda grad, a, b, *_: (a.new_empty(a.shape), b.new_empty(b.shape)),
)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, float | None, float], output: Tensor) -> None:
    a, b, ctx.radius, ctx.stride, ctx.scale, ctx.slope = inputs
    ctx.save_for_backward(a, b, *([output] if ctx.slope != 1 else []))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, *activated = ctx.saved_tensors
    if activated:  # positive exactly where the value before the activation was
        grad = torch.where(activated[0] > 0, grad, grad * ctx.slope)
    return (*_gradients(grad, a, b, ctx.radius, ctx.stride, ctx.scale), None, None, None, None)


set_gradient("correlation", _backward, _remember)
refuse_gradient("correlation_backward")

# --- the public function ----------------------------------------------------------------------------------------------


def correlation(
    a: Tensor,
    b: Tensor,
    pad_size: int = 20,
    kernel_size: int = 1,
    max_displacement: int = 20,
    stride1: int = 1,
    stride2: int = 2,
    *,
    scale: float | None = None,
    negative_slope: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Cost volume of two feature maps: the mean over channels (and over a window) of a times a displaced b.

    Differentiable in ``a`` and ``b`` (once). The defaults are FlowNetC's: 21 x 21 displacements of up to 20 px in steps
    of 2, at every pixel.

    Args:
        a: (B, C, H, W) float32, float64, bfloat16 or float16, any strides, none of the sizes zero.
        b: the same shape, dtype and device.
        pad_size: width of the border of zeros around both maps, pixels.
        kernel_size: side of the square window that is compared, pixels, odd.
        max_displacement: largest displacement in x and in y, pixels.
        stride1: step from one output pixel to the next, pixels.
        stride2: step from one displacement to the next, pixels.
        scale: factor of the sum over channels. None: 1 / C, which gives the mean. Maps padded with channels of zeros
            need 1 / (number of real channels).
        negative_slope: of a LeakyReLU on the result, not negative; 1: none.
        out: (B, D * D, Ho, Wo) of the inputs' dtype and device to write to, any strides, such as some channels of a
            concatenation; shares no memory with ``a`` or ``b``. There are no gradients then. None: a new tensor.

    Returns:
        ``out``, or (B, D * D, Ho, Wo) in the inputs' dtype, contiguous, with r = max_displacement // stride2,
        D = 2 r + 1, Ho = ceil((H + 2 pad_size - 2 max_displacement - (kernel_size - 1)) / stride1), Wo likewise.
        Channel (j + r) D + (i + r) holds the displacement (i, j) * stride2 in (x, y).

    Sums are formed in float32 (float64 for float64), and scaled and activated before they are rounded. Against the
    definition: 1e-5 absolute for float32 maps of unit variance; for half precision one rounding of the result, on a CPU
    also one of ``a`` times the scale and one before the LeakyReLU.

    Raises:
        TypeError: an input is not a floating point tensor, or the dtypes differ.
        ValueError: shapes or devices differ, a size is zero, a parameter is out of range, or nothing remains to
            compare (Ho or Wo below 1).
        RuntimeError: ``out`` is given where a gradient is asked for.

    Source: Fischer et al., FlowNet: Learning Optical Flow with Convolutional Networks, ICCV 2015, section 3. Windows
    larger than one pixel are centred as in its Caffe layer.
    """
    size = _checked(a, b, pad_size, kernel_size, max_displacement, stride1, stride2)
    if not 0 <= negative_slope < math.inf:
        raise ValueError(f"negative_slope must not be negative, got {negative_slope}")
    if out is not None:
        _check_out(out, a, b, size)
    radius = max_displacement // stride2
    if pad_size == max_displacement and kernel_size == stride1 == 1:
        if out is None:
            return _pixel_correlation(a, b, radius, stride2, scale, negative_slope)
        _pixel_correlation_into(out, a, b, radius, stride2, scale, negative_slope)
        return out
    # Where a and b are padded with zeros, the volume is zero too; and comparing windows averages the volume over them.
    border = pad_size - max_displacement
    volume = F.pad(_pixel_correlation(widened(a), widened(b), radius, stride2, scale), (border,) * 4)
    costs = F.leaky_relu(F.avg_pool2d(volume, kernel_size, stride1), negative_slope).to(a.dtype)
    return costs if out is None else out.copy_(costs)


def _checked(
    a: Tensor, b: Tensor, pad_size: int, kernel_size: int, max_displacement: int, stride1: int, stride2: int
) -> tuple[int, ...]:
    """The result's shape."""
    if not a.is_floating_point() or a.dtype != b.dtype:
        raise TypeError(f"correlation takes two floating point maps of one dtype, got {a.dtype} and {b.dtype}")
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"correlation takes two (B, C, H, W) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() == 0:
        raise ValueError(f"correlation takes maps that hold something, got {tuple(a.shape)}")
    if a.device != b.device:
        raise ValueError(f"correlation takes two maps on one device, got {a.device} and {b.device}")
    if pad_size < 0 or max_displacement < 0:
        raise ValueError(f"pad_size and max_displacement must not be negative, got {pad_size} and {max_displacement}")
    if stride1 < 1 or stride2 < 1:
        raise ValueError(f"stride1 and stride2 must be at least 1, got {stride1} and {stride2}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    needed = 2 * max_displacement + kernel_size - 2 * pad_size
    if min(a.shape[2:]) < needed:
        raise ValueError(
            f"a map of {a.shape[2]}x{a.shape[3]} is too small: pad_size {pad_size}, max_displacement "
            f"{max_displacement} and kernel_size {kernel_size} need at least {needed} pixels each way; raise pad_size"
        )
    rows, columns = (-(-(size - needed + 1) // stride1) for size in a.shape[2:])
    return a.shape[0], (2 * (max_displacement // stride2) + 1) ** 2, rows, columns


def _check_out(out: Tensor, a: Tensor, b: Tensor, size: tuple[int, ...]) -> None:
    if out.dtype != a.dtype:
        raise TypeError(f"out is {a.dtype} as the maps are, got {out.dtype}")
    if out.shape != size or out.device != a.device:
        raise ValueError(f"out is {size} on {a.device}, got {tuple(out.shape)} on {out.device}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, a, b)):
        raise RuntimeError("correlation with out= has no gradients: leave it out, or use torch.no_grad()")
