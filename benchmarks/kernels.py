"""Each kernel against the plain torch definition, and OpenCV where it has the same operation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ceilings import Ceilings, share_of_limit
from benchmarks.measure import Action, Effort, Sample, alternated, device_sync, devices, ratio
from flowreel.engine.compiled.composed import composed
from flowreel.engine.compiled.padded import Convolution, pack_layer, padded
from flowreel.engine.config import Precision
from flowreel.engine.models.layers import conv, deconv
from flowreel.kernels import bitshuffle, channel_norm, correlation, flow_to_color, quantise, warp, yuv_to_rgb
from flowreel.kernels.bias_leaky_relu import bias_leaky_relu_, bias_leaky_relu_in_place_definition
from flowreel.kernels.bitshuffle import bitshuffle_definition
from flowreel.kernels.channel_norm import channel_norm_definition
from flowreel.kernels.correlation import (
    correlation_definition,
    pixel_correlation_backward_definition,
    pixel_correlation_on_cuda_cores,
)
from flowreel.kernels.enlarge_flow import enlarge_flow, enlarge_flow_definition
from flowreel.kernels.flow_color import flow_to_color_definition
from flowreel.kernels.flow_head import flow_head, flow_head_definition, pack_flow_head, take_off_borders_
from flowreel.kernels.fusing_input import fusing_input, fusing_input_definition
from flowreel.kernels.normalise_frames import normalise_frames, normalise_frames_definition
from flowreel.kernels.operation import recording
from flowreel.kernels.quantise import quantise_definition
from flowreel.kernels.refining_input import refining_input, refining_input_definition
from flowreel.kernels.warp import warp_definition
from flowreel.kernels.yuv_to_rgb import yuv_to_rgb_definition

OURS = "flowreel"
ON_CUDA_CORES = "flowreel, on CUDA cores"
PIXELS = (448, 1024)  # rows, columns of a frame
BATCH = 8  # pairs, for the convolutions
FEATURES = (1, 256, 56, 128)  # the shape of the maps that FlowNetC correlates for such frames
PAIRS = 8  # per batch, for operations too short to time on one pair
RADIUS, STRIDE = 10, 2  # 21 x 21 displacements, every second pixel
HEADS = {2: 200, 3: 392, 4: 776, 5: 1032, 6: 1024}  # level: channels of the maps of S and C, padded
SMOOTHED_HEADS = {0: (88, 16), 1: (168, 32), 2: (200, 64)}  # likewise of the fusion and SD, and between the two layers
BEYOND_CACHES = 256 << 20  # bytes of different inputs: more than the largest last-level caches in use
MOST_INPUTS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Layer:
    """A layer of FlowNet2 that runs as our own convolution instead of cuDNN's."""

    name: str
    make: Callable[[], nn.Module]
    inputs: int
    level: int  # its input is 1 / 2^level of the frame
    batch: int = BATCH
    room: tuple[int, int] | None = None  # in the concatenation it writes to: all channels, its first channel


LAYERS = (
    Layer("C conv1", lambda: conv(3, 64, 7, 2), 3, 0, 2 * BATCH),
    Layer("S conv1", lambda: conv(12, 64, 7, 2), 12, 0),
    Layer("SD conv0", lambda: conv(6, 64), 6, 0),
    Layer("fusion conv0", lambda: conv(11, 64), 11, 0, room=(82, 0)),
    Layer("fusion deconv1", lambda: deconv(128, 32), 128, 2, room=(162, 128)),
    Layer("fusion deconv0", lambda: deconv(162, 16), 162, 1, room=(82, 64)),
)


@dataclass(frozen=True)
class Kernel:
    """One operation on one kind of input, in several implementations that agree within the stated tolerance."""

    name: str
    shape: str
    precision: str
    ways: Mapping[str, Action]  # ours first
    flops: float  # additions and multiplications; 0 if only memory can be the limit
    moved_bytes: float  # each input read once, each output written once


def run(short: bool = False, ceilings: Ceilings | None = None) -> dict[str, object]:
    """All implementations of an operation in turn, so that ratios are from one run. Input is random, never zeros."""
    effort = Effort.of(short)
    rows: list[dict[str, Any]] = []
    for device in devices():
        for kernel in kernels(device):
            found = alternated(kernel.ways, effort, device_sync(device))
            rows += [_row(kernel, device, way, found, ceilings or {}) for way in kernel.ways]
    return {"settings": {"effort": vars(effort)}, "rows": rows}


