"""Two frames minus their mean, divided by 255, written wherever networks read them from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowreel.kernels.launch import SUFFIXES, launch, sizes, view
from flowreel.kernels.operation import operation
from flowreel.kernels.pixels import aligned, check_room, check_types, fill, tiles_for

if TYPE_CHECKING:
    from collections.abc import Callable

CHANNELS = 8  # of ``pair`` and ``both``: one frame's 3 or two frames' 6, and zeros
_LEVELS = 255.0

# --- the definition: any device ---------------------------------------------------------------------------------------


def normalise_frames_definition(
    first: Tensor, second: Tensor, planes: Tensor | None, pair: Tensor | None, both: Tensor | None
) -> None:
    """What ``normalise_frames`` means."""
    mean = (_mean(first) + _mean(second)) / 2
    first, second = ((frame - mean) / _LEVELS for frame in (first, second))
    if planes is not None:
        fill(planes, first, second)
    if pair is not None:
        fill(pair, first, second)
    if both is not None:
        fill(both, torch.cat((first, second)))


def _mean(frames: Tensor) -> Tensor:
    """(B, 3, 1, 1). By torch, which adds in the same order every time."""
    return frames.mean((2, 3), keepdim=True)


# --- the CUDA version -------------------------------------------------------------------------------------------------


def _normalise_frames_cuda(
    first: Tensor, second: Tensor, planes: Tensor | None, pair: Tensor | None, both: Tensor | None
) -> None:
    batch, _, height, width = first.shape
    room = next((x for x in (pair, both, planes) if x is not None), None)
    if room is None:
        return
    views = (*view(first), *view(second), _mean(first), _mean(second), planes, pair, both)
    entry = f"normalise_frames_{SUFFIXES[room.dtype]}"
    launch("normalise_frames", entry, tiles_for(batch, height, width), (*views, *sizes(batch, height, width)))


# --- registration -----------------------------------------------------------------------------------------------------

_normalise: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], None] = operation(
    "normalise_frames(Tensor first, Tensor second, Tensor(a!)? planes, Tensor(b!)? pair, Tensor(c!)? both) -> ()",
    normalise_frames_definition,
    on_cuda=_normalise_frames_cuda,
    takes=lambda first, second, planes, pair, both: aligned(pair) and aligned(both),
)

# --- the function -----------------------------------------------------------------------------------------------------


def normalise_frames(
    first: Tensor,
    second: Tensor,
    *,
    planes: Tensor | None = None,
    pair: Tensor | None = None,
    both: Tensor | None = None,
) -> None:
    """Two frames minus one mean per sample and channel *over the two together*, divided by 255.

    Args:
        first, second: (B, 3, H, W) float32, 0..255, any strides.
        planes: (B, 6, H, W) float32, contiguous: gets the first frame, then the second.
        pair: (B, 8, H, W), channels-last without gaps: gets both frames in its channels, then zeros.
        both: (2B, 8, H, W) of pair's dtype, channels-last without gaps: gets the B first frames, then the B second
            ones, zeros in the other channels.

    ``pair`` and ``both`` are float32, bfloat16 or float16. Outputs that are None are left out. Computed in float32 and
    rounded once. Without gradients: for inference.

    Raises:
        TypeError: frames or planes are not float32, or pair and both differ in dtype or have another than these.
        ValueError: shapes, strides or devices do not fit together.

    Source: Ilg et al., FlowNet 2.0: Evolution of Optical Flow Estimation with Deep Networks, CVPR 2017; one mean for
    both frames as in NVIDIA's flownet2-pytorch.
    """
    if first.ndim != 4 or first.shape[1] != 3 or first.numel() == 0 or second.shape != first.shape:
        raise ValueError(f"expected (B, 3, H, W) twice, got {tuple(first.shape)} and {tuple(second.shape)}")
    check_types(first, first, second, *(() if planes is None else (planes,)))
    batch, _, height, width = first.shape
    if planes is not None and (planes.shape != (batch, 6, height, width) or not planes.is_contiguous()):
        raise ValueError(f"planes for {tuple(first.shape)} twice are contiguous, got {tuple(planes.shape)}")
    for room, pictures in ((pair, batch), (both, 2 * batch)):
        if room is not None:
            check_types(room, first)
            check_room(room, CHANNELS, pictures, height, width)
    if pair is not None and both is not None and pair.dtype != both.dtype:
        raise TypeError(f"pair and both are of one dtype, got {pair.dtype} and {both.dtype}")
    _normalise(first, second, planes, pair, both)
