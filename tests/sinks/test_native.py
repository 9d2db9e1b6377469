"""A stored low-resolution prediction, enlarged by the reader, equals the network's own full-resolution flow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowreel.engine.config import FitMode
from flowreel.engine.data import FlowBatch
from flowreel.engine.models.layers import Upsampling, upsample
from flowreel.engine.restore import Fit, restore
from flowreel.sinks.native import enlarge


@pytest.mark.parametrize("upsampling", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(64, 128), (70, 100), (135, 190), (97, 65)])
@pytest.mark.parametrize("mode", ["pad", "crop", "resize"])
def test_equals_the_direct_flow(mode: FitMode, size: tuple[int, int], upsampling: Upsampling) -> None:
    fit = Fit(mode, *size)
    height, width = fit.network_size
    predicted = 5 * torch.randn(2, 2, height // 4, width // 4, generator=torch.Generator().manual_seed(0))
    frames = np.arange(2)
    batch = FlowBatch(upsample(predicted, upsampling), 0, frames, frames, frames / 25, frames / 25, native=predicted)
    (restored,) = restore(fit)(iter([batch]))
    assert restored.native is not None
    grid = fit.grid(upsampling)
    for flow, expected in zip(restored.native.numpy(), restored.flow.numpy(), strict=True):
        made = enlarge(flow, grid, *fit.flow_size)
        assert made.dtype == np.float32
        np.testing.assert_allclose(made, expected, atol=1e-4, rtol=0)


def test_a_missing_vector_spoils_just_what_it_is_part_of() -> None:
    fit = Fit("pad", 64, 64)
    flow = np.zeros((2, 16, 16), np.float32)
    flow[:, 8, 8] = np.nan
    missing = np.isnan(enlarge(flow, fit.grid("bilinear"), 64, 64))
    assert missing[:, 32:36, 32:36].all()
    assert missing.sum() == 2 * 8 * 8
    assert np.isnan(enlarge(flow, fit.grid("nearest"), 64, 64)).sum() == 2 * 4 * 4
