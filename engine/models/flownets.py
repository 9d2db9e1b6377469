"""FlowNetS: both frames stacked into one plain encoder-decoder (Fischer et al., ICCV 2015)."""

from __future__ import annotations

from torch import Tensor

from flowreel.engine.models.layers import Refiner, conv, initialise, scaled


class FlowNetS(Refiner):
    """Used alone (6 input channels) it is FlowNet2S; with 12 it refines another network's flow inside the stacks."""

    def __init__(self, *, batch_norm: bool = False, width: float = 1.0, input_channels: int = 6) -> None:
        super().__init__(width, upsampled_bias=False)

        def n(channels: int) -> int:
            return scaled(channels, width)

        self.conv1 = conv(input_channels, n(64), 7, 2, batch_norm=batch_norm)
        self.conv2 = conv(n(64), n(128), 5, 2, batch_norm=batch_norm)
        self.conv3 = conv(n(128), n(256), 5, 2, batch_norm=batch_norm)
        self.conv3_1 = conv(n(256), n(256), batch_norm=batch_norm)
        self.add_coarse_levels(width, batch_norm)
        initialise(self)

    def predict(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 6 or 12, H, W) normalised input to (flow2, ..., flow6) in pixels / 20."""
        conv2 = self.conv2(self.conv1(x))
        conv3 = self.conv3_1(self.conv3(conv2))
        return self.refine(self.encode_on(conv2, conv3))
