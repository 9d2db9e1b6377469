"""The losses, on cases that can be computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from flowreel.engine.models.flownetc import DISPLACEMENTS, REACH
from flowreel.engine.training.loss import (
    end_point_error,
    matching_loss,
    multi_scale_loss,
    zero_flow_error,
)


def test_end_point_error_of_a_3_4_5_triangle() -> None:
    flow, truth = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    truth[:, 0], truth[:, 1] = 3, 4
    assert end_point_error(flow, truth).item() == pytest.approx(5)
    assert zero_flow_error(truth).item() == pytest.approx(5)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert end_point_error(flow, truth, mask).item() == 0
    mask[0, 0, 0] = True
    truth[:, :, 1:] = 100
    assert end_point_error(flow, truth, mask).item() == pytest.approx(5)


def test_multi_scale_is_zero_at_the_truth_and_grows_with_the_error() -> None:
    truth = torch.full((2, 2, 64, 128), 10.0)
    mask = torch.ones(2, 64, 128, dtype=torch.bool)
    right = tuple(torch.full((2, 2, 64 >> level, 128 >> level), 0.5) for level in (2, 3, 4, 5, 6))
    assert multi_scale_loss(right, truth, mask).item() == pytest.approx(0, abs=1e-4)
    off = tuple(flow + torch.tensor([0.3, 0.4]).view(1, 2, 1, 1) for flow in right)
    assert multi_scale_loss(off, truth, mask).item() == pytest.approx(0.5 * 9, rel=1e-4)


def test_what_is_masked_counts_at_no_scale() -> None:
    truth = torch.full((1, 2, 64, 64), 10.0)
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    mask[:, :, 32:] = False
    truth[:, :, :, 32:] = 1e4
    right = tuple(torch.full((1, 2, 64 >> level, 64 >> level), 0.5) for level in (2, 3, 4, 5, 6))
    assert multi_scale_loss(right, truth, mask).item() == pytest.approx(0, abs=1e-3)


def shifted_costs(dx: int, dy: int, sharpness: float) -> torch.Tensor:
    """A cost volume in which every pixel matches best at (dx, dy), in steps of the displacement."""
    costs = torch.zeros(1, DISPLACEMENTS, 8, 8)
    costs[:, (dy + REACH) * (2 * REACH + 1) + dx + REACH] = sharpness
    return costs


def test_matching_is_sure_where_the_right_displacement_stands_out() -> None:
    truth = torch.zeros(1, 2, 64, 64)
    truth[:, 0], truth[:, 1] = 3 * 16, -2 * 16
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    assert matching_loss(torch.zeros(1, DISPLACEMENTS, 8, 8), truth, mask).item() == pytest.approx(
        math.log(441), rel=1e-4
    )
    assert matching_loss(shifted_costs(3, -2, 2.0), truth, mask).item() < 1e-3
    assert matching_loss(shifted_costs(-2, 3, 2.0), truth, mask).item() > 10
    truth[:, 0] += 8  # half way to the next displacement: half the truth lies there
    assert matching_loss(shifted_costs(3, -2, 2.0), truth, mask).item() == pytest.approx(20, rel=1e-3)


def test_matching_ignores_what_cannot_be_matched() -> None:
    truth = torch.full((1, 2, 64, 64), 1000.0)
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    assert matching_loss(torch.rand(1, DISPLACEMENTS, 8, 8), truth, mask).item() == 0
    assert matching_loss(torch.rand(1, DISPLACEMENTS, 8, 8), torch.zeros_like(truth), ~mask).item() == 0
