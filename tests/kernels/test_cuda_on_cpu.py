"""The CPU that acts as a GPU detects the errors it is meant to detect, in deliberately wrong kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flowreel.kernels.compiling import SOURCES
from flowreel.kernels.launch import launch, sizes

ORDERS = ("forward", "backward", "shuffled")
Run = Callable[..., Tensor]


@pytest.fixture(params=ORDERS)
def run(request: pytest.FixtureRequest, acting: Callable[..., object], tmp_path: Path) -> Run:
    """``run(body)`` runs a kernel ``(float* x, int n)`` with this body on 0, 1, 2, ... in one block."""

    def compiled(body: str, threads: int = 64, elements: int = 64) -> Tensor:
        common = (SOURCES / "common.cuh").read_text()
        (tmp_path / "made.cu").write_text(f'{common}\nextern "C" __global__ void made(float* x, int n) {{ {body} }}\n')
        acting(tmp_path, order=request.param)
        x = torch.arange(elements, dtype=torch.float32)
        launch("made", "made", (1,), (x, *sizes(elements)), (threads,))
        return x

    return compiled


REVERSE = "SHARED(float, kept, 64); kept[threadIdx.x] = x[threadIdx.x]; {0} x[threadIdx.x] = kept[63 - threadIdx.x];"


def test_a_barrier_makes_what_others_wrote_visible(run: Run) -> None:
    assert run(REVERSE.format("__syncthreads();")).tolist() == list(range(63, -1, -1))


def test_a_missing_barrier_shows_in_the_result(run: Run) -> None:
    assert run(REVERSE.format("")).isnan().any()


def test_shared_memory_starts_as_nan(run: Run) -> None:
    assert run("SHARED(float, kept, 64); x[threadIdx.x] = kept[threadIdx.x];").isnan().all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 8) return; __syncthreads();", "8 threads ended without reaching this barrier"),
        ("if (threadIdx.x < 8) {\n__syncthreads();\n} else {\n__syncthreads();\n}", "threads wait at barriers"),
        ("if (threadIdx.x < 8) x[0] = __shfl_xor_sync(0xffffffffu, x[0], 1);", "a lane of the warp has ended before"),
        ("if (threadIdx.x & 1) __syncthreads(); else __syncwarp();", "some lanes of a warp never come"),
        ("SHARED(float, kept, 8); kept[threadIdx.x] = 0;", "shared array kept is written beyond its end"),
        ("x[threadIdx.x + 1] = 0;", "memory beyond a tensor is touched"),
        ("if (x[threadIdx.x + 1] < 0) x[0] = 1;", "memory beyond a tensor is touched"),
        ("x[(int)threadIdx.x - 1] = 0;", "writes beyond a tensor's memory"),
        ("((Several<float, 2>*)(x + 1))->values[0] = 0;", "does not have its type's alignment"),
    ],
)
def test_what_a_gpu_forbids_is_an_error(run: Run, body: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run(body)
    assert run("x[threadIdx.x] = n;")[0] == 64  # the next launch works


def test_reading_before_a_tensor_finds_nan(run: Run) -> None:
    assert run("if (threadIdx.x == 0) x[0] = x[-1];")[0].isnan()


def test_warps_exchange_values(run: Run) -> None:
    out = run(
        "float s = x[threadIdx.x]; for (int i = 16; i; i /= 2) s += __shfl_xor_sync(~0u, s, i); x[threadIdx.x] = s;"
    )
    assert out.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


def test_a_last_warp_may_be_short(run: Run) -> None:
    out = run("x[threadIdx.x] = __shfl_sync(~0u, x[threadIdx.x], 3);", threads=40, elements=40)
    assert out.tolist() == [3.0] * 32 + [35.0] * 8


def test_arguments_of_another_type_are_refused(run: Run, tmp_path: Path) -> None:
    x = run("x[threadIdx.x] = 0;")
    for wrong in ((x, np.int64(64)), (x, np.float32(64)), (np.int64(0), np.int32(64), x)):
        with pytest.raises((AssertionError, ValueError), match=r"takes pi|argument"):
            launch("made", "made", (1,), wrong, (64,))


def test_half_types_convert_as_torch_does(acting: Callable[..., object], tmp_path: Path) -> None:
    """All 65536 values of each type to float, and floats between them, including ties, back."""
    common = (SOURCES / "common.cuh").read_text()
    entry = (
        'extern "C" __global__ void {0}(const {1}* x, float* wide, const float* y, {1}* narrow) {{ '
        "const int i = blockIdx.x * 256 + threadIdx.x; wide[i] = widened(x[i]); store(narrow + i, y[i]); }}\n"
    )
    names = {"half": ("__half", torch.float16), "bfloat16": ("__nv_bfloat16", torch.bfloat16)}
    (tmp_path / "made.cu").write_text(common + "".join(entry.format(name, t) for name, (t, _) in names.items()))
    acting(tmp_path)
    for name, (_, dtype) in names.items():
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        spacing = (x.view(torch.int16) ^ 1).view(dtype).float() - x.float()
        y = x.float() + spacing * torch.tensor([0.5, 0.49, 0.51, 0.0]).repeat(1 << 14)
        wide, narrow = torch.empty(1 << 16), torch.empty(1 << 16, dtype=dtype)
        launch("made", name, (256,), (x, wide, y, narrow))
        torch.testing.assert_close(wide, x.float(), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(narrow, y.to(dtype), rtol=0, atol=0, equal_nan=True)
