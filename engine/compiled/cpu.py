"""Any of the networks on a CPU: oneDNN's packed convolutions, channels last, concatenations written in place.

``engine.models`` defines what each network computes; this computes the same, arranged for the caches. Two thirds of
FlowNet2's arithmetic is at low resolution, where oneDNN reaches the machine's limit by itself; the rest is limited by
memory, see ``convolution`` and ``buffers``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from flowreel.engine.compiled import Packed, Shape, plain, quarter_upsampling
from flowreel.engine.compiled.buffers import Buffers
from flowreel.engine.compiled.composed import HEAD, SMOOTHING, values_of
from flowreel.engine.compiled.convolution import Convolution, chained
from flowreel.engine.compiled.onednn import available
from flowreel.engine.compiled.smoothed import SmoothedHead
from flowreel.engine.config import Precision
from flowreel.engine.errors import PrecisionWarning
from flowreel.engine.models.flownetc import DISPLACEMENTS, FlowNetC
from flowreel.engine.models.flownetsd import FlowNetSD
from flowreel.engine.models.layers import FLOW_SCALE, SLOPE, FlowHead, Upsampling, folded, normalise, upsample
from flowreel.engine.models.stacks import (
    REFINING_CHANNELS,
    SD_SCALE_IN_FLOWNET2,
    FlowNet2CS,
    FlowNet2CSS,
    warped_and_error,
)
from flowreel.kernels import channel_norm, correlation

GROUP_PIXELS = 1 << 19  # of a frame, at a time: one pair of 1024x448, four of 256x512. More at once is no faster
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pack(net: nn.Module, precision: Precision) -> Packed:
    """The network's weights, packed; without oneDNN, a copy of the module."""
    dtype = _DTYPES[precision]
    if not available(dtype):
        if available(torch.float32):
            warnings.warn(
                f"this CPU has no instructions for {precision}: fp32 is many times faster here, and more accurate",
                PrecisionWarning,
                stacklevel=2,
            )
        return plain.pack(net, precision)
    return CpuNetwork(type(net), Layers.of(net, dtype), quarter_upsampling(net))


class CpuNetwork:
    """The packed network: its weights, and those of its programs still in use."""

    def __init__(self, kind: type[nn.Module], layers: Layers, upsampling: Upsampling | None) -> None:
        self._kind, self._layers, self._upsampling = kind, layers, upsampling
        self._programs: WeakValueDictionary[tuple[int, int], CpuProgram] = WeakValueDictionary()

    def program(self, shape: Shape) -> CpuProgram:
        """One for each height and width; the number of pairs does not matter."""
        made = CpuProgram(self._kind, replace(self._layers, buffers=Buffers()), self._upsampling)
        return self._programs.setdefault(shape[1:], made)


@dataclass(frozen=True)
class Layers:
    """The convolutions of a network or of a part of it, by their names in its state dict.

    In bfloat16 two kinds of layer stay float32: flow heads, as in the module, and the first layer of each network. Its
    input is exact, and bfloat16 would round it by a quarter of a grey level, or by .04 px of a flow of 20 px.
    """

    convolutions: Mapping[str, Convolution]
    smoothed: Mapping[str, SmoothedHead]  # by the head's name; the input is that of the smoothing layer
    buffers: Buffers
    dtype: torch.dtype

    @classmethod
    def of(cls, net: nn.Module, dtype: torch.dtype) -> Layers:
        modules = dict(folded(net).named_modules())
        found, smoothed = {}, {}
        for path, module in modules.items():
            inner = module[0] if isinstance(module, nn.Sequential) else module
            if not isinstance(inner, nn.Conv2d | nn.ConvTranspose2d) or path.endswith(".0"):
                continue
            if SMOOTHING in path:
                continue  # packed with its head
            before = modules.get(path.replace(HEAD, SMOOTHING))
            if HEAD in path and isinstance(before, nn.Sequential):
                smoothed[path] = SmoothedHead(values_of(before[0]), values_of(inner))
                continue
            leaky = isinstance(module, nn.Sequential) and isinstance(module[-1], nn.LeakyReLU)
            is_head = isinstance(inner, FlowHead)
            inside = torch.float32 if is_head or _is_first(net, path) else dtype
            gives = torch.float32 if is_head else dtype
            found[path] = Convolution(inner, leaky, inside, gives)
        return cls(found, smoothed, Buffers(), dtype)

    def part(self, name: str) -> Layers:
        """The layers of one network inside a stack."""
        start = f"{name}."
        convolutions = {
            key.removeprefix(start): layer for key, layer in self.convolutions.items() if key.startswith(start)
        }
        smoothed = {key.removeprefix(start): layer for key, layer in self.smoothed.items() if key.startswith(start)}
        return Layers(convolutions, smoothed, self.buffers, self.dtype)

    def __getitem__(self, name: str) -> Convolution:
        return self.convolutions[name]

    def __call__(self, x: Tensor, *names: str) -> Tensor:
        """Applies these layers in order; a head includes the smoothing layer before it."""
        for name in names:
            x = (self.smoothed.get(name) or self[name])(x, self.buffers)
        return x

    def side_by_side(self, *parts: Tensor | tuple[str, Tensor]) -> Tensor:
        """Concatenates channels, in the first part's dtype: a part is a tensor, or a layer's name and its input."""
        sizes = [p.shape[1] if isinstance(p, Tensor) else self[p[0]].outputs for p in parts]
        whole = parts[0]
        assert isinstance(whole, Tensor)
        batch, _, height, width = whole.shape
        out = self.buffers.empty(batch, sum(sizes), height, width, whole.dtype)
        for part, slot in zip(parts, torch.split(out, sizes, 1), strict=True):
            if isinstance(part, Tensor):
                slot.copy_(part)
            else:
                self[part[0]].into(slot, part[1], self.buffers)
        return out