def _row(kernel: Kernel, device: str, way: str, found: Mapping[str, list[float]], ceilings: Ceilings) -> dict[str, Any]:
    seconds = Sample.of(found[way])
    with recording(ran := {}):
        kernel.ways[way]()
    return {
        "op": kernel.name,
        "shape": kernel.shape,
        "precision": kernel.precision,
        "device": device,
        "by": way,
        "run by": " and ".join(sorted(set(ran.values()))) or None,  # of our operations: our kernel, or torch's
        "ms": seconds.times(1e3).cell(),
        "of the limit": share_of_limit(
            seconds.median, kernel.flops, kernel.moved_bytes, ceilings, device, kernel.precision
        ),
        "its time / ours": None if way == OURS else ratio(found[way], found[OURS]),
    }


def kernels(device: str) -> Iterator[Kernel]:
    """Every operation and precision that is worth a row on the device, each made when its turn has come: together their
    inputs take more than 8 GB of a GPU."""
    torch.manual_seed(0)
    half: Precision = "bf16" if device == "cpu" else "fp16"
    yield from (_correlation(device, precision) for precision in ("fp32", half))
    yield _correlation_backward(device)
    yield from (_correlation_into(device, precision) for precision in ("fp32", half))
    yield _quantise(device)
    if device == "cuda":
        yield _correlation_into(device, half, batch=8)
    yield from (_warp(device, precision) for precision in ("fp32", half))
    yield from (_channel_norm(device, channels) for channels in (3, 2))
    if device == "cuda":
        yield _yuv_to_rgb(device)
        yield _bitshuffle(device)
        yield from (_bias_leaky_relu(device, precision) for precision in ("fp32", half))
        yield from (_flow_head(device, level, channels) for level, channels in HEADS.items())
        yield from (_smoothed_head(device, level, *channels) for level, channels in SMOOTHED_HEADS.items())
        yield from (make(device, half) for make in (_normalise_frames, _refining_input, _fusing_input, _enlarge_flow))
        yield from (_convolution(layer, device, half) for layer in LAYERS)
    yield _color(device)


