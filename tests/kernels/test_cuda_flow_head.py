"""The CUDA kernel of flow heads equals the definition: odd sizes, strips and their ends, parts of larger maps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flowreel.engine.compiled.composed import composed
from flowreel.kernels import flow_head as heads
from flowreel.kernels.flow_head import Borders, pack_flow_head
from tests.kernels.conftest import as_on_a_gpu

Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = (
    (1, 8, 1, 1),
    (1, 16, 1, 70),  # three strips
    (2, 40, 9, 1),
    (2, 88, 7, 33),  # three chunks of channels, one warp
    (1, 136, 6, 31),  # five chunks, two warps
    (1, 200, 5, 37),  # seven chunks, four warps
)
TYPES = (torch.float16, torch.bfloat16)


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def map_of(shape: Shape, dtype: torch.dtype, card: torch.device, beside: int = 0) -> Tensor:
    """A channels-last map, with ``beside`` channels of NaN before and after it."""
    batch, channels, height, width = shape
    whole = torch.full((batch, channels + 2 * beside, height, width), torch.nan)
    whole[:, beside : beside + channels] = random(*shape)
    whole = whole.to(card, dtype).contiguous(memory_format=torch.channels_last)
    return whole[:, beside : beside + channels]


def compare(shape: Shape, kernel: int, dtype: torch.dtype, card: torch.device, beside: int = 0) -> None:
    x = map_of(shape, dtype, card, beside)
    weight = random(2, shape[1], kernel, kernel, seed=4) * (shape[1] * kernel**2) ** -0.5
    bias = torch.tensor([0.5, -2.0], device=card)
    packed = pack_flow_head(weight.to(card), dtype)
    found = heads._flow_head_cuda(x, packed, bias)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found, heads.flow_head_definition(x, packed, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("dtype", TYPES)
def test_kernel_equals_its_definition(dtype: torch.dtype, kernel: int, card: torch.device) -> None:
    for shape in SHAPES:
        compare(shape, kernel, dtype, card)


@pytest.fixture
def tall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives blocks many rows, as for a large map; the last block may have fewer."""
    chosen = heads._shares

    def shares(*given: int) -> tuple[int, int, tuple[int, int, int]]:
        splits, _, (across, _, batch) = chosen(*given)
        return splits, 7, (across, -(-given[2] // 7), batch)

    monkeypatch.setattr(heads, "_shares", shares)


@pytest.mark.parametrize("kernel", [3, 5])
def test_blocks_of_many_rows(kernel: int, card: torch.device, tall: None) -> None:
    compare((1, 200, 9, 9), kernel, torch.float16, card)
    compare((1, 16, 17, 40), kernel, torch.float16, card)


@pytest.mark.parametrize("beside", [8, 16])
def test_part_of_a_larger_map(card: torch.device, beside: int) -> None:
    compare((2, 24, 3, 35), 3, torch.bfloat16, card, beside)


def test_the_kernel_runs_where_it_can_and_the_definition_elsewhere_and_it_is_told(
    card: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    launch = heads.launch
    monkeypatch.setattr(heads, "launch", lambda *given, **more: (launched.append(given[1]), launch(*given, **more)))
    bias = torch.zeros(2, device=card)
    head, borders = torch.ops.flowreel.flow_head.default, torch.ops.flowreel.take_off_borders_.default
    whole = map_of((1, 40, 3, 5), torch.float16, card)
    odd = map_of((1, 12, 3, 5), torch.float16, card)
    for x, runs in (
        (whole, True),
        (whole[:, :16], True),
        (whole[:, :, 1:, 2:], True),
        (whole[:, 4:20], False),  # not aligned
        (whole.contiguous(), False),
        (map_of((1, 80, 3, 5), torch.float16, card)[:, ::2], False),
        (odd, False),
        (whole.float(), False),
    ):
        launched.clear()
        packed = pack_flow_head(random(2, x.shape[1], 3, 3).to(card), x.dtype)
        told = as_on_a_gpu(head, x, packed, bias), as_on_a_gpu(borders, *bordering(x))
        assert told == (("cuda", "cuda") if runs else ("torch", "torch"))
        assert len(launched) == (2 if runs else 0)
    wide, x, *rest = bordering(whole)
    assert as_on_a_gpu(borders, wide.to(memory_format=torch.channels_last), x, *rest) == "torch"


def bordering(x: Tensor) -> tuple[Tensor, ...]:
    """The arguments of ``take_off_borders_`` for a map."""
    return random(x.shape[0], 2, *x.shape[2:], seed=6).to(x.device), x, *borders_of(x.shape[1], x.device)


# --- borders ----------------------------------------------------------------------------------------------------------


def borders_of(channels: int, card: torch.device) -> Borders:
    """Random values that TF32 represents exactly, because cuDNN may compute the definition in TF32."""
    made = (4, 5, 2, channels), (4, 2), (4, 2, channels), (4, 2)
    return Borders(*(random(*shape, seed=5 + n).bfloat16().float().to(card) for n, shape in enumerate(made)))


def compare_borders(shape: Shape, dtype: torch.dtype, card: torch.device) -> None:
    found, x, *borders = bordering(map_of(shape, dtype, card))
    wanted = found.clone()
    heads.take_off_borders_definition(wanted, x, *borders)
    heads._take_off_borders_cuda(found, x, *borders)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", TYPES)
def test_borders_equal_their_definition(dtype: torch.dtype, card: torch.device) -> None:
    for shape in ((1, 8, 1, 1), (2, 16, 1, 7), (1, 264, 9, 1), (2, 40, 2, 2), (2, 24, 5, 11), (2, 96, 19, 38)):
        compare_borders(shape, dtype, card)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 6), (2, 2), (5, 1), (3, 4), (9, 40)])
