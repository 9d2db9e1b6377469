"""The CUDA convolution equals the definition: odd sizes, incomplete tiles, parts of concatenations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flowreel.kernels import compiling
from flowreel.kernels.convolution import _convolution_cuda, convolution_definition, pack, tiling

TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}  # relative: one rounding


class Layer(NamedTuple):
    """A layer that the kernel supports, and a picture small enough for the CPU that acts as a GPU."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    transposed: bool
    size: tuple[int, int, int]  # batch, height, width

    def weight(self, dtype: torch.dtype, card: torch.device) -> Tensor:
        ends = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        made = torch.randn(*ends, self.kernel, self.kernel, generator=torch.Generator().manual_seed(5))
        return (made / (self.inputs * self.kernel**2) ** 0.5).to(card, dtype)


LAYERS = {
    "C conv1": Layer(3, 64, 7, 2, False, (2, 37, 35)),
    "S conv1 alone": Layer(6, 64, 7, 2, False, (1, 8, 33)),
    "S conv1": Layer(12, 64, 7, 2, False, (1, 33, 6)),
    "SD conv0": Layer(6, 64, 3, 1, False, (2, 9, 17)),
    "fusion conv0": Layer(11, 64, 3, 1, False, (2, 9, 17)),
    "fusion deconv0": Layer(40, 16, 4, 2, True, (2, 5, 18)),
    "fusion deconv1": Layer(24, 32, 4, 2, True, (1, 2, 3)),
}


