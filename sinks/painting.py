"""Pictures of flow, painted where the flow is: what the colour outputs share for flow on a GPU.

There a picture costs next to nothing, and three bytes a vector go to the host in place of eight. On a CPU the outputs
paint arrays, each in its own way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flowreel.engine.data import UNKNOWN_ABOVE, ColorBatch
from flowreel.kernels.flow_color import flow_to_color

if TYPE_CHECKING:
    import numpy.typing as npt


def painted(
    flow: Tensor,
    max_flow: float | None,
    *,
    index: int,
    frame: npt.NDArray[np.int64],
    timestamp_s: npt.NDArray[np.float64],
) -> ColorBatch:
    """Pictures of flow (N, 2, H, W) of any float type, on its device. Nothing is waited for.

    max_flow: pixels that full colour stands for; None: each flow's own longest. The rest is as in ``ColorBatch``.
    """
    colors = flow_to_color(flow, max_flow).permute(0, 2, 3, 1).contiguous()
    unknown = _unknown(flow).any(1).sum((1, 2))
    return ColorBatch(rgb=colors, unknown=unknown, index=index, frame=frame, timestamp_s=timestamp_s)


def packed(flow: Tensor) -> Tensor:
    """Flow of any shape as float16 at half the memory: NaN where a component is unknown, and at most 65504 px."""
    longest = torch.finfo(torch.float16).max
    return torch.where(_unknown(flow), math.nan, flow.clamp(-longest, longest)).half()


def _unknown(flow: Tensor) -> Tensor:
    return ~(flow.abs() <= UNKNOWN_ABOVE)  # NaN fails every comparison
