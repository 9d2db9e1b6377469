"""Checks that the kernels are right, at the sizes they have in the networks, in every dtype and layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import kernels as cases
from benchmarks.gpu.findings import Findings, Settings
from flowreel.engine.compiled.padded import convolve, pack_layer, padded
from flowreel.kernels import bitshuffle, channel_norm, correlation, flow_to_color, quantise, warp, yuv_to_rgb
from flowreel.kernels.bias_leaky_relu import bias_leaky_relu_, bias_leaky_relu_in_place_definition
from flowreel.kernels.bitshuffle import bitshuffle_definition
from flowreel.kernels.channel_norm import channel_norm_definition
from flowreel.kernels.correlation import correlation_definition
from flowreel.kernels.enlarge_flow import enlarge_flow, enlarge_flow_definition
from flowreel.kernels.flow_head import (
    Borders,
    flow_head,
    pack_flow_head,
    take_off_borders_,
    take_off_borders_definition,
    unpack_flow_head,
)
from flowreel.kernels.fusing_input import fusing_input, fusing_input_definition
from flowreel.kernels.normalise_frames import normalise_frames, normalise_frames_definition
from flowreel.kernels.quantise import quantise_definition
from flowreel.kernels.refining_input import refining_input, refining_input_definition
from flowreel.kernels.warp import warp_definition
from flowreel.kernels.yuv_to_rgb import yuv_to_rgb_definition
from flowreel.sinks.blosc import BLOCK_VALUES
from flowreel.sinks.painting import yuv420

TOLERANCE = {"fp32": 1e-5, "fp16": 2**-10, "bf16": 2**-7}  # relative; half precision: one rounding of the result
LAYOUTS = {"": torch.contiguous_format, " channels last": torch.channels_last}

Compared = list[tuple[Tensor, Tensor]]  # ours, and the expected result in float64


@dataclass(frozen=True)
class Made:
    """Makes random maps in the dtype and layout under test."""

    device: str
    dtype: torch.dtype
    layout: torch.memory_format

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype).contiguous(memory_format=self.layout)

    def flow(self) -> Tensor:
        """(1, 2, H, W), always float32: away from whole pixels, where the slope of a warp jumps."""
        return torch.randn(1, 2, *cases.PIXELS, device=self.device) * 8

    def quarter(self, channels: int) -> Tensor:
        """(2, channels, H/4, W/4) float32."""
        height, width = (side // 4 for side in cases.PIXELS)
        return torch.randn(2, channels, height, width, device=self.device).contiguous(memory_format=self.layout)

    def frames(self) -> Tensor:
        """(2, 6, H, W) float32, contiguous. Smooth, since noise would turn correctly rounded coordinates into large
        differences."""
        return torch.nn.functional.interpolate(self.quarter(6), scale_factor=4.0, mode="bilinear").contiguous()

    def rooms(self, channels: int, batch: int = 2) -> tuple[Tensor, Tensor]:
        """Zeroed outputs, channels last: in the dtype under test, and in float64."""
        room = torch.zeros(batch, channels, *cases.PIXELS, device=self.device).to(memory_format=torch.channels_last)
        return room.to(self.dtype), room.double()


def check(findings: Findings, settings: Settings) -> None:
    """Against the definition in float64, on the device, in every dtype; then the operations that give integers."""
    make_small(settings)
    for (precision, dtype), (layout, order) in itertools.product(cases.DTYPES.items(), LAYOUTS.items()):
        made = Made(settings.device, dtype, order)
        for name, compared in COMPARED.items():
            findings.attempt(
                f"{name}{layout} {precision}", partial(_compare, findings, f"{name}{layout}", precision, compared, made)
            )
    whole = {"yuv_to_rgb": _yuv_to_rgb, "quantise": _quantise, "flow_to_color": _flow_to_color, "yuv420": _yuv420}
    for name, compare in whole.items():
        findings.attempt(name, partial(compare, findings, settings.device))


def make_small(settings: Settings) -> None:
    """Shrinks all cases for a dry run."""
    if settings.dry:
        cases.PIXELS, cases.FEATURES, cases.BEYOND_CACHES = (24, 32), (1, 8, 6, 8), 1 << 12


def relative(ours: Tensor, wanted: Tensor) -> float:
    """The largest difference, each divided by the value plus the RMS of all values. NaN if either tensor has one."""
    scale = wanted.square().mean().sqrt()
    return float(((ours.double() - wanted).abs() / (wanted.abs() + scale)).max())


def _compare(findings: Findings, name: str, precision: str, compared: Callable[[Made], Compared], made: Made) -> None:
    torch.manual_seed(0)
    pairs = compared(made)
    for number, (ours, wanted) in enumerate(pairs):
        apart = relative(ours, wanted)
        which = f" {number}" if len(pairs) > 1 else ""
        findings.check(
            f"{name}{which} {precision}", apart <= TOLERANCE[precision], apart=apart, allowed=TOLERANCE[precision]
        )


# --- what is compared -------------------------------------------------------------------------------------------------


def _correlation(made: Made) -> Compared:
    a, b = made(*cases.FEATURES), made(*cases.FEATURES)
    return [(correlation(a, b), correlation_definition(a.double(), b.double()))]


def _correlation_into(made: Made, radius: int, stride: int) -> Compared:
    """As FlowNetC uses it, in some channels of a concatenation; the channels beside them must not change."""
    channels, reach = (2 * radius + 1) ** 2, radius * stride
    _, *shape = cases.FEATURES
    a, b = made(2, *shape), made(2, *shape)
    whole = made(2, 32 + channels + 7, *shape[1:])
    before, part = whole.double(), slice(32, 32 + channels)
    mean = correlation_definition(a.double(), b.double(), reach, 1, reach, 1, stride)
    before[:, part] = torch.nn.functional.leaky_relu(mean, 0.1)
    correlation(a, b, reach, 1, reach, 1, stride, negative_slope=0.1, out=whole[:, part])
    return [(whole[:, part], before[:, part]), (whole, before)]


def _warp(made: Made) -> Compared:
    image, flow = made(1, 3, *cases.PIXELS), made.flow()
    return [(warp(image, flow), warp_definition(image.double(), flow.double()))]


def _channel_norm(made: Made) -> Compared:
    x = made(1, 2, *cases.PIXELS)
    return [(channel_norm(x), channel_norm_definition(x.double()))]


def _bias_leaky_relu(made: Made) -> Compared:
    x = made(1, 64, *cases.PIXELS)
    bias, wanted = torch.randn(64, device=made.device), x.double()
    bias_leaky_relu_in_place_definition(wanted, bias, 0.1, None)
    return [(bias_leaky_relu_(x, bias, 0.1), wanted)]


def _flow_head(made: Made) -> Compared:
    """Half precision only: float32 maps take the definition, a cuDNN convolution."""
    compared: Compared = []
    for kernel in (3, 5) if made.dtype != torch.float32 else ():
        x, bias = _map_of_head(made), torch.randn(2, device=made.device)
        packed = pack_flow_head(torch.randn(2, x.shape[1], kernel, kernel, device=made.device) * 0.02, x.dtype)
        weight = unpack_flow_head(packed, x.shape[1]).double()
        wanted = torch.nn.functional.conv2d(x.double(), weight, bias.double(), padding=kernel // 2)
        compared.append((flow_head(x, packed, bias), wanted))
    return compared


def _flow_head_borders(made: Made) -> Compared:
    if made.dtype == torch.float32:
        return []
    x = _map_of_head(made)
    shapes = (4, 5, 2, x.shape[1]), (4, 2), (4, 2, x.shape[1]), (4, 2)
    # Values that TF32 represents exactly: other layouts take the definition.
    borders = [torch.randn(shape, device=made.device).bfloat16().float() for shape in shapes]
    ours = torch.randn(2, 2, *x.shape[2:], device=made.device)
    wanted = ours.double()
    take_off_borders_(ours, x, Borders(*borders))
    take_off_borders_definition(wanted, x.double(), *(part.double() for part in borders))
    return [(ours, wanted)]


def _map_of_head(made: Made) -> Tensor:
    return made(2, 200, *(side // 4 for side in cases.PIXELS))


def _refining_input(made: Made) -> Compared:
    frames, flow, (ours, wanted) = made.frames(), made.quarter(2) / 2, made.rooms(16)
    refining_input(frames, flow, 20.0, ours)
    refining_input_definition(frames.double(), flow.double(), 20.0, wanted)
    return [(ours, wanted)]


def _fusing_input(made: Made) -> Compared:
    frames, small, large, (ours, wanted) = made.frames(), made.quarter(2), made.quarter(2) / 2, made.rooms(16)
    fusing_input(frames, small, 0.05, large, 20.0, ours)
    fusing_input_definition(frames.double(), small.double(), 0.05, large.double(), 20.0, wanted)
    return [(ours, wanted)]


def _normalise_frames(made: Made) -> Compared:
    first, second = (made.frames()[:, :3].contiguous(memory_format=made.layout) * 50 + 120 for _ in range(2))
    planes = torch.zeros(2, 6, *cases.PIXELS, device=made.device)
    pairs = [(planes, planes.double()), made.rooms(8), made.rooms(8, 4)]
    ours, wanted = zip(*pairs, strict=True)
    normalise_frames(first, second, planes=ours[0], pair=ours[1], both=ours[2])
    normalise_frames_definition(first.double(), second.double(), *wanted)
    return pairs


def _enlarge_flow(made: Made) -> Compared:
    flow, (ours, wanted) = made.flow().contiguous(memory_format=made.layout), made.rooms(7, 1)
    flow = flow[:, :, : flow.shape[2] // 2, : flow.shape[3] // 2]
    weight, bias = torch.randn(2, 2, 4, 4, device=made.device), torch.randn(2, device=made.device)
    enlarge_flow(flow, weight, bias, ours[:, 3:5])
    enlarge_flow_definition(flow.double(), weight.double(), bias.double(), wanted[:, 3:5])
    return [(ours, wanted)]


def _convolution(layer: cases.Layer, made: Made) -> Compared:
    """With bias and LeakyReLU, and also written to part of a concatenation."""
    if made.dtype == torch.float32:
        return []  # runs in cuDNN
    half = pack_layer(layer.make().to(made.device), "fp16" if made.dtype == torch.float16 else "bf16")
    height, width = (side >> layer.level for side in cases.PIXELS)
    x = made(2, padded(layer.inputs), height, width)
    weight = half.weight.double().contiguous()
    wanted = convolve(x[:, : layer.inputs].double().contiguous(), replace(half, weight=weight))
    bias_leaky_relu_in_place_definition(wanted, half.bias, half.slope, None)
    first, part = layer.room if layer.room is not None else (half.outputs, 0)
    whole = made(2, padded(first), *wanted.shape[2:])
    own = half(x, whole[:, part : part + half.outputs])
    return [(own, wanted), (whole[:, part : part + half.outputs], wanted)]


def _gradients(layer: Callable[..., Tensor], inputs: Callable[[Made], tuple[Tensor, ...]], made: Made) -> Compared:
    """The gradient of each input: by the kernels in the dtype under test, by the definitions in float64."""
    given = inputs(made)
    came, exact = ([turned(x).requires_grad_() for x in given] for turned in (Tensor.clone, Tensor.double))
    out = layer(*came)
    arrived = torch.randn_like(out)
    ours = torch.autograd.grad(out, came, arrived)
    wanted = torch.autograd.grad(layer(*exact), exact, arrived.double())  # float64 always takes the definition
    return list(zip(ours, wanted, strict=True))


COMPARED: dict[str, Callable[[Made], Compared]] = {
    "correlation": _correlation,
    "correlation into a part": partial(_correlation_into, radius=10, stride=2),
    "correlation into a part, 9 x 9": partial(_correlation_into, radius=4, stride=1),
    "warp": _warp,
    "channel_norm": _channel_norm,
    "bias_leaky_relu": _bias_leaky_relu,
    "flow_head": _flow_head,
    "flow_head, borders": _flow_head_borders,
    "refining_input": _refining_input,
    "fusing_input": _fusing_input,
    "normalise_frames": _normalise_frames,
    "enlarge_flow": _enlarge_flow,
    **{f"convolution, {layer.name}": partial(_convolution, layer) for layer in cases.LAYERS},
    "correlation, gradient": partial(
        _gradients, correlation, lambda made: (made(*cases.FEATURES), made(*cases.FEATURES))
    ),
    "warp, gradient": partial(_gradients, warp, lambda made: (made(1, 3, *cases.PIXELS), made.flow())),
    "channel_norm, gradient": partial(_gradients, channel_norm, lambda made: (made(1, 2, *cases.PIXELS),)),
}


# --- whole numbers ----------------------------------------------------------------------------------------------------


def _yuv_to_rgb(findings: Findings, device: str) -> None:
    height, width = cases.PIXELS
    luma = torch.randint(0, 256, (height, width), dtype=torch.uint8, device=device)
    chroma = torch.randint(0, 256, (height // 2, width // 2, 2), dtype=torch.uint8, device=device)
    wanted = torch.empty(3, height, width, dtype=torch.uint8, device=device)
    yuv_to_rgb_definition(wanted, luma, chroma, "bt709", False, 8)
    _check_levels(findings, "yuv_to_rgb", yuv_to_rgb(luma, chroma), wanted)


def _quantise(findings: Findings, device: str) -> None:
    flow = torch.randn(1, 2, *cases.PIXELS, device=device) * 8
    ours = quantise(flow, 1 / 64)
    for where, wanted in (
        ("its definition", quantise_definition(flow, 1 / 64, 32767.0, torch.int16)),
        ("a CPU", quantise(flow.cpu(), 1 / 64)),
    ):
        same = all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(ours, wanted, strict=True))
        findings.check(f"quantise is that of {where}", same)
    for kind in (torch.int16, torch.int32):
        steps = quantise(flow, 1 / 64, dtype=kind).steps
        same = torch.equal(bitshuffle(steps, BLOCK_VALUES).cpu(), bitshuffle_definition(steps.cpu(), BLOCK_VALUES))
        findings.check(f"bitshuffle is that of its definition, {str(kind).removeprefix('torch.')}", same)


def _flow_to_color(findings: Findings, device: str) -> None:
    flow = torch.randn(1, 2, *cases.PIXELS, device=device) * 8
    _check_levels(findings, "flow_to_color", flow_to_color(flow, 20.0).cpu(), flow_to_color(flow.cpu(), 20.0))


def _yuv420(findings: Findings, device: str) -> None:
    """A video's planes, for pictures converted one by one, for several at once, and for an odd size."""
    height, width = cases.PIXELS
    for shape in ((2, 3, 2 * height, 2 * width), (3, 3, height, width), (1, 3, 33, 47)):
        colors = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        _check_levels(findings, f"yuv420, {shape[3]}x{shape[2]}", yuv420(colors).cpu(), yuv420(colors.cpu()))


def _check_levels(findings: Findings, name: str, ours: Tensor, wanted: Tensor) -> None:
    """Bytes may differ by one where rounding just tips over, which is rare."""
    apart = (ours.int() - wanted.int()).abs()
    most, mean = int(apart.max()), float(apart.float().mean())
    findings.check(name, most <= 1 and mean <= 0.01, most_levels=most, mean_levels=mean)
