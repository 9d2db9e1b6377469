"""Flow to whole steps: the definition equals the store's quantisation, and the CUDA kernel equals the definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowreel.engine.config import SinkConfig
from flowreel.kernels.quantise import _quantise_cuda, numbers_found, quantise, quantise_definition
from flowreel.sinks.codecs import flow_codec

EDGES = (511.98, 511.99, 512.0, -512.0, 600.0, 1e9, 1.1e9, -1e12, torch.inf, torch.nan, 1 / 128, -3 / 128, 0.0, -0.0)


def flow_of_all_kinds(count: int, height: int, width: int) -> Tensor:
    """Ordinary vectors, and values at and beyond every limit in one component or both."""
    flow = torch.randn(count, 2, height, width, generator=torch.Generator().manual_seed(height)) * 20
    values = flow.view(-1)
    for place, value in enumerate(EDGES):
        values[7 * place + 1 :: 7 * len(EDGES) + 3] = value
    return flow


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 200)),
    max_error=st.sampled_from([1e-4, 1 / 512, 1 / 128, 0.03, 0.5, 3.0]),
    scale=st.sampled_from([1.0, 100.0, 1e5]),
    seed=st.integers(0, 1000),
)
def test_equals_what_the_store_makes_of_it(size: tuple[int, int], max_error: float, scale: float, seed: int) -> None:
    flow = flow_of_all_kinds(1, *size)
    flow += torch.randn(flow.shape, generator=torch.Generator().manual_seed(seed)) * scale
    codec = flow_codec(*size, SinkConfig(max_error=max_error))
    wanted, unknown, beyond_range = codec.quantise(flow[0].numpy())
    dtype = torch.int16 if codec.dtype.itemsize == 2 else torch.int32
    out = quantise(flow, codec.step, codec.limit, dtype)
    np.testing.assert_array_equal(out.steps[0].numpy(), wanted)
    (*counts, (worst,)) = numbers_found(out.found)
    assert counts == [[unknown], [beyond_range]]
    kept = wanted[0] != codec.fill
    errors = np.abs(wanted.astype(np.float64) * codec.step - flow[0].double().numpy())[:, kept]
    assert worst == errors.max(initial=0)
    assert worst <= codec.step / 2 <= max_error


def test_each_flow_has_its_own_counts() -> None:
    flow = torch.zeros(3, 2, 4, 5)
    flow[0, 0, 1, 1] = flow[0, 1, 2, 2] = torch.nan
    flow[1, :, 0, 0] = 1e6
    flow[2, 0, 3, 3] = 0.3
    out = quantise(flow, 0.25)
    unknown, beyond_range, worst = numbers_found(out.found)
    assert (unknown, beyond_range) == ([2, 0, 0], [0, 1, 0])
    assert worst == pytest.approx([0, 0, 0.05])
    assert out.steps[0, :, 1, 1].tolist() == out.steps[1, :, 0, 0].tolist() == [-32768, -32768]
    assert out.steps[2, :, 3, 3].tolist() == [1, 0]


@pytest.mark.parametrize(("dtype", "last_px"), [(torch.int16, 32767 / 4), (torch.int32, 2.0**29 - 32)])
def test_what_its_type_holds_is_kept_and_not_a_step_more(dtype: torch.dtype, last_px: float) -> None:
    """Without a limit, the type's range counts. 2^31 - 1 is not a float32; the largest one below 2^31 is 2^31 - 128."""
    wide = torch.tensor(last_px)
    flow = torch.zeros(1, 2, 1, 3)
    flow[0, 0, 0] = torch.stack([wide, torch.nextafter(wide, 2 * wide).clamp(min=last_px + 0.25), -wide])
    out = quantise(flow, 0.25, dtype=dtype)
    assert out.steps[0, 0, 0].tolist() == [4 * last_px, torch.iinfo(dtype).min, -4 * last_px]
    assert numbers_found(out.found)[:2] == ([0], [1])


