"""The stacks of FlowNet 2.0 (Ilg et al., CVPR 2017): each network refines the flow of the one before it.

FlowNet2CS   C -> S
FlowNet2CSS  C -> S -> S
FlowNet2     C -> S -> S, and SD in parallel, joined by the fusion network
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowreel.engine.models.flownetc import FlowNetC
from flowreel.engine.models.flownets import FlowNetS
from flowreel.engine.models.flownetsd import FlowNetSD
from flowreel.engine.models.fusion import FlowNetFusion
from flowreel.engine.models.layers import FLOW_SCALE, Upsampling, normalise, to_pixels, upsample
from flowreel.kernels import channel_norm, warp

REFINING_CHANNELS = 12  # frames 6, warped second frame 3, flow 2, brightness error 1

# NVIDIA's FlowNet2 divides its small-displacement flow by 20 where every other network multiplies. The weights were
# converted for that code, so it stays; it is one constant so that it can be questioned in one place.
SD_SCALE_IN_FLOWNET2 = 1 / FLOW_SCALE


def warped_and_error(x: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """The second frame warped by ``flow`` (B, 3, H, W), and its brightness error against the first (B, 1, H, W)."""
    warped = warp(x[:, 3:], flow)
    return warped, channel_norm(x[:, :3] - warped)


def refining_input(x: Tensor, flow: Tensor) -> Tensor:
    """(B, 6, H, W) frames and (B, 2, H, W) flow in pixels to the (B, 12, H, W) input of the next network."""
    warped, error = warped_and_error(x, flow)
    return torch.cat((x, warped, flow / FLOW_SCALE, error), 1).to(x.dtype)  # flow may be of a wider dtype than x


class FlowNet2CS(nn.Module):
    """C, refined once by S. ``final``: how the last quarter-resolution prediction is upsampled to full resolution."""

    final: Upsampling = "bilinear"

    def __init__(self, *, batch_norm: bool = False, width: float = 1.0) -> None:
        super().__init__()
        self.flownetc = FlowNetC(batch_norm=batch_norm, width=width)
        self.flownets_1 = FlowNetS(batch_norm=batch_norm, width=width, input_channels=REFINING_CHANNELS)

    def predict(self, x: Tensor) -> Tensor:
        """(B, 6, H, W) normalised frames to the last network's (B, 2, H/4, W/4) prediction in pixels / 20."""
        flow = to_pixels(self.flownetc.predict(x)[0], "bilinear")
        return self.flownets_1.predict(refining_input(x, flow))[0]

    def quarter(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, 3, H, W) RGB 0..255 twice to the last network's (B, 2, H/4, W/4) flow, pixels of the full frame."""
        return self.predict(normalise(first, second)) * FLOW_SCALE

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, 3, H, W) RGB 0..255 twice to (B, 2, H, W) pixels, in training mode too."""
        return upsample(self.quarter(first, second), self.final)


class FlowNet2CSS(FlowNet2CS):
    """C, refined twice by S; the last upsampling is nearest-neighbour."""

    final: Upsampling = "nearest"

    def __init__(self, *, batch_norm: bool = False, width: float = 1.0) -> None:
        super().__init__(batch_norm=batch_norm, width=width)
        self.flownets_2 = FlowNetS(batch_norm=batch_norm, width=width, input_channels=REFINING_CHANNELS)

    def predict(self, x: Tensor) -> Tensor:
        """(B, 6, H, W) normalised frames to the last network's (B, 2, H/4, W/4) prediction in pixels / 20."""
        flow = to_pixels(super().predict(x), "bilinear")
        return self.flownets_2.predict(refining_input(x, flow))[0]


class FlowNet2(FlowNet2CSS):
    """CSS for large motion and SD for small, fused at full resolution: its flow has no quarter-resolution form."""

    def __init__(self, *, batch_norm: bool = False, width: float = 1.0) -> None:
        super().__init__(batch_norm=batch_norm, width=width)
        self.flownets_d = FlowNetSD(batch_norm=batch_norm, width=width)
        self.flownetfusion = FlowNetFusion(batch_norm=batch_norm, width=width)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, 3, H, W) RGB 0..255 twice to (B, 2, H, W) pixels, in training mode too."""
        x = normalise(first, second)
        flow_css = to_pixels(self.predict(x), "nearest")
        flow_sd = upsample(self.flownets_d.predict(x)[0] * SD_SCALE_IN_FLOWNET2, "nearest")
        _, error_css = warped_and_error(x, flow_css)
        _, error_sd = warped_and_error(x, flow_sd)
        parts = (x[:, :3], flow_sd, flow_css, channel_norm(flow_sd), channel_norm(flow_css), error_sd, error_css)
        fused: Tensor = self.flownetfusion(torch.cat(parts, 1).to(x.dtype))
        return fused
