"""Every CUDA kernel equals its definition, on a CPU that acts as a GPU and on a real GPU if present."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flowreel.kernels import channel_norm, correlation, warp
from flowreel.kernels import launch as launching

Shape = tuple[int, int, int, int]
DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # relative: 1 rounding of the result
SHAPES: tuple[Shape, ...] = ((1, 1, 1, 1), (1, 3, 1, 7), (2, 2, 9, 1), (2, 5, 7, 13), (1, 3, 20, 33))


class Case(NamedTuple):
    module: object  # which contains the kernel's launch and the definition
    name: str  # of the operation
    inputs: Callable[[Callable[..., Tensor], Shape], tuple[object, ...]]  # from a function that makes random tensors
    shapes: tuple[Shape, ...] = SHAPES


def _module(function: object) -> object:
    import sys

    return sys.modules[function.__module__]


def of_norm(random: Callable[..., Tensor], shape: Shape) -> tuple[object, ...]:
    x = random(*shape)
    x[0, :, 0, 0] = 0  # a zero vector
    norm = channel_norm(x.cpu()).to(x.device)
    return random(shape[0], 1, *shape[2:]), x, norm


def flow_for(random: Callable[..., Tensor], shape: Shape) -> Tensor:
    """Mostly short, some whole numbers, some far beyond the border, one vector infinite; always float32."""
    flow = random(shape[0], 2, *shape[2:], dtype=torch.float32) * 3
    flow.view(-1)[::7] *= 50
    flow.view(-1)[3::11] = flow.view(-1)[3::11].round()
    flow[-1, :, -1, -1] = torch.tensor([torch.inf, -torch.inf])
    return flow


WIDE: Shape = (2, 8, 5, 131)  # several tiles of columns, the last one short; channels in three turns


def for_correlation(radius: int, stride: int, *how: float) -> Callable[..., tuple[object, ...]]:
    """Two maps and the settings: radius, stride, scale, slope."""
    return lambda random, shape: (random(*shape), random(*shape), radius, stride, *how)


def for_its_gradient(radius: int, stride: int, *how: float) -> Callable[..., tuple[object, ...]]:
    def inputs(random: Callable[..., Tensor], shape: Shape) -> tuple[object, ...]:
        volume = shape[0], (2 * radius + 1) ** 2, *shape[2:]
        return random(*volume), random(*shape), random(*shape), radius, stride, *how

    return inputs


def of_correlation(name: str, inputs: Callable[..., tuple[object, ...]], *more: Shape) -> Case:
    return Case(_module(correlation), f"pixel_{name}", inputs, (*SHAPES, *more))


CASES = {
    "correlation": of_correlation("correlation", for_correlation(10, 2), WIDE),
    "correlation, activated": of_correlation("correlation", for_correlation(4, 1, 0.7, 0.1), WIDE),
    "correlation, in parts": of_correlation("correlation", for_correlation(7, 3, None, 0.1)),  # two in x, three in y
    "correlation, one displacement": of_correlation("correlation", for_correlation(0, 5)),
    "correlation_backward": of_correlation("correlation_backward", for_its_gradient(10, 2)),
    "correlation_backward, scaled": of_correlation("correlation_backward", for_its_gradient(2, 1, 0.7), (1, 17, 3, 5)),
    "channel_norm": Case(_module(channel_norm), "channel_norm", lambda random, shape: (random(*shape),)),
    "channel_norm_backward": Case(_module(channel_norm), "channel_norm_backward", of_norm),
    "warp": Case(_module(warp), "warp", lambda random, shape: (random(*shape), flow_for(random, shape))),
    "warp_image_gradient": Case(
        _module(warp), "warp_image_gradient", lambda random, shape: (random(*shape), flow_for(random, shape))
    ),
    "warp_flow_gradient": Case(
        _module(warp),
        "warp_flow_gradient",
        lambda random, shape: (random(*shape), random(*shape), flow_for(random, shape)),
    ),
}


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def with_gaps(x: Tensor) -> Tensor:
    """Every second element of a larger tensor, whose other elements are NaN."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


LAYOUTS = {f.__name__: f for f in (Tensor.contiguous, channels_last, transposed, with_gaps)}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


