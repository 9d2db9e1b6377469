from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor


@pytest.fixture
def pulled() -> Callable[[Tensor, Tensor], Tensor]:
    """Pulls a second frame (3, H, W) back along a flow (2, H, W) px: sampled where the flow ends, float32."""
    return _pulled


def _pulled(second: Tensor, flow: Tensor) -> Tensor:
    """``second`` sampled where ``flow`` ends: (3, H, W) float32."""
    height, width = flow.shape[1:]
    x = (flow[0] + torch.arange(width)) * 2 / (width - 1) - 1
    y = (flow[1] + torch.arange(height)[:, None]) * 2 / (height - 1) - 1
    grid = torch.stack((x, y), -1)[None]
    return functional.grid_sample(second[None].float(), grid, padding_mode="border", align_corners=True)[0]
