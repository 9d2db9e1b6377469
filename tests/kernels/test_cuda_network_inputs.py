"""The CUDA kernels that prepare networks' inputs and enlarge flow between levels equal their definitions.

Tested with incomplete and whole tiles, borders, unknown and infinite flow, types, layouts, parts of concatenations and
planted faults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowreel.kernels import enlarge_flow, fusing_input, normalise_frames, refining_input
from flowreel.kernels.channel_norm import channel_norm_definition
from tests.kernels.conftest import as_on_a_gpu

TYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # for half types: one rounding
SIZES = ((1, 4, 4), (1, 12, 36), (2, 8, 100), (2, 64, 64))  # of frames: less than a tile, incomplete tiles, two frames
FLOWS = ((1, 1, 1), (2, 3, 5), (1, 8, 32), (2, 5, 33))  # (1, 8, 32): whole tiles


class Draws:
    """Makes the same random tensors every time, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(5)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device)

    def frames(self, batch: int, height: int, width: int) -> Tensor:
        """Frames that are smooth over a few pixels: in noise, tiny rounding of sample positions would matter a lot."""
        return self.normal(batch, 6, height, width).cumsum(3) / 8

    def prediction(self, batch: int, height: int, width: int, pixels: float = 3.0) -> Tensor:
        """Flow of a quarter of the size; one value is infinite, one unknown, one far beyond the border."""
        flow = self.normal(batch, 2, height // 4, width // 4) * pixels
        flow.view(-1)[::5] *= 40
        for place, value in ((-1, torch.inf), (-3, torch.nan), (-6, -1e30)):
            if flow.numel() > 8:
                flow.view(-1)[place] = value
        return flow


def room(
    batch: int, channels: int, height: int, width: int, dtype: torch.dtype, device: torch.device, fill: float = 7.0
) -> Tensor:
    whole = torch.full((batch, channels, height, width), fill, dtype=dtype, device=device)
    return whole.to(memory_format=torch.channels_last)


def same(found: Tensor, wanted: Tensor) -> None:
    """Compares relative to each value, or to the largest finite one, where terms may have cancelled."""
    tolerance = TOLERANCE[found.dtype]
    largest = max(1.0, wanted.float().nan_to_num(0, 0, 0).abs().clamp(max=100).max().item())
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=max(tolerance / 4, 2e-6) * largest, equal_nan=True)


def compare_refining(size: tuple[int, int, int], dtype: torch.dtype, card: torch.device) -> None:
    draws = Draws(card)
    frames, flow = draws.frames(*size), draws.prediction(*size) / 20
    wanted, *found = (room(size[0], 16, *size[1:], dtype, card) for _ in range(3))
    refining_input.refining_input_definition(frames, flow, 20.0, wanted)
    for out, laid in zip(found, (flow, flow.to(memory_format=torch.channels_last)), strict=True):
        refining_input._refining_input_cuda(frames, laid, 20.0, out)
        same(out, wanted)


def compare_fusing(size: tuple[int, int, int], dtype: torch.dtype, card: torch.device) -> None:
    draws = Draws(card)
    frames, small, large = draws.frames(*size), draws.prediction(*size) * 20, draws.prediction(*size) / 20
    wanted, found = (room(size[0], 16, *size[1:], dtype, card) for _ in range(2))
    fusing_input.fusing_input_definition(frames, small, 0.05, large, 20.0, wanted)
    fusing_input._fusing_input_cuda(frames, small, 0.05, large.to(memory_format=torch.channels_last), 20.0, found)
    same(found, wanted)


