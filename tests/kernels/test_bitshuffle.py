"""Integers to planes of bits: the definition equals Blosc's, and the CUDA kernel equals the definition."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numcodecs.blosc
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowreel.kernels.bitshuffle import _bitshuffle_cuda, bitshuffle, bitshuffle_definition

TYPES = (torch.int16, torch.int32)


def values_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small and large integers of both signs, over the whole range of the type."""
    generator = torch.Generator().manual_seed(sum(shape))
    limits = torch.iinfo(dtype)
    small, all_bits = (
        torch.randint(low, high, shape, generator=generator) for low, high in ((-40, 40), (limits.min, limits.max + 1))
    )
    return torch.where(torch.rand(shape, generator=generator) < 0.5, small, all_bits).to(dtype)


def shuffled_by_blosc(values: np.ndarray, block: int) -> bytes:
    """The values as Blosc shuffled them, before compression."""
    chunk = numcodecs.blosc.Blosc("zstd", 1, numcodecs.blosc.BITSHUFFLE, block * values.itemsize).encode(values)
    total, size = struct.unpack_from("<2i", chunk, 4)
    assert not chunk[2] & 2, "it has compressed nothing"
    blocks = []
    starts = range(0, total, size)
    for start, begin in zip(starts, struct.unpack_from(f"<{len(starts)}i", chunk, 16), strict=True):
        (length,) = struct.unpack_from("<i", chunk, begin)
        body = chunk[begin + 4 : begin + 4 + length]
        as_it_is = length == min(size, total - start)
        blocks.append(body if as_it_is else zstandard.ZstdDecompressor().decompress(body))
    return b"".join(blocks)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(64, 3000),
    block=st.sampled_from([128, 1024, 4096]),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 99),
)
def test_equals_what_blosc_does(count: int, block: int, dtype: torch.dtype, seed: int) -> None:
    numcodecs.blosc.use_threads = False
    values = torch.randint(-9, 9, (1, count), generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert bitshuffle(values, block).numpy().tobytes() == shuffled_by_blosc(values[0].numpy(), block)


def test_each_row_and_block_for_itself() -> None:
    values = values_of((3, 2, 5, 8), torch.int16)
    out = bitshuffle(values, 32)
    assert out.shape == (3, 160)
    for row, flat in zip(out, values.flatten(1), strict=True):
        alone = [bitshuffle(flat[None, start : start + 32], 32)[0] for start in range(0, 80, 32)]
        assert torch.equal(row, torch.cat(alone))


def test_bit_by_bit() -> None:
    out = bitshuffle(torch.tensor([[1, 0, 0, 2, -1, 0, 0, -32768]], dtype=torch.int16), 8)
    assert out.tolist() == [[0b00010001, 0b00011000, *[0b00010000] * 13, 0b10010000]]


def test_registered_and_foretold() -> None:
    arguments = (values_of((2, 2, 3, 8), torch.int32), 16)
    torch.library.opcheck(
        torch.ops.flowreel.bitshuffle.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("values", "block", "error", "message"),
    [
        (torch.zeros(1, 8), 8, TypeError, "float32"),
        (torch.zeros(1, 8, dtype=torch.int64), 8, TypeError, "int64"),
        (torch.zeros(8, dtype=torch.int16), 8, ValueError, "there are some"),
        (torch.zeros(1, 0, dtype=torch.int16), 8, ValueError, "there are some"),
        (torch.zeros(1, 8, dtype=torch.int16), 0, ValueError, "multiple of 8"),
        (torch.zeros(1, 8, dtype=torch.int16), 12, ValueError, "multiple of 8"),
    ],
)
def test_impossible_arguments_are_refused(values: Tensor, block: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bitshuffle(values, block)


# --- the CUDA kernel: equal to the definition -------------------------------------------------------------------------

# Rows that start at every offset within 16 bytes, rows of one and of several blocks, every kind of last block.
CASES = (((1, 1), 8), ((2, 8), 8), ((3, 2, 1, 3), 8), ((2, 2, 37, 44), 1024), ((3, 2, 5, 20), 64), ((3, 2, 5, 21), 64))
CASES += (((2, 2, 64, 64), 4096),)


def compare(device: torch.device, shape: tuple[int, ...], block: int, dtype: torch.dtype = torch.int16) -> None:
    values = values_of(shape, dtype)
    wanted = bitshuffle_definition(values, block)
    for layout in (values, torch.stack([values, values], -1)[..., 0]):
        out = _bitshuffle_cuda(layout.to(device), block)
        assert (out.dtype, out.shape) == (torch.uint8, wanted.shape)
        assert torch.equal(out.cpu(), wanted)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("shape", "block"), CASES)
def test_equals_its_definition(card: torch.device, shape: tuple[int, ...], block: int, dtype: torch.dtype) -> None:
    compare(card, shape, block, dtype)


FAULTS = {
    "one group too many": ("number >= batch * groups", "number > batch * groups"),
    "squares of 2 not turned": ("0x00aa00aa00aa00aaull", "0ull"),
    "squares of 8 not turned": ("0x00000000f0f0f0f0ull", "0ull"),
    "the first block's bits for all": ("group * TOGETHER / block * block", "0"),
    "the first row for all": ("number / groups * count + first", "first"),
    "a short block's planes as far apart as a whole one's": ("plane = length / TOGETHER", "plane = block / TOGETHER"),
    "a block that is no multiple shuffled": ("if (length % TOGETHER)", "if (length < TOGETHER)"),
    "beyond the last value": ("i < length && i < place", "i < place"),
    "the lowest byte alone": ("mine[i] >> 8 * b & 255", "mine[i] & 255"),
    "bits the other way round": ("(8 * b + bit) * plane", "(8 * b + 7 - bit) * plane"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught(fault: tuple[str, str], plant: Callable[..., torch.device]) -> None:
    device = plant("bitshuffle.cu", *fault)
    with pytest.raises(AssertionError):
        _compare_all(device)


def _compare_all(device: torch.device) -> None:
    for shape, block in CASES:
        compare(device, shape, block)
