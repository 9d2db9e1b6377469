"""Flow heads on half-precision maps: a convolution to two float32 channels, summed in float32.

Libraries return the sums in the maps' dtype, and half precision costs 0.04 px there at 40 px of motion; in float32 they
use no tensor cores and need a copy of the maps first. With two outputs a convolution is bound by reading its maps: the
kernel does little else.

A head that follows a 3x3 layer without an activation can be merged with it into one 5x5 layer, except at the borders:
beyond the image the head sees zeros, where the 5x5 layer sees what the first layer would give there. That difference
depends on the outermost rows and columns of the input alone; ``Borders`` holds its weights, and ``take_off_borders_``
subtracts it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowreel.kernels.launch import MOST_DEEP, SUFFIXES, launch, multiprocessors, on_tensor_cores, parts, sizes, view
from flowreel.kernels.operation import operation


class Borders(NamedTuple):
    """Weights of what a merged 5x5 layer adds for places beyond the image, by side. All float32.

    Sides: above, below, left, right. A corner lies beyond two sides and is subtracted with each of them, once too
    often, so it is added back. Corners: above left, above right, below left, below right.
    """

    along: Tensor  # (4, 5, N, C): side, filter place along it, output, input channel
    along_constants: Tensor  # (4, N)
    corners: Tensor  # (4, N, C)
    corner_constants: Tensor  # (4, N)


# --- weights as tensor cores take them --------------------------------------------------------------------------------

CHUNK = 32  # channels of two products: 8 for each of 4 lanes
_OUTPUTS, _TILE = 2, 8  # output channels; columns of a product
_FIRST = 4  # kx that share a tile: 4 x 2 columns
_TILES = {3: 3, 5: 7}  # per filter: one for each ky with the first kx; for 5x5 two more with all ky of the last kx
_KERNELS = {tiles: kernel for kernel, tiles in _TILES.items()}


def pack_flow_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(2, C, k, k), k 3 or 5, to (chunks, tiles, 8 columns, 4, 8 channels) of ``dtype``, padded with zeros.

    Raises:
        ValueError: the weight has another shape.
    """
    outputs, channels, kernel = weight.shape[:3]
    if outputs != _OUTPUTS or kernel not in _TILES or weight.shape[3] != kernel:
        raise ValueError(f"a flow head is (2, C, 3, 3) or (2, C, 5, 5), not {tuple(weight.shape)}")
    chunks = parts(channels, CHUNK)
    columns = weight.new_zeros(_TILES[kernel], _TILE, chunks * CHUNK)
    by_place = weight.permute(2, 3, 0, 1)  # (ky, kx, output, channel)
    first = by_place[:, :_FIRST].flatten(1, 2)
    columns[:kernel, : first.shape[1], :channels] = first
    if kernel > _FIRST:
        last = by_place[:, _FIRST].flatten(0, 1)
        columns[kernel:].flatten(0, 1)[: len(last), :channels] = last
    return columns.view(-1, _TILE, chunks, 4, 8).permute(2, 0, 1, 3, 4).to(dtype).contiguous()


def unpack_flow_head(packed: Tensor, channels: int) -> Tensor:
    """The inverse: the weights (2, C, k, k) as they were rounded."""
    kernel = _KERNELS[packed.shape[1]]
    columns = packed.permute(1, 2, 0, 3, 4).flatten(2)[..., :channels]  # (tile, column, channel)
    kx = min(kernel, _FIRST)
    by_place = columns[:kernel, : kx * _OUTPUTS].reshape(kernel, kx, _OUTPUTS, channels)
    if kernel > _FIRST:
        last = columns[kernel:].flatten(0, 1)[: kernel * _OUTPUTS].reshape(kernel, 1, _OUTPUTS, channels)
        by_place = torch.cat((by_place, last), 1)
    return by_place.permute(2, 3, 0, 1)


# --- the definitions: any device --------------------------------------------------------------------------------------


