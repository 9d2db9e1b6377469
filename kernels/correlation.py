"""Cost volume: how well each pixel of one feature map matches each displaced pixel of another.

Every use is reduced to one operation, the *pixel correlation*: out[dy, dx, y, x] = mean over c of a[c, y, x] times
b[c, y + dy, x + dx], for displacements that are multiples of a stride. Padding, windows and output strides follow from
it by a pad and an average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowreel.kernels import correlation_bands

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
    a, b = (F.pad(_widened(x), (pad_size,) * 4) for x in (a, b))

    def at_centres(x: Tensor, dy: int, dx: int) -> Tensor:
        y, x0 = margin + dy, margin + dx
        return x[:, :, y : y + (rows - 1) * stride1 + 1 : stride1, x0 : x0 + (columns - 1) * stride1 + 1 : stride1]

    volume = a.new_zeros(a.shape[0], (2 * radius + 1) ** 2, rows, columns)
    for channel, (dy, dx) in enumerate(_displacements(radius, stride2)):
        for j in range(-reach, reach + 1):
            for i in range(-reach, reach + 1):
                volume[:, channel] += (at_centres(a, j, i) * at_centres(b, j + dy, i + dx)).mean(1)
    return (volume / kernel_size**2).to(dtype)


def pixel_correlation_definition(a: Tensor, b: Tensor, radius: int, stride: int) -> Tensor:
    """(B, C, H, W) twice -> (B, (2 radius + 1)^2, H, W): the pixel correlation, zero where b ends."""
    return correlation_definition(a, b, radius * stride, 1, radius * stride, 1, stride)


def pixel_correlation_backward_definition(
    grad: Tensor, a: Tensor, b: Tensor, radius: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Gradients for ``a`` and ``b``, one displacement at a time."""
    edge, (height, width) = radius * stride, a.shape[2:]
    grad, wide_a, padded_b = _widened(grad) / a.shape[1], _widened(a), F.pad(_widened(b), (edge,) * 4)
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


def _widened(x: Tensor) -> Tensor:
    """Half types as float32, in which sums are formed."""
    return x.float() if x.element_size() < 4 else x


# --- registration -----------------------------------------------------------------------------------------------------

_torch_library: Any = torch.library  # its functions carry no types
_LIBRARY = _torch_library.Library("flowreel", "FRAGMENT")
_LIBRARY.define("correlation(Tensor a, Tensor b, int radius, int stride) -> Tensor")
_LIBRARY.define("correlation_backward(Tensor grad, Tensor a, Tensor b, int radius, int stride) -> (Tensor, Tensor)")
_LIBRARY.impl("correlation", pixel_correlation_definition, "CompositeExplicitAutograd")  # any device without its own
_LIBRARY.impl("correlation_backward", pixel_correlation_backward_definition, "CompositeExplicitAutograd")
_LIBRARY.impl("correlation", correlation_bands.pixel_correlation, "CPU")
_LIBRARY.impl("correlation_backward", correlation_bands.pixel_correlation_backward, "CPU")


def _shape_of_correlation(a: Tensor, b: Tensor, radius: int, stride: int) -> Tensor:
    return a.new_empty(a.shape[0], (2 * radius + 1) ** 2, *a.shape[2:])


def _shapes_of_backward(grad: Tensor, a: Tensor, b: Tensor, radius: int, stride: int) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


_torch_library.register_fake("flowreel::correlation", _shape_of_correlation, lib=_LIBRARY)

_torch_library.register_fake("flowreel::correlation_backward", _shapes_of_backward, lib=_LIBRARY)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
    a, b, ctx.radius, ctx.stride = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grad_a, grad_b = torch.ops.flowreel.correlation_backward(grad, *ctx.saved_tensors, ctx.radius, ctx.stride)
    return grad_a, grad_b, None, None


_torch_library.register_autograd("flowreel::correlation", _backward, setup_context=_remember, lib=_LIBRARY)


# --- the public function ----------------------------------------------------------------------------------------------


def correlation(
    a: Tensor,
    b: Tensor,
    pad_size: int = 20,
    kernel_size: int = 1,
    max_displacement: int = 20,
    stride1: int = 1,
    stride2: int = 2,
) -> Tensor:
    """Cost volume of two feature maps: the mean over channels (and over a window) of a times a displaced b.

    Differentiable in ``a`` and ``b`` (once). The defaults are FlowNetC's: 21 x 21 displacements, up to 20 px, every
    second one, at every pixel.

    Args:
        a: (B, C, H, W) float32, float64, bfloat16 or float16, any strides, none of the sizes zero.
        b: the same shape, dtype and device.
        pad_size: zeros put around both maps, pixels.
        kernel_size: side of the square window that is compared, pixels, odd.
        max_displacement: largest displacement in x and in y, pixels.
        stride1: step from one output pixel to the next, pixels.
        stride2: step from one displacement to the next, pixels.

    Returns:
        (B, D * D, Ho, Wo) in the inputs' dtype, with r = max_displacement // stride2, D = 2 r + 1,
        Ho = ceil((H + 2 pad_size - 2 max_displacement - (kernel_size - 1)) / stride1), Wo likewise.
        Channel (j + r) D + (i + r) holds the displacement (i, j) * stride2 in (x, y). Contiguous.

    Sums are formed in float32 (float64 for float64). Against the definition: 1e-5 absolute for float32 maps of unit
    variance; for half types one rounding of 1/C and one of the result.

    Raises:
        TypeError: an input is not a floating point tensor, or the two dtypes differ.
        ValueError: shapes or devices differ, a size is zero, a parameter is out of range, or nothing remains to
            compare (Ho or Wo below 1).

    Source: Fischer et al., FlowNet: Learning Optical Flow with Convolutional Networks, ICCV 2015, section 3. Windows
    larger than one pixel are centred as in its Caffe layer.
    """
    _check(a, b, pad_size, kernel_size, max_displacement, stride1, stride2)
    plain = pad_size == max_displacement and kernel_size == stride1 == 1
    radius = max_displacement // stride2
    if plain:
        return _pixel_correlation(a, b, radius, stride2)
    # With p zeros around a and b, the volume itself is zero there; and the window's sum is an average of the volume.
    border = pad_size - max_displacement
    volume = F.pad(_pixel_correlation(_widened(a), _widened(b), radius, stride2), (border,) * 4)
    return F.avg_pool2d(volume, kernel_size, stride1).to(a.dtype)


_pixel_correlation: Callable[[Tensor, Tensor, int, int], Tensor] = torch.ops.flowreel.correlation.default


def _check(
    a: Tensor, b: Tensor, pad_size: int, kernel_size: int, max_displacement: int, stride1: int, stride2: int
) -> None:
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
