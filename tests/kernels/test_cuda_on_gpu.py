"""On a real GPU: each kernel in a captured CUDA graph and under torch.compile, forward and backward.

Results are compared with the definitions, computed on the CPU in float32 from the same values. Plain calls of the
kernels are tested in test_cuda.py and its neighbours, which also run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flowreel.kernels import (
    bitshuffle,
    channel_norm,
    compiling,
    correlation,
    flow_to_color,
    launch,
    quantise,
    warp,
    yuv_to_rgb,
)
from flowreel.kernels.bitshuffle import bitshuffle_definition
from flowreel.kernels.channel_norm import channel_norm_definition
from flowreel.kernels.convolution import convolution, convolution_definition, pack
from flowreel.kernels.correlation import pixel_correlation_definition
from flowreel.kernels.enlarge_flow import enlarge_flow, enlarge_flow_definition
from flowreel.kernels.flow_color import flow_to_color_definition
from flowreel.kernels.flow_head import (
    Borders,
    flow_head,
    flow_head_definition,
    pack_flow_head,
    take_off_borders_,
    take_off_borders_definition,
)
from flowreel.kernels.fusing_input import fusing_input, fusing_input_definition
from flowreel.kernels.normalise_frames import normalise_frames, normalise_frames_definition
from flowreel.kernels.operation import recording
from flowreel.kernels.quantise import quantise_definition
from flowreel.kernels.refining_input import refining_input, refining_input_definition
from flowreel.kernels.warp import warp_definition
from flowreel.kernels.yuv_to_rgb import yuv_to_rgb_definition

Results = tuple[Tensor, ...]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


class Differentiable(NamedTuple):
    """An operation with gradients: the result, then the gradients of all inputs."""

    function: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    full: tuple[int, ...] = ()  # inputs that are always float32


def activated(a: Tensor, b: Tensor) -> Tensor:
    return correlation(a, b, scale=0.3, negative_slope=0.1)


def activated_definition(a: Tensor, b: Tensor) -> Tensor:
    return pixel_correlation_definition(a, b, 10, 2, 0.3, 0.1)


MAP = (2, 5, 11, 19)
DIFFERENTIABLE = {
    "correlation": Differentiable(activated, activated_definition, (MAP, MAP)),
    "warp": Differentiable(warp, warp_definition, (MAP, (2, 2, 11, 19)), full=(1,)),
    "channel_norm": Differentiable(channel_norm, channel_norm_definition, (MAP,)),
}


@pytest.fixture(params=DIFFERENTIABLE.keys())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def random(case: Differentiable, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Inputs on the CPU; flow for warping avoids whole pixels, where the gradient jumps."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in case.shapes]
    made = [x.round() + 0.5 + 0.4 * torch.tanh(x) if n in case.full else x for n, x in enumerate(made)]
    return [x if n in case.full else x.to(dtype) for n, x in enumerate(made)]


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> Results:
    """The result and the inputs' gradients, for an output gradient that is different at each place."""
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, inputs, weights)


def wanted(case: Differentiable, inputs: list[Tensor]) -> Results:
    return with_gradients(case.definition, [x.float().cpu().detach().requires_grad_() for x in inputs])


def compare(found: Results, expected: Results, tolerance: float) -> None:
    for x, y in zip(found, expected, strict=True):
        size = max(1.0, y.abs().max().item())
        torch.testing.assert_close(x.float().cpu(), y, rtol=2 * tolerance, atol=2 * tolerance * size)


