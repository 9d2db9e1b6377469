"""The correlation on tensor cores equals its definition, on a CPU that acts as a GPU and on a real GPU if present."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowreel.kernels import correlation_products
from flowreel.kernels.correlation import _pixel_correlation_into_cuda, pixel_correlation_definition

Shape = tuple[int, int, int, int]
TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}  # relative: one rounding of the result


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def maps(device: torch.device, dtype: torch.dtype, shape: Shape) -> tuple[Tensor, Tensor]:
    """Two maps as the engine passes them: the halves of one batch, channels last."""
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(7)
    both = torch.randn(2 * batch, height, width, channels, generator=generator).to(dtype).to(device)
    a, b = both.permute(0, 3, 1, 2).split(batch)
    return a, b


def amid_nan(x: Tensor) -> Tensor:
    """The same map as a part of a larger tensor that is NaN everywhere else."""
    batch, channels, height, width = x.shape
    whole = torch.full((batch, height + 2, width + 2, channels + 16), torch.nan, dtype=x.dtype, device=x.device)
    part = whole.permute(0, 3, 1, 2)[:, 8:-8, 1:-1, 1:-1]
    part.copy_(x)
    return part


def compare(a: Tensor, b: Tensor, radius: int, stride: int, out: Tensor | None = None) -> None:
    """Compares the scaled and activated correlation with the definition."""
    assert correlation_products.fits(a, radius)
    wanted = pixel_correlation_definition(a, b, radius, stride, 0.5, 0.1)
    out = torch.full_like(wanted, torch.nan) if out is None else out
    correlation_products.pixel_correlation_into(out, a, b, radius, stride, 0.5, 0.1)
    tolerance, largest = TOLERANCE[a.dtype], wanted.float().abs().max().item()
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance / 4 * largest)


@pytest.mark.parametrize(
    ("shape", "radius", "stride"),
    [
        ((1, 8, 1, 1), 10, 2),  # a single pixel; three of four phases are empty
        ((2, 16, 3, 1), 10, 2),
        ((1, 24, 1, 70), 10, 2),  # several tiles, the last one short
        ((2, 40, 21, 5), 10, 2),  # several blocks vertically; displacements larger than the picture
        ((1, 256, 5, 37), 10, 2),
        ((1, 136, 3, 9), 10, 2),  # slightly more channels than one stage holds
        ((1, 8, 27, 5), 10, 1),  # rows without a counterpart
        ((1, 24, 19, 25), 4, 1),
        ((2, 40, 10, 37), 4, 3),
    ],
    ids=str,
)
def test_equals_its_definition(card: torch.device, dtype: torch.dtype, shape: Shape, radius: int, stride: int) -> None:
    compare(*maps(card, dtype, shape), radius, stride)


@pytest.mark.parametrize("start", [0, 3, 32])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_goes_into_its_part_of_a_concatenation_and_nowhere_else(
    card: torch.device, layout: torch.memory_format, start: int
) -> None:
    a, b = maps(card, torch.float16, (2, 16, 5, 36))
    whole = torch.full((2, start + 441 + 7, 5, 36), 7, dtype=torch.float16, device=card).to(memory_format=layout)
    compare(a, b, 10, 2, out=whole[:, start : start + 441])
    assert (whole[:, :start] == 7).all()
    assert (whole[:, start + 441 :] == 7).all()


@pytest.mark.parametrize("shares", [1, 3, 28])
def test_blocks_may_share_the_rows(card: torch.device, monkeypatch: pytest.MonkeyPatch, shares: int) -> None:
    monkeypatch.setattr(correlation_products, "_shares", lambda tiles, rows, at_once: shares)
    monkeypatch.setattr(correlation_products, "MOST_DEEP", 2 * shares)  # so that only two pairs fit in one launch
    compare(*maps(card, torch.bfloat16, (3, 8, 19, 3)), 10, 2)


def test_shares_fill_the_gpu_and_no_more() -> None:
    assert correlation_products._shares(64, 28, 264) == 4  # 256 blocks at once instead of 64
    assert correlation_products._shares(64, 28, 80) == 1  # a GPU with 40 multiprocessors
    assert correlation_products._shares(512, 28, 264) == 1
    assert correlation_products._shares(10**6, 28, 264) == 1


@pytest.mark.parametrize(("count", "deep"), [(132, 4), (40, 1)])
def test_a_smaller_gpu_gets_fewer_blocks(monkeypatch: pytest.MonkeyPatch, count: int, deep: int) -> None:
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(correlation_products, "multiprocessors", lambda device: count)
    monkeypatch.setattr(correlation_products, "launch", lambda source, entry, grid, *how: grids.append(grid))
    a, b = maps(torch.device("cpu"), torch.float16, (1, 8, 64, 128))
    correlation_products.pixel_correlation_into(a.new_empty(1, 441, 64, 128), a, b, 10, 2, 1.0, 1.0)
    assert grids == [(4, 16, deep)]


def test_what_lies_beyond_is_neither_read_nor_spoilt(card: torch.device, dtype: torch.dtype) -> None:
    compare(*map(amid_nan, maps(card, dtype, (1, 24, 6, 11))), 10, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels apart": Tensor.contiguous,
    "not from a multiple of 16 bytes": lambda x: amid_nan(x)[:, 4:12],
    "pixels not at multiples of 16 bytes": lambda x: torch.cat([x, x[:, :4]], 1)[:, :8],
    "one for all pixels": lambda x: x[:, :, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout(card: torch.device, layout: Callable[[Tensor], Tensor]) -> None:
    a, b = map(layout, maps(card, torch.float16, (1, 16, 3, 5)))
    compare(a, b, 4, 1)


def test_maps_that_can_be_read_in_words_are_not_copied() -> None:
    for x in maps(torch.device("cpu"), torch.float16, (2, 16, 3, 5)):
        assert correlation_products._read_in_words(x) is x


@pytest.mark.parametrize(
    ("channels", "dtype", "radius", "entry"),
    [
        (256, torch.float16, 4, "correlation_products_4_half"),
        (8, torch.bfloat16, 10, "correlation_products_10_bfloat16"),
        (8, torch.float32, 4, "correlation_9_float"),
        (12, torch.float16, 4, "correlation_9_half"),  # no whole number of 16-byte words
        (264, torch.float16, 4, "correlation_9_half"),  # more channels than a warp holds
        (8, torch.float16, 9, "correlation_21_half"),
    ],
)
def test_only_maps_that_fit_go_to_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, channels: int, dtype: torch.dtype, radius: int, entry: str
) -> None:
    asked = []
    for module in (correlation_products, sys.modules[_pixel_correlation_into_cuda.__module__]):
        monkeypatch.setattr(module, "launch", lambda source, entry, *how: asked.append(entry))
    a, b = maps(torch.device("cpu"), dtype, (1, channels, 3, 4))
    _pixel_correlation_into_cuda(a.new_empty(1, (2 * radius + 1) ** 2, 3, 4), a, b, radius, 1)
    assert asked == [entry]


# --- faults planted in a copy of the source: the tests above must be able to fail -------------------------------------

FAULTS = {
    "no barrier": ("__syncthreads();  // this", "// this"),
    "not waited for": ("fetch_wait<STAGES - 2>", "fetch_wait<STAGES - 1>"),
    "fetched into a stage that is being read": ("stage == 0 ? STAGES - 1 : stage - 1", "stage"),
    "one column too many": ("fetched_column + i < columns", "fetched_column + i <= columns"),
    "one column too few": ("fetched_column + i >= 0", "fetched_column + i > 0"),
    "channels too many of b": ("const bool filled =", "const bool filled = true ||"),
    "channels too many of a": ("32 * k < count", "0 < count"),
    "halves not where they are looked for": ("unit ^ fetched % 2 * 4", "unit"),
    "one dy too many": ("dy >= SIDE", "dy > SIDE"),
    "one dy too few": ("row - RADIUS < own_row + OWN", "row - RADIUS < own_row"),
    "one row too many": ("row < rows) {", "row <= rows) {"),
    "one pixel too many": ("own_column + m < columns ?", "own_column + m <= columns ?"),
    "rows in the wrong order": ("row - own_row - i + RADIUS", "own_row + i - row + RADIUS"),
    "band not straight": ("m * (PITCH + 1)", "m * PITCH"),
    "written before it is there": ("__syncwarp();\n            T* const to", "T* const to"),
    "overwritten before it is read": ("__syncwarp();  // read", "// read"),
    "not activated": ("low < 0 ? low * slope : low", "low"),
    "not scaled": ("sums[i][c][2 * half] * scale", "sums[i][c][2 * half]"),
    "fewer rows than its caller knows": ("DOWN = 2", "DOWN = 1"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught(fault: tuple[str, str], plant: Callable[..., torch.device]) -> None:
    device = plant("correlation_products.cu", *fault)

    def compare_all() -> None:
        compare(*maps(device, torch.float16, (1, 136, 3, 4)), 10, 2)
        compare(*map(amid_nan, maps(device, torch.float16, (1, 24, 29, 20))), 10, 2)

    with pytest.raises(AssertionError):
        compare_all()