def _without_gradients(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Action:
    """An action that uses the inputs in turn, so that none is still in a cache when it is used again."""
    turns = itertools.cycle(inputs)

    def call() -> None:
        with torch.no_grad():
            function(*next(turns))

    return call


def _ways(functions: Mapping[str, Callable[..., Any]], inputs: Sequence[tuple[Any, ...]]) -> dict[str, Action]:
    return {name: _without_gradients(function, inputs) for name, function in functions.items()}


def _many(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Enough different inputs to outgrow every cache together, unless they are small: at most ``MOST_INPUTS`` more."""
    first = make()
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    return [first, *(make() for _ in range(min(MOST_INPUTS, BEYOND_CACHES // size)))]


def _shape(*tensors: Tensor) -> str:
    return " ".join("x".join(map(str, tensor.shape)) for tensor in tensors)


def _features(device: str, precision: str, batch: int = 1) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, *FEATURES[1:], device=device).to(DTYPES[precision]) for _ in range(2))


def _correlation_flops(a: Tensor) -> float:
    return 2.0 * (2 * RADIUS + 1) ** 2 * a.numel()


def _correlation_bytes(a: Tensor) -> int:
    volume_values = (2 * RADIUS + 1) ** 2 * a.numel() // a.shape[1]
    return a.element_size() * (2 * a.numel() + volume_values)


def _correlation(device: str, precision: str) -> Kernel:
    inputs = _many(lambda: _features(device, precision))
    functions: dict[str, Callable[..., Any]] = {OURS: correlation, "torch definition": correlation_definition}
    if device == "cuda" and precision != "fp32":
        functions[ON_CUDA_CORES] = _on_cuda_cores
    ways, a = _ways(functions, inputs), inputs[0][0]
    return Kernel("correlation", _shape(a), precision, ways, _correlation_flops(a), _correlation_bytes(a))


def _on_cuda_cores(a: Tensor, b: Tensor, out: Tensor | None = None) -> None:
    if out is None:
        out = a.new_empty(a.shape[0], (2 * RADIUS + 1) ** 2, *a.shape[2:])
    pixel_correlation_on_cuda_cores(out, a, b, RADIUS, STRIDE, None, 0.1)


def _correlation_into(device: str, precision: str, batch: int = 1) -> Kernel:
    """As FlowNetC uses it: with LeakyReLU, written into 441 of the 480 channels of a concatenation."""
    kind = torch.channels_last if device == "cuda" else torch.contiguous_format

    def make() -> tuple[Tensor, ...]:
        a, b = (x.contiguous(memory_format=kind) for x in _features(device, precision, batch))
        whole = torch.zeros(batch, 480, *FEATURES[2:], dtype=a.dtype, device=device).contiguous(memory_format=kind)
        return a, b, whole[:, 32:473]

    def in_one(a: Tensor, b: Tensor, part: Tensor) -> None:
        correlation(a, b, negative_slope=0.1, out=part)

    def one_by_one(a: Tensor, b: Tensor, part: Tensor) -> None:
        part.copy_(torch.nn.functional.leaky_relu(correlation(a, b), 0.1))

    functions: dict[str, Callable[..., Any]] = {OURS: in_one, "flowreel, then torch": one_by_one}
    if device == "cuda" and precision != "fp32":
        functions[ON_CUDA_CORES] = _on_cuda_cores
    inputs = _many(make)
    ways, a = _ways(functions, inputs), inputs[0][0]
    name = "correlation + LeakyReLU into a slice"
    return Kernel(name, _shape(a), precision, ways, _correlation_flops(a), _correlation_bytes(a))


def _correlation_backward(device: str) -> Kernel:
    volume = (FEATURES[0], (2 * RADIUS + 1) ** 2, *FEATURES[2:])
    inputs = _many(lambda: (torch.randn(volume, device=device), *_features(device, "fp32")))
    functions: dict[str, Callable[..., Any]] = {OURS: torch.ops.flowreel.correlation_backward.default}
    functions["torch definition"] = pixel_correlation_backward_definition
    ways = _ways(functions, [(*tensors, RADIUS, STRIDE) for tensors in inputs])
    grad, a, _ = inputs[0]
    moved = 4 * (4 * a.numel() + grad.numel())
    return Kernel("correlation, backward", _shape(a), "fp32", ways, 2 * _correlation_flops(a), moved)


def _warp(device: str, precision: str) -> Kernel:
    """OpenCV's remap rounds coordinates to 1/32 px; ours does not."""

    def make() -> tuple[Tensor, ...]:
        return torch.rand(1, 3, *PIXELS, device=device).to(DTYPES[precision]), _flow(device)

    inputs = _many(make)
    ways = _ways({OURS: warp, "torch definition": warp_definition}, inputs)
    if device == "cpu" and precision == "fp32":
        ways["OpenCV remap"] = _remap(inputs)
    image, flow = inputs[0]
    moved = 2 * image.element_size() * image.numel() + 4 * flow.numel()
    return Kernel("warp", _shape(image), precision, ways, 8.0 * image.numel(), moved)


def _remap(inputs: Sequence[tuple[Tensor, ...]]) -> Action:
    import cv2  # here, since it is needed on a CPU only

    x, y = (np.ascontiguousarray(grid, np.float32) for grid in np.meshgrid(*map(np.arange, PIXELS[::-1])))

    def remap(picture: Any, u: Any, v: Any) -> Any:
        return cv2.remap(picture, x + u, y + v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    pictures = [(_last(image), *flow[0].numpy()) for image, flow in inputs]
    return _without_gradients(remap, pictures)


def _flow(device: str) -> Tensor:
    return torch.randn(1, 2, *PIXELS, device=device) * 8


def _last(x: Tensor) -> Any:
    """(1, C, H, W) -> (H, W, C) NumPy, C order."""
    return np.ascontiguousarray(x[0].permute(1, 2, 0).numpy())


def _channel_norm(device: str, channels: int) -> Kernel:
    """On a CPU our function runs the definition; torch's own norm is the alternative."""
    inputs = _many(lambda: (torch.randn(1, channels, *PIXELS, device=device),))
    functions = {OURS: channel_norm, "torch vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1)}
    if device == "cuda":
        functions["torch definition"] = channel_norm_definition
    ways = _ways(functions, inputs)
    if device == "cpu" and channels == 2:
        import cv2

        ways["OpenCV magnitude"] = _without_gradients(cv2.magnitude, [tuple(x[0].numpy()) for (x,) in inputs])
    x, pixels = inputs[0][0], PIXELS[0] * PIXELS[1]
    return Kernel("channel_norm", _shape(x), "fp32", ways, 2.0 * x.numel(), 4 * (x.numel() + pixels))


def _bias_leaky_relu(device: str, precision: str) -> Kernel:
    """In place, and copied into a concatenation of three times as many channels, as after FlowNetC's first layer."""
    channels, (height, width) = 64, (side // 2 for side in PIXELS)

    def map_of(count: int) -> Tensor:
        made = torch.randn(1, count, height, width, device=device).to(DTYPES[precision])
        return made.contiguous(memory_format=torch.channels_last)

    inputs = _many(lambda: (map_of(channels), torch.randn(channels, device=device), map_of(3 * channels)))
    given = [(x, bias, 0.1, whole[:, channels : 2 * channels]) for x, bias, whole in inputs]
    functions = {OURS: bias_leaky_relu_, "torch definition": bias_leaky_relu_in_place_definition}
    x = inputs[0][0]
    return Kernel(
        "bias_leaky_relu", _shape(x), precision, _ways(functions, given), 0.0, 3 * x.element_size() * x.numel()
    )


def _feature_maps(device: str, level: int, channels: int) -> list[tuple[Tensor, ...]]:
    """Inputs of one float16 map each, at 1 / 2^level of the frames' size."""
    size = PAIRS, channels, *(side >> level for side in PIXELS)
    return _many(lambda: (_channels_last(torch.randn(size, device=device).half()),))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _flow_head(device: str, level: int, channels: int) -> Kernel:
    """The definition is what a library offers: convert the maps to float32, then convolve."""
    inputs = _feature_maps(device, level, channels)
    weight = pack_flow_head(torch.randn(2, channels, 3, 3, device=device) * 0.01, torch.float16)
    bias = torch.randn(2, device=device)
    functions = {OURS: flow_head, "torch definition": flow_head_definition}
    ways = _ways(functions, [(x, weight, bias) for (x,) in inputs])
    x = inputs[0][0]
    return Kernel(f"flow_head, level {level}", _shape(x), "fp16", ways, *_work_of_head(x, 9))


def _smoothed_head(device: str, level: int, channels: int, between: int) -> Kernel:
    """With the smoothing layer before it, which a library has to compute separately."""
    inputs = _feature_maps(device, level, channels)
    smooth = torch.randn(between, channels, 3, 3, device=device) * 0.03, torch.randn(between, device=device)
    head = torch.randn(2, between, 3, 3, device=device) * 0.03, torch.randn(2, device=device)
    one = composed(smooth, head)
    packed = pack_flow_head(one.weight, torch.float16)
    half = _channels_last(smooth[0].half()), smooth[1].half()

    def as_one(x: Tensor) -> Tensor:
        return take_off_borders_(flow_head(x, packed, one.bias), x, one.borders)

    def one_by_one(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, *half, padding=1).float(), *head, padding=1)

    ways = _ways({OURS: as_one, "torch, two layers": one_by_one}, inputs)
    x = inputs[0][0]
    return Kernel(f"flow_head, smoothed, level {level}", _shape(x), "fp16", ways, *_work_of_head(x, 25))


def _work_of_head(x: Tensor, taps: int) -> tuple[float, float]:
    """Operations and bytes."""
    pixels = x.numel() // x.shape[1]
    return 2.0 * 2 * taps * x.numel(), x.element_size() * x.numel() + 4.0 * 2 * pixels


def _room(device: str, precision: str, channels: int, batch: int = PAIRS) -> Tensor:
    """A zeroed map of the frames' size, channels last."""
    made = torch.zeros(batch, channels, *PIXELS, dtype=DTYPES[precision], device=device)
    return made.to(memory_format=torch.channels_last)


def _frames_and_quarters(device: str, quarters: int) -> tuple[Tensor, ...]:
    """Two normalised frames, and ``quarters`` flows at a quarter of their size, as a network predicts them."""
    frames = torch.randn(PAIRS, 6, *PIXELS, device=device)
    height, width = (side // 4 for side in PIXELS)
    return frames, *(torch.randn(PAIRS, 2, height, width, device=device) / 2 for _ in range(quarters))


def _normalise_frames(device: str, precision: str) -> Kernel:
    """Writes to all three outputs at once, as FlowNet2 uses it."""

    def make() -> tuple[Tensor, ...]:
        first, second = (torch.rand(PAIRS, 3, *PIXELS, device=device) * 255 for _ in range(2))
        rooms = _room(device, precision, 8), _room(device, precision, 8, 2 * PAIRS)
        return first, second, torch.empty(PAIRS, 6, *PIXELS, device=device), *rooms

    def ours(first: Tensor, second: Tensor, planes: Tensor, pair: Tensor, both: Tensor) -> None:
        normalise_frames(first, second, planes=planes, pair=pair, both=both)

    inputs = _many(make)
    ways = _ways({OURS: ours, "torch definition": normalise_frames_definition}, inputs)
    return _in_bytes("normalise_frames", precision, ways, inputs[0])


def _refining_input(device: str, precision: str) -> Kernel:
    def make() -> tuple[Tensor, ...]:
        return *_frames_and_quarters(device, 1), _room(device, precision, 16)

    inputs = _many(make)
    given = [(frames, flow, 20.0, room) for frames, flow, room in inputs]
    ways = _ways({OURS: refining_input, "torch definition": refining_input_definition}, given)
    return _in_bytes("refining_input", precision, ways, inputs[0])


def _fusing_input(device: str, precision: str) -> Kernel:
    def make() -> tuple[Tensor, ...]:
        return *_frames_and_quarters(device, 2), _room(device, precision, 16)

    inputs = _many(make)
    given = [(frames, small, 1 / 20, large, 20.0, room) for frames, small, large, room in inputs]
    ways = _ways({OURS: fusing_input, "torch definition": fusing_input_definition}, given)
    return _in_bytes("fusing_input", precision, ways, inputs[0])


def _enlarge_flow(device: str, precision: str) -> Kernel:
    """FlowNet2's last one, from half to full size. It writes to two of 88 channels, so its writes are far apart."""

    def make() -> tuple[Tensor, ...]:
        flow = torch.randn(PAIRS, 2, *(side // 2 for side in PIXELS), device=device)
        return flow, _room(device, precision, 88)

    weight, bias = torch.randn(2, 2, 4, 4, device=device), torch.randn(2, device=device)
    inputs = _many(make)
    given = [(flow, weight, bias, room[:, 80:82]) for flow, room in inputs]
    ways = _ways({OURS: enlarge_flow, "torch definition": enlarge_flow_definition}, given)
    return _in_bytes("enlarge_flow", precision, ways, (inputs[0][0], given[0][-1]))


def _in_bytes(name: str, precision: str, ways: Mapping[str, Action], moved: Sequence[Tensor]) -> Kernel:
    """A memory-bound operation. ``moved``: the tensors that it reads or writes once, its input first."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in moved)
    return Kernel(name, _shape(moved[0]), precision, ways, 0.0, size)


def _convolution(layer: Layer, device: str, precision: Precision) -> Kernel:
    """With bias and LeakyReLU, written where the network needs it."""
    module, (height, width) = layer.make().to(device), (side >> layer.level for side in PIXELS)
    ways = {OURS: pack_layer(module, precision), "cuDNN, bias_leaky_relu": pack_layer(module, precision, by_cudnn=True)}

    def map_of(channels: int, height: int, width: int) -> Tensor:
        made = torch.zeros(layer.batch, padded(channels), height, width, dtype=DTYPES[precision], device=device)
        made[:, :channels].normal_()
        return made.contiguous(memory_format=torch.channels_last)

    def call(by: Convolution, x: Tensor, whole: Tensor | None) -> None:
        part = None if whole is None or layer.room is None else whole[:, layer.room[1] :][:, : by.outputs]
        if part is not None and by.transposed:  # nothing else reads the result
            by.into(x, part)
        else:
            by(x, part)

    ours, x = ways[OURS], map_of(layer.inputs, height, width)
    out = ours(x).shape
    whole = None if layer.room is None else map_of(layer.room[0], *out[2:])
    flops = 2.0 * x.shape[0] * ours.weight[0, 0].numel() * layer.inputs * ours.outputs
    flops *= height * width / (1 if ours.transposed else ours.stride**2)
    written = 2 * out.numel() if layer.room is not None and not ours.transposed else out.numel()
    return Kernel(
        f"convolution, {layer.name}",
        _shape(x),
        precision,
        {name: _without_gradients(partial(call, way), [(x, whole)]) for name, way in ways.items()},
        flops,
        x.element_size() * (x.shape[0] * layer.inputs * height * width + written),
    )


def _color(device: str) -> Kernel:
    """OpenCV has no Middlebury colour wheel; instead it paints the angle as hue, as in its tutorials.

    The limit is reading the flow and writing the picture.
    """
    inputs = _many(lambda: (_flow(device),))
    as_tensors = [(flow, 20.0) for (flow,) in inputs]
    if device == "cpu":
        arrays = [(_last(flow), 20.0) for (flow,) in inputs]
        ways = _ways({OURS: flow_to_color, "OpenCV HSV (another wheel)": _hsv}, arrays)
        ways["flowreel, as a tensor"] = _without_gradients(flow_to_color, as_tensors)
    else:
        ways = _ways({OURS: flow_to_color, "torch definition": flow_to_color_definition}, as_tensors)
    return Kernel("flow_to_color", _shape(inputs[0][0]), "fp32", ways, 0.0, (8 + 3) * PIXELS[0] * PIXELS[1])


def _yuv_to_rgb(device: str) -> Kernel:
    """NV12, as NVDEC outputs it. There is no row for a CPU, where FFmpeg's scaler converts decoded frames."""
    height, width = PIXELS

    def make() -> tuple[Tensor, ...]:
        luma = torch.randint(16, 236, PIXELS, dtype=torch.uint8, device=device)
        return luma, torch.randint(16, 241, (height // 2, width // 2, 2), dtype=torch.uint8, device=device)

    def definition(luma: Tensor, chroma: Tensor) -> None:
        yuv_to_rgb_definition(
            torch.empty(3, *PIXELS, dtype=torch.uint8, device=device), luma, chroma, "bt709", False, 8
        )

    inputs = _many(make)
    ways = _ways({OURS: yuv_to_rgb, "torch definition": definition}, inputs)
    return Kernel("yuv_to_rgb", f"{_shape(inputs[0][0])} NV12", "8 bits", ways, 0.0, 4.5 * height * width)


def _quantise(device: str) -> Kernel:
    """To int16 steps of 1/64 px. On a CPU beside the store's own NumPy code, which works in place, block by block."""
    inputs = _many(lambda: (_flow(device),))
    given = [(flow, 1 / 64, 32767.0, torch.int16) for (flow,) in inputs]
    ways = _ways({OURS: quantise} | ({"torch definition": quantise_definition} if device == "cuda" else {}), given)
    if device == "cpu":
        from flowreel.engine.config import SinkConfig
        from flowreel.sinks.codecs import flow_codec

        codec = flow_codec(*PIXELS, SinkConfig(max_error=1 / 128))
        ways["the store's, NumPy"] = _without_gradients(codec.quantise, [(flow[0].numpy(),) for (flow,) in inputs])
    return Kernel("quantise", _shape(inputs[0][0]), "fp32", ways, 0.0, 2 * (4 + 2) * PIXELS[0] * PIXELS[1])


def _bitshuffle(device: str) -> Kernel:
    """int16 steps, in blocks as in a store."""
    from flowreel.sinks.blosc import BLOCK_VALUES

    inputs = _many(lambda: (quantise(_flow(device), 1 / 64).steps, BLOCK_VALUES))
    ways = _ways({OURS: bitshuffle, "torch definition": bitshuffle_definition}, inputs)
    return Kernel("bitshuffle", _shape(inputs[0][0]), "16 bits", ways, 0.0, 2 * (2 + 2) * PIXELS[0] * PIXELS[1])


def _hsv(flow: Any, max_flow: float) -> Any:
    import cv2

    length, angle = cv2.cartToPolar(flow[..., 0], flow[..., 1], angleInDegrees=True)
    hsv = np.full((*flow.shape[:2], 3), 255, np.uint8)
    hsv[..., 0] = angle / 2
    hsv[..., 1] = np.minimum(length * (255 / max_flow), 255)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