def test_registered_and_foretold() -> None:
    flow = flow_of_all_kinds(2, 5, 6)
    arguments = (flow, 0.25, 100.0, torch.int16)
    torch.library.opcheck(torch.ops.flowreel.quantise.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"flow": torch.zeros(1, 2, 3, 3, dtype=torch.float64)}, TypeError, "float64"),
        ({"flow": torch.zeros(1, 2, 3, 3, dtype=torch.int32)}, TypeError, "int32"),
        ({"dtype": torch.uint8}, TypeError, "uint8"),
        ({"flow": torch.zeros(1, 3, 3, 3)}, ValueError, "N, 2, H, W"),
        ({"flow": torch.zeros(1, 2, 0, 3)}, ValueError, "holds something"),
        ({"step": 0.3}, ValueError, "power of two"),
        ({"step": 0.0}, ValueError, "power of two"),
        ({"limit": 40000.0}, ValueError, "32767"),
        ({"limit": 2.0**31, "dtype": torch.int32}, ValueError, "2147483520"),
        ({"limit": 0.0}, ValueError, "limit"),
    ],
)
def test_impossible_arguments_are_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"flow": torch.zeros(1, 2, 3, 3), "step": 0.25}
    with pytest.raises(error, match=message):
        quantise(**(arguments | change))  # type: ignore[arg-type]


# --- the CUDA kernel: equal to the definition in every value and count ------------------------------------------------

SIZES = ((1, 1), (1, 7), (9, 1), (13, 33), (70, 131))  # the last takes three blocks


def compare(
    device: torch.device,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    bits: int = 16,
    step: float = 1 / 64,
) -> None:
    flow = flow_of_all_kinds(3, *size).to(dtype)
    flow[1, 0] = flow[2, 1] = 0  # one flow with only v, one with only u
    settings = step, {16: 32767.0, 32: 1e9}[bits], {16: torch.int16, 32: torch.int32}[bits]
    wanted = quantise_definition(flow, *settings)
    last, gaps = flow.contiguous(memory_format=torch.channels_last), torch.stack([flow, -flow], -1)[..., 0]
    for layout in (flow, last, gaps):
        for out, expected in zip(_quantise_cuda(layout.to(device), *settings), wanted, strict=True):
            assert out.dtype == expected.dtype
            assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_equals_its_definition(card: torch.device, size: tuple[int, int], dtype: torch.dtype, bits: int) -> None:
    compare(card, size, dtype, bits)


@pytest.mark.parametrize("step", [2.0, 1.0, 2**-10])
def test_steps_of_any_length(card: torch.device, step: float) -> None:
    compare(card, (13, 33), step=step)


FAULTS = {
    "no barrier while totals are formed": ("common.cuh", "__syncthreads();", ""),
    "half of the block forgotten": ("common.cuh", "half = BLOCK / 2", "half = BLOCK / 4"),
    "one pixel too many": ("quantise.cu", "i < pixels", "i <= pixels"),
    "one step less": ("quantise.cu", "fabsf(steps_v) <= limit", "fabsf(steps_v) < limit"),
    "no limit for u": ("quantise.cu", "fabsf(steps_u) <= limit", "fabsf(steps_u) <= 2 * limit"),
    "rounded down": ("quantise.cu", "rintf(u * per_step)", "floorf(u * per_step)"),
    "u for v": ("quantise.cu", "*out.at(share.n, 1, y, x) = stored_v", "*out.at(share.n, 1, y, x) = stored_u"),
    "one component kept": ("quantise.cu", "stored_v = kept ?", "stored_v = known ?"),
    "an error not seen": ("quantise.cu", "fmaxf(off_u, off_v)", "off_v"),
    "unknown beyond 1e10": ("common.cuh", "1e9f", "1e10f"),
    "counted the other way round": ("quantise.cu", "known ? 0 : 1, known ? 1 : 0", "known ? 1 : 0, known ? 0 : 1"),
    "only block 0 counts": ("quantise.cu", "if (threadIdx.x != 0) return", "if (threadIdx.x + blockIdx.x) return"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_caught(fault: tuple[str, str, str], plant: Callable[..., torch.device]) -> None:
    device = plant(*fault)
    with pytest.raises(AssertionError):
        compare(device, (70, 131))