def compare(layer: Layer, dtype: torch.dtype, card: torch.device) -> None:
    """Compares results written into a new map and a part of a concatenation, then into that part alone."""
    generator = torch.Generator().manual_seed(3)
    batch, *size = layer.size
    made = torch.randn(batch, -(-layer.inputs // 8) * 8, *size, generator=generator)
    x = made.to(card, dtype).contiguous(memory_format=torch.channels_last)
    bias, weight = torch.randn(layer.outputs, generator=generator).to(card), layer.weight(dtype, card)
    step = layer.stride
    size = [side * step if layer.transposed else -(-side // step) for side in size]
    packed = pack(weight, step, layer.transposed)
    for slope in (0.1, 1.0):
        ours, wanted = (
            torch.full((batch, layer.outputs + 24, *size), 7, dtype=dtype, device=card).to(
                memory_format=torch.channels_last
            )
            for _ in range(2)
        )
        own, wanted_own = (
            torch.empty(batch, layer.outputs, *size, dtype=dtype, device=card).to(memory_format=torch.channels_last)
            for _ in range(2)
        )
        part = slice(8, 8 + layer.outputs)
        given = x, weight, packed, bias, step, layer.transposed, slope
        if slope == 1:
            _convolution_cuda(*given, ours[:, part], None)
            convolution_definition(*given, wanted[:, part], None)
        else:
            _convolution_cuda(*given, own, ours[:, part])
            convolution_definition(*given, wanted_own, wanted[:, part])
            assert_close(own, wanted_own)
        assert_close(ours, wanted)


def assert_close(ours: Tensor, wanted: Tensor) -> None:
    """Both are rounded once, from float32 sums in different orders."""
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance / 64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_kernel_equals_its_definition(layer: Layer, dtype: torch.dtype, card: torch.device) -> None:
    compare(layer, dtype, card)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_a_picture_of_one_pixel(layer: Layer, acting: Callable[..., object]) -> None:
    acting()
    compare(layer._replace(size=(1, 1, 1)), torch.float16, torch.device("cpu"))


@pytest.mark.parametrize("place", [3, 4, 0], ids=["odd", "half aligned", "channels apart"])
def test_places_that_do_not_take_sixteen_bytes_are_copied_to(place: int, card: torch.device) -> None:
    layer = Layer(11, 64, 3, 1, False, (1, 3, 5))
    weight, bias = layer.weight(torch.float16, card), torch.ones(64, device=card)
    x = torch.randn(1, 16, 3, 5, generator=torch.Generator().manual_seed(1)).to(card, torch.float16)  # channels apart
    wanted = torch.empty(1, 64, 3, 5, dtype=torch.float16, device=card)
    given = x, weight, pack(weight, 1, False), bias, 1, False, 0.1
    convolution_definition(*given, wanted, None)
    kind = torch.channels_last if place else torch.contiguous_format
    own, whole, alone = (
        torch.full((1, channels, 3, 5), 7, dtype=torch.float16, device=card).to(memory_format=kind)
        for channels in (64, 72, 72)
    )
    _convolution_cuda(*given, own, whole[:, place : place + 64])
    _convolution_cuda(*given, alone[:, place : place + 64], None)
    assert_close(own, wanted)
    for found in (whole, alone):
        assert_close(found[:, place : place + 64], wanted)
        assert bool((found[:, :place] == 7).all())
        assert bool((found[:, place + 64 :] == 7).all())


def test_a_map_that_is_a_part_of_a_concatenation(card: torch.device) -> None:
    layer = LAYERS["fusion conv0"]
    weight, bias = layer.weight(torch.bfloat16, card), torch.ones(64, device=card)
    whole = torch.full((2, 88, 5, 18), torch.nan, dtype=torch.bfloat16, device=card)
    x = whole.contiguous(memory_format=torch.channels_last)[:, 16:32]
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    ours, wanted = (torch.empty(2, 64, 5, 18, dtype=x.dtype, device=card) for _ in range(2))
    given = x, weight, pack(weight, 1, False), bias, 1, False, 0.1
    _convolution_cuda(*given, ours, None)
    convolution_definition(*given, wanted, None)
    assert_close(ours, wanted)


CHECKED_BANKS = """const auto given = WARP_GIVES(row);
    for (int m = 0; m < 4; ++m) {
        unsigned banks = 0;
        for (int i = 0; i < 8; ++i) banks |= 1u << (uintptr_t)given[m * 8 + i] / 16 % 8;
        if (banks != 255) shim::fail("rows of a matrix share banks");
    }"""


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_what_is_read_at_once_lies_in_different_banks(layer: Layer, plant: Callable[..., torch.device]) -> None:
    device = plant("tensor_core.cuh", "const auto given = WARP_GIVES(row);", CHECKED_BANKS)
    keep_one_entry(layer)
    compare(layer._replace(size=(1, 1, 1)), torch.float16, device)


FAULTS = {
    "fetches not waited for": ("S conv1", "fetch_wait<0>();", ""),
    "no barrier": ("fusion deconv0", "__syncthreads();", ""),
    "one buffer for two": ("fusion deconv0", "(chunk + 1) % BUFFERS * L::BUFFER", "chunk % BUFFERS * L::BUFFER"),
    "always the first channels": ("fusion deconv0", "fetch((chunk + 1) * CHANNELS", "fetch(chunk * 0 * CHANNELS"),
    "channels beyond the map": ("fusion deconv0", " && first + channel < channels", ""),
    "a column too many": ("SD conv0", "(unsigned)from_x < (unsigned)width", "from_x >= 0 && from_x <= width"),
    "a row too many": ("SD conv0", "(unsigned)y < (unsigned)height", "y >= 0 && y <= height"),
    "no left border": ("SD conv0", "(unsigned)from_x < (unsigned)width", "from_x < width"),
    "no upper border": ("SD conv0", "(unsigned)y < (unsigned)height", "y < height"),
    "a tile not all there": ("C conv1", "L::HEIGHT * L::PIECES) break", "L::HEIGHT * L::PIECES - 2) break"),
    "half steps of the wrong row": ("SD conv0", "real / HALVES * PITCH", "(real + 1) / HALVES * PITCH"),
    "a deconvolution's neighbour left out": ("fusion deconv0", "dy >= 1", "dy > 1"),
    "weights of the step before": ("S conv1", "w += L::PAIRS * 32;", "w += s ? L::PAIRS * 32 : 0;"),
    "no second group": ("fusion deconv1", "(int)blockIdx.x % groups, column", "0, column"),
    "written beyond the last row": ("SD conv0", "y + r >= out_height || ", ""),
    "written beyond the last column": ("SD conv0", " || own_x + 8 * side >= out_width", ""),
    "not activated": ("C conv1", "fmaxf(value, value * slope)", "value"),
    "not written twice": ("fusion conv0", "if (twice)", "if (!twice)"),
    "bias of another channel": ("SD conv0", "+ q % L::RUN]", "]"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught(fault: tuple[str, str, str], plant: Callable[..., torch.device]) -> None:
    name, right, wrong = fault
    device = plant("convolution.cu", right, wrong)
    layer = LAYERS[name]
    keep_one_entry(layer)
    with pytest.raises(AssertionError):
        compare(layer, torch.float16, device)


def keep_one_entry(layer: Layer) -> None:
    """Removes all other entries from the copied source, so that they need not be compiled."""
    found = tiling(layer.weight(torch.float16, torch.device("cpu")), layer.stride, layer.transposed)
    assert found is not None
    source = compiling.SOURCES / "convolution.cu"
    kept = f"ENTRIES({', '.join(str(int(number)) for number in found)}, "
    lines = source.read_text().replace("ENTRY_OF(bfloat16, __nv_bfloat16, __VA_ARGS__)", "").splitlines()
    assert sum(line.startswith(kept) for line in lines) == 1
    source.write_text("\n".join(line for line in lines if line.startswith(kept) or not line.startswith("ENTRIES(")))
