"""The input of the network that fuses two flows, made by one kernel: a frame, both flows, their lengths and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from flowreel.kernels.channel_norm import channel_norm_definition
from flowreel.kernels.launch import SUFFIXES, launch, sizes, view
from flowreel.kernels.operation import operation
from flowreel.kernels.pixels import aligned, check_frames, check_room, check_types, fill, tiles_for
from flowreel.kernels.warp import warp_definition

if TYPE_CHECKING:
    from collections.abc import Callable

CHANNELS = 16  # of the output: first frame 3, both flows 4, their lengths 2, both brightness errors 2, zeros 5

# --- the definition: any device ---------------------------------------------------------------------------------------


def fusing_input_definition(
    frames: Tensor, small: Tensor, small_scale: float, large: Tensor, large_scale: float, out: Tensor
) -> None:
    """What ``fusing_input`` means."""
    scaled = (small * small_scale, large * large_scale)
    flows = [F.interpolate(flow, scale_factor=4, mode="nearest") for flow in scaled]
    lengths = [channel_norm_definition(flow) for flow in flows]
    errors = [channel_norm_definition(frames[:, :3] - warp_definition(frames[:, 3:], flow)) for flow in flows]
    fill(out, frames[:, :3], *flows, *lengths, *errors)


# --- the CUDA version -------------------------------------------------------------------------------------------------


def _fusing_input_cuda(
    frames: Tensor, small: Tensor, small_scale: float, large: Tensor, large_scale: float, out: Tensor
) -> None:
    batch, _, height, width = frames.shape
    scales = np.float32(small_scale), np.float32(large_scale)
    arguments = (frames, *view(small), *view(large), out, *sizes(height, width), *scales)
    launch("fusing_input", f"fusing_input_{SUFFIXES[out.dtype]}", tiles_for(batch, height, width), arguments)


# --- registration -----------------------------------------------------------------------------------------------------

_fusing: Callable[[Tensor, Tensor, float, Tensor, float, Tensor], None] = operation(
    "fusing_input(Tensor frames, Tensor small, float small_scale, Tensor large, float large_scale, Tensor(a!) out)"
    " -> ()",
    fusing_input_definition,
    on_cuda=_fusing_input_cuda,
    takes=lambda *arguments: aligned(arguments[-1]),
)

# --- the function -----------------------------------------------------------------------------------------------------


def fusing_input(
    frames: Tensor, small: Tensor, small_scale: float, large: Tensor, large_scale: float, out: Tensor
) -> None:
    """Fills the input of the network that fuses the flow of small displacements with that of large ones.

    Args:
        frames: (B, 6, H, W) float32, contiguous: two normalised frames; H and W are multiples of 4.
        small, large: (B, 2, H/4, W/4) float32, any strides: predictions of two networks.
        small_scale, large_scale: factors that turn them into pixels.
        out: (B, 16, H, W) float32, bfloat16 or float16, channels-last without gaps.
            It gets the first frame (3 channels), small and large in pixels (2 and 2), their lengths (1 and 1), the
            norms of the first frame minus the second one warped by small, and by large (1 and 1), and zeros.

    Flow is upsampled by nearest neighbour. Computed in float32 and rounded once; otherwise as ``warp`` and
    ``channel_norm``, for infinite and unknown flow too. Without gradients: for inference.

    Raises:
        TypeError: frames or flows are not float32, or out has another dtype than these.
        ValueError: shapes, strides or devices do not fit together.

    Source: Ilg et al., FlowNet 2.0: Evolution of Optical Flow Estimation with Deep Networks, CVPR 2017, section 4.
    """
    check_types(out, frames, small, large)
    check_room(out, CHANNELS, *check_frames(frames, small, large))
    _fusing(frames, small, small_scale, large, large_scale, out)
