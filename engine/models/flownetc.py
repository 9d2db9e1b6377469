"""FlowNetC: both frames through one encoder, matched by a correlation layer (Fischer et al., ICCV 2015)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flowreel.engine.models.layers import SLOPE, Refiner, conv, initialise, scaled
from flowreel.kernels import correlation

REACH = 10  # displacements each way, 2 pixels apart at 1/8 resolution (16 pixels of the frame)
DISPLACEMENTS = (2 * REACH + 1) ** 2


class FlowNetC(Refiner):
    """Used alone it is FlowNet2C; the stacks call its ``predict``."""

    def __init__(self, *, batch_norm: bool = False, width: float = 1.0) -> None:
        super().__init__(width)

        def n(channels: int) -> int:
            return scaled(channels, width)

        self.conv1 = conv(3, n(64), 7, 2, batch_norm=batch_norm)
        self.conv2 = conv(n(64), n(128), 5, 2, batch_norm=batch_norm)
        self.conv3 = conv(n(128), n(256), 5, 2, batch_norm=batch_norm)
        self.conv_redir = conv(n(256), n(32), 1, batch_norm=batch_norm)
        self.conv3_1 = conv(n(32) + DISPLACEMENTS, n(256), batch_norm=batch_norm)
        self.add_coarse_levels(width, batch_norm)
        initialise(self)

    def match(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 6, H, W) normalised frames to the first one's features at 1/4 and 1/8, and (B, 441, H/8, W/8) costs."""
        conv2_first = self.conv2(self.conv1(x[:, :3]))
        conv3_first = self.conv3(conv2_first)
        conv3_second = self.conv3(self.conv2(self.conv1(x[:, 3:])))
        return conv2_first, conv3_first, correlation(conv3_first, conv3_second)

    def decode(self, conv2_first: Tensor, conv3_first: Tensor, costs: Tensor) -> tuple[Tensor, ...]:
        """The result of ``match`` to (flow2, ..., flow6) in pixels / 20."""
        matched = F.leaky_relu(costs, SLOPE)
        conv3 = self.conv3_1(torch.cat((self.conv_redir(conv3_first), matched), 1))
        return self.refine(self.encode_on(conv2_first, conv3))

    def predict(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 6, H, W) normalised frames to (flow2, ..., flow6) in pixels / 20."""
        return self.decode(*self.match(x))
