"""The fusion network that joins FlowNet2's large- and small-displacement flows at full resolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowreel.engine.models.layers import FlowHead, UpsampledFlow, conv, deconv, initialise, inter_conv, scaled

FUSING_CHANNELS = 11  # first frame 3, both flows 4, their magnitudes 2, both brightness errors 2


class FlowNetFusion(nn.Module):
    """Ilg et al., "FlowNet 2.0" (CVPR 2017), section 4."""

    def __init__(self, *, batch_norm: bool = False, width: float = 1.0) -> None:
        super().__init__()

        def n(channels: int) -> int:
            return scaled(channels, width)

        self.conv0 = conv(FUSING_CHANNELS, n(64), batch_norm=batch_norm)
        self.conv1 = conv(n(64), n(64), stride=2, batch_norm=batch_norm)
        self.conv1_1 = conv(n(64), n(128), batch_norm=batch_norm)
        self.conv2 = conv(n(128), n(128), stride=2, batch_norm=batch_norm)
        self.conv2_1 = conv(n(128), n(128), batch_norm=batch_norm)
        self.deconv1 = deconv(n(128), n(32))
        concat1 = n(128) + n(32) + 2
        self.deconv0 = deconv(concat1, n(16))
        concat0 = n(64) + n(16) + 2
        self.inter_conv1 = inter_conv(concat1, n(32), batch_norm=batch_norm)
        self.inter_conv0 = inter_conv(concat0, n(16), batch_norm=batch_norm)
        self.predict_flow2 = FlowHead(n(128))
        self.predict_flow1 = FlowHead(n(32))
        self.predict_flow0 = FlowHead(n(16))
        self.upsampled_flow2_to_1 = UpsampledFlow()
        self.upsampled_flow1_to_0 = UpsampledFlow()
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """The (B, 11, H, W) input to (B, 2, H, W) pixels."""
        conv0 = self.conv0(x)
        conv1 = self.conv1_1(self.conv1(conv0))
        conv2 = self.conv2_1(self.conv2(conv1))
        flow2 = self.predict_flow2(conv2)
        concat1 = torch.cat((conv1, self.deconv1(conv2), self.upsampled_flow2_to_1(flow2)), 1)
        flow1 = self.predict_flow1(self.inter_conv1(concat1))
        concat0 = torch.cat((conv0, self.deconv0(concat1), self.upsampled_flow1_to_0(flow1)), 1)
        flow0: Tensor = self.predict_flow0(self.inter_conv0(concat0))
        return flow0