def _is_first(net: nn.Module, path: str) -> bool:
    """Whether this is the first layer of its network: conv0, or conv1 in networks without conv0."""
    parent, _, name = path.rpartition(".")
    return name == "conv0" or (name == "conv1" and not hasattr(net.get_submodule(parent), "conv0"))


def refine(layers: Layers, encoded: dict[int, Tensor]) -> Tensor:
    """The last prediction of ``Refiner.refine``: (B, 2, H/4, W/4) float32, pixels / 20."""
    features = encoded[6]
    flow = layers(features, "predict_flow6")
    for level in (5, 4, 3, 2):
        up, grown = (f"deconv{level}", features), (f"upsampled_flow{level + 1}_to_{level}", flow)
        features = layers.side_by_side(encoded[level], up, grown)
        flow = layers(features, f"predict_flow{level}")
    return flow


def encode_on(layers: Layers, conv2: Tensor, conv3: Tensor) -> dict[int, Tensor]:
    """The rest of an encoder: beyond level 3 all are alike."""
    conv4 = layers(conv3, "conv4", "conv4_1")
    conv5 = layers(conv4, "conv5", "conv5_1")
    return {2: conv2, 3: conv3, 4: conv4, 5: conv5, 6: layers(conv5, "conv6", "conv6_1")}


def flownet_s(layers: Layers, x: Tensor) -> Tensor:
    """The last prediction of ``FlowNetS.predict``."""
    conv2 = layers(x, "conv1", "conv2")
    return refine(layers, encode_on(layers, conv2, layers(conv2, "conv3", "conv3_1")))


def flownet_sd(layers: Layers, x: Tensor) -> Tensor:
    """The last prediction of ``FlowNetSD.predict``."""
    conv1 = chained(layers["conv0"], layers["conv1"], x, layers.buffers)
    conv2 = layers(conv1, "conv1_1", "conv2", "conv2_1")
    return refine(layers, encode_on(layers, conv2, layers(conv2, "conv3", "conv3_1")))


def flownet_c(layers: Layers, x: Tensor) -> Tensor:
    """The last prediction of ``FlowNetC.predict``."""
    conv2 = layers(x[:, :3], "conv1", "conv2")
    first, second = layers(conv2, "conv3"), layers(x[:, 3:], "conv1", "conv2", "conv3")
    batch, _, height, width = first.shape
    sizes = [layers["conv_redir"].outputs, DISPLACEMENTS]
    concat = layers.buffers.empty(batch, sum(sizes), height, width, layers.dtype)
    redirected, matched = torch.split(concat, sizes, 1)
    layers["conv_redir"].into(redirected, first, layers.buffers)
    correlation(first, second, negative_slope=SLOPE, out=matched)
    return refine(layers, encode_on(layers, conv2, layers(concat, "conv3_1")))


