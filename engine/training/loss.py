"""The losses networks are trained with, and the measure they are judged by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flowreel.engine.models.layers import FLOW_SCALE

LEVEL_WEIGHTS = (4.0, 2.0, 1.0, 1.0, 1.0)  # flow2 ... flow6: the finest counts most, the coarse ones guide
EPSILON = 1e-6  # keeps the gradient of the norm finite where a prediction is exact


def end_point_error(flow: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean Euclidean distance in the units of ``flow``.

    Args:
        flow, truth: (B, 2, H, W).
        mask: (B, H, W), true where it counts; None: everywhere.

    Returns:
        A scalar tensor; 0 when nothing counts.
    """
    distance = ((flow - truth).square().sum(1) + EPSILON**2).sqrt()
    if mask is None:
        return distance.mean()
    weight = mask.to(distance.dtype)
    return (distance * weight).sum() / weight.sum().clamp(min=1)


def multi_scale_loss(flows: tuple[Tensor, ...], truth: Tensor, mask: Tensor) -> Tensor:
    """Weighted end-point errors of (flow2, ..., flow6), each against the truth averaged to its resolution.

    Args:
        flows: predictions in pixels / 20, from 1/4 to 1/64 resolution (Fischer et al., ICCV 2015).
        truth: (B, 2, H, W) pixels.
        mask: (B, H, W), true where the truth counts; a coarse pixel counts as far as the fine ones below it do.
    """
    weight = mask.unsqueeze(1).to(truth.dtype)
    total = truth.new_zeros(())
    for flow, level_weight in zip(flows, LEVEL_WEIGHTS, strict=True):
        factor = truth.shape[-1] // flow.shape[-1]
        share = F.avg_pool2d(weight, factor)
        target = F.avg_pool2d(truth * weight, factor) / share.clamp(min=EPSILON) / FLOW_SCALE
        distance = ((flow.float() - target).square().sum(1, keepdim=True) + EPSILON**2).sqrt()
        total = total + level_weight * (distance * share).sum() / share.sum().clamp(min=1)
    return total


def outliers(flow: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of pixels off by more than 3 px and by more than 5 % of the true motion (KITTI's Fl)."""
    distance = (flow - truth).square().sum(1).sqrt()
    wrong = (distance > 3) & (distance > 0.05 * truth.square().sum(1).sqrt())
    return wrong.float().mean() if mask is None else wrong[mask].float().mean()


def zero_flow_error(truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """The end-point error of predicting no motion at all: what any network has to beat."""
    return end_point_error(torch.zeros_like(truth), truth, mask)
