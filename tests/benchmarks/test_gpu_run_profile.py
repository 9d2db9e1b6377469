"""The part ``run profile`` of ``python -m benchmarks gpu`` evaluates traces and samples of threads correctly."""

from __future__ import annotations

import random
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
from torch.autograd import DeviceType

import flowreel
from benchmarks.gpu import chains, run_profile, sampling, trace
from benchmarks.gpu.findings import Settings
from benchmarks.gpu.profile import profiled
from benchmarks.gpu.trace import Event
from flowreel.engine import compiled, pipeline
from flowreel.engine.inference import Inference, Network
from flowreel.sinks import shard_processes
from tests.fakes.cuda_streams import GPU, Card, LateCopies
from tests.fakes.gpu_parts import Found

US = 1000  # ns

# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_intervals_are_joined_and_shared_as_sets_of_moments_are(seed: int) -> None:
    drawn = random.Random(seed)

    def some() -> list[tuple[int, int]]:
        starts = [drawn.randrange(100) for _ in range(8)]
        return [(start, start + drawn.randrange(1, 20)) for start in starts]

    def moments(intervals: list[tuple[int, int]]) -> set[int]:
        return {moment for start, end in intervals for moment in range(start, end)}

    one, other = some(), some()
    joined, beside = trace.union(one), trace.union(other)
    assert moments(joined) == moments(one)
    assert trace.length(joined) == len(moments(one))
    assert trace.shared(joined, beside) == len(moments(one) & moments(other))
    within = [(start, end) for start, end in joined if start < 60]
    assert moments(trace.gaps(within, (0, 130))) == set(range(130)) - moments(within)


# --- the profiler's events --------------------------------------------------------------------------------------------


def kineto(name: str, start_us: int, us: int, lane: int, *, on_card: bool = False, number: int = 0) -> SimpleNamespace:
    """One event in the form of torch's profiler."""
    return SimpleNamespace(
        name=lambda: name,
        device_type=lambda: DeviceType.CUDA if on_card else DeviceType.CPU,
        device_resource_id=lambda: lane,
        start_ns=lambda: start_us * US,
        duration_ns=lambda: us * US,
        correlation_id=lambda: number,
        is_user_annotation=lambda: name == "ProfilerStep#1",
        activity_type=lambda: "overhead" if "Buffer" in name else "kernel",
    )


def profiler_of(*events: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: list(events))))


MODEL, DECODE = 4021, 0x7F12_89AB_CDEF  # a thread's number by the system, and one by pthread
KNOWN = {MODEL: "model", DECODE: "decode"}
DECODE_SHORT = 0x89AB_CDEF - (1 << 32)  # cut to 32 bits with a sign, as in the profiler's events
RUN = profiler_of(
    kineto("cudaGraphLaunch", 0, 50, MODEL, number=7),
    kineto("aten::conv2d", 0, 9000, MODEL),
    kineto("ProfilerStep#1", 0, 9000, 1, on_card=True),
    kineto("Command Buffer Full", 0, 5000, 1, on_card=True),
    kineto("convolution_3_half", 0, 600, 20, on_card=True, number=7),
    kineto("warp_half", 300, 400, 20, on_card=True, number=7),  # overlaps the kernel above
    kineto("cuLaunchKernel", 700, 200, DECODE_SHORT, number=8),
    kineto("yuv_to_rgb_8", 800, 100, 21, on_card=True, number=8),
    kineto("cudaStreamSynchronize", 600, 200, -DECODE_SHORT),  # without its sign
    kineto("Memcpy DtoH (Device -> Pinned)", 500, 300, 22, on_card=True),
    kineto("cudaMalloc", 900, 100, 99),
)


def test_what_the_card_and_the_threads_did_is_told_apart() -> None:
    events = trace.events_of(RUN)
    assert [event.name for event in events if not event.on_card] == [
        "cudaGraphLaunch",
        "cuLaunchKernel",
        "cudaStreamSynchronize",
        "cudaMalloc",
    ]
    within = (0, 1000 * US)
    card = trace.card(events, within, KNOWN)
    assert card.shares == pytest.approx(
        {"a kernel runs": 0.8, trace.NETWORK_RUNS: 0.7, "a copy runs": 0.3, "nothing runs": 0.1}
    )
    told = [(row["on the card"], row["stream"], row["started by"], row["count"], row["share"]) for row in card.rows]
    assert told == [
        ("network", 20, ["model"], 2, pytest.approx(0.7)),
        ("copy to the host", 22, [], 1, pytest.approx(0.3)),
        ("colours", 21, ["decode"], 1, pytest.approx(0.1)),
    ]
    assert card.pauses == [(700 * US, 1000 * US)]
    assert trace.waits(card.pauses, within)["share"] == pytest.approx(0.3)
    calls = trace.calls(events, within, KNOWN, card.pauses, 1)
    assert [(row["thread"], row["call"], row["ms"], row["ms in pauses"]) for row in calls] == [
        ("decode", "cuLaunchKernel", pytest.approx(0.2), pytest.approx(0.2)),
        ("decode", "cudaStreamSynchronize", pytest.approx(0.2), pytest.approx(0.1)),
        ("another thread, 99", "cudaMalloc", pytest.approx(0.1), pytest.approx(0.1)),
        ("model", "cudaGraphLaunch", pytest.approx(0.05), 0),
    ]


def test_the_ends_of_a_run_are_left_out() -> None:
    events = [Event("a", 0, 100, 1, True, 0), Event("a", 450, 1000, 1, True, 0)]
    assert trace.middle(events) == (200, 800)
    assert [(event.start_ns, event.end_ns) for event in trace.clipped(events, (200, 800))] == [(450, 800)]
    assert trace.card([], trace.middle([]), {}).shares["nothing runs"] == 1


def test_torchs_profiler_has_events_of_that_kind() -> None:
    with profiled(False) as profiler:
        torch.ones(3).add(1)
    events = trace.events_of(profiler, run_profile.OPERATION)
    assert "aten::add" in {event.name for event in events}
    assert all(event.end_ns >= event.start_ns > 0 and not event.on_card for event in events)


def test_on_a_card_the_rows_say_what_bounds(
    findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the made-up trace of a run on a GPU; only its middle counts, from 180 to 720 us."""
    one = chains.Ran(271.0, sample_of(271.0), 1.0, (), "NVDEC (h264)", 1.5)
    monkeypatch.setattr(run_profile, "profiled", lambda on_gpu: RUN)
    made = SimpleNamespace(to_store=lambda around: one)
    run_profile._trace(findings, settings, made, lambda what, words: findings.add(headline=words))  # type: ignore[arg-type]
    assert [row["call"] for row in findings["rows"] if "call" in row] == ["cudaStreamSynchronize", "cuLaunchKernel"]
    assert findings["headline"] == "under the profiler (271 pairs/s) the network's kernels run 96% of the time"


def sample_of(rate: float) -> chains.Sample:
    return chains.Sample(rate, rate, rate, 1)


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
    waits = watch.lock_waits()
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
            assert blocking  # a thread that waits by spinning would hold Python's lock
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
        assert {stage.name: stage.items for stage in one.stages}["restore"] == 4  # batches of two of eight pairs
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
    assert sum(late.brought) == 4 * 2 * 2 * 64 * 96 * 4


def test_the_lock_is_asked_for_as_before_afterwards() -> None:
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
