"""Cost volume: how well each pixel of one feature map matches each displaced pixel of another.

Every use is reduced to one operation, the *pixel correlation*: out[dy, dx, y, x] = mean over c of a[c, y, x] times
b[c, y + dy, x + dx], for displacements that are multiples of a stride. Padding, windows and output strides follow from
it by a pad and an average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


# --- the fast CPU version ---------------------------------------------------------------------------------------------
#
# Bands of matrix products. Pixels whose coordinates agree modulo the stride meet only each other, so the maps fall
# apart into stride x stride *phases*, in which neighbouring displacements are neighbouring pixels. `tile` pixels in a
# row of a, times all rows of b within the radius, each `pitch` = tile + 2 radius wide (a *window*), is one matrix
# product (tile, C) x (C, rows * pitch). Wanted of it are the diagonals column - pixel = 0 .. 2 radius of each row,
# which strides can name. The rest is thrown away, the less the narrower the tile; below about 16 the products
# themselves become slow. Rows of b beyond the map are left out, columns beyond it are zeros in the windows.

_FAST_BFLOAT16 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # elsewhere its products are scalar loops


@dataclass(frozen=True)
class _Layout:
    """How the maps are cut up, and the views and copies that cut them. D = 2 radius + 1."""

    batch: int
    channels: int
    height: int
    width: int
    radius: int
    stride: int
    rows: int  # of one phase
    tile: int  # pixels of a in one product
    tiles: int  # products that cover one row of one phase

    @classmethod
    def of(cls, a: Tensor, radius: int, stride: int) -> _Layout:
        batch, channels, height, width = a.shape
        columns = -(-width // stride)
        whole = [size for size in range(12, 25) if columns % size == 0]
        tile = columns if columns <= 24 else min(whole, key=lambda size: abs(size - 16), default=16)
        return cls(batch, channels, height, width, radius, stride, -(-height // stride), tile, -(-columns // tile))

    @property
    def side(self) -> int:
        return 2 * self.radius + 1

    @property
    def pitch(self) -> int:
        return self.tile + 2 * self.radius

    @property
    def products(self) -> int:
        return self.batch * self.stride * self.tiles

    @property
    def full_width(self) -> int:
        return self.tiles * self.tile * self.stride

    def fill(self) -> tuple[int, int, int, int]:
        """Padding that completes the last row of phases and the last tile."""
        return (0, self.full_width - self.width, 0, self.rows * self.stride - self.height)

    def lefts(self, a: Tensor) -> Tensor:
        """a / C, (B, C, H, W) -> (phase row, row, products, tile, C)."""
        a = F.pad(a, self.fill()) if any(self.fill()) else a
        a = a.reshape(self.batch, self.channels, self.rows, self.stride, self.tiles, self.tile, self.stride)
        a = a.permute(3, 2, 0, 6, 4, 5, 1)  # (phase row, row, B, phase column, tile, pixel, C)
        scaled = torch.mul(a, 1 / self.channels, out=a.new_empty(a.shape))
        return scaled.view(self.stride, self.rows, self.products, self.tile, self.channels)

    def from_lefts(self, lefts: Tensor) -> Tensor:
        """The transpose of ``lefts``: gradients back in place, divided by C, (B, C, H, W)."""
        s = self.stride
        x = lefts.view(s, self.rows, self.batch, s, self.tiles, self.tile, self.channels).permute(2, 6, 1, 0, 4, 5, 3)
        a = torch.mul(x, 1 / self.channels, out=x.new_empty(x.shape))
        a = a.view(self.batch, self.channels, self.rows * s, self.full_width)
        return a[..., : self.height, : self.width].contiguous()

    def windows(self, b: Tensor) -> Tensor:
        """(B, C, H, W) -> (phase row, products, C, rows * pitch)."""
        edge, (_, right, _, bottom) = self.radius * self.stride, self.fill()
        x = F.pad(b, (edge, edge + right, 0, bottom))
        x = x.reshape(self.batch, self.channels, self.rows, self.stride, -1, self.stride)
        x = x.unfold(4, self.pitch, self.tile)  # (B, C, row, phase row, tile, phase column, pitch)
        x = x.permute(3, 0, 5, 4, 1, 2, 6)
        return x.reshape(self.stride, self.products, self.channels, self.rows * self.pitch)

    def from_windows(self, windows: Tensor) -> Tensor:
        """The transpose of ``windows``: gradients summed where windows overlap, (B, C, H, W)."""
        s, width = self.stride, self.tiles * self.tile
        x = windows.view(s, self.batch, s, self.tiles, self.channels, self.rows, self.pitch)
        x = x.permute(3, 1, 4, 5, 0, 6, 2)  # (tile, B, C, row, phase row, pitch, phase column)
        total = x.new_zeros(self.batch, self.channels, self.rows, s, width + 2 * self.radius, s)
        for tile in range(self.tiles):
            total[..., tile * self.tile : tile * self.tile + self.pitch, :] += x[tile]
        b = total[..., self.radius : self.radius + width, :]
        b = b.reshape(self.batch, self.channels, self.rows * s, self.full_width)
        return b[..., : self.height, : self.width].contiguous()

    def band(self, product: Tensor) -> Tensor:
        """(products, tile, n * pitch) -> view (B, phase column, tile, pixel, n of the dy, dx): the wanted diagonals."""
        row = product.shape[2]
        shape = (self.batch, self.stride, self.tiles, self.tile, row // self.pitch, self.side)
        product_size = self.tile * row
        places = (self.stride * self.tiles * product_size, self.tiles * product_size, product_size)
        return product.as_strided(shape, (*places, row + 1, self.pitch, 1))

    def volume(self, x: Tensor) -> Tensor:
        """(B, D * D, H, full width) -> view (H, B, phase column, tile, pixel, dy, dx), to meet ``band``."""
        shape = (self.batch, self.side, self.side, self.height, self.tiles, self.tile, self.stride)
        return x.view(shape).permute(3, 0, 6, 4, 5, 1, 2)

    def steps(self) -> Iterator[tuple[int, int, int, slice, slice]]:
        """For each y: its phase, its row there, the dy that stay inside the map, and their columns in ``windows``."""
        for y in range(self.height):
            row, phase = divmod(y, self.stride)
            first, last = max(0, row - self.radius), min(self.rows, row + self.radius + 1)
            inside = slice(first - row + self.radius, last - row + self.radius)
            yield y, phase, row, inside, slice(first * self.pitch, last * self.pitch)


def _pixel_correlation_cpu(a: Tensor, b: Tensor, radius: int, stride: int) -> Tensor:
    if a.dtype == torch.float16 or (a.dtype == torch.bfloat16 and not _FAST_BFLOAT16):
        return _pixel_correlation_cpu(a.float(), b.float(), radius, stride).to(a.dtype)
    layout = _Layout.of(a, radius, stride)
    lefts, windows = layout.lefts(a), layout.windows(b)
    out = a.new_zeros(layout.batch, layout.side**2, layout.height, layout.full_width)
    volume = layout.volume(out)
    scratch = a.new_empty(layout.products * layout.tile * layout.side * layout.pitch)
    for y, phase, row, inside, columns in layout.steps():
        shape = (layout.products, layout.tile, columns.stop - columns.start)
        product = scratch[: math.prod(shape)].view(shape)
        torch.bmm(lefts[phase, row], windows[phase, :, :, columns], out=product)
        source, target = layout.band(product), volume[y, ..., inside, :]
        for column in range(stride):  # apart, so that the innermost run is over pixels
            target[:, column].copy_(source[:, column])
    return out if layout.full_width == layout.width else out[..., : layout.width].contiguous()


def _pixel_correlation_backward_cpu(
    grad: Tensor, a: Tensor, b: Tensor, radius: int, stride: int
) -> tuple[Tensor, Tensor]:
    """The same bands the other way: the volume's gradient becomes a banded matrix, multiplied with b and with a."""
    if a.element_size() < 4:
        grads = _pixel_correlation_backward_cpu(grad.float(), a.float(), b.float(), radius, stride)
        return grads[0].to(a.dtype), grads[1].to(b.dtype)
    layout = _Layout.of(a, radius, stride)
    lefts, windows = layout.lefts(a), layout.windows(b)
    missing = layout.full_width - layout.width
    volume = layout.volume((F.pad(grad, (0, missing)) if missing else grad).contiguous())
    grad_lefts, grad_windows = torch.empty_like(lefts), torch.zeros_like(windows)
    matrix = a.new_empty(0, 0, 0)
    for y, phase, row, inside, columns in layout.steps():
        shape = (layout.products, layout.tile, columns.stop - columns.start)
        if matrix.shape != shape:
            matrix = a.new_zeros(shape)  # outside the band it stays zero from row to row
        target, source = layout.band(matrix), volume[y, ..., inside, :]
        for column in range(stride):
            target[:, column].copy_(source[:, column])
        torch.bmm(matrix, windows[phase, :, :, columns].transpose(1, 2), out=grad_lefts[phase, row])
        grad_windows[phase, :, :, columns].baddbmm_(lefts[phase, row].transpose(1, 2), matrix)
    return layout.from_lefts(grad_lefts), layout.from_windows(grad_windows)


# --- registration -----------------------------------------------------------------------------------------------------

_torch_library: Any = torch.library  # its functions carry no types
_LIBRARY = _torch_library.Library("flowreel", "FRAGMENT")
_LIBRARY.define("correlation(Tensor a, Tensor b, int radius, int stride) -> Tensor")
_LIBRARY.define("correlation_backward(Tensor grad, Tensor a, Tensor b, int radius, int stride) -> (Tensor, Tensor)")
_LIBRARY.impl("correlation", pixel_correlation_definition, "CompositeExplicitAutograd")  # any device without its own
_LIBRARY.impl("correlation_backward", pixel_correlation_backward_definition, "CompositeExplicitAutograd")
_LIBRARY.impl("correlation", _pixel_correlation_cpu, "CPU")
_LIBRARY.impl("correlation_backward", _pixel_correlation_backward_cpu, "CPU")


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
