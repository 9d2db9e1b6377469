"""Every CUDA kernel equals its definition: on a CPU that acts the GPU, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flowreel.kernels import channel_norm, warp
from flowreel.kernels import launch as launching

Shape = tuple[int, int, int, int]
DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # relative: 1 rounding of the result
SHAPES: tuple[Shape, ...] = ((1, 1, 1, 1), (1, 3, 1, 7), (2, 2, 9, 1), (2, 5, 7, 13), (1, 3, 20, 33))


class Case(NamedTuple):
    module: object  # the file that holds both
    name: str  # of the operation
    inputs: Callable[[Callable[..., Tensor], Shape], tuple[object, ...]]  # made of a random tensor's maker
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
    """Mostly near, some far beyond the border, one infinite, one unknown; float32 always."""
    flow = random(shape[0], 2, *shape[2:], dtype=torch.float32) * 3
    flow.view(-1)[::7] *= 50
    flow.view(-1)[3::11] = flow.view(-1)[3::11].round()
    flow[-1, :, -1, -1] = torch.tensor([torch.inf, -torch.inf])
    return flow


CASES = {
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
    """Every other element of a tensor that is NaN between."""
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
            torch.testing.assert_close(out, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 4, equal_nan=True)
            assert out.is_contiguous() if isinstance(out, Tensor) else all(x.is_contiguous() for x in out)


def test_an_unknown_flow_spoils_its_own_pixel_only(card: torch.device) -> None:
    image, flow = torch.ones(1, 2, 4, 5, device=card), torch.zeros(1, 2, 4, 5, device=card)
    flow[0, 0, 1, 2] = torch.nan
    out = _module(warp)._warp_cuda(image, flow)  # type: ignore[attr-defined]
    assert out.isnan().nonzero().tolist() == [[0, 0, 1, 2], [0, 1, 1, 2]]


def test_far_coordinates_stay_exact(card: torch.device) -> None:
    """4000 pixels from the left a float's spacing is 2.4e-4, but the fraction is never added to that."""
    image = torch.arange(4096.0, device=card).expand(1, 1, 1, 4096) % 2
    flow = torch.zeros(1, 2, 1, 4096, device=card)
    flow[:, 0] = 0.0001
    out = _module(warp)._warp_cuda(image, flow)  # type: ignore[attr-defined]
    torch.testing.assert_close(out[0, 0, 0, 4000].item(), 0.0001, rtol=1e-4, atol=0)


def test_every_dtype_has_its_suffix() -> None:
    assert set(launching.SUFFIXES.items()) == {(dtype, name) for name, dtype in DTYPES.items()}


# --- faults planted in a copy of the sources --------------------------------------------------------------------------

FAULTS = {
    "channel_norm: one pixel too many": ("common.cuh", "number < (long long)", "number <= (long long)", "channel_norm"),
    "channel_norm: one channel too few": ("channel_norm.cu", "c < channels", "c < channels - 1", "channel_norm"),
    "channel_norm: no small term": ("channel_norm.cu", " + 1e-9f", "", "channel_norm_backward"),
    "warp: border off by one": ("warp.cu", "place : size - 1", "place : size", "warp"),
    "warp: no border at all": ("warp.cu", "place < 0 ? 0 : ", "", "warp"),
    "warp: wrong corner": ("warp.cu", "bottom + left, bottom + right", "bottom + right, bottom + left", "warp"),
    "warp: wrong sign": ("warp.cu", "(bottom_left - top_left)", "(top_left - bottom_left)", "warp_flow_gradient"),
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
