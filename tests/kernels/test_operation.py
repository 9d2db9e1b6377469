"""Which version of an operation runs, and how that is reported."""

from __future__ import annotations

import pytest
import torch

from flowreel.kernels import channel_norm, launch, warp
from flowreel.kernels.operation import note, recording, versions


def test_operations_are_noted_while_somebody_records() -> None:
    ran: dict[str, str] = {}
    x = torch.ones(1, 2, 3, 3)
    channel_norm(x)
    with recording(ran):
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
    monkeypatch.setattr(launch, "cupy_is_there", lambda: cupy)
    by_key = versions("op", lambda *_: "definition", lambda *_: "on cpu", lambda *_: "on cuda", lambda *_: True)
    run = by_key["CUDA"]
    for dtype, ours in ((torch.float16, cupy), (torch.float32, cupy), (torch.float64, False)):
        with recording(ran := {}):
            assert run(torch.ones(1, dtype=dtype), 3) == ("on cuda" if ours else "definition")
        assert ran == {"op": "cuda" if ours else "torch"}
    with recording(ran := {}):
        assert run(torch.ones(1, dtype=torch.uint8)) == ("on cuda" if cupy else "definition")
        assert by_key["CPU"](1) == "on cpu"
        assert by_key["CompositeExplicitAutograd"](1) == "definition"
    assert ran == {"op": "cuda and torch" if cupy else "torch"}


def test_what_our_kernel_does_not_take_is_told_to_run_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cupy_is_there", lambda: True)
    run = versions("op_into", lambda *_: "definition", None, lambda *_: "on cuda", lambda x, n: n > 1)["CUDA"]
    for n, ran_by in ((1, "torch"), (2, "cuda")):
        with recording(ran := {}):
            assert run(torch.ones(1), n) == ("on cuda" if n > 1 else "definition")
        assert ran == {"op": ran_by}
