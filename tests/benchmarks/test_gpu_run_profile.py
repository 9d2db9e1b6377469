"""The part ``run profile`` of ``python -m benchmarks gpu``: the chain of a run, and samples of its threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import flowreel
from benchmarks.gpu import chains, run_profile, sampling
from benchmarks.gpu.findings import Settings
from flowreel.engine import compiled, pipeline
from flowreel.engine.inference import Inference, Network
from flowreel.sinks import shard_processes
from tests.fakes.cuda_streams import GPU, Card, LateCopies

# --- the threads ------------------------------------------------------------------------------------------------------


def test_a_thread_is_seen_where_it_stands() -> None:
    """A thread that waits for items is sampled in the pipeline's own code; it runs until it was seen twice."""
    watch = sampling.Watch(1e-4, resting=2)

    def until_seen() -> Iterator[int]:
        while watch.places["waits"].total() < 2:
            yield 0

    with watch:
        chain = pipeline.Pipeline("first", until_seen())
        chain.run({"waits": lambda items: [item for item in items if threading.Event().wait(1e-3)]})
    assert {"first", "waits"} <= set(watch.places)
    (row, *_) = (row for row in watch.stood(1) if row["thread"] == "waits")
    assert 0 < float(str(row["share"])) <= 1
    lines = [where for seen in watch.places.values() for where in seen]
    assert any(where.startswith("engine/pipeline.py:") for where in lines)
    waits = watch.gil_waits()
    assert waits["median_ms"] <= waits["nine_of_10_ms"] <= waits["longest_ms"]
    assert {row["processor of"] for row in watch.processors()} >= {"MainThread"} or not sampling.TASKS.exists()


def test_a_place_is_our_line_and_whom_it_called() -> None:
    frames: list[str] = []

    def seen(item: int) -> int:
        frames.append(sampling.place(sys._getframe()))
        return item

    pipeline.in_own_thread(lambda: seen(1))
    (where,) = frames
    assert where.startswith("engine/pipeline.py:")
    assert " work: done.append(action()) > test_gpu_run_profile.py:" in where


def test_processor_time_is_told_of_pythons_threads_and_of_others() -> None:
    watch = sampling.Watch()
    watch.seconds, watch.names = 2.0, {11: "model"}
    watch._first = {11: sampling.Spent("python", 1.0, 0.0, 10)}
    watch._last = {
        11: sampling.Spent("python", 1.5, 0.25, 30),
        12: sampling.Spent("cuda-EvtHandlr", 0.5, 0.0, 4),
        13: sampling.Spent("cuda-EvtHandlr", 0.5, 0.0, 4),
    }
    told = {row["processor of"]: (row["threads"], row["on it"], row["sleeps a s"]) for row in watch.processors()}
    assert told == {"not Python's: cuda-EvtHandlr": (2, 0.5, 4.0), "model": (1, 0.25, 10.0)}


def test_without_proc_no_processor_time_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "TASKS", tmp_path / "none")
    assert sampling.spent() == {}


# --- the chain --------------------------------------------------------------------------------------------------------


def test_the_pace_is_that_of_whole_shards_once_the_pipeline_is_full() -> None:
    """Shards of 4 in batches of 2; the first shard is slow, the others take 1 s each."""
    pace = chains.Pace([(0, 0.0), (2, 8.0), (4, 10.0), (6, 10.5), (8, 11.0), (10, 11.9), (12, 12.0), (14, 90.0)])
    rate, by_shard = pace.rate(4)
    assert rate == 4
    assert (by_shard.median, by_shard.count) == (4, 2)


def test_flow_is_let_go_no_further_ahead_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is given work long before the work is done, so the flow is waited for one batch later."""
    log: list[str] = []

    class Event:
        made = 0

        def __init__(self, blocking: bool) -> None:
            assert blocking  # a thread that waits by spinning would hold the GIL
            self.number, Event.made = Event.made, Event.made + 1

        def record(self, stream: str) -> None:
            log.append(f"{self.number} on {stream}")

        def synchronize(self) -> None:
            log.append(f"waits for {self.number}")

    class Batch:
        flow = SimpleNamespace(is_cuda=True, device="cuda:0")

        def __len__(self) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    pace = chains.Pace()
    pace.let_go(Batch() for _ in range(3))  # type: ignore[arg-type]
    on = "on the stream of cuda:0"
    assert log == [f"0 {on}", "waits for 0", f"1 {on}", "waits for 1", f"2 {on}"]
    assert [seen for seen, _ in pace.reached] == [0, 2, 4]


def test_a_run_of_the_chain_gives_every_flow_to_its_end(settings: Settings) -> None:
    made = run_profile.Chains(settings)
    for way in (run_profile.Chains.to_store, run_profile.Chains.dropped, run_profile.Chains.frames_there):
        one = way(made)
        assert {stage.name: stage.items for stage in one.stages}["restore"] == 3  # batches of two of six pairs
    assert run_profile.Chains.without_threads(made).decoder == "none: frames in memory"


def test_the_chain_is_that_of_a_run_on_a_card_too(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake streams whose copies happen as late as possible, the flow is right only if every copy is waited for."""
    monkeypatch.setattr(compiled, "_BACKENDS", {})  # the compiled form for CPUs would mix its buffers with the fake's
    made = run_profile.Chains(settings)
    expected = flowreel.open_store(made._store)[:]
    fitted = Network.fitted

    def on_card(self: Network, *arguments: Any, **options: Any) -> Inference:
        return replace(fitted(self, *arguments, **options), device=GPU)

    monkeypatch.setattr(Network, "fitted", on_card)
    late = LateCopies(Card(monkeypatch))
    names = [stage.name for stage in made.to_store().stages]
    assert names == ["decode", "batches", "model", "write"]
    assert np.array_equal(flowreel.open_store(made._store)[:], expected)
    late.brought.clear()
    assert [stage.name for stage in made.dropped().stages] == ["decode", "batches", "model", "drop"]
    assert late.brought == []
    assert [stage.name for stage in made.dropped_on_the_host().stages][-2:] == ["download", "drop"]
    assert sum(late.brought) == 3 * 2 * 2 * 60 * 64 * 4


def test_the_gil_is_requested_as_before_afterwards() -> None:
    before_s, during_s = sys.getswitchinterval(), []

    def to_store() -> None:
        during_s.append(sys.getswitchinterval())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run_profile.asking_sooner(SimpleNamespace(to_store=to_store))  # type: ignore[arg-type]
    assert during_s == [pytest.approx(run_profile.SOONER_S)]
    assert sys.getswitchinterval() == before_s


def test_shards_are_made_by_processes_for_as_long_as_it_says() -> None:
    before = shard_processes.are_worth_it

    def to_store(chains: object) -> bool:
        return shard_processes.are_worth_it(1, 1, 1)

    assert run_profile.by_processes(SimpleNamespace(), to_store) is True  # type: ignore[arg-type, comparison-overlap]
    assert shard_processes.are_worth_it is before


def test_time_that_a_quota_took_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpu.stat"
    monkeypatch.setattr(run_profile, "QUOTA", path)
    assert run_profile._withheld_us() == 0
    path.write_text("usage_usec 5\nnr_throttled 3\nthrottled_usec 1234\n")
    assert run_profile._withheld_us() == 1234
