"""The building blocks every FlowNet shares, and the two scale changes of their inputs and outputs.

State-dict keys follow flownet2-pytorch: a layer is a ``Sequential`` whose ``0`` is the convolution and whose ``1``,
with BatchNorm, is the normalisation. Networks: Fischer et al., "FlowNet" (ICCV 2015), and Ilg et al.,
"FlowNet 2.0" (CVPR 2017).
"""

from __future__ import annotations

from copy import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

FLOW_SCALE = 20.0  # networks predict pixels / 20, so that predictions are of order one
RGB_MAX = 255.0
SLOPE = 0.1  # negative slope of every LeakyReLU
STRIDE = 64  # six halvings: heights and widths are multiples of this

Upsampling = Literal["bilinear", "nearest"]


def scaled(channels: int, width: float) -> int:
    """Channels of a layer at a width factor; 1.0 is the published network."""
    return max(1, round(channels * width))


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, batch_norm: bool = False) -> nn.Sequential:
    """Convolution + LeakyReLU. With ``batch_norm``, BatchNorm between the two replaces the convolution's bias."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not batch_norm)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers, nn.LeakyReLU(SLOPE, inplace=True))


def inter_conv(inputs: int, outputs: int, *, batch_norm: bool = False) -> nn.Sequential:
    """3x3 convolution without activation; it keeps its bias under BatchNorm, as the published one does."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, 1, 1)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers)


def deconv(inputs: int, outputs: int) -> nn.Sequential:
    """Transposed convolution that doubles height and width, + LeakyReLU; never BatchNorm."""
    return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(SLOPE, inplace=True))