def fuse(layers: Layers, x: Tensor) -> Tensor:
    """``FlowNetFusion``: (B, 11, H, W) to (B, 2, H, W) float32 pixels."""
    batch, _, height, width = x.shape
    sizes = [layers["conv0"].outputs, layers["deconv0"].outputs, 2]
    concat0 = layers.buffers.empty(batch, sum(sizes), height, width, layers.dtype)
    conv0, deconv0, up0 = torch.split(concat0, sizes, 1)
    conv1 = layers(chained(layers["conv0"], layers["conv1"], x, layers.buffers, keep=conv0), "conv1_1")
    conv2 = layers(conv1, "conv2", "conv2_1")
    flow2 = layers(conv2, "predict_flow2")
    concat1 = layers.side_by_side(conv1, ("deconv1", conv2), ("upsampled_flow2_to_1", flow2))
    flow1 = layers(concat1, "predict_flow1")
    layers["deconv0"].into(deconv0, concat1, layers.buffers)
    layers["upsampled_flow1_to_0"].into(up0, flow1, layers.buffers)
    return layers(concat0, "predict_flow0")


@dataclass(frozen=True)
class CpuProgram:
    """The network for frames of one size. Each layer prepares for an input size when it first meets it."""

    kind: type[nn.Module]
    layers: Layers
    upsampling: Upsampling | None

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        if self.upsampling is not None:
            return _enlarged(self.quarter(first, second), self.upsampling).contiguous()
        return _in_groups(self._fused, first, second)

    def quarter(self, first: Tensor, second: Tensor) -> Tensor:
        return _in_groups(self._quarter, first, second)

    def _fused(self, first: Tensor, second: Tensor) -> Tensor:
        x = normalise(first, second)
        flow_css = _enlarged(self._refined(x, "flownets_1", "flownets_2") * FLOW_SCALE, "nearest")
        flow_sd = _enlarged(flownet_sd(self.layers.part("flownets_d"), x) * SD_SCALE_IN_FLOWNET2, "nearest")
        _, error_css = warped_and_error(x, flow_css)
        _, error_sd = warped_and_error(x, flow_sd)
        parts = (x[:, :3], flow_sd, flow_css, channel_norm(flow_sd), channel_norm(flow_css), error_sd, error_css)
        return fuse(self.layers.part("flownetfusion"), self.layers.side_by_side(*parts))

    def _quarter(self, first: Tensor, second: Tensor) -> Tensor:
        x = normalise(first, second)
        if issubclass(self.kind, FlowNet2CSS):
            flow = self._refined(x, "flownets_1", "flownets_2")
        elif issubclass(self.kind, FlowNet2CS):
            flow = self._refined(x, "flownets_1")
        elif issubclass(self.kind, FlowNetC):
            flow = flownet_c(self.layers, x)
        elif issubclass(self.kind, FlowNetSD):
            flow = flownet_sd(self.layers, x)
        else:
            flow = flownet_s(self.layers, x)
        return flow * FLOW_SCALE

    def _refined(self, x: Tensor, *refiners: str) -> Tensor:
        """A stack's last prediction, pixels / 20."""
        flow = flownet_c(self.layers.part("flownetc"), x)
        batch, frames, height, width = x.shape
        refining = self.layers.buffers.empty(batch, REFINING_CHANNELS, height, width, x.dtype)
        refining[:, :frames] = x  # written once, for every refining network
        for name in refiners:
            full = _enlarged(flow * FLOW_SCALE, "bilinear")
            warped, error = warped_and_error(x, full)
            own = torch.split(refining[:, frames:], [3, 2, 1], 1)
            for part, value in zip(own, (warped, full / FLOW_SCALE, error), strict=True):
                part.copy_(value)
            flow = flownet_s(self.layers.part(name), refining)
        return flow


def _enlarged(flow2: Tensor, how: Upsampling) -> Tensor:
    return upsample(flow2.contiguous(), how)  # channels last, torch's upsampling takes four times as long


def _in_groups(form: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Runs a few pairs at a time, so that memory use does not grow with the batch."""
    pairs, _, height, width = first.shape
    most = max(1, GROUP_PIXELS // (height * width))
    if pairs <= most:
        return form(first, second).contiguous()
    groups = zip(torch.split(first, most), torch.split(second, most), strict=True)
    return torch.cat([form(*group).contiguous() for group in groups])  # else cat would keep channels last
