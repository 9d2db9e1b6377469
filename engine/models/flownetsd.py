"""FlowNetSD: FlowNetS for small displacements, with smaller kernels and a smoothed decoder (Ilg et al., CVPR 2017)."""

from __future__ import annotations

from torch import Tensor

from flowreel.engine.models.layers import Refiner, conv, initialise, scaled


class FlowNetSD(Refiner):
    """Used alone it is FlowNet2SD; FlowNet2 calls its ``predict``."""

    def __init__(self, *, batch_norm: bool = False, width: float = 1.0) -> None:
        super().__init__(width, smooth=True, batch_norm=batch_norm)

        def n(channels: int) -> int:
            return scaled(channels, width)

        self.conv0 = conv(6, n(64), batch_norm=batch_norm)
        self.conv1 = conv(n(64), n(64), stride=2, batch_norm=batch_norm)
        self.conv1_1 = conv(n(64), n(128), batch_norm=batch_norm)
        self.conv2 = conv(n(128), n(128), stride=2, batch_norm=batch_norm)
        self.conv2_1 = conv(n(128), n(128), batch_norm=batch_norm)
        self.conv3 = conv(n(128), n(256), stride=2, batch_norm=batch_norm)
        self.conv3_1 = conv(n(256), n(256), batch_norm=batch_norm)
        self.add_coarse_levels(width, batch_norm)
        initialise(self)

    def predict(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 6, H, W) normalised frames to (flow2, ..., flow6) in pixels / 20."""
        conv1 = self.conv1_1(self.conv1(self.conv0(x)))
        conv2 = self.conv2_1(self.conv2(conv1))
        conv3 = self.conv3_1(self.conv3(conv2))
        return self.refine(self.encode_on(conv2, conv3))
