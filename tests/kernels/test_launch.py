"""Which version of an operation runs, and that it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowreel.kernels import channel_norm, launch, warp
from flowreel.kernels.launch import implement, note, recording


class Library:
    """Keeps what is registered with it."""

    def __init__(self) -> None:
        self.versions: dict[str, Callable[..., Any]] = {}

    def impl(self, name: str, function: Callable[..., Any], key: str) -> None:
        self.versions[key] = function


def test_operations_are_noted_while_somebody_records() -> None:
    ran: dict[str, str] = {}
    x = torch.ones(1, 2, 3, 3)
    channel_norm(x)
    with recording(ran):
        channel_norm(x)
        with recording(inner := {}):
            warp(x, x)
        channel_norm(x)
    warp(x, x)
    assert (ran, inner) == ({"channel_norm": "torch"}, {"warp": "torch"})


def test_what_ran_both_ways_is_told_so() -> None:
    with recording(ran := {}):
        note("warp", "cuda")
        note("warp", "cuda")
        assert ran == {"warp": "cuda"}
        note("warp", "torch")
        note("warp", "cuda")
    assert ran == {"warp": "cuda and torch"}


@pytest.mark.parametrize("cupy", [True, False])
def test_on_cuda_tensors_ours_runs_where_it_can(monkeypatch: pytest.MonkeyPatch, cupy: bool) -> None:
    monkeypatch.setattr(launch, "_cupy_is_there", lambda: cupy)
    library = Library()
    implement(library, "op", lambda *_: "definition", on_cpu=lambda *_: "on cpu", on_cuda=lambda *_: "on cuda")
    run = library.versions["CUDA"]
    for dtype, ours in ((torch.float16, cupy), (torch.float32, cupy), (torch.float64, False)):
        with recording(ran := {}):
            assert run(torch.ones(1, dtype=dtype), 3) == ("on cuda" if ours else "definition")
        assert ran == {"op": "cuda" if ours else "torch"}
    with recording(ran := {}):
        assert run(torch.ones(1, dtype=torch.uint8)) == ("on cuda" if cupy else "definition")
        assert library.versions["CPU"](1) == "on cpu"
        assert library.versions["CompositeExplicitAutograd"](1) == "definition"
    assert ran == {"op": "cuda and torch" if cupy else "torch"}
