"""A convolution fused with its bias and LeakyReLU, for the large maps of few channels at which cuDNN is slow.

Such layers are bound by memory traffic. So the result gets its bias and LeakyReLU in registers and is written from
there: to a map of its own and, where it is needed there too, to a part of a concatenation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowreel.kernels.launch import SUFFIXES, launch, on_tensor_cores, parts, sizes, view
from flowreel.kernels.operation import operation

if TYPE_CHECKING:
    from collections.abc import Callable

# --- the definition: any device ---------------------------------------------------------------------------------------


def convolution_definition(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    bias: Tensor,
    stride: int,
    transposed: bool,
    slope: float,
    out: Tensor,
    also: Tensor | None,
) -> None:
    """Summed in float32 and rounded once. ``packed``, the same weights in another order, is for the CUDA version.

    A process may allow TF32 for float32; half-precision inputs lose nothing by it.
    """
    convolve = F.conv_transpose2d if transposed else F.conv2d
    channels = weight.shape[0 if transposed else 1]
    value = convolve(x[:, :channels].float(), weight.float(), bias, stride, padding_of(weight))
    out.copy_(F.leaky_relu_(value, slope) if slope != 1 else value)
    if also is not None:
        also.copy_(out)


def padding_of(weight: Tensor) -> int:
    """The padding of the networks' layers: a stride divides the size exactly, a deconvolution multiplies it exactly."""
    return (weight.shape[-1] - 1) // 2


# --- the CUDA version -------------------------------------------------------------------------------------------------

_COLUMNS, _WARPS, _TOGETHER = 16, 4, 8  # as in convolution.cu
_NEIGHBOURS = 3  # a deconvolution's 2x2 results for a pixel depend on its 3x3 neighbourhood
_RESULTS = 16  # output channels that a block computes for each of the 2x2 results


class Tiling(NamedTuple):
    """What one block computes, and how: the template arguments of its entry in ``convolution.cu``."""

    kernel: int  # for a deconvolution: of the convolution that it becomes
    stride: int
    channels: int  # input channels at a time
    outputs: int  # output channels per block; for a deconvolution, those of all 2x2 results together
    rows: int  # output rows per warp
    enlarges: bool  # whether it is a deconvolution

    @property
    def half_steps(self) -> int:
        """Half steps per filter row: 8 values of its columns and channels each."""
        return parts(self.kernel * self.channels, _TOGETHER)

    @property
    def steps(self) -> int:
        return parts(self.kernel * self.half_steps, 2)

    @property
    def run(self) -> int:
        """Consecutive output channels that one lane holds."""
        return 4 if self.enlarges else 8

    def entry(self, dtype: torch.dtype) -> str:
        return f"convolution_{'_'.join(str(int(number)) for number in self)}_{SUFFIXES[dtype]}"


def tiling(weight: Tensor, stride: int, transposed: bool) -> Tiling | None:
    """How our kernel computes a layer with that weight, or None if it does not.

    Args:
        weight: (out, in, k, k), for a deconvolution (in, out, k, k), without padded channels; float16 or bfloat16.
    """
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return None
    kernel = weight.shape[-1]
    outputs, inputs = (weight.shape[1], weight.shape[0]) if transposed else weight.shape[:2]
    if transposed:
        fits = (kernel, stride) == (4, 2) and outputs % _RESULTS == 0 and inputs <= 176
        return Tiling(_NEIGHBOURS, 1, 16, 4 * _RESULTS, 4, True) if fits else None
    if (kernel, stride) == (7, 2) and outputs % 64 == 0 and inputs <= 12:
        return Tiling(7, 2, 4 * parts(inputs, 4), 64, 4, False)
    if (kernel, stride) == (3, 1) and outputs % 64 == 0 and inputs <= 16:
        return Tiling(3, 1, 8 if inputs <= 8 else 16, 64, 2, False)
    return None