class FlowHead(nn.Conv2d):
    """3x3 convolution to two channels: flow in pixels / 20 of the full frame, at this level's resolution.

    Always computed in float32 or wider, whatever autocast and the weights' dtype: half precision costs .04 px here at
    40 px of motion.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(x.device.type, enabled=False):
            flow: Tensor = self._conv_forward(x.to(wide), self.weight.to(wide), bias)
            return flow


class UpsampledFlow(nn.ConvTranspose2d):
    """Learned 2x upsampling of a flow field, without activation. Casts the flow, float32, to the weights' dtype."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(2, 2, 4, 2, 1, bias=bias)

    def forward(self, flow: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(flow.to(self.weight.dtype), output_size)


def normalise(first: Tensor, second: Tensor) -> Tensor:
    """Two RGB frames to the networks' input.

    Args:
        first, second: (B, 3, H, W) float, 0..255; H and W multiples of 64.

    Returns:
        (B, 6, H, W): both frames, minus one mean per sample and channel *over the two together*, divided by 255.

    Raises:
        TypeError: the frames are not floating point.
        ValueError: shapes differ, or are not multiples of 64.
    """
    if not (first.is_floating_point() and second.is_floating_point()):
        raise TypeError(f"expected floating point frames, got {first.dtype} and {second.dtype}: call .float() first")
    if first.shape != second.shape or first.ndim != 4 or first.shape[1] != 3:
        raise ValueError(f"expected two (B, 3, H, W) tensors of one shape, got {_shape(first)} and {_shape(second)}")
    height, width = first.shape[2:]
    if height % STRIDE or width % STRIDE or height == 0 or width == 0:
        raise ValueError(f"height and width must be multiples of {STRIDE}, got {height}x{width}: pad or crop first")
    mean = (first.mean((2, 3), keepdim=True) + second.mean((2, 3), keepdim=True)) / 2
    return torch.cat((first, second), 1).sub_(mean.repeat(1, 2, 1, 1)).div_(RGB_MAX)  # in place: one tensor, not four


def upsample(flow2: Tensor, mode: Upsampling) -> Tensor:
    """A quarter-resolution field to full resolution, with half-pixel centres as in Caffe; values are not scaled."""
    if mode == "nearest":
        return F.interpolate(flow2, scale_factor=4, mode="nearest")
    return F.interpolate(flow2, scale_factor=4, mode="bilinear", align_corners=False)


def to_pixels(flow2: Tensor, mode: Upsampling) -> Tensor:
    """A network's last prediction (pixels / 20, quarter resolution) to full-resolution pixels."""
    return upsample(flow2 * FLOW_SCALE, mode)


class Refiner(nn.Module):
    """What FlowNetC, FlowNetS and FlowNetSD share: the coarse levels, the decoder, and the interface when used alone.

    The decoder predicts flow at each level from 6 (1/64) to 2 (1/4). The next finer level's input is
    concat(skip, deconv, upsampled flow): the encoder's features there, then the upsampled features and flow.
    FlowNetSD predicts from an extra convolution of that concatenation (``inter_conv``).
    """

    final: Upsampling = "bilinear"  # of the last, quarter-resolution prediction to full resolution

    def __init__(self, width: float, *, upsampled_bias: bool = True, smooth: bool = False, batch_norm: bool = False):
        super().__init__()
        self.smooth = smooth
        skip = {5: scaled(512, width), 4: scaled(512, width), 3: scaled(256, width), 2: scaled(128, width)}
        up = {5: scaled(512, width), 4: scaled(256, width), 3: scaled(128, width), 2: scaled(64, width)}
        channels = {6: scaled(1024, width)} | {level: skip[level] + up[level] + 2 for level in skip}
        for level in (5, 4, 3, 2):
            self.add_module(f"deconv{level}", deconv(channels[level + 1], up[level]))
            self.add_module(f"upsampled_flow{level + 1}_to_{level}", UpsampledFlow(upsampled_bias))
            if smooth:
                self.add_module(f"inter_conv{level}", inter_conv(channels[level], up[level], batch_norm=batch_norm))
        for level in (6, 5, 4, 3, 2):
            inputs = up[level] if smooth and level < 6 else channels[level]
            self.add_module(f"predict_flow{level}", FlowHead(inputs))

    def add_coarse_levels(self, width: float, batch_norm: bool) -> None:
        """The encoder from level 4 on, where all three are alike."""
        for level, inputs, outputs in ((4, 256, 512), (5, 512, 512), (6, 512, 1024)):
            inputs, outputs = scaled(inputs, width), scaled(outputs, width)
            self.add_module(f"conv{level}", conv(inputs, outputs, stride=2, batch_norm=batch_norm))
            self.add_module(f"conv{level}_1", conv(outputs, outputs, batch_norm=batch_norm))

    def encode_on(self, conv2: Tensor, conv3: Tensor) -> dict[int, Tensor]:
        """The encoder's features at levels 2 and 3 to those at all levels, as ``refine`` takes them."""
        encoded = {2: conv2, 3: conv3}
        for level in (4, 5, 6):
            halved = self.get_submodule(f"conv{level}")(encoded[level - 1])
            encoded[level] = self.get_submodule(f"conv{level}_1")(halved)
        return encoded

    def predict(self, x: Tensor) -> tuple[Tensor, ...]:
        """A network's normalised input to (flow2, ..., flow6) in pixels / 20."""
        raise NotImplementedError

    def quarter(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, 3, H, W) RGB 0..255 twice to the network's own (B, 2, H/4, W/4) flow, pixels of the full frame."""
        return self.predict(normalise(first, second))[0] * FLOW_SCALE

    def forward(self, first: Tensor, second: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(B, 3, H, W) RGB 0..255 twice to (B, 2, H, W) pixels; in training mode to (flow2, ..., flow6) / 20."""
        if self.training:
            return self.predict(normalise(first, second))
        return upsample(self.quarter(first, second), self.final)

    def refine(self, encoded: dict[int, Tensor]) -> tuple[Tensor, ...]:
        """Encoder features by level, (B, C, H/2^level, W/2^level), to (flow2, ..., flow6) in pixels / 20."""
        features = encoded[6]
        flow = self.get_submodule("predict_flow6")(features)
        flows = [flow]
        for level in (5, 4, 3, 2):
            upsampled_flow = self.get_submodule(f"upsampled_flow{level + 1}_to_{level}")(flow)
            upsampled = self.get_submodule(f"deconv{level}")(features)
            features = torch.cat((encoded[level], upsampled, upsampled_flow), 1)
            seen = self.get_submodule(f"inter_conv{level}")(features) if self.smooth else features
            flow = self.get_submodule(f"predict_flow{level}")(seen)
            flows.append(flow)
        return tuple(reversed(flows))


def initialise(model: nn.Module) -> None:
    """He initialisation for LeakyReLU, zero biases; flow heads start at almost no motion.

    Heads initialised at full scale predict noise, which the first steps suppress by driving the features to zero; and a
    correlation of zero features has no gradient from which training could recover.
    """
    for module in model.modules():
        if isinstance(module, FlowHead):
            nn.init.normal_(module.weight, std=1e-3)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
        elif isinstance(module, nn.ConvTranspose2d):
            # Each output pixel of a 4x4, stride 2 deconvolution sees 4 of the 16 taps.
            fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1] / 4
            nn.init.normal_(module.weight, std=(2 / ((1 + SLOPE**2) * fan_in)) ** 0.5)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def folded(net: nn.Module) -> nn.Module:
    """What the network computes in evaluation mode, with BatchNorm folded into the convolutions before it.

    The network is left as it is, and shares all other tensors with the result. Without BatchNorm it is the result.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        return net
    if isinstance(net, nn.Sequential):
        convolution, norm, *others = net
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        return nn.Sequential(fuse_conv_bn_eval(copy(convolution).eval(), copy(norm).eval()), *others)
    own = copy(net)  # not deepcopy, which fails where a user's attribute cannot be copied
    own._modules = {name: child and folded(child) for name, child in net._modules.items()}
    return own


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
