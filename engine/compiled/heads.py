"""Flow heads on padded half-precision maps, by our own kernel, which includes the smoothing layer before some heads.

Maps and weights are rounded to half precision as in other layers; sums and the flow are float32. Half precision for the
flow itself would cost .04 px at 40 px of motion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowreel.engine.compiled.composed import HEAD, SMOOTHING, composed, values_of
from flowreel.engine.compiled.padded import DTYPES, Convolution, pack_layer, padded
from flowreel.engine.config import Precision
from flowreel.engine.models.layers import FlowHead, folded
from flowreel.kernels.flow_head import Borders, flow_head, pack_flow_head, take_off_borders_


@dataclass(frozen=True)
class Head:
    """A head, or a smoothing layer and its head."""

    weight: Tensor  # packed, in the dtype of the maps
    bias: Tensor  # (2,) float32
    borders: Borders | None  # of the composed layer, for padded channels; None: a head alone

    def __call__(self, x: Tensor) -> Tensor:
        """A padded map to (B, 2, H, W) float32, pixels / 20."""
        flow = flow_head(x, self.weight, self.bias)
        return flow if self.borders is None else take_off_borders_(flow, x, self.borders)


Layers = dict[str, Convolution | Head]


def pack_part(part: nn.Module, precision: Precision) -> Layers:
    """The layers of C, S, SD or the fusion network. In half precision, smoothing layers are part of their heads."""
    part, dtype = folded(part), DTYPES[precision]
    if dtype == torch.float32:
        return {name: pack_layer(layer, precision) for name, layer in part.named_children()}
    layers = Layers()
    for name, layer in part.named_children():
        if isinstance(layer, FlowHead):
            layers[name] = _head(layer, getattr(part, name.replace(HEAD, SMOOTHING), None), dtype)
        elif not name.startswith(SMOOTHING):
            layers[name] = pack_layer(layer, precision)
    return layers


def _head(head: FlowHead, smoothing: nn.Sequential | None, dtype: torch.dtype) -> Head:
    weight, bias = values_of(head)
    if smoothing is None:
        return Head(pack_flow_head(weight, dtype), bias.float(), None)
    smooth_weight, smooth_bias = values_of(smoothing[0])
    whole = composed((_padded(smooth_weight), smooth_bias), (weight, bias))
    return Head(pack_flow_head(whole.weight, dtype), whole.bias, whole.borders)


def _padded(weight: Tensor) -> Tensor:
    """(M, C, 3, 3) with C padded to that of the maps."""
    channels = weight.shape[1]
    return F.pad(weight, (0, 0, 0, 0, 0, padded(channels) - channels))
