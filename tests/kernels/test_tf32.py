"""Definitions keep float32 precision even if a process allows TF32: on a GPU without CuPy, the definitions run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowreel.kernels.convolution import convolution_definition, pack
from flowreel.kernels.enlarge_flow import enlarge_flow_definition
from flowreel.kernels.flow_head import flow_head_definition, pack_flow_head, take_off_borders_definition

aten = torch.ops.aten
FACTORS = {aten.convolution: (0, 1), aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2)}
HALF_TYPES = (torch.float16, torch.bfloat16)


class AllowingTF32(TorchDispatchMode):
    """Rounds the float32 factors of convolutions and matrix products to the 10 bits that TF32 keeps."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        factors = FACTORS.get(func.overloadpacket, ())
        return func(*(rounded(x) if place in factors else x for place, x in enumerate(args)), **(kwargs or {}))


def rounded(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)  # away from zero at ties: close enough


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def enlarged() -> Tensor:
    out = torch.empty(2, 2, 10, 12)
    enlarge_flow_definition(40 * normal(2, 2, 5, 6), normal(2, 2, 4, 4), normal(2), out)
    return out


def without_borders(dtype: torch.dtype) -> Tensor:
    out, borders = torch.zeros(2, 2, 5, 6), (normal(4, 5, 2, 8), normal(4, 2), normal(4, 2, 8), normal(4, 2))
    take_off_borders_definition(out, normal(2, 8, 5, 6).to(dtype), *borders)
    return out


def head(dtype: torch.dtype) -> Tensor:
    return flow_head_definition(normal(2, 8, 5, 6).to(dtype), pack_flow_head(normal(2, 8, 3, 3), dtype), normal(2))


def convolved(dtype: torch.dtype) -> Tensor:
    weight, out = normal(64, 8, 3, 3).to(dtype), torch.empty(2, 64, 5, 6, dtype=dtype)
    x, packed = normal(2, 8, 5, 6).to(dtype), pack(weight, 1, False)
    convolution_definition(x, weight, packed, torch.ones(64), 1, False, 0.1, out, None)
    return out


CASES: dict[str, Callable[[], Tensor]] = {"enlarge_flow": enlarged}
CASES |= {f"borders, {dtype}": lambda dtype=dtype: without_borders(dtype) for dtype in (torch.float32, *HALF_TYPES)}
CASES |= {f"head, {dtype}": lambda dtype=dtype: head(dtype) for dtype in (torch.float32, *HALF_TYPES)}
CASES |= {f"convolution, {dtype}": lambda dtype=dtype: convolved(dtype) for dtype in HALF_TYPES}


@pytest.mark.parametrize("made", CASES.values(), ids=CASES.keys())
def test_definitions_are_the_same_where_tf32_is_allowed(made: Callable[[], Tensor]) -> None:
    expected = made()
    with AllowingTF32():
        assert torch.equal(made(), expected)


def test_this_would_be_seen() -> None:
    x, weight = normal(1, 2, 4, 4), normal(2, 2, 3, 3)
    expected = torch.nn.functional.conv2d(x, weight)
    with AllowingTF32():
        assert not torch.equal(torch.nn.functional.conv2d(x, weight), expected)
