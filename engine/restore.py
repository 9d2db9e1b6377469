"""Fits frames to the networks' multiple of 64, and the flow back to the frames: one object does both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from flowreel.engine.config import FitMode
from flowreel.engine.data import FlowBatch, NativeGrid
from flowreel.engine.errors import UsageError
from flowreel.engine.models.layers import STRIDE, Upsampling

PREDICTED_AT = 4  # the networks' last prediction has a quarter of their input's height and width


@dataclass(frozen=True)
class Fit:
    """How frames of one size are made to fit the networks.

    pad:    edges are replicated up to the next multiple, as evenly as possible on both sides; flow is cropped back,
            exactly.
    crop:   frames are cropped in the centre to a multiple; flow has that size (flownet2-pytorch's way).
    resize: frames are resized to the nearest multiple; flow is resized back, and its vectors scaled with it.
    """

    mode: FitMode
    height: int  # pixels of a frame
    width: int

    def __post_init__(self) -> None:
        if self.mode == "crop" and min(self.height, self.width) < STRIDE:
            raise UsageError(
                f"fit=crop needs frames of at least {STRIDE}x{STRIDE} pixels, these are "
                f"{self.width}x{self.height}: use fit=pad"
            )

    @property
    def network_size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        if self.mode == "pad":
            return -(-self.height // STRIDE) * STRIDE, -(-self.width // STRIDE) * STRIDE
        if self.mode == "crop":
            return self.height // STRIDE * STRIDE, self.width // STRIDE * STRIDE
        return _nearest(self.height), _nearest(self.width)

    @property
    def flow_size(self) -> tuple[int, int]:
        """(height, width) of the resulting flow."""
        return self.network_size if self.mode == "crop" else (self.height, self.width)

    def apply(self, frames: Tensor) -> Tensor:
        """(N, 3, height, width) float to (N, 3, *network_size)."""
        height, width = self.network_size
        if (height, width) == (self.height, self.width):
            return frames
        if self.mode == "resize":
            return F.interpolate(frames, (height, width), mode="bilinear", align_corners=False, antialias=True)
        top, left = self._margins()
        if self.mode == "crop":
            return frames[:, :, top : top + height, left : left + width]
        return F.pad(frames, (left, width - self.width - left, top, height - self.height - top), mode="replicate")

    def undo(self, flow: Tensor) -> Tensor:
        """(N, 2, *network_size) in the network's pixels to (N, 2, *flow_size) in the frame's pixels."""
        height, width = self.network_size
        if self.mode == "crop" or (height, width) == (self.height, self.width):
            return flow
        if self.mode == "resize":
            flow = F.interpolate(flow, (self.height, self.width), mode="bilinear", align_corners=False)
            return _scaled(flow, self.width / width, self.height / height)
        top, left = self._margins()
        return flow[:, :, top : top + self.height, left : left + self.width]

    def undo_native(self, native: Tensor) -> Tensor:
        """(N, 2, h, w) native prediction, from pixels of the network's input to pixels of the frame."""
        if self.mode != "resize":
            return native
        height, width = self.network_size
        return _scaled(native, self.width / width, self.height / height)

    def grid(self, upsampling: Upsampling) -> NativeGrid:
        """How the network's native prediction, upsampled as stated, maps to the flow that ``undo`` gives."""
        height, width = (side // PREDICTED_AT for side in self.network_size)
        top, left = self._margins() if self.mode == "pad" else (0, 0)
        return NativeGrid(height, width, PREDICTED_AT, upsampling, self.mode, top, left)

    def _margins(self) -> tuple[int, int]:
        height, width = self.network_size
        return abs(height - self.height) // 2, abs(width - self.width) // 2


def restore(fit: Fit) -> Callable[[Iterator[FlowBatch]], Iterator[FlowBatch]]:
    """A stage: flow at the network's size to flow in pixels of the source frame."""

    def stage(batches: Iterator[FlowBatch]) -> Iterator[FlowBatch]:
        for batch in batches:
            native = None if batch.native is None else fit.undo_native(batch.native)
            yield replace(batch, flow=fit.undo(batch.flow), native=native)

    return stage


def _scaled(flow: Tensor, x: float, y: float) -> Tensor:
    """Vectors stretched by plain numbers: a tensor of them would be copied to a GPU only after all its work so far."""
    return torch.stack([flow[:, 0] * x, flow[:, 1] * y], 1)


def _nearest(size: int) -> int:
    return max(STRIDE, round(size / STRIDE) * STRIDE)