def compare_normalising(size: tuple[int, int, int], dtype: torch.dtype, card: torch.device) -> None:
    """Writes frames of different, non-contiguous layouts to all outputs, and to each output alone."""
    batch, height, width = size
    draws = Draws(card)
    first = draws.normal(batch, 3, height, 2 * width)[..., ::2] * 60 + 120
    second = (draws.normal(batch, 3, height, width) * 60 + 90).to(memory_format=torch.channels_last)

    def places() -> list[Tensor]:
        planes = torch.full((batch, 6, height, width), 7.0, device=card)
        return [planes, *(room(n, 8, height, width, dtype, card) for n in (batch, 2 * batch))]

    wanted = places()
    normalise_frames.normalise_frames_definition(first, second, *wanted)
    for chosen in ((0, 1, 2), (0,), (1,), (2,)):
        found = places()
        normalise_frames._normalise_frames_cuda(first, second, *(found[n] if n in chosen else None for n in range(3)))
        for number, (x, y) in enumerate(zip(found, wanted, strict=True)):
            if number in chosen:
                same(x, y)
            else:
                assert bool((x == 7).all())


def compare_enlarging(size: tuple[int, int, int], dtype: torch.dtype, card: torch.device) -> None:
    """Writes to two channels of a concatenation, from an even and an odd one on, and to nothing beside them."""
    batch, height, width = size
    draws = Draws(card)
    flow, weight, bias = draws.normal(batch, 2, height, width), draws.normal(2, 2, 4, 4), draws.normal(2, 2)[:, 0]
    weight = torch.cat((bias[:1], weight.flatten()))[1:].view(2, 2, 4, 4)  # does not begin at a multiple of 16 bytes
    flow[0, 0, 0, 0] = torch.inf
    for start, channels in ((0, 2), (4, 8), (3, 7)):
        for order in (torch.channels_last, torch.contiguous_format):
            wanted, found = (
                torch.full((batch, channels, 2 * height, 2 * width), 7.0, dtype=dtype, device=card).to(
                    memory_format=order
                )
                for _ in range(2)
            )
            part = slice(start, start + 2)
            enlarge_flow.enlarge_flow_definition(flow, weight, bias, wanted[:, part])
            enlarge_flow._enlarge_flow_cuda(flow.to(memory_format=order), weight, bias, found[:, part])
            same(found, wanted)


