"""Each kernel against the plain torch definition, and OpenCV where it has the same operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.ceilings import Ceilings, share_of_limit
from benchmarks.measure import Action, Effort, Sample, alternated, device_sync, devices, ratio
from flowreel.kernels import channel_norm, correlation, flow_to_color, warp
from flowreel.kernels.channel_norm import channel_norm_definition
from flowreel.kernels.correlation import correlation_definition, pixel_correlation_backward_definition
from flowreel.kernels.warp import warp_definition

OURS = "flowreel"
PIXELS = (448, 1024)  # rows, columns of a frame
FEATURES = (1, 256, 56, 128)  # what FlowNetC correlates of such frames
RADIUS, STRIDE = 10, 2  # 21 x 21 displacements, every second pixel
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Kernel:
    """One operation on one input, done in several ways. Each gives the same numbers within its stated tolerance."""

    name: str
    shape: str
    precision: str
    ways: Mapping[str, Action]  # ours first
    flops: float  # additions and multiplications
    moved_bytes: float  # each input read once, each output written once


def run(short: bool = False, ceilings: Ceilings | None = None) -> dict[str, object]:
    """All ways of one operation in turn, so that the ratios are of one run. Random input, never zeros."""
    effort = Effort.of(short)
    rows: list[dict[str, Any]] = []
    for device in devices():
        for kernel in kernels(device):
            found = alternated(kernel.ways, effort, device_sync(device))
            rows += [_row(kernel, device, way, found, ceilings or {}) for way in kernel.ways]
    return {"settings": {"effort": vars(effort)}, "rows": rows}


def _row(
    kernel: Kernel, device: str, way: str, found: Mapping[str, list[float]], ceilings: Ceilings
) -> dict[str, Any]:
    seconds = Sample.of(found[way])
    return {
        "op": kernel.name,
        "shape": kernel.shape,
        "precision": kernel.precision,
        "device": device,
        "by": way,
        "ms": seconds.times(1e3).cell(),
        "of the limit": share_of_limit(
            seconds.median, kernel.flops, kernel.moved_bytes, ceilings, device, kernel.precision
        ),
        "its time / ours": None if way == OURS else ratio(found[way], found[OURS]),
    }


def kernels(device: str) -> list[Kernel]:
    """Every operation and precision that is worth a row on that device."""
    torch.manual_seed(0)
    half = "bf16" if device == "cpu" else "fp16"
    made = [_correlation(device, "fp32"), _correlation(device, half), _correlation_backward(device)]
    made += [_warp(device, "fp32"), _warp(device, half), _channel_norm(device, 3), _channel_norm(device, 2)]
    return [*made, _color(device)]


def _without_gradients(function: Callable[..., Any], *arguments: Any) -> Action:
    def call() -> None:
        with torch.no_grad():
            function(*arguments)

    return call


def _ways(functions: Mapping[str, Callable[..., Any]], *arguments: Any) -> dict[str, Action]:
    return {name: _without_gradients(function, *arguments) for name, function in functions.items()}


def _shape(*tensors: Tensor) -> str:
    return " ".join("x".join(map(str, tensor.shape)) for tensor in tensors)


def _features(device: str, precision: str) -> tuple[Tensor, Tensor]:
    a, b = (torch.randn(FEATURES, device=device).to(DTYPES[precision]) for _ in range(2))
    return a, b


def _correlation_flops() -> float:
    return 2.0 * (2 * RADIUS + 1) ** 2 * FEATURES[0] * FEATURES[1] * FEATURES[2] * FEATURES[3]


def _volume_values() -> int:
    return FEATURES[0] * (2 * RADIUS + 1) ** 2 * FEATURES[2] * FEATURES[3]


def _correlation(device: str, precision: str) -> Kernel:
    a, b = _features(device, precision)
    ways = _ways({OURS: correlation, "torch definition": correlation_definition}, a, b)
    moved = a.element_size() * (2 * a.numel() + _volume_values())
    return Kernel("correlation", _shape(a), precision, ways, _correlation_flops(), moved)


def _correlation_backward(device: str) -> Kernel:
    a, b = _features(device, "fp32")
    grad = torch.randn(FEATURES[0], (2 * RADIUS + 1) ** 2, *FEATURES[2:], device=device)
    ours = torch.ops.flowreel.correlation_backward.default
    ways = _ways({OURS: ours, "torch definition": pixel_correlation_backward_definition}, grad, a, b, RADIUS, STRIDE)
    moved = 4 * (4 * a.numel() + grad.numel())
    return Kernel("correlation, backward", _shape(a), "fp32", ways, 2 * _correlation_flops(), moved)


def _warp(device: str, precision: str) -> Kernel:
    """OpenCV's remap rounds coordinates to 1/32 px; ours does not."""
    image = torch.rand(1, 3, *PIXELS, device=device).to(DTYPES[precision])
    flow = torch.randn(1, 2, *PIXELS, device=device) * 8
    ways = _ways({OURS: warp, "torch definition": warp_definition}, image, flow)
    if device == "cpu" and precision == "fp32":
        ways["OpenCV remap"] = _remap(image, flow)
    moved = 2 * image.element_size() * image.numel() + 4 * flow.numel()
    return Kernel("warp", _shape(image), precision, ways, 8.0 * image.numel(), moved)


def _remap(image: Tensor, flow: Tensor) -> Action:
    picture = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    x, y = (np.ascontiguousarray(grid, np.float32) for grid in np.meshgrid(*map(np.arange, PIXELS[::-1])))
    u, v = flow[0].numpy()
    return lambda: cv2.remap(picture, x + u, y + v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _channel_norm(device: str, channels: int) -> Kernel:
    """On a CPU the definition is what runs; torch's own norm is the other way to write it."""
    x = torch.randn(1, channels, *PIXELS, device=device)
    ways = _ways({OURS: channel_norm, "torch vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1)}, x)
    if device == "cpu" and channels == 2:
        u, v = x[0].numpy()
        ways["OpenCV magnitude"] = lambda: cv2.magnitude(u, v)
    elif device == "cuda":
        ways |= _ways({"torch definition": channel_norm_definition}, x)
    pixels = PIXELS[0] * PIXELS[1]
    return Kernel("channel_norm", _shape(x), "fp32", ways, 2.0 * x.numel(), 4 * (x.numel() + pixels))


def _color(device: str) -> Kernel:
    """OpenCV has no Middlebury wheel; hue from the angle, as its tutorials paint flow, stands in for it."""
    flow = torch.randn(1, 2, *PIXELS, device=device) * 8
    ways: dict[str, Action]
    if device == "cpu":
        array = np.ascontiguousarray(flow[0].permute(1, 2, 0).numpy())
        ways = {OURS: lambda: flow_to_color(array, 20.0), "OpenCV HSV (another wheel)": lambda: _hsv(array)}
        ways["flowreel, as a tensor"] = _without_gradients(flow_to_color, flow, 20.0)
    else:
        ways = _ways({OURS: flow_to_color}, flow, 20.0)
    pixels = PIXELS[0] * PIXELS[1]
    return Kernel("flow_to_color", _shape(flow), "fp32", ways, 60.0 * pixels, (8 + 3) * pixels)


def _hsv(flow: Any) -> Any:
    length, angle = cv2.cartToPolar(flow[..., 0], flow[..., 1], angleInDegrees=True)
    hsv = np.full((*flow.shape[:2], 3), 255, np.uint8)
    hsv[..., 0] = angle / 2
    hsv[..., 1] = np.minimum(length * (255 / 20), 255)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
