"""The correlation by tensor cores equals its definition: on a CPU that acts the GPU, and on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowreel.kernels import correlation_products
from flowreel.kernels.correlation import pixel_correlation_definition

Shape = tuple[int, int, int, int]
TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}  # relative: one rounding of the result


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def maps(device: torch.device, dtype: torch.dtype, shape: Shape) -> tuple[Tensor, Tensor]:
    """As the engine gives them: two halves of one batch, channels last."""
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(7)
    both = torch.randn(2 * batch, height, width, channels, generator=generator).to(dtype).to(device)
    a, b = both.permute(0, 3, 1, 2).split(batch)
    return a, b


@pytest.mark.parametrize(
    ("shape", "radius", "stride"),
    [
        ((1, 8, 1, 1), 10, 2),  # a single pixel; three of four phases are empty
        ((2, 16, 3, 1), 10, 2),
        ((1, 24, 1, 70), 10, 2),  # several tiles, the last of them ragged
        ((2, 40, 21, 5), 10, 2),  # rows beside each other and beyond one block; the reach is more than the picture
        ((1, 256, 7, 37), 10, 2),
        ((1, 136, 3, 9), 10, 2),  # a little more than one chunk of channels
        ((1, 16, 43, 20), 10, 1),
        ((1, 24, 19, 25), 4, 1),
        ((2, 40, 10, 37), 4, 3),
    ],
    ids=str,
)
def test_equals_its_definition(card: torch.device, dtype: torch.dtype, shape: Shape, radius: int, stride: int) -> None:
    a, b = maps(card, dtype, shape)
    assert correlation_products.fits(a, b, radius)
    wanted = pixel_correlation_definition(a, b, radius, stride, 0.5, 0.1)
    out = torch.full_like(wanted, torch.nan)
    correlation_products.pixel_correlation_into(out, a, b, radius, stride, 0.5, 0.1)
    largest = wanted.float().abs().max().item()
    torch.testing.assert_close(out, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 4 * largest)
