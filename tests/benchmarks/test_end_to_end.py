"""The end-to-end case compares a whole run with its stages alone, here on a small synthetic scene."""

from __future__ import annotations

from pathlib import Path

from benchmarks.end_to_end import STAGES, Job, measured
from benchmarks.networks import random_weights
from flowreel.engine.config import ModelConfig, RunConfig, SelectConfig
from flowreel.engine.inference import load_network


def test_a_run_and_its_stages_alone(tmp_path: Path) -> None:
    weights = str(random_weights("FlowNet2S", tmp_path, 0.05))
    config = RunConfig(model=ModelConfig(weights=weights, device="cpu", batch=2), select=SelectConfig(stop=6))
    scene = "synthetic:translate?size=64x64&frames=9"
    rows = measured(Job(scene, config, load_network(config.model), 5), {"model": "tiny"}, rounds=2)
    whole, *stages = rows
    assert whole["flows"] == 5
    assert whole["batch"] == 2
    assert whole["slowest alone"] in STAGES
    assert whole["pairs/s"]["n"] == whole["of the model alone"]["n"] == 2
    assert [row["stage"] for row in stages] == ["decode", "pairs", "batches", "model", "restore", "write"]
    assert [row["stage"] for row in stages if "pairs/s alone" in row] == list(STAGES)
    assert all(row["busy s"] >= 0 for row in stages)
