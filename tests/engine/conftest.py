"""Networks filled with numbers that anybody can make again, which the goldens were computed with; frames and flow."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from flowreel.engine.models import build_model


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


def fill(key: str, shape: torch.Size) -> np.ndarray:
    """The value of one tensor, from its name alone."""
    noise = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(shape), np.float32)
    if len(shape) >= 2:
        taps = shape[2] * shape[3]
        transposed = any(part.startswith(("deconv", "upsampled_flow")) for part in key.split("."))
        fan_in = shape[0] * taps / 4 if transposed else shape[1] * taps
        return noise * np.float32(np.sqrt(2 / (1.01 * fan_in)))
    if key.endswith("running_var"):
        return 1 + 0.01 * np.abs(noise)
    if key.endswith(".1.weight"):
        return 1 + 0.01 * noise
    return 0.01 * noise


@pytest.fixture(scope="session")
def filled() -> Callable[..., nn.Module]:
    """``filled(name, **options)``: a network in evaluation mode with reproducible weights."""

    def build(name: str, **options: object) -> nn.Module:
        model = build_model(name, **options)  # type: ignore[arg-type]
        state: dict[str, Tensor] = {
            key: tensor if key.endswith("num_batches_tracked") else torch.from_numpy(fill(key, tensor.shape))
            for key, tensor in model.state_dict().items()
        }
        model.load_state_dict(state)
        return model.eval()

    return build