def captured(work: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, Results]:
    """A CUDA graph of the work, and the tensors that each replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


def test_in_a_captured_graph(gpu: torch.device, name: str, dtype: torch.dtype) -> None:
    case = DIFFERENTIABLE[name]
    inputs = [x.to(gpu).requires_grad_() for x in random(case, dtype, 1)]
    with recording(ran := {}):
        graph, results = captured(lambda: with_gradients(case.function, inputs))
    assert ran[name] == "cuda"
    for seed in (2, 3):
        others = random(case, dtype, seed)
        with torch.no_grad():
            for place, values in zip(inputs, others, strict=True):
                place.copy_(values)
        graph.replay()
        compare(results, wanted(case, others), TOLERANCE[dtype])


def test_under_torch_compile(gpu: torch.device, name: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    case = DIFFERENTIABLE[name]
    inputs = random(case, dtype, 1)
    compiled = torch.compile(case.function, fullgraph=True)
    compare(
        with_gradients(compiled, [x.to(gpu).requires_grad_() for x in inputs]), wanted(case, inputs), TOLERANCE[dtype]
    )


def test_correlation_into_a_concatenation_in_a_graph_and_compiled(gpu: torch.device, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    a, b = torch.randn(2, 2, 8, 11, 19).to(dtype)
    expected = torch.ones(2, 446, 11, 19)
    expected[:, 3:444] = activated_definition(a.float(), b.float())
    a, b = (x.to(gpu, memory_format=torch.channels_last) for x in (a, b))

    def work() -> Results:
        whole = torch.ones(2, 446, 11, 19, device=gpu, dtype=dtype).to(memory_format=torch.channels_last)
        correlation(a, b, scale=0.3, negative_slope=0.1, out=whole[:, 3:444])
        return (whole,)

    graph, results = captured(work)
    graph.replay()
    compare(results, (expected,), TOLERANCE[dtype])
    compare(torch.compile(work, fullgraph=True)(), (expected,), TOLERANCE[dtype])


def test_network_inputs_in_a_graph_and_compiled(gpu: torch.device) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    first, second, flow = (
        torch.randn(2, *shape, generator=generator) for shape in ((3, 20, 44), (3, 20, 44), (2, 5, 11))
    )
    weight, bias = torch.randn(2, 2, 4, 4, generator=generator), torch.randn(2, generator=generator)

    def rooms(device: torch.device) -> list[Tensor]:
        shapes = ((2, 6, 20, 44), (2, 8, 20, 44), (4, 8, 20, 44), (2, 16, 20, 44), (2, 16, 20, 44), (2, 7, 10, 22))
        made = [torch.zeros(shape, device=device) for shape in shapes]
        return made[:1] + [x.to(memory_format=torch.channels_last) for x in made[1:]]

    expected = rooms(torch.device("cpu"))
    normalise_frames_definition(first, second, *expected[:3])
    refining_input_definition(expected[0], flow, 2.0, expected[3])
    fusing_input_definition(expected[0], flow, 0.5, flow, 2.0, expected[4])
    enlarge_flow_definition(flow, weight, bias, expected[5][:, 3:5])
    given = [x.to(gpu) for x in (first, second, flow, weight, bias)]

    def work() -> Results:
        one, two, quarter, *learned = given
        planes, pair, both, refining, fusing, whole = rooms(gpu)
        normalise_frames(one, two, planes=planes, pair=pair, both=both)
        refining_input(planes, quarter, 2.0, refining)
        fusing_input(planes, quarter, 0.5, quarter, 2.0, fusing)
        enlarge_flow(quarter, *learned, whole[:, 3:5])
        return planes, pair, both, refining, fusing, whole

    graph, results = captured(work)
    graph.replay()
    compare(results, tuple(expected), 1e-5)
    compare(torch.compile(work, fullgraph=True)(), tuple(expected), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convolution_into_a_concatenation_in_a_graph_and_compiled(gpu: torch.device, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    x, bias = torch.randn(2, 16, 37, 21).to(dtype).contiguous(memory_format=torch.channels_last), torch.randn(64)
    weight = (torch.randn(64, 11, 3, 3) / 10).to(dtype)
    expected = torch.ones(2, 88, 37, 21).to(dtype)
    own = torch.empty(2, 64, 37, 21, dtype=dtype)
    packed = pack(weight, 1, False)
    convolution_definition(x, weight, packed, bias, 1, False, 0.1, own, expected[:, 8:72])
    given = [tensor.to(gpu) for tensor in (x, weight, packed, bias)]

    def work() -> Results:
        whole = torch.ones(2, 88, 37, 21, device=gpu, dtype=dtype).to(memory_format=torch.channels_last)
        return convolution(*given, 0.1, 1, also=whole[:, 8:72]), whole

    with recording(ran := {}):
        graph, results = captured(work)
    assert ran["convolution"] == "cuda"
    graph.replay()
    for found in (results, torch.compile(work, fullgraph=True)()):
        compare(found, (own.float(), expected.float()), TOLERANCE[dtype])


def test_pictures_and_steps_in_a_graph_and_compiled(gpu: torch.device) -> None:
    torch._dynamo.reset()
    flow = torch.randn(2, 2, 37, 130, generator=torch.Generator().manual_seed(1)) * 300
    luma = torch.randint(0, 256, (36, 52), dtype=torch.uint8)
    chroma = torch.randint(0, 256, (18, 26, 2), dtype=torch.uint8)
    rgb = torch.zeros(3, 36, 52, dtype=torch.uint8)
    yuv_to_rgb_definition(rgb, luma, chroma, "bt709", False, 8)
    steps, found = quantise_definition(flow, 1 / 64, 32767.0, torch.int16)
    shuffled = bitshuffle_definition(steps, 4096)
    expected = (steps, found, shuffled, flow_to_color_definition(flow, None), rgb)
    given = [x.to(gpu) for x in (flow, luma, chroma)]

    def work() -> Results:
        on_card, y, c = given
        steps, found = quantise(on_card, 1 / 64)
        return (steps, found, bitshuffle(steps, 4096), flow_to_color(on_card), yuv_to_rgb(y, c))

    graph, results = captured(work)
    graph.replay()
    for found in (results, torch.compile(work, fullgraph=True)()):
        for x, y in zip(found[:3], expected[:3], strict=True):
            assert torch.equal(x.cpu(), y)
        for x, y in zip(found[3:], expected[3:], strict=True):
            assert (x.cpu().int() - y.int()).abs().max() <= 1


def test_flow_heads_in_a_graph_and_compiled(gpu: torch.device) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(2, 200, 5, 5, generator=generator) / 70, torch.randn(2, generator=generator)
    packed = pack_flow_head(weight, torch.float16)
    shapes = (4, 5, 2, 200), (4, 2), (4, 2, 200), (4, 2)
    borders = Borders(*(torch.randn(shape, generator=generator) / 30 for shape in shapes))
    x = torch.randn(2, 200, 23, 70, generator=generator).half().contiguous(memory_format=torch.channels_last)
    expected = flow_head_definition(x, packed, bias)
    take_off_borders_definition(expected, x, *borders)
    packed_there, bias_there, there = packed.to(gpu), bias.to(gpu), torch.zeros_like(x, device=gpu)
    borders_there = Borders(*(part.to(gpu) for part in borders))

    def work() -> Results:
        return (take_off_borders_(flow_head(there, packed_there, bias_there), there, borders_there),)

    with recording(ran := {}):
        graph, results = captured(work)
    assert ran == {"flow_head": "cuda", "take_off_borders_": "cuda"}
    there.copy_(x)
    for _ in range(2):
        graph.replay()
        compare(results, (expected,), 1e-4)
    compare(torch.compile(work, fullgraph=True)(), (expected,), 1e-4)


def test_all_kernels_load(gpu: torch.device) -> None:
    assert launch.kernels_on(gpu) == "cuda"
    launch.prepare(gpu)
    assert {source for source, _ in launch._modules} == {path.stem for path in compiling.SOURCES.glob("*.cu")}
