"""The storage case measures correctly: sizes in bytes, errors of the flow read back, writes counted by the system."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from benchmarks import storage
from flowreel.engine.config import Codec, SinkConfig
from flowreel.engine.data import FlowBatch
from flowreel.sinks.codecs import flow_codec


def ramp(height: int, width: int) -> Any:
    x = np.linspace(-9, 9, width, dtype=np.float32)
    return np.stack([np.tile(x, (height, 1)), np.tile(x[::-1] / 3, (height, 1))])


def test_cost_is_that_of_the_chunk() -> None:
    flow = ramp(30, 40)
    codec = flow_codec(30, 40, SinkConfig())
    cost = storage.measure(codec, [flow, flow], 12 + 8 * 30 * 40)
    assert cost["ratio"] == (12 + 8 * 30 * 40) / len(codec.encode(flow).chunk)
    error = np.abs(np.rint(flow * 32) / 32 - flow)
    assert cost["max error px"] == pytest.approx(error.max(), rel=1e-6)
    assert cost["mean error px"] == pytest.approx(error.mean(), rel=1e-5)
    assert min(cost["encode GB/s"], cost["decode GB/s"]) > 0


def test_every_field_and_codec_has_its_row() -> None:
    found = storage.measure_all("ramp", [ramp(10, 12)])
    assert all(one["max error px"] <= storage.BOUNDS[one["bound"]] for one in found)
    rows = storage.rows(found, [])
    assert [row["codec"] for row in rows] == list(get_args(Codec))
    for row in rows:
        assert row[".flo / lossless"] < row[".flo / 1/16"]
        assert row["write amplification"] is None
        assert all(row[f".flo / {bound}"] > 0 for bound in storage.BOUNDS)
        assert 0 < row["largest error / bound"] <= 1


def test_the_error_beside_the_bound() -> None:
    assert storage.error_of_bound({"bound": "1/64", "max error px": 1 / 128}) == 0.5
    assert storage.error_of_bound({"bound": "lossless", "max error px": 0.0}) == 0
    assert storage.error_of_bound({"bound": "lossless", "max error px": 1e-9}) == float("inf")


def test_a_coarse_field_counts_as_the_flow_made_of_it() -> None:
    (alone, *_), (coarse, *_) = (
        storage.measure_all("ramp", [ramp(8, 16)], ["blosc"], *size) for size in ((), ((32, 64),))
    )
    assert coarse["ratio"] == pytest.approx(alone["ratio"] * (12 + 8 * 32 * 64) / (12 + 8 * 8 * 16))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this system does not count a process's writes")
def test_writes_are_those_of_the_whole_store() -> None:
    count = 40
    flow = torch.from_numpy(np.random.default_rng(0).normal(0, 9, (count, 2, 60, 80)).astype(np.float32))
    frames = np.arange(count)
    batch = FlowBatch(flow, 0, frames, frames + 1, frames / 25, (frames + 1) / 25)
    store = storage.whole_store("noise", [batch], "blosc")
    assert store["flows"] == count
    assert store["store bytes"] > flow.numel()  # noise takes at least a byte per value
    assert store["wchar"] >= store["store bytes"]
    assert store["wchar / store"] < 1.05  # metadata is written twice, the flow once
