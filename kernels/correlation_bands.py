"""The cost volume on a CPU: bands of matrix products.

Only pixels whose coordinates agree modulo the stride are compared, so the maps split into stride x stride *phases*, in
which neighbouring displacements are neighbouring pixels. `tile` pixels in a row of a, times all rows of b within the
radius, each `pitch` = tile + 2 radius wide (a *window*), make one matrix product (tile, C) x (C, rows * pitch). The
costs are the diagonals column - pixel = 0 .. 2 radius of each row, a *band* that a strided view selects. The rest is
discarded: a narrower tile wastes less, but below about 16 pixels the products themselves become slow. Rows of b beyond
the map are left out, columns beyond it are zeros in the windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

_FAST_BFLOAT16 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # elsewhere bfloat16 products are scalar loops


@dataclass(frozen=True)
class _Layout:
    """How the maps are divided into tiles and windows, and the views and copies that do so. D = 2 radius + 1."""

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

    def lefts(self, a: Tensor, scale: float) -> Tensor:
        """scale a, (B, C, H, W) -> (phase row, row, products, tile, C)."""
        a = F.pad(a, self.fill()) if any(self.fill()) else a
        a = a.reshape(self.batch, self.channels, self.rows, self.stride, self.tiles, self.tile, self.stride)
        a = a.permute(3, 2, 0, 6, 4, 5, 1)  # (phase row, row, B, phase column, tile, pixel, C)
        scaled = torch.mul(a, scale, out=a.new_empty(a.shape))
        return scaled.view(self.stride, self.rows, self.products, self.tile, self.channels)

    def from_lefts(self, lefts: Tensor, scale: float) -> Tensor:
        """The transpose of ``lefts``: gradients back in place, scaled, (B, C, H, W)."""
        s = self.stride
        x = lefts.view(s, self.rows, self.batch, s, self.tiles, self.tile, self.channels).permute(2, 6, 1, 0, 4, 5, 3)
        a = torch.mul(x, scale, out=x.new_empty(x.shape))
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
        """(B, D * D, H, full width), any strides -> view (H, B, phase column, tile, pixel, dy, dx), as ``band`` is."""
        over_batch, over_channels, down, right = x.stride()
        shape = (self.height, self.batch, self.stride, self.tiles, self.tile, self.side, self.side)
        across = (right, self.tile * self.stride * right, self.stride * right)
        return x.as_strided(shape, (down, over_batch, *across, self.side * over_channels, over_channels))

    def steps(self) -> Iterator[tuple[int, int, int, slice, slice]]:
        """For each y: its phase, its row there, the dy that stay inside the map, and their columns in ``windows``."""
        for y in range(self.height):
            row, phase = divmod(y, self.stride)
            first, last = max(0, row - self.radius), min(self.rows, row + self.radius + 1)
            inside = slice(first - row + self.radius, last - row + self.radius)
            yield y, phase, row, inside, slice(first * self.pitch, last * self.pitch)


def scale_of(a: Tensor, scale: float | None) -> float:
    """The factor of the sum over channels. None: 1 / C, which gives the mean."""
    return 1 / a.shape[1] if scale is None else scale


def pixel_correlation(
    a: Tensor, b: Tensor, radius: int, stride: int, scale: float | None = None, slope: float = 1.0
) -> Tensor:
    """(B, C, H, W) twice -> (B, (2 radius + 1)^2, H, W), as ``pixel_correlation_definition``."""
    out = a.new_empty(a.shape[0], (2 * radius + 1) ** 2, *a.shape[2:])
    pixel_correlation_into(out, a, b, radius, stride, scale, slope)
    return out


def pixel_correlation_into(
    out: Tensor, a: Tensor, b: Tensor, radius: int, stride: int, scale: float | None = None, slope: float = 1.0
) -> None:
    """The same, written to ``out``, which may have any strides."""
    if a.dtype == torch.float16 or (a.dtype == torch.bfloat16 and not _FAST_BFLOAT16):
        out.copy_(pixel_correlation(a.float(), b.float(), radius, stride, scale, slope))
        return
    layout = _Layout.of(a, radius, stride)
    if layout.full_width > layout.width:
        whole = a.new_empty(*out.shape[:3], layout.full_width)
        _by_rows(layout, layout.volume(whole), a, b, scale_of(a, scale), slope)
        out.copy_(whole[..., : layout.width])
    else:
        _by_rows(layout, layout.volume(out), a, b, scale_of(a, scale), slope)


def _by_rows(layout: _Layout, volume: Tensor, a: Tensor, b: Tensor, scale: float, slope: float) -> None:
    lefts, windows = layout.lefts(a, scale), layout.windows(b)
    channels_last = volume.stride(6) == 1
    scratch = a.new_empty(layout.products * layout.tile * layout.side * layout.pitch)
    for y, phase, row, inside, columns in layout.steps():
        shape = (layout.products, layout.tile, columns.stop - columns.start)
        product = scratch[: math.prod(shape)].view(shape)
        torch.bmm(lefts[phase, row], windows[phase, :, :, columns], out=product)
        if slope != 1:
            F.leaky_relu_(product, slope)
        source, target = layout.band(product), volume[y, ..., inside, :]
        volume[y, ..., : inside.start, :] = 0
        volume[y, ..., inside.stop :, :] = 0
        if channels_last:
            target.copy_(source)
            continue
        for column in range(layout.stride):  # one at a time, so that the innermost loop runs over pixels
            target[:, column].copy_(source[:, column])


def pixel_correlation_backward(
    grad: Tensor, a: Tensor, b: Tensor, radius: int, stride: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients for both maps: the volume's gradient becomes a banded matrix, which is multiplied by b and by a."""
    if a.element_size() < 4:
        grads = pixel_correlation_backward(grad.float(), a.float(), b.float(), radius, stride, scale)
        return grads[0].to(a.dtype), grads[1].to(b.dtype)
    layout, scale = _Layout.of(a, radius, stride), scale_of(a, scale)
    lefts, windows = layout.lefts(a, scale), layout.windows(b)
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
    return layout.from_lefts(grad_lefts, scale), layout.from_windows(grad_windows)