COMPARED: dict[str, tuple[Callable[..., None], tuple[tuple[int, int, int], ...]]] = {
    "refining_input": (compare_refining, SIZES),
    "fusing_input": (compare_fusing, SIZES),
    "normalise_frames": (compare_normalising, (*SIZES, (2, 3, 35), (1, 9, 1))),
    "enlarge_flow": (compare_enlarging, FLOWS),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", COMPARED)
def test_kernel_equals_its_definition(name: str, dtype: torch.dtype, card: torch.device) -> None:
    compare, sizes = COMPARED[name]
    for size in sizes:
        compare(size, dtype, card)


def test_far_flow_is_exact(card: torch.device) -> None:
    """At 4000 pixels from the left a float32's spacing is 2.4e-4; the fraction must not be added to such a number."""
    width = 4096
    frames = (torch.arange(float(width), device=card) % 2).expand(1, 6, 4, width).contiguous()
    flow = torch.zeros(1, 2, 1, width // 4, device=card)
    flow[:, 0] = 0.0001
    out = room(1, 16, 4, width, torch.float32, card)
    refining_input._refining_input_cuda(frames, flow, 1.0, out)
    torch.testing.assert_close(out[0, 6, 1, 4000].item(), 0.0001, rtol=1e-4, atol=0)


def test_unknown_flow_spoils_its_own_pixels_only(card: torch.device) -> None:
    frames = torch.ones(1, 6, 8, 8, device=card)
    small, large = torch.zeros(1, 2, 2, 2, device=card), torch.zeros(1, 2, 2, 2, device=card)
    large[0, 1, 1, 0] = torch.nan
    out = room(1, 16, 8, 8, torch.float16, card)
    fusing_input._fusing_input_cuda(frames, small, 1.0, large, 1.0, out)
    spoilt = out.isnan()
    assert spoilt.any(1).nonzero().tolist() == [[0, y, x] for y in range(4, 8) for x in range(4)]
    assert spoilt.any(0).any(1).any(1).nonzero().flatten().tolist() == [6, 8, 10]


def test_lengths_are_formed_in_float32(card: torch.device) -> None:
    frames = torch.zeros(1, 6, 4, 4, device=card)
    flow = torch.full((1, 2, 1, 1), 15.0, device=card)  # 300 px, whose square overflows float16
    out = room(1, 16, 4, 4, torch.float16, card)
    fusing_input._fusing_input_cuda(frames, flow, 20.0, flow, 20.0, out)
    length = channel_norm_definition(torch.full((1, 2, 1, 1), 300.0)).half().item()
    assert bool((out[:, 7:9] == length).all())


FAULTS = (
    ("refining_input.cu", "first + 1 < size", "first + 1 <= size"),
    ("refining_input.cu", "((float)place + 0.5f) * 0.25f - 0.5f", "(float)place * 0.25f"),
    ("refining_input.cu", "right * unscale", "right"),
    ("refining_input.cu", "quarter < last", "quarter <= last"),
    ("refining_input.cu", "r < 2 && quarter > 0", "r < 2"),
    ("refining_input.cu", "0.25f * r - 0.375f", "0.25f * r - 0.125f"),
    ("refining_input.cu", "sampled(own + (3 + c)", "sampled(own + c"),
    ("refining_input.cu", "p.y + r, right", "p.y, right"),
    ("fusing_input.cu", "errors_of(a", "errors_of(b"),
    ("fusing_input.cu", "p.x / 4", "(p.x + 1) / 4"),
    ("fusing_input.cu", "place[flow.c]", "place[1]"),
    ("fusing_input.cu", "r <= ROWS; ++r", "r < ROWS; ++r"),
    ("fusing_input.cu", "seen[r + 1] * down.part", "seen[r] * down.part"),
    ("normalise_frames.cu", "second_mean[3 * p.n + c]", "first_mean[3 * p.n + c]"),
    ("normalise_frames.cu", "first_mean[3 * p.n + c]", "first_mean[c]"),
    ("normalise_frames.cu", "p.n + batch", "p.n"),
    ("normalise_frames.cu", "p.n * 6 * plane", "p.n * 3 * plane"),
    ("normalise_frames.cu", "r < ROWS && p.y < height", "r < ROWS"),
    ("enlarge_flow.cu", "left * by.z", "left * by.w"),
    ("enlarge_flow.cu", "y >= height", "y > height"),
    ("enlarge_flow.cu", "j < width ? ", "true ? "),
    ("enlarge_flow.cu", "j > 0 ? ", "true ? "),
    ("enlarge_flow.cu", "x >= 2 * width", "x > 2 * width"),
    ("enlarge_flow.cu", "out.c == 1 && ", ""),
    ("pixels.cuh", "chosen(second, pieces[i], pieces[i + 1])", "chosen(second, pieces[i + 1], pieces[i])"),
    ("pixels.cuh", "second && p.inside", "second"),
    ("pixels.cuh", "if (second_inside)", "if (true)"),
    ("pixels.cuh", "ROWS = 4", "ROWS = 8"),
    ("pixels.cuh", "place += row;", ""),
    ("pixels.cuh", "x < width ? x : width - 1", "x"),
    ("sampling.cuh", "min(place, size - 1)", "min(place, size)"),
)


@pytest.mark.parametrize(("file", "right", "wrong"), FAULTS)
def test_a_planted_fault_is_caught(plant: Callable[..., torch.device], file: str, right: str, wrong: str) -> None:
    device = plant(file, right, wrong)
    name = file.removesuffix(".cu") if file.endswith(".cu") else None
    with pytest.raises(AssertionError):  # noqa: PT012
        for compare, sizes in COMPARED.values() if name is None else (COMPARED[name],):
            for size in sizes:
                compare(size, torch.float32, device)


@pytest.mark.parametrize("name", ["refining_input", "fusing_input", "normalise_frames: pair", "normalise_frames: both"])
def test_a_room_that_cannot_be_stored_whole_is_filled_by_the_definition(name: str, card: torch.device) -> None:
    """That is, memory that does not begin at a multiple of 16 bytes, as a view of other memory may not."""
    frames, flow = Draws(card).frames(2, 8, 8), torch.ones(2, 2, 2, 2, device=card)

    def shifted(channels: int, by: int) -> Tensor:
        memory = torch.zeros(2 * 8 * 8 * channels + by, dtype=torch.float16, device=card)
        return memory[by:].view(2, 8, 8, channels).permute(0, 3, 1, 2)

    found: list[Tensor] = []
    given: tuple[object, ...]
    for by in (0, 4):
        if name == "refining_input":
            found.append(shifted(16, by))
            given = frames, flow, 20.0, found[-1]
        elif name == "fusing_input":
            found.append(shifted(16, by))
            given = frames, flow, 0.05, flow, 20.0, found[-1]
        elif name.endswith("pair"):
            found.append(shifted(8, by))
            given = frames[:, :3], frames[:, 3:], None, found[-1], None
        else:  # both frames of one pair
            found.append(shifted(8, by))
            given = frames[:1, :3], frames[:1, 3:], None, None, found[-1]
        how = as_on_a_gpu(getattr(torch.ops.flowreel, name.split(":")[0]).default, *given)
        assert how == ("torch" if by else "cuda")
    same(*found)


def test_rooms_are_stored_whole_and_what_does_not_fit_is_refused() -> None:
    frames, flow = torch.zeros(2, 6, 8, 8), torch.zeros(2, 2, 2, 2)
    out = room(2, 16, 8, 8, torch.float16, torch.device("cpu"))
    refining: Any = refining_input.refining_input
    refining(frames, flow, 20.0, out)
    for wrong, error in (
        ((frames[:, :5], flow, 20.0, out), ValueError),
        ((frames, flow[:, :, :1], 20.0, out), ValueError),
        ((frames, flow.to("meta"), 20.0, out), ValueError),
        ((torch.zeros(2, 6, 8, 6), flow[..., :1], 20.0, room(2, 16, 8, 6, out.dtype, out.device)), ValueError),
        ((frames, flow, 20.0, out.contiguous()), ValueError),
        ((frames, flow, 20.0, out[:, :12]), ValueError),
        ((frames, flow, 20.0, out[..., :4]), ValueError),
        ((frames.to(memory_format=torch.channels_last), flow, 20.0, out), ValueError),
        ((frames, flow.half(), 20.0, out), TypeError),
        ((frames, flow, 20.0, out.int()), TypeError),
    ):
        with pytest.raises(error):
            refining(*wrong)
    with pytest.raises(ValueError, match="quarter"):
        fusing_input.fusing_input(frames, flow, 1.0, flow[:1], 1.0, out)
    first = torch.zeros(1, 3, 4, 4)
    pair, both = (room(n, 8, 4, 4, torch.float16, torch.device("cpu")) for n in (1, 2))
    normalise_frames.normalise_frames(first, first, pair=pair, both=both)
    for error, said, given in (
        (ValueError, "expected room for", {"pair": both}),
        (ValueError, "expected room for", {"both": pair}),
        (ValueError, "contiguous", {"planes": torch.zeros(1, 6, 4, 8)[..., :4]}),
        (TypeError, "pair and both are of one dtype", {"pair": pair, "both": both.float()}),
        (TypeError, "what is read is float32", {"planes": torch.zeros(1, 6, 4, 4).half()}),
    ):
        with pytest.raises(error, match=said):
            normalise_frames.normalise_frames(first, first, **given)
    with pytest.raises(ValueError, match="twice"):
        normalise_frames.normalise_frames(first, first[..., :3], pair=pair)
    weight, bias = torch.zeros(2, 2, 4, 4), torch.zeros(2)
    enlarge: Any = enlarge_flow.enlarge_flow
    for wrong in (
        (flow, weight[:, :1], bias, torch.zeros(2, 2, 4, 4)),
        (flow, weight, bias[:1], torch.zeros(2, 2, 4, 4)),
        (flow[:, :1], weight, bias, torch.zeros(2, 2, 4, 4)),
        (flow, weight, bias, torch.zeros(2, 2, 4, 5)),
    ):
        with pytest.raises(ValueError, match=r"expected|holds|does not go"):
            enlarge(*wrong)