def test_a_head_behind_a_smoothing_layer_is_the_two(height: int, width: int, card: torch.device) -> None:
    """The fused head equals the two layers exactly, tested with integers that every type represents.

    The large bias of the first layer shows errors at the border, where the second layer pads with zeros instead.
    """
    generator = torch.Generator().manual_seed(height * 100 + width)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float()

    smooth, head = (whole(6, 24, 3, 3), 100 * whole(6)), (whole(2, 6, 3, 3), whole(2))
    x = whole(2, 24, height, width)
    expected = F.conv2d(F.conv2d(x, *smooth, padding=1), *head, padding=1)
    one = composed(smooth, head)
    given = x.to(card, torch.float16).contiguous(memory_format=torch.channels_last)
    packed = pack_flow_head(one.weight, torch.float16).to(card)
    found = heads._flow_head_cuda(given, packed, one.bias.to(card))
    heads._take_off_borders_cuda(found, given, *(part.to(card) for part in one.borders))
    assert torch.equal(found.cpu(), expected)


# --- faults planted in a copy of the sources: the tests above must be able to fail ------------------------------------

HEAD = {
    "one column too many": ("i * 8 < width)", "i * 8 <= width)"),
    "one column too few": ("strip * GIVES - REACH + g", "strip * GIVES + g"),
    "one row too many": ("min(last_row + REACH, height)", "last_row + REACH"),
    "rows above": ("ahead_row >= 0 &&", ""),
    "channels beyond the last": (" && channel < channels;", ";"),
    "read before it is there": ("fetch_wait<STAGES - 2>", "fetch_wait<STAGES - 1>"),
    "a stage that is still read": ("stage == 0 ? STAGES - 1 : stage - 1", "stage"),
    "no barrier": ("__syncthreads();  // one a row", "// one a row"),
    "one buffer": ("buffer ^= 1;", ""),
    "a warp's share lost": ("other < warp - share + splits", "other < warp - share + 1"),
    "each row by the same warp": ("(y - first_row) % splits == share", "share == 0 && splits == 1"),
    "no bias": ("__ldg(bias + output)", "0"),
    "sums not moved on": ("sums.go_on(lane);", ""),
    "sums not begun": ("of[m][0][i] = 0;", ""),
    "the last kx not moved on": ("lane % 4 == 0 ? lane + 3 : lane - 1", "lane"),
    "the last kx of the last ky lost": ("of[m][6][i] = lane % 4 == 0 ? before : 0;", "of[m][6][i] = 0;"),
    "products the wrong way round": ("{low.x, high.x, low.y, high.y}", "{high.x, low.x, high.y, low.y}"),
}


@pytest.mark.parametrize("fault", HEAD.values(), ids=HEAD.keys())
def test_a_planted_fault_is_caught(fault: tuple[str, str], plant: Callable[..., torch.device], tall: None) -> None:
    device = plant("flow_head.cu", *fault)
    with pytest.raises(AssertionError):  # noqa: PT012
        compare((1, 200, 9, 9), 5, torch.float16, device)
        compare((1, 24, 5, 33), 5, torch.float16, device)
        compare((1, 40, 9, 33), 3, torch.float16, device, beside=8)


BORDERS = {
    "a side too few": ("side < 4", "side < 3"),
    "an end too few": ("end < 2", "end < 1"),
    "a corner too few": ("corner < 4", "corner < 2"),
    "no corner's constant": ("again += corner_constants", "again += 0 * corner_constants"),
    "constants from every warp": ("share == 0 && t == 0", "t == 0"),
    "before the line": ("place + away >= 0 && ", ""),
    "beyond the line": ("place + away < size", "place + away <= size"),
    "columns that have the corners too": ("1 + after % max", "after % max"),
    "ends of columns": ("if (!in_row || r < 0", "if (r < 0"),
    "part of the lanes": ("other = 2; other > 0", "other = 1; other > 0"),
    "a warp's share lost": ("other < splits; ++other", "other < 1; ++other"),
    "no barrier": ("__syncthreads();\n    if (!writes)", "if (!writes)"),
    "channels of one turn": ("c += channels.step", "c += channels.all"),
    "channels beyond the last": ("c < channels.all", "c < (channels.all + 31) / 32 * 32"),
    "one pixel too many": ("t < count", "true"),
    "the other output's weights": ("side * TAPS * 2 + output", "side * TAPS * 2"),
}


@pytest.mark.parametrize("fault", BORDERS.values(), ids=BORDERS.keys())
def test_a_fault_at_the_borders_is_caught(fault: tuple[str, str], plant: Callable[..., torch.device]) -> None:
    device = plant("flow_head.cu", *fault)
    with pytest.raises(AssertionError):  # noqa: PT012
        compare_borders((1, 264, 4, 6), torch.float16, device)
        compare_borders((1, 8, 1, 5), torch.float16, device)