def random_tensors(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    return random


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_kernel_equals_its_definition(case: Case, dtype: torch.dtype, card: torch.device) -> None:
    compare(case, dtype, card)


def compare(case: Case, dtype: torch.dtype, card: torch.device) -> None:
    kernel = getattr(case.module, f"_{case.name}_cuda")
    definition = getattr(case.module, f"{case.name}_definition")
    for shape in case.shapes:
        inputs = case.inputs(random_tensors(card, dtype), shape)
        wanted = definition(*inputs)
        for layout in LAYOUTS.values():
            out = kernel(*(layout(x) if isinstance(x, Tensor) and x.ndim == 4 else x for x in inputs))
            for found, expected in zip(*((x,) if isinstance(x, Tensor) else x for x in (out, wanted)), strict=True):
                assert_close(found, expected, TOLERANCE[dtype])
                assert found.is_contiguous()


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compares relative to each value, or to the largest value where terms may have cancelled."""
    largest = max(1.0, expected.float().nan_to_num(0, 0, 0).abs().max().item())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 4 * largest, equal_nan=True)


def test_an_unknown_flow_spoils_its_own_pixel_only(card: torch.device) -> None:
    image, flow = torch.ones(1, 2, 4, 5, device=card), torch.zeros(1, 2, 4, 5, device=card)
    flow[0, 0, 1, 2] = torch.nan
    for given in (flow, flow.half(), flow.double()):
        out = _module(warp)._warp_cuda(image, given)  # type: ignore[attr-defined]
        assert out.isnan().nonzero().tolist() == [[0, 0, 1, 2], [0, 1, 1, 2]]


def test_no_gradient_comes_from_an_unknown_flow(card: torch.device) -> None:
    """Where the flow is unknown, the output's gradient is ignored, even if it is NaN itself."""
    random = random_tensors(card, torch.float32)
    image, grad, flow = random(1, 3, 5, 6), random(1, 3, 5, 6), random(1, 2, 5, 6, dtype=torch.float64)
    flow[0, 0, 1, 2] = flow[0, 1, 3, 4] = grad[0, 1, 1, 2] = torch.nan
    known = ~flow.isnan().any(1, keepdim=True)
    module, kept = _module(warp), (torch.where(known, grad, 0), torch.where(known, flow, 0))
    for name, between in (("warp_image_gradient", ()), ("warp_flow_gradient", (image,))):
        launched, definition = getattr(module, f"_{name}_cuda"), getattr(module, f"{name}_definition")
        wanted = definition(kept[0], *between, kept[1])
        assert_close(launched(grad, *between, flow), wanted, 1e-5)
        assert_close(definition(grad, *between, flow), wanted, 1e-6)


def test_far_coordinates_stay_exact(card: torch.device) -> None:
    """At 4000 pixels from the left a float32's spacing is 2.4e-4; the fraction must not be added to such a number."""
    image = torch.arange(4096.0, device=card).expand(1, 1, 1, 4096) % 2
    flow = torch.zeros(1, 2, 1, 4096, device=card)
    flow[:, 0] = 0.0001
    out = _module(warp)._warp_cuda(image, flow)  # type: ignore[attr-defined]
    torch.testing.assert_close(out[0, 0, 0, 4000].item(), 0.0001, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_correlation_goes_into_its_part_of_a_concatenation_and_nowhere_else(
    card: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    random = random_tensors(card, dtype)
    a, b = random(2, 7, 9, 14).to(memory_format=memory_format), random(2, 7, 9, 14)  # a turn of one channel
    whole = random(2, 3 + 441 + 4, 9, 14).to(memory_format=memory_format)
    wanted = whole.clone()
    module: Any = _module(correlation)
    module._pixel_correlation_into_cuda(whole[:, 3:444], a, b, 10, 2, 0.5, 0.1)
    wanted[:, 3:444] = module.pixel_correlation_definition(a, b, 10, 2, 0.5, 0.1)
    assert_close(whole[:, 3:444], wanted[:, 3:444], TOLERANCE[dtype])
    for others in (slice(0, 3), slice(444, None)):
        assert torch.equal(whole[:, others], wanted[:, others])


def test_correlation_takes_a_gradient_that_is_one_number(card: torch.device) -> None:
    module: Any = _module(correlation)
    random = random_tensors(card, torch.float32)
    a, b = random(1, 3, 6, 7), random(1, 3, 6, 7)
    grad = torch.ones(1, 1, 1, 1, device=card).expand(1, 25, 6, 7)
    found = module._pixel_correlation_backward_cuda(grad, a, b, 2, 2)
    for x, y in zip(found, module.pixel_correlation_backward_definition(grad, a, b, 2, 2), strict=True):
        assert_close(x, y, 1e-5)


def test_correlation_of_more_pairs_than_a_grid_is_deep(card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = _module(correlation)
    monkeypatch.setattr(module, "MOST_DEEP", 7)  # each pair takes 3 parts, so only 2 pairs fit in one launch
    random = random_tensors(card, torch.float32)
    a, b = random(5, 2, 3, 4), random(5, 2, 3, 4)
    wanted = module.pixel_correlation_definition(a, b, 10, 2)
    torch.testing.assert_close(module._pixel_correlation_cuda(a, b, 10, 2), wanted, rtol=0, atol=1e-5)


def test_every_dtype_has_its_suffix() -> None:
    assert set(launching.SUFFIXES.items()) == {(dtype, name) for name, dtype in DTYPES.items()}


# --- faults planted in a copy of the sources: the tests above must be able to fail ------------------------------------

FAULTS = {
    "channel_norm: one pixel too many": ("common.cuh", "number < (long long)", "number <= (long long)", "channel_norm"),
    "channel_norm: one channel too few": ("channel_norm.cu", "c < channels", "c < channels - 1", "channel_norm"),
    "channel_norm: no small term": ("channel_norm.cu", " + 1e-9f", "", "channel_norm_backward"),
    "warp: border off by one": ("sampling.cuh", "min(place, size - 1)", "min(place, size)", "warp"),
    "warp: no border at all": ("sampling.cuh", "max(0, min(place, size - 1))", "min(place, size - 1)", "warp"),
    "warp: wrong corner": ("sampling.cuh", "bottom + left, bottom + right", "bottom + right, bottom + left", "warp"),
    "warp: wrong sign": ("warp.cu", "(bottom_left - top_left)", "(top_left - bottom_left)", "warp_flow_gradient"),
    "correlation: no barrier before the first turn": (
        "correlation.cu",
        "keep(buffers);\n    __syncthreads();",
        "keep(buffers);",
        "correlation",
    ),
    "correlation: no barrier between turns": (
        "correlation.cu",
        "__syncthreads();  // the one",
        "// the one",
        "correlation",
    ),
    "correlation: one buffer for two": ("correlation.cu", "turn ^= 1", "turn ^= 0", "correlation"),
    "correlation: one column too many": ("correlation.cu", "&& x < size.width", "&& x <= size.width", "correlation"),
    "correlation: one row too many": (
        "correlation.cu",
        "row_inside = fetched_row >= 0 && fetched_y < size",
        "row_inside = fetched_row >= 0 && fetched_y <= size",
        "correlation",
    ),
    "correlation: one channel too many": ("correlation.cu", "channel < size", "channel <= size", "correlation"),
    "correlation: one dy too many": ("correlation.cu", "dy >= side", "dy > side", "correlation, in parts"),
    "correlation: one dx too many": ("correlation.cu", "k >= side", "k > side", "correlation, in parts"),
    "correlation: wrong displacement": ("correlation.cu", "window[k + j]", "window[k + 3 - j]", "correlation"),
    "correlation: phases not apart": ("correlation.cu", "p % phases * phase_pitch", "0", "correlation"),
    "correlation: not activated": (
        "correlation.cu",
        "mean < 0 ? mean * slope : mean",
        "mean",
        "correlation, activated",
    ),
    "correlation: not scaled": ("correlation.cu", "sums[k][j] * scale", "sums[k][j]", "correlation"),
    "correlation: fewer rows than its caller knows": ("correlation.cu", "ROWS = 3", "ROWS = 2", "correlation"),
    "correlation: b's gradient from the wrong side": ("correlation.cu", "p.x - dx", "p.x + dx", "correlation_backward"),
    "correlation: gradient from beyond the map": (
        "correlation.cu",
        "y >= size.height) continue",
        "y > size.height) continue",
        "correlation_backward",
    ),
    "correlation: one channel's gradient too many": (
        "correlation.cu",
        "c <= last",
        "c <= last + 1",
        "correlation_backward",
    ),
    "correlation: groups of channels too small": (
        "correlation.cu",
        "GROUP = 8",
        "GROUP = 4",
        "correlation_backward, scaled",
    ),
    "warp: a share lost": (
        "warp.cu",
        "atomicAdd(plane + at.top_left",
        "(void)(plane + at.top_left",
        "warp_image_gradient",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught(fault: tuple[str, str, str, str], plant: Callable[..., torch.device]) -> None:
    *where, name = fault
    device = plant(*where)
    with pytest.raises(AssertionError):
        compare(CASES[name], torch.float32, device)
