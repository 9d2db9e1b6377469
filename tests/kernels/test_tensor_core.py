"""A warp's matrix product and how its operands are fetched (``tensor_core.cuh``), on a CPU that acts as a GPU.

On a real GPU too, if present.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowreel.kernels import compiling
from flowreel.kernels import launch as launching

BODY = """
#include "tensor_core.cuh"
template <class T>
__device__ __forceinline__ void product(const T* a, const T* b, float* d) {
    SHARED(uint4, memory, 48);
    T* const kept_a = (T*)memory;  // 16 x 16
    T* const kept_b = (T*)(memory + 32);  // 8 x 16: columns
    const int lane = (int)threadIdx.x, g = lane / 4, t = lane % 4;
    fetch_16(kept_a + 8 * lane, a + 8 * lane, true);
    fetch_end();
    for (int part = 0; part < 16 / BYTES; ++part)
        fetch_BYTES(
            (char*)(memory + 32 + lane % 16) + part * BYTES, (const char*)(b + 8 * (lane % 16)) + part * BYTES,
            lane % 16 * (16 / BYTES) + part < INSIDE
        );
    fetch_end();
    fetch_wait<1>();
    WAIT
    __syncthreads();
    unsigned rows[4], columns[4], by[2];
    float sums[4] = {1, 2, 3, 4};
    load_matrices<false>(rows, kept_a + lane % 16 * 16 + lane / 16 * 8);
    load_matrices<LAID>(columns, kept_b + (LAID ? lane % 16 * 8 : lane % 8 * 16 + lane / 8 % 2 * 8));
    by[0] = columns[0], by[1] = columns[1];
    multiply_add<T>(sums, rows, by);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i] - (float)(i + 1);
}
extern "C" __global__ void product_half(const __half* a, const __half* b, float* d) { product(a, b, d); }
extern "C" __global__ void product_bfloat16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
    product(a, b, d);
}
"""
Product = Callable[..., float]


@pytest.fixture
def apart(card: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Product:
    """The largest difference between a product of random matrices and torch's.

    Only the first ``inside`` pieces of the second matrix, of ``piece`` bytes each, are fetched; the rest, which is NaN
    in memory, must count as zeros.
    """

    def run(
        dtype: torch.dtype, by_rows: bool, wait: str = "fetch_wait<0>();", piece: int = 16, inside: int | None = None
    ) -> float:
        inside = 256 // piece if inside is None else inside
        for name in ("common.cuh", "tensor_core.cuh"):
            (tmp_path / name).write_text((compiling.SOURCES / name).read_text())
        text = BODY.replace("LAID", str(by_rows).lower()).replace("WAIT", wait)
        text = text.replace("BYTES", str(piece)).replace("INSIDE", str(inside))
        (tmp_path / "made.cu").write_text(text)
        monkeypatch.setattr(compiling, "SOURCES", tmp_path)
        monkeypatch.setattr(launching, "_modules", {})
        monkeypatch.setattr(launching, "_kernels", {})
        a, b = torch.randn(16, 16).to(card, dtype), torch.randn(16, 8).to(card, dtype)
        given, out = (b if by_rows else b.mT).contiguous(), torch.empty(16, 8, device=card)
        pieces = given.view(-1, piece // 2)
        pieces[inside:] = 0
        wanted = a.double() @ b_of(given, by_rows).double()
        pieces[inside:] = torch.nan
        launching.launch("made", f"product_{launching.SUFFIXES[dtype]}", (1,), (a, given, out), (32,))
        return float((out - wanted).abs().max())

    def b_of(given: Tensor, by_rows: bool) -> Tensor:
        return given if by_rows else given.mT

    return run


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_warp_multiplies(apart: Product, dtype: torch.dtype, by_rows: bool) -> None:
    assert apart(dtype, by_rows) < 1e-4


def test_what_is_not_waited_for_is_not_there(card: torch.device, apart: Product) -> None:
    if card.type == "cuda":
        pytest.skip("there it may come in time")
    assert not apart(torch.float16, True, wait="") < 1e9


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(("piece", "inside"), [(16, 0), (16, 5), (16, 15), (8, 0), (8, 13), (8, 32)])
def test_what_lies_outside_is_zero_and_not_read(apart: Product, piece: int, inside: int, by_rows: bool) -> None:
    assert apart(torch.float16, by_rows, piece=piece, inside=inside) < 1e-4
