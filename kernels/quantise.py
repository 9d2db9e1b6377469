"""Flow to integer steps, as the store keeps it, with the number of vectors that could not be kept and the error."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowreel.engine.data import is_known
from flowreel.kernels.launch import SUFFIXES, blocks_for_picture, launch, sizes, view
from flowreel.kernels.operation import operation

if TYPE_CHECKING:
    from collections.abc import Callable


class Quantised(NamedTuple):
    """N flows in steps, all on their device."""

    steps: Tensor  # (N, 2, H, W) int16 or int32; where a vector was not kept, both are the dtype's smallest number
    # (3, N) int32, one tensor, so that one copy brings it to the host (see ``numbers_found``). For each flow:
    # vectors that were NaN, infinite or beyond 1e9 px; known vectors with a component beyond the limit; the bits of the
    # largest error of a kept component, float32 pixels.
    found: Tensor


def numbers_found(found: Tensor) -> tuple[list[int], list[int], list[float]]:
    """From a ``Quantised.found`` on the host, for each flow: vectors unknown, vectors beyond range, worst error in px.

    By NumPy, which keeps the GIL meanwhile: each of torch's operations would release it to another thread.
    """
    unknown, beyond_range, worst = found.numpy()
    return unknown.tolist(), beyond_range.tolist(), worst.view(np.float32).tolist()


# --- the definition: any device ---------------------------------------------------------------------------------------


def quantise_definition(flow: Tensor, step: float, limit: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What ``quantise`` means. Gives the two tensors of ``Quantised``."""
    wide = flow.float()
    steps = (wide * (1 / step)).round()
    known = is_known(wide).all(1, keepdim=True)
    kept = known & (steps.abs() <= limit).all(1, keepdim=True)
    stored = torch.where(kept, steps, torch.iinfo(dtype).min).to(dtype)
    error = torch.where(kept, stored.float() * step - wide, 0).abs()
    unknown, beyond = (vectors.sum((1, 2, 3), dtype=torch.int32) for vectors in (~known, known & ~kept))
    return stored, torch.stack([unknown, beyond, error.amax((1, 2, 3)).view(torch.int32)])


# --- the CUDA version -------------------------------------------------------------------------------------------------


def _quantise_cuda(flow: Tensor, step: float, limit: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    count, _, height, width = flow.shape
    out = torch.empty(flow.shape, dtype=dtype, device=flow.device)
    found = torch.zeros(3, count, dtype=torch.int32, device=flow.device)
    blocks = blocks_for_picture(height, width)
    scales = map(np.float32, (step, 1 / step, limit))
    arguments = (*view(flow), *view(out), found, *sizes(count, height, width, blocks), *scales)
    entry = f"quantise_{8 * dtype.itemsize}_{SUFFIXES[flow.dtype]}"
    launch("quantise", entry, (blocks * count,), (*arguments, np.int32(torch.iinfo(dtype).min)))
    return out, found


# --- registration -----------------------------------------------------------------------------------------------------


def _shapes(flow: Tensor, step: float, limit: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    steps = torch.empty(flow.shape, dtype=dtype, device=flow.device)
    return steps, torch.empty((3, flow.shape[0]), dtype=torch.int32, device=flow.device)


_quantise: Callable[..., tuple[Tensor, Tensor]] = operation(
    "quantise(Tensor flow, float step, float limit, ScalarType dtype) -> (Tensor, Tensor)",
    quantise_definition,
    on_cuda=_quantise_cuda,
    shape=_shapes,
)

# --- the public function ----------------------------------------------------------------------------------------------


def quantise(flow: Tensor, step: float, limit: float | None = None, dtype: torch.dtype = torch.int16) -> Quantised:
    """Rounds each vector to the nearest integer steps, and measures the error.

    Args:
        flow: (N, 2, H, W) float32, bfloat16 or float16, pixels, any strides, none of the sizes zero.
        step: pixels per step, a power of two: then scaling is exact, and no error exceeds half a step.
        limit: the largest number of steps that is kept. None: the largest number that ``dtype`` and float32 both hold
            exactly.
        dtype: torch.int16 or torch.int32.

    Returns:
        The same values and counts as ``sinks.codecs.FlowCodec.quantise``, and the largest error. The caller has to
        check that the error is within its bound: to do so here would make the CPU wait. On a GPU: equal to the
        definition.

    Raises:
        TypeError: flow is not float32, bfloat16 or float16, or the dtype is none of these.
        ValueError: the shape, step or limit is not as described.
    """
    if not flow.dtype.is_floating_point or flow.dtype == torch.float64:
        raise TypeError(f"flow to quantise is float32, bfloat16 or float16, got {flow.dtype}")
    if dtype not in (torch.int16, torch.int32):
        raise TypeError(f"steps are int16 or int32, got {dtype}")
    if flow.ndim != 4 or flow.shape[1] != 2 or flow.numel() == 0:
        raise ValueError(f"flow is (N, 2, H, W) and holds something, got {tuple(flow.shape)}")
    if not 0 < step < math.inf or math.frexp(step)[0] != 0.5:
        raise ValueError(f"a step is a power of two, got {step}")
    most = 32767.0 if dtype == torch.int16 else 2147483520.0  # float32's largest below 2^31
    limit = most if limit is None else limit
    if not 0 < limit <= most:
        raise ValueError(f"the limit for {dtype} is up to {most:.0f} steps, got {limit}")
    return Quantised(*_quantise(flow, step, limit, dtype))
