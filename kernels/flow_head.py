"""Flow heads on maps of half precision: a convolution to two float32 channels, summed in float32.

Libraries give the sums back in the type of the maps, and half precision costs .04 px there at 40 px of motion; in
float32 they take no tensor cores, and a copy of the maps first. With two outputs it is all reading of maps: the kernel
does little else.

A head behind a layer of 3x3 without an activation is one 5x5 layer with it, but for the borders: the head meets zeros
beyond the image, where the 5x5 layer goes on with what the first layer would give there. That depends on the outermost
row or column of the input alone; ``Borders`` holds it, and ``take_off_borders_`` takes it off again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowreel.kernels.launch import (
    MOST_DEEP,
    SUFFIXES,
    implement,
    launch,
    multiprocessors,
    on_tensor_cores,
    parts,
    sizes,
    view,
)


class Borders(NamedTuple):
    """What a 5x5 layer adds for places beyond the image, by the side that they lie on. All float32.

    Sides: above, below, left, right. Corners, which lie beyond two sides and are taken off with both, once too often:
    above left, above right, below left, below right.
    """

    along: Tensor  # (4, 5, N, C): side, place along it
    along_constants: Tensor  # (4, N)
    corners: Tensor  # (4, N, C)
    corner_constants: Tensor  # (4, N)


# --- weights as tensor cores take them --------------------------------------------------------------------------------

CHUNK = 32  # channels of two products: 8 of each of 4 lanes
_OUTPUTS, _TILE = 2, 8  # columns of a product
_FIRST = 4  # kx that share a tile: 4 x 2 columns
_TILES = {3: 3, 5: 7}  # of a filter: one for each ky with the first kx, and for 5x5 two with all ky of the last kx
_KERNELS = {tiles: kernel for kernel, tiles in _TILES.items()}


def pack_flow_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(2, C, k, k), k 3 or 5, to (chunks, tiles, 8 columns, 4, 8 channels) in half precision, zeros where none are.

    Raises:
        ValueError: not of that shape.
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
    """The weights (2, C, k, k) again, as they were rounded."""
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

    For float32 a process may allow TF32, which keeps 10 bits: enough for what was half precision, else it is float64.
    """
    dtype = torch.float32 if x.element_size() < 4 else torch.float64
    wide = unpack_flow_head(weight, x.shape[1]).to(dtype)
    return F.conv2d(x.to(dtype), wide, bias.to(dtype), padding=wide.shape[2] // 2).float().contiguous()


def take_off_borders_definition(
    out: Tensor, x: Tensor, along: Tensor, along_constants: Tensor, corners: Tensor, corner_constants: Tensor
) -> None:
    """Of ``out`` (B, N, H, W), which a 5x5 layer made of ``x`` (B, C, H, W). In float64: see above."""
    ends = (2, 0), (2, -1), (3, 0), (3, -1)  # axis, place
    for side, (axis, place) in enumerate(ends):
        edge, filters = x.select(axis, place).double(), along[side].permute(1, 2, 0).double()
        out.select(axis, place).sub_(F.conv1d(edge, filters, along_constants[side].double(), padding=2))
    for corner, weight in enumerate(corners):
        y, column = -(corner // 2), -(corner % 2)
        out[:, :, y, column] += x[:, :, y, column].double() @ weight.T.double() + corner_constants[corner]


# --- the CUDA version -------------------------------------------------------------------------------------------------

_WARPS = 4  # of a block, as in flow_head.cu
_COLUMNS = 32  # that a warp reads
_BORDER_WARPS, _RUN = 8, 4  # of a block at the borders, and pixels that a lane has there
_AT_ONCE = {3: 4, 5: 3}  # by filter: blocks that a multiprocessor runs at once
_ENOUGH = 2.5  # with fewer it waits for the latency of memory; chosen by reckoning, not by measuring


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
    splits = next((n for n in (1, 2, 4) if n * CHUNK >= channels), _BORDER_WARPS)  # by the channels alone: as _shares
    rows, columns = min(height, 2), min(width, 2)
    runs = rows * parts(width, _RUN) + columns * parts(height - rows, _RUN)
    arguments = (*view(x), *(b.contiguous() for b in borders), out, *sizes(channels, height, width, splits))
    grid, block = (parts(runs, 4 * _BORDER_WARPS // splits), batch), (32 * _BORDER_WARPS,)
    launch("flow_head", f"flow_head_borders_{SUFFIXES[x.dtype]}", grid, arguments, block)


def _takes_head(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return _fits(x)


def _takes_borders(out: Tensor, x: Tensor, *borders: Tensor) -> bool:
    wide = all(y.dtype == torch.float32 for y in (out, *borders))
    return _fits(x) and wide and out.is_contiguous() and out.shape[1] == _OUTPUTS


def _fits(x: Tensor) -> bool:
    """Whether the kernels run there, and can read the pixels 8 channels at a time."""
    steps = (step for axis, step in enumerate(x.stride()) if axis != 1 and x.shape[axis] > 1)
    aligned = x.data_ptr() % 16 == 0 and x.shape[1] % 8 == 0 and all(step % 8 == 0 for step in steps)
    known = x.dtype in (torch.float16, torch.bfloat16) and x.shape[0] <= MOST_DEEP
    return known and aligned and x.stride(1) == 1 and on_tensor_cores(x.device)


@lru_cache
def _shares(
    batch: int, channels: int, height: int, width: int, kernel: int, processors: int
) -> tuple[int, int, tuple[int, int, int]]:
    """How many warps share the channels, how many rows a block makes, and the grid.

    The first decides in what order sums are made: by the channels alone, so that bits do not depend on the batch.
    """
    chunks = parts(channels, CHUNK)
    splits = 1 if chunks <= 3 else 2 if chunks <= 6 else 4
    strips = parts(width, _COLUMNS - kernel + 1)
    across = parts(strips, _WARPS // splits)

    def time(rows: int) -> float:
        """Of the busiest multiprocessor, in rows of one block."""
        blocks = parts(batch * across * parts(height, rows), processors)
        rest = blocks % _AT_ONCE[kernel]
        return (blocks - rest + (max(rest, _ENOUGH) if rest else 0)) * (rows + kernel - 1)

    rows = min(range(height, 0, -1), key=time)  # of those that take the same time what reads least twice
    return splits, rows, (across, parts(height, rows), batch)


# --- registration -----------------------------------------------------------------------------------------------------

_torch_library: Any = torch.library  # its functions carry no types
_LIBRARY = _torch_library.Library("flowreel", "FRAGMENT")
_LIBRARY.define("flow_head(Tensor x, Tensor weight, Tensor bias) -> Tensor")
_LIBRARY.define(
    "take_off_borders_(Tensor(a!) out, Tensor x, Tensor along, Tensor along_constants, Tensor corners, "
    "Tensor corner_constants) -> ()"
)
implement(_LIBRARY, "flow_head", flow_head_definition, on_cuda=_flow_head_cuda, takes=_takes_head)
implement(
    _LIBRARY,
    "take_off_borders_",
    take_off_borders_definition,
    on_cuda=_take_off_borders_cuda,
    takes=_takes_borders,
)


def _shape_of_flow(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], _OUTPUTS, *x.shape[2:], dtype=torch.float32)


def _nothing_of(out: Tensor, x: Tensor, *borders: Tensor) -> None:
    return None


_torch_library.register_fake("flowreel::flow_head", _shape_of_flow, lib=_LIBRARY)

_torch_library.register_fake("flowreel::take_off_borders_", _nothing_of, lib=_LIBRARY)

# --- the functions ----------------------------------------------------------------------------------------------------


def flow_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution of stride 1 with zeros around the image, as large as it, to the two channels of a flow.

    Args:
        x: (B, C, H, W). Our kernel takes float16 and bfloat16 whose pixels are vectors at multiples of 16 bytes, C a
            multiple of 8: channels last, or the first channels of such a map. Anything else goes by the definition.
        weight: from ``pack_flow_head``, of the type of x.
        bias: (2,) float32.

    Returns:
        (B, 2, H, W) float32, contiguous. Sums are formed in float32: their order depends on C.

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
    """Of ``out``, in place, what a 5x5 layer that stands for two of 3x3 adds at the borders. Gives ``out`` back.

    Args:
        out: (B, N, H, W) float32, what the 5x5 layer gave.
        x: (B, C, H, W), what it was given. Our kernel takes what that of ``flow_head`` takes, and N = 2.

    Without gradients: for inference.

    Raises:
        ValueError: shapes do not fit together.
    """
    outputs, inputs = borders.corners.shape[1:]
    if out.shape != (x.shape[0], outputs, *x.shape[2:]) or x.shape[1] != inputs:
        raise ValueError(f"{tuple(out.shape)} was not made of {tuple(x.shape)} by {inputs} to {outputs} channels")
    _take_off(out, x, *borders)
    return out


_head: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.ops.flowreel.flow_head.default
_take_off: Callable[..., None] = torch.ops.flowreel.take_off_borders_.default
