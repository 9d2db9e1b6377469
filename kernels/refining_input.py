"""The input of a network that refines a flow, made by one kernel: frames, warped frame, flow and brightness error."""

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

CHANNELS = 16  # of the output: frames 6, warped second frame 3, flow 2, brightness error 1, zeros 4

# --- the definition: any device ---------------------------------------------------------------------------------------


def refining_input_definition(frames: Tensor, flow: Tensor, scale: float, out: Tensor) -> None:
    """What ``refining_input`` means."""
    pixels = F.interpolate(flow * scale, scale_factor=4, mode="bilinear", align_corners=False)
    warped = warp_definition(frames[:, 3:], pixels)
    error = channel_norm_definition(frames[:, :3] - warped)
    fill(out, frames, warped, pixels / scale, error)


# --- the CUDA version -------------------------------------------------------------------------------------------------


def _refining_input_cuda(frames: Tensor, flow: Tensor, scale: float, out: Tensor) -> None:
    batch, _, height, width = frames.shape
    arguments = (frames, *view(flow), out, *sizes(height, width), np.float32(scale), np.float32(1 / scale))
    launch("refining_input", f"refining_input_{SUFFIXES[out.dtype]}", tiles_for(batch, height, width), arguments)


# --- registration -----------------------------------------------------------------------------------------------------

_refining: Callable[[Tensor, Tensor, float, Tensor], None] = operation(
    "refining_input(Tensor frames, Tensor flow, float scale, Tensor(a!) out) -> ()",
    refining_input_definition,
    on_cuda=_refining_input_cuda,
    takes=lambda frames, flow, scale, out: aligned(out),
)

# --- the function -----------------------------------------------------------------------------------------------------


def refining_input(frames: Tensor, flow: Tensor, scale: float, out: Tensor) -> None:
    """Fills the input of a network that refines the flow of the one before it.

    Args:
        frames: (B, 6, H, W) float32, contiguous: two normalised frames; H and W are multiples of 4.
        flow: (B, 2, H/4, W/4) float32, any strides: a network's prediction.
        scale: factor that turns it into pixels.
        out: (B, 16, H, W) float32, bfloat16 or float16, channels-last without gaps.
            It gets the frames (6 channels), the second one warped by the flow (3), the upsampled flow in the
            prediction's unit (2), the norm of the first frame minus the warped one (1), and zeros.

    The flow is upsampled bilinearly, with half-pixel centres. Computed in float32 and rounded once; otherwise as
    ``warp`` and ``channel_norm``, for infinite and unknown flow too. Without gradients: for inference.

    Raises:
        TypeError: frames or flow are not float32, or out has another dtype than these.
        ValueError: shapes, strides or devices do not fit together.

    Source: Ilg et al., FlowNet 2.0: Evolution of Optical Flow Estimation with Deep Networks, CVPR 2017, section 4.
    """
    check_types(out, frames, flow)
    check_room(out, CHANNELS, *check_frames(frames, flow))
    _refining(frames, flow, scale, out)