def pack(weight: Tensor, stride: int, transposed: bool) -> Tensor:
    """The weights in the order in which the kernel's lanes read them (``tensor_core.cuh``), padded with zeros.

    Raises:
        ValueError: the kernel does not compute such a layer.
    """
    found = tiling(weight, stride, transposed)
    if found is None:
        raise ValueError(f"no kernel for {weight.dtype} weights {tuple(weight.shape)} with stride {stride}")
    if transposed:
        weight = _as_convolution(weight)
    outputs, inputs, kernel, _ = weight.shape
    channels, tiles = found.channels, found.outputs // 8
    chunks = parts(inputs, channels)
    # k, the summed dimension: filter row, then its columns and channels, 8 at a time
    padded = F.pad(weight, (0, 0, 0, 0, 0, chunks * channels - inputs)).view(outputs, chunks, channels, kernel, kernel)
    rows = padded.permute(1, 3, 4, 2, 0).reshape(chunks, kernel, kernel * channels, outputs)
    rows = F.pad(rows, (0, 0, 0, found.half_steps * _TOGETHER - kernel * channels)).flatten(1, 2)
    rows = F.pad(rows, (0, 0, 0, found.steps * 16 - rows.shape[1]))
    # columns of a product: a lane gets two of 8; in this order it gets `run` consecutive channels from run / 2 products
    column, product = torch.arange(8), torch.arange(tiles)[:, None]
    half = found.run // 2
    order = product // half * (8 * half) + column // 2 * found.run + product % half * 2 + column % 2
    rows = rows.view(chunks, found.steps * 16, -1, found.outputs)[..., order.flatten().to(weight.device)]
    apart = rows.view(chunks, found.steps, 2, 4, 2, -1, tiles // 2, 2, 8)  # k: r t i; group; column: p j g
    flat = apart.permute(5, 0, 1, 6, 8, 3, 7, 2, 4).flatten()
    return torch.cat((flat, flat.new_zeros(found.outputs * 16)))  # one more step, fetched but not used


def _packed_size(found: Tiling, inputs: int, outputs: int) -> int:
    """How many elements ``pack`` returns for a layer of so many channels."""
    groups, chunks = outputs // (_RESULTS if found.enlarges else found.outputs), parts(inputs, found.channels)
    return (groups * chunks * found.steps + 1) * 16 * found.outputs


def _as_convolution(weight: Tensor) -> Tensor:
    """A 4x4 deconvolution's (in, out, 4, 4) to (4 out, in, 3, 3): 2x2 results of 16 channels, from 3x3 neighbours."""
    inputs, outputs = weight.shape[:2]
    made = weight.new_zeros(2, 2, outputs, inputs, _NEIGHBOURS, _NEIGHBOURS)
    taps = [(place, step, place + 1 - 2 * step) for place in (0, 1) for step in (place - 1, place)]
    for y, dy, ky in taps:
        for x, dx, kx in taps:
            made[y, x, :, :, dy + 1, dx + 1] = weight[:, :, ky, kx].mT
    return made.view(4, -1, _RESULTS, *made.shape[3:]).transpose(0, 1).flatten(0, 2)


def _takes(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor, stride: int, transposed: bool, *_: object) -> bool:
    return tiling(weight, stride, transposed) is not None and x.dtype == weight.dtype and on_tensor_cores(x.device)


def _convolution_cuda(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    bias: Tensor,
    stride: int,
    transposed: bool,
    slope: float,
    out: Tensor,
    also: Tensor | None,
) -> None:
    found = tiling(weight, stride, transposed)
    assert found is not None  # or ``_takes`` would have said so
    inputs = weight.shape[0 if transposed else 1]
    if not _reaches(x, _TOGETHER):
        x = x.contiguous(memory_format=torch.channels_last)
    first = out if _reaches(out, found.run) else torch.empty_like(out, memory_format=torch.channels_last)
    second = first if also is None or not _reaches(also, found.run) else also
    height, width = (x if transposed else out).shape[2:]
    groups = out.shape[1] // (_RESULTS if transposed else found.outputs)
    grid = (parts(width, _COLUMNS) * groups, parts(height, _WARPS * found.rows), x.shape[0])
    counts = sizes(int(second is not first), inputs, *x.shape[2:], height, width, groups, found.kernel // 2)
    arguments = (*view(x), packed, bias, *view(first), *view(second), *counts, np.float32(slope))
    launch("convolution", found.entry(x.dtype), grid, arguments, (32 * _WARPS,))
    if first is not out:
        out.copy_(first)
    if also is not None and second is not also:
        also.copy_(first)


def _reaches(x: Tensor, together: int) -> bool:
    """Whether a pixel's channels lie side by side, so aligned that ``together`` of them can be accessed at once."""
    near = x.stride(1) == 1 or x.shape[1] == 1
    apart = (x.storage_offset(), *(x.stride(axis) for axis in (0, 2, 3) if x.shape[axis] > 1))
    return near and x.data_ptr() % 16 == x.storage_offset() * 2 % 16 and not any(step % together for step in apart)


# --- registration -----------------------------------------------------------------------------------------------------

_into: Callable[..., None] = operation(
    "convolution(Tensor x, Tensor weight, Tensor packed, Tensor bias, int stride, bool transposed, float slope, "
    "Tensor(a!) out, Tensor(b!)? also) -> ()",
    convolution_definition,
    on_cuda=_convolution_cuda,
    takes=_takes,
)

# --- the function -----------------------------------------------------------------------------------------------------


def convolution(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    bias: Tensor,
    slope: float,
    stride: int,
    transposed: bool = False,
    *,
    out: Tensor | None = None,
    also: Tensor | None = None,
) -> Tensor:
    """LeakyReLU of a convolution + bias, written to ``out``, which is returned, and also to ``also``.

    Args:
        x: (B, C, H, W) float16 or bfloat16, channels last, C a multiple of 8. Channels beyond the weight's have no
            effect, as long as they are finite.
        weight: (out, in, k, k), for a deconvolution (in, out, k, k): one that ``tiling`` accepts, of x's dtype.
        packed: ``pack`` of it.
        bias: (out,) float32.
        slope: of the LeakyReLU for negative values, 0 to 1; 1: no activation.
        stride: of rows and columns alike. The padding is that of ``padding_of``.
        transposed: whether it is a deconvolution.
        out: (B, out, H', W') of x's dtype; may be a part of another tensor, but shares no memory with x. None: a new
            tensor, channels last.
        also: the same, sharing no memory with ``out``.

    Computed in float32 and rounded once. An infinite input may spoil the pixel to the left of those that depend on it.
    Without gradients: for inference.

    Raises:
        ValueError: shapes or types do not fit together, or ``tiling`` does not accept the layer.
    """
    found = tiling(weight, stride, transposed)
    if found is None:
        raise ValueError(f"no kernel for {weight.dtype} weights {tuple(weight.shape)} with stride {stride}")
    outputs, inputs = (weight.shape[1], weight.shape[0]) if transposed else weight.shape[:2]
    size = [side * stride if transposed else parts(side, stride) for side in x.shape[2:]]
    if x.ndim != 4 or x.shape[1] < inputs or x.shape[1] % _TOGETHER or bias.shape != (outputs,):
        raise ValueError(f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)} do not fit together")
    if not weight.dtype == packed.dtype == x.dtype or bias.dtype != torch.float32:
        raise ValueError(f"maps take weights of their type and float32 biases: {x.dtype}, {weight.dtype}, {bias.dtype}")
    if packed.numel() != _packed_size(found, inputs, outputs) or not packed.is_contiguous():
        raise ValueError(f"{tuple(packed.shape)} is not what pack makes of weights {tuple(weight.shape)}")
    shape = (x.shape[0], outputs, *size)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if not 0 <= slope <= 1:
        raise ValueError(f"a slope is 0 to 1, not {slope}")
    for given in (out, out if also is None else also):
        if given.shape != shape or given.dtype != x.dtype:
            raise ValueError(f"the result is {shape} {x.dtype}, not {tuple(given.shape)} {given.dtype}")
    _into(x, weight, packed, bias, stride, transposed, slope, out, also)
    return out
