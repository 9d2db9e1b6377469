"""Networks timed in separate processes, and the message when a peer is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.measure import Effort, Skipped
from benchmarks.networks import random_weights


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    frames = np.random.default_rng(0).uniform(0, 255, (2, 3, 64, 64)).astype(np.float32)
    np.save(tmp_path / "frames.npy", frames)
    weights = str(random_weights("FlowNet2S", tmp_path, 0.05))
    return {
        "kind": "compiled",
        "model": "FlowNet2S",
        "weights": weights,
        "precision": "fp32",
        "threads": 1,
        "frames": str(tmp_path / "frames.npy"),
    }


def test_two_ways_of_one_model_give_one_flow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "SIZE", (64, 128))
    monkeypatch.setattr(peers, "WAYS", {peers.OURS: ("compiled", "fp32"), "plain": ("plain", "fp32")})
    effort = Effort(least=2, most=2, cap_s=0.1)
    random_weights("FlowNet2S", tmp_path, 0.05).rename(tmp_path / "FlowNet2S-1.safetensors")
    ours, plain = peers.compared("FlowNet2S", "no python at all", effort, tmp_path)
    assert ours["by"] == peers.OURS
    assert ours["s/pair"]["n"] == 2
    assert ours["s/pair"]["median"] > 0
    assert 1e8 < plain["peak MB"] * 1e6 < 4e9
    assert plain["apart"] < 1e-4


def test_a_peer_that_ends_says_what_it_said(settings: dict[str, Any], tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="no-such-file"),
        peers.peer(sys.executable, settings | {"frames": "no-such-file"}, tmp_path / "log"),
    ):
        pass


def test_an_environment_that_is_missing_or_has_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWREEL_PTLFLOW", "/nowhere/python")
    with pytest.raises(Skipped, match=r"no interpreter at /nowhere/python.*benchmarks\.peers"):
        peers.run()
    monkeypatch.setenv("FLOWREEL_PTLFLOW", sys.executable)
    with pytest.raises(Skipped, match="not at all"):
        peers.run()
