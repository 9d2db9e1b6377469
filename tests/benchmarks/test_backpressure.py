"""The back-pressure case detects the difference: little piles up in bounded channels, much in unbounded ones."""

from __future__ import annotations

import pytest

from benchmarks import backpressure
from benchmarks.backpressure import Job, alone, growth_mb, held, most_ahead, new_job, whole
from flowreel.engine.config import QueueConfig

FLOWS = 40
REST_S = 0.02  # after each flow; the network takes a few ms at this size


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backpressure, "HEIGHT", 64)
    monkeypatch.setattr(backpressure, "WIDTH", 64)


def job(queued: int, slow: str = "sink", flows: int = FLOWS) -> Job:
    made = new_job(flows, {slow: REST_S})  # type: ignore[dict-item]
    made.queues = QueueConfig(items=queued, total_bytes=64 << 20)
    return made


@pytest.mark.parametrize("slow", ["source", "model", "sink"])
def test_bounded_channels_keep_the_source_back(slow: str) -> None:
    made = job(1, slow)
    _, pipeline = whole(made)
    found = held([(made, pipeline)])
    assert made.flows_written == FLOWS
    assert made.frames_made == FLOWS + 1
    assert found["frames ahead"] <= found["allowed ahead"] == most_ahead(made) == 13
    assert found["deepest queue"] <= 1
    assert 0 < found["MB in queues"] <= found["allowed MB"]


def test_without_bounds_the_source_runs_away() -> None:
    """Missing bounds would be noticed: with room for everything, a slow sink leaves more in flight than is allowed."""
    made = job(10 * FLOWS)
    whole(made)
    assert made.furthest_ahead > most_ahead(job(1))


def test_a_stage_alone_does_all_its_items() -> None:
    source, model, sink = (job(1, slow, flows=8) for slow in ("source", "model", "sink"))
    assert alone(model, "model") >= 8 * REST_S
    assert alone(source, "source") >= 8 * REST_S
    assert source.frames_made == 8 + 1
    assert alone(sink, "sink") >= 8 * REST_S
    assert sink.flows_written == 8


def test_growth_is_from_the_warm_quarter_to_the_last() -> None:
    assert growth_mb([100, 100, 250, 250, 260, 260, 300, 300]) == 50
    assert growth_mb([7.0]) == 0
