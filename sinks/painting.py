"""Paints pictures of flow on the flow's device: what the colour outputs share for flow on a GPU.

There a picture costs next to nothing, and three bytes per vector go to the host in place of eight, one and a half for a
video, in the layout its encoder takes. On a CPU the outputs paint arrays, each in its own way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from flowreel.engine.data import ColorBatch, is_known
from flowreel.kernels.flow_color import flow_to_color

if TYPE_CHECKING:
    import numpy.typing as npt


_LUMA = (0.2126, 0.7152, 0.0722)  # of red, green and blue: BT.709
_LUMA_RANGE, _CHROMA_RANGE = 219 / 255, 224 / 255  # limited range relative to full
_BLACK, _GREY = 16, 128
_PIXELS = 1 << 21  # that are converted together: each takes about 33 bytes meanwhile


def painted(
    flow: Tensor,
    max_flow: float | None,
    *,
    index: int,
    frame: npt.NDArray[np.int64],
    timestamp_s: npt.NDArray[np.float64],
    for_video: bool = False,
) -> ColorBatch:
    """Pictures of flow (N, 2, H, W) of any float type, on its device. Does not synchronise.

    max_flow: pixels that full colour stands for; None: each flow's own longest. for_video: in the layout of ``yuv420``.
    The rest is as in ``ColorBatch``.
    """
    colors = flow_to_color(flow, max_flow)
    pictures = yuv420(colors) if for_video else colors.permute(0, 2, 3, 1).contiguous()
    unknown = (~is_known(flow)).any(1).sum((1, 2))
    return ColorBatch(pictures=pictures, unknown=unknown, index=index, frame=frame, timestamp_s=timestamp_s)


def yuv420(rgb: Tensor) -> Tensor:
    """Full-range RGB (N, 3, H, W) uint8 as BT.709 of limited range, 4:2:0, each chroma the mean of 2x2 pixels.

    Returns (N, h * 3 / 2, w) uint8, h and w being H and W made even by repeating the last row and column: h rows of
    luma, then all of Cb, then all of Cr, packed: FFmpeg's yuv420p. Within one level of swscale, averaging areas.
    """
    height, width = rgb.shape[2:]
    together = max(_PIXELS // (height * width), 1)
    return torch.cat([_planes(colors.float()) for colors in torch.split(rgb, together)])


def _planes(colors: Tensor) -> Tensor:
    count, _, height, width = colors.shape
    if height % 2 or width % 2:
        colors = functional.pad(colors, (0, width % 2, 0, height % 2), mode="replicate")
    luma = _weighted(colors)
    means = functional.avg_pool2d(colors, 2)
    mean_luma = _weighted(means)
    planes = [(luma * _LUMA_RANGE).add_(_BLACK)]
    for primary in (2, 0):  # Cb of blue, Cr of red; their largest difference from luma spans the range
        apart = means[:, primary].sub(mean_luma)
        planes.append(apart.mul_(_CHROMA_RANGE / (2 * (1 - _LUMA[primary]))).add_(_GREY))
    whole = torch.cat([plane.reshape(count, -1) for plane in planes], 1)
    return whole.round_().to(torch.uint8).view(count, -1, luma.shape[-1])


def _weighted(colors: Tensor) -> Tensor:
    """Luma (N, H, W), 0..255."""
    red, green, blue = colors.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def packed(flow: Tensor) -> Tensor:
    """Flow of any shape as float16 at half the memory: NaN where a component is unknown, clipped to ±65504 px."""
    longest = torch.finfo(torch.float16).max
    return torch.where(is_known(flow), flow.clamp(-longest, longest), math.nan).half()
