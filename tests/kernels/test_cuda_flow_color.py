"""The CUDA kernel that turns flow into colours equals the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowreel.kernels.flow_color import _flow_to_color_cuda, flow_to_color, flow_to_color_definition

SIZES = ((1, 1), (1, 7), (9, 1), (13, 33), (70, 131))  # the last takes three blocks
LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    Tensor.contiguous,
    lambda x: x.contiguous(memory_format=torch.channels_last),
    lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
)


def flows(count: int, height: int, width: int) -> Tensor:
    """Short and long vectors; some at rest, some along the axes, some unknown in one component or too long."""
    flow = torch.randn(2, count * height * width, generator=torch.Generator().manual_seed(width)) * 8
    for place, (u, v) in enumerate([(0.0, 0.0), (5.0, 0.0), (-5.0, -0.0), (0.0, 3.0), (torch.nan, 1.0), (2.0, 2e9)]):
        flow[:, place + 3 :: 11] = torch.tensor([[u], [v]])
    return flow.view(2, count, height, width).transpose(0, 1).contiguous()


def compare(device: torch.device, dtype: torch.dtype, size: tuple[int, int], max_flow: float | None) -> None:
    flow = flows(3, *size).to(dtype)
    flow[1] = 0 if max_flow is None else torch.inf  # one flow without motion, or entirely unknown
    wanted = flow_to_color_definition(flow, max_flow)
    for layout in LAYOUTS:
        out = _flow_to_color_cuda(layout(flow.to(device)), max_flow)
        assert out.is_contiguous()
        apart = (out.cpu().int() - wanted.int()).abs()
        assert apart.max() <= 1
        assert apart.sum() <= max(3, 0.01 * apart.numel())  # a few values are rounded the other way


@pytest.mark.parametrize("max_flow", [None, 9.5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_its_definition(
    card: torch.device, dtype: torch.dtype, size: tuple[int, int], max_flow: float | None
) -> None:
    compare(card, dtype, size, max_flow)


def test_the_longest_vector_has_its_full_colour(card: torch.device) -> None:
    """The scale is the longest vector's length; if rounding made it smaller, that vector would be darkened."""
    flow = torch.randn(500, 2, 1, 3, generator=torch.Generator().manual_seed(1)).to(card)
    longest = flow.square().sum(1).argmax(-1).flatten()
    colors = _flow_to_color_cuda(flow, None)[torch.arange(500, device=card), :, 0, longest]
    assert (colors.amax(1) == 255).all()


def test_no_pictures_and_whole_numbers(card: torch.device) -> None:
    assert _flow_to_color_cuda(torch.zeros(0, 2, 3, 4, device=card), None).shape == (0, 3, 3, 4)
    assert flow_to_color(torch.zeros(0, 2, 3, 4)).shape == (0, 3, 3, 4)
    whole = torch.randint(-9, 9, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    for max_flow in (None, 5.0):
        assert torch.equal(flow_to_color(whole, max_flow), flow_to_color(whole.float(), max_flow))


FAULTS: dict[str, tuple[str, str, str, Any]] = {
    "no barrier before the wheel is read": ("flow_color.cu", "__syncthreads();\n    const Share", "const Share", 9.5),
    "no barrier while the longest is found": ("common.cuh", "__syncthreads();", "", None),
    "half of the block's vectors forgotten": ("common.cuh", "half = BLOCK / 2", "half = BLOCK / 4", None),
    "blocks that do the same": ("common.cuh", "block * BLOCK + threadIdx.x", "threadIdx.x", 9.5),
    "one pixel too many": ("flow_color.cu", "i < pixels", "i <= pixels", 9.5),
    "one column too few": ("flow_color.cu", "COLUMNS = 56", "COLUMNS = 55", 9.5),
    "unknown beyond 1e10": ("common.cuh", "1e9f", "1e10f", 9.5),
    "an unknown vector painted": ("flow_color.cu", "!known ? 0.0f : ", "", 9.5),
    "no scale where nothing moves": ("flow_color.cu", "scales[share.n] : 1.0f", "scales[share.n] : 0.0f", None),
    "a wrong half turn": ("flow_color.cu", "+ 1) * 27", "+ 1) * 27.5f", 9.5),
    "the picture's other direction": ("flow_color.cu", "atan2f(-v, -u)", "atan2f(v, -u)", 9.5),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught(fault: tuple[str, str, str, Any], plant: Callable[..., torch.device]) -> None:
    *where, max_flow = fault
    device = plant(*where)
    with pytest.raises(AssertionError):
        compare(device, torch.float32, (70, 131), max_flow)