def flow_head_definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W), packed weights and (2,) to (B, 2, H, W) float32.

    Half precision is computed in float32: if the process allows TF32, its 10 bits are enough for that. Other types are
    computed in float64.
    """
    dtype = torch.float32 if x.element_size() < 4 else torch.float64
    wide = unpack_flow_head(weight, x.shape[1]).to(dtype)
    return F.conv2d(x.to(dtype), wide, bias.to(dtype), padding=wide.shape[2] // 2).float().contiguous()


def take_off_borders_definition(
    out: Tensor, x: Tensor, along: Tensor, along_constants: Tensor, corners: Tensor, corner_constants: Tensor
) -> None:
    """Corrects ``out`` (B, N, H, W), which a 5x5 layer made of ``x`` (B, C, H, W). In float64: no TF32 there."""
    ends = (2, 0), (2, -1), (3, 0), (3, -1)  # axis, place
    for side, (axis, place) in enumerate(ends):
        edge, filters = x.select(axis, place).double(), along[side].permute(1, 2, 0).double()
        out.select(axis, place).sub_(F.conv1d(edge, filters, along_constants[side].double(), padding=2))
    for corner, weight in enumerate(corners):
        y, column = -(corner // 2), -(corner % 2)
        out[:, :, y, column] += x[:, :, y, column].double() @ weight.T.double() + corner_constants[corner]


# --- the CUDA version -------------------------------------------------------------------------------------------------

_WARPS = 4  # per block, as in flow_head.cu
_COLUMNS = 32  # that a warp reads
_BORDER_WARPS, _RUN = 8, 4  # at the borders: warps per block, pixels per lane
_AT_ONCE = {3: 4, 5: 3}  # by filter size: blocks that a multiprocessor runs at once
_ENOUGH = 2.5  # blocks per multiprocessor: with fewer, memory latency shows; estimated, not measured


def _flow_head_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    kernel = _KERNELS[weight.shape[1]]
    out = x.new_empty(batch, _OUTPUTS, height, width, dtype=torch.float32)
    splits, rows, grid = _shares(batch, channels, height, width, kernel, multiprocessors(x.device))
    arguments = (*view(x), weight.contiguous(), bias.contiguous(), out)
    arguments += sizes(channels, height, width, splits, rows)
    launch("flow_head", f"flow_head_{kernel}_{SUFFIXES[x.dtype]}", grid, arguments, (32 * _WARPS,))
    return out


def _take_off_borders_cuda(
    out: Tensor, x: Tensor, along: Tensor, along_constants: Tensor, corners: Tensor, corner_constants: Tensor
) -> None:
    borders = along, along_constants, corners, corner_constants
    batch, channels, height, width = x.shape
    splits = next((n for n in (1, 2, 4) if n * CHUNK >= channels), _BORDER_WARPS)  # by channels alone, as in _shares
    rows, columns = min(height, 2), min(width, 2)
    runs = rows * parts(width, _RUN) + columns * parts(height - rows, _RUN)
    arguments = (*view(x), *(b.contiguous() for b in borders), out, *sizes(channels, height, width, splits))
    grid, block = (parts(runs, 4 * _BORDER_WARPS // splits), batch), (32 * _BORDER_WARPS,)
    launch("flow_head", f"flow_head_borders_{SUFFIXES[x.dtype]}", grid, arguments, block)


def _takes_borders(out: Tensor, x: Tensor, *borders: Tensor) -> bool:
    wide = all(y.dtype == torch.float32 for y in (out, *borders))
    return _fits(x) and wide and out.is_contiguous() and out.shape[1] == _OUTPUTS


def _fits(x: Tensor) -> bool:
    """Whether the kernels run on the map's device and can read its pixels 8 channels at a time."""
    steps = (step for axis, step in enumerate(x.stride()) if axis != 1 and x.shape[axis] > 1)
    aligned = x.data_ptr() % 16 == 0 and x.shape[1] % 8 == 0 and all(step % 8 == 0 for step in steps)
    known = x.dtype in (torch.float16, torch.bfloat16) and x.shape[0] <= MOST_DEEP
    return known and aligned and x.stride(1) == 1 and on_tensor_cores(x.device)


