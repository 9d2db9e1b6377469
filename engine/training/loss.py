"""The losses that networks are trained with, and the end-point error that they are judged by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flowreel.engine.models.flownetc import REACH
from flowreel.engine.models.layers import FLOW_SCALE

LEVEL_WEIGHTS = (4.0, 2.0, 1.0, 1.0, 1.0)  # flow2 ... flow6: the finest counts most, the coarse ones guide
MATCHING_SHARPNESS = 20.0  # logits per unit of cost: enough for features of unit magnitude to tell matches apart
EPSILON = 1e-6  # keeps the gradient of the norm finite where a prediction is exact


def end_point_error(flow: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean Euclidean distance in the units of ``flow``.

    Args:
        flow, truth: (B, 2, H, W).
        mask: (B, H, W), true for pixels that count; None: all count.

    Returns:
        A scalar tensor; 0 if no pixel counts.
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
        mask: (B, H, W), true for pixels that count; the weight of a coarse pixel is the share of its pixels that do.
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


def matching_loss(costs: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """How reliably the correlation layer alone finds the match: cross-entropy over its displacements.

    It trains the encoder of FlowNetC directly for matching, above all to give features of equal magnitude everywhere:
    the correlation does not normalise, so a wrong match of large features beats a right one of small features.

    Args:
        costs: (B, 441, H/8, W/8), the cost volume of the correlation layer.
        truth: (B, 2, H, W) pixels.
        mask: (B, H, W), true where the match is visible in the second frame.

    Returns:
        A scalar; 6.1 if all displacements have equal costs. A truth between displacements is split bilinearly.
    """
    cell = 8 * 2  # pixels of the frame between neighbouring displacements
    # Output i of three convolutions of stride 2 is centred on pixel 8 i.
    place = truth[:, :, ::8, ::8] / cell + REACH
    corner = place.floor()
    counts = mask[:, ::8, ::8] & ((corner >= 0) & (corner < 2 * REACH)).all(1)
    corner = corner.clamp(0, 2 * REACH - 1)
    share = place - corner
    surety = F.log_softmax(costs.float() * MATCHING_SHARPNESS, 1)
    total = torch.zeros_like(share[:, 0])
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = corner[:, 0] + dx, corner[:, 1] + dy
            weight = (share[:, 0] if dx else 1 - share[:, 0]) * (share[:, 1] if dy else 1 - share[:, 1])
            chosen = (y * (2 * REACH + 1) + x).long().unsqueeze(1)
            total = total - weight * surety.gather(1, chosen)[:, 0]
    return (total * counts).sum() / counts.sum().clamp(min=1)


def zero_flow_error(truth: Tensor) -> Tensor:
    """The end-point error of predicting no motion, which any network has to beat."""
    return end_point_error(torch.zeros_like(truth), truth)
