"""Torch's modes and defaults belong to the caller: they do not change the flow, and flowreel does not change them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowreel

Clip = Callable[..., Path]
SCENE = "synthetic:objects?size=96x64&frames=4"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bf16": lambda: default_dtype(torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
}


def modes() -> tuple[object, ...]:
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    defaults = torch.get_default_dtype(), torch.get_default_device()
    return *autocast, *defaults, torch.is_inference_mode_enabled(), torch.is_grad_enabled()


@pytest.fixture(scope="module")
def video(clip: Clip) -> Path:
    return clip("modes.mp4", count=7)


def everything(video: Path, folder: Path) -> dict[str, Any]:
    """Flow of the default weights, from every function of the library that computes or loads it.

    Of all their networks by one function; the others take the first alone, which is faster.
    """
    lazy = flowreel.open(video, batch=4)
    options: dict[str, Any] = {"batch": 4, "model": "FlowNet2C"}
    kept = flowreel.open(video, cache=folder / "cache", **options)
    found: dict[str, Any] = {"one": lazy[0], "all": lazy[:], "kept": kept[1], "read": kept[1:3]}
    found["rendered"] = flowreel.open(SCENE, **options)[0]
    with flowreel.open(video, cache=folder / "cache", **options) as again:
        found["read again"] = again[1:3]
    found |= {f"batch {batch.index}": batch.flow for batch in flowreel.stream(video, **options)}
    flowreel.run(SCENE, folder / "a.zarr", **options)
    found["stored"] = flowreel.open_store(folder / "a.zarr")[:]
    clips = flowreel.FlowClips([video, folder / "a.zarr"], length=2, size=48, crop=32, random=True, seed=1, **options)
    found |= {f"clip {index}": clips[index]["flow"] for index in (0, len(clips) - 1)}
    net = flowreel.load_model(weights="baseline")
    found["compiled"] = [flowreel.compile(net, (1, 64, 64), precision) for precision in ("fp32", "bf16")]
    found["module"] = flowreel.load_model("FlowNet2C", weights="baseline").get_parameter("conv1.0.weight")
    return found


@pytest.fixture(scope="module")
def expected(video: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return everything(video, tmp_path_factory.mktemp("modes"))


@pytest.mark.parametrize("mode", MODES)
def test_flow_does_not_depend_on_them(mode: str, video: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    with MODES[mode]():
        before = modes()
        found = everything(video, tmp_path)
        assert modes() == before
    frames = [torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 255 for seed in (0, 1)]
    for mine, other in zip(found.pop("compiled"), expected["compiled"], strict=True):
        assert torch.equal(mine(*frames), other(*frames))
        with MODES[mode]():
            before = modes()
            given = mine(*frames)
            assert modes() == before
        assert torch.equal(given, other(*frames))
    for name, values in expected.items():
        if name == "compiled":
            continue
        assert found[name].dtype in (torch.float32, np.float32), name
        assert not isinstance(values, Tensor) or found[name].device == values.device, name
        mine, other = (torch.as_tensor(one).detach() for one in (found[name], values))
        assert torch.equal(mine, other), name


def test_a_network_from_a_file_draws_nothing() -> None:
    before = torch.get_rng_state()
    flowreel.load_model("FlowNet2C", weights="baseline")
    assert torch.equal(torch.get_rng_state(), before)