@lru_cache
def _shares(
    batch: int, channels: int, height: int, width: int, kernel: int, processors: int
) -> tuple[int, int, tuple[int, int, int]]:
    """How many warps share the channels, how many rows a block computes, and the grid.

    The first number decides the order of summation, so it depends on the channels alone: then the batch does not change
    the result's last bits.
    """
    chunks = parts(channels, CHUNK)
    splits = 1 if chunks <= 3 else 2 if chunks <= 6 else 4
    strips = parts(width, _COLUMNS - kernel + 1)
    across = parts(strips, _WARPS // splits)

    def time(rows: int) -> float:
        """Of the busiest multiprocessor, in units of one block's row."""
        blocks = parts(batch * across * parts(height, rows), processors)
        rest = blocks % _AT_ONCE[kernel]
        return (blocks - rest + (max(rest, _ENOUGH) if rest else 0)) * (rows + kernel - 1)

    rows = min(range(height, 0, -1), key=time)  # among equals the most rows: the fewest are read twice
    return splits, rows, (across, parts(height, rows), batch)


# --- registration -----------------------------------------------------------------------------------------------------

_head: Callable[[Tensor, Tensor, Tensor], Tensor] = operation(
    "flow_head(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    flow_head_definition,
    on_cuda=_flow_head_cuda,
    takes=lambda x, weight, bias: _fits(x),
    shape=lambda x, weight, bias: x.new_empty(x.shape[0], _OUTPUTS, *x.shape[2:], dtype=torch.float32),
)
_take_off: Callable[..., None] = operation(
    "take_off_borders_(Tensor(a!) out, Tensor x, Tensor along, Tensor along_constants, Tensor corners, "
    "Tensor corner_constants) -> ()",
    take_off_borders_definition,
    on_cuda=_take_off_borders_cuda,
    takes=_takes_borders,
)

# --- the functions ----------------------------------------------------------------------------------------------------


def flow_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution to the two channels of a flow, stride 1, padded with zeros to keep the size.

    Args:
        x: (B, C, H, W). Our kernel takes float16 and bfloat16 with C a multiple of 8 and each pixel's channels side by
            side, aligned to 16 bytes: channels last, or the first channels of such a map. The definition takes others.
        weight: from ``pack_flow_head``, of the same dtype as x.
        bias: (2,) float32.

    Returns:
        (B, 2, H, W) float32, contiguous. Sums are formed in float32; their order depends on C alone.

    Without gradients: for inference.

    Raises:
        ValueError: shapes or types do not fit together.
    """
    fits = x.ndim == 4 and weight.ndim == 5 and weight.shape[1] in _KERNELS
    packed = fits and weight.shape == (parts(x.shape[1], CHUNK), weight.shape[1], _TILE, 4, CHUNK // 4)
    if not packed or bias.shape != (_OUTPUTS,) or bias.dtype != torch.float32:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, bias))
        raise ValueError(f"expected (B, C, H, W), packed weights for C channels and (2,) float32, got {shapes}")
    if weight.dtype != x.dtype:
        raise ValueError(f"maps take weights of their type: {x.dtype}, {weight.dtype}")
    return _head(x, weight, bias)


def take_off_borders_(out: Tensor, x: Tensor, borders: Borders) -> Tensor:
    """Subtracts from ``out``, in place, the excess at the borders of a 5x5 layer merged from two of 3x3.

    Args:
        out: (B, N, H, W) float32, the 5x5 layer's output. It is returned.
        x: (B, C, H, W), the layer's input. Our kernel takes what that of ``flow_head`` takes, and N = 2.

    Without gradients: for inference.

    Raises:
        ValueError: shapes do not fit together.
    """
    outputs, inputs = borders.corners.shape[1:]
    if out.shape != (x.shape[0], outputs, *x.shape[2:]) or x.shape[1] != inputs:
        raise ValueError(f"{tuple(out.shape)} was not made of {tuple(x.shape)} by {inputs} to {outputs} channels")
    _take_off(out, x, *borders)
    return out
