"""Captured work and turns: the order of things, against a CUDA that only notes what it is told."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from flowreel.engine.compiled.graphs import Turns, captured

GPU = torch.device("cuda", 0)


class NotingCuda:
    """Streams, events and graphs of torch.cuda that write down what is asked of them."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stream = "s1"  # the current one
        self.capturing = False
        self.fails: Exception | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = self

        class Stream:
            def __init__(self, name: object = "side") -> None:
                self.name = name if isinstance(name, str) else "side"

            def wait_event(self, event: Event) -> None:
                cuda.said.append(f"{self.name} waits for {event.recorded}")

            def wait_stream(self, other: Stream) -> None:
                cuda.said.append(f"{self.name} waits for {other.name}")

        class Event:
            recorded = "nothing"

            def record(self, stream: Stream) -> None:
                self.recorded = stream.name

            def synchronize(self) -> None:
                cuda.said.append(f"host waits for {self.recorded}")

        class CUDAGraph:
            def replay(self) -> None:
                cuda.said.append(f"replay on {cuda.stream}")

        @contextmanager
        def on(stream: Stream) -> Iterator[None]:
            before, cuda.stream = cuda.stream, stream.name
            yield
            cuda.stream = before

        @contextmanager
        def graph(made: CUDAGraph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            with on(stream):
                cuda.capturing = True
                try:
                    yield
                finally:
                    cuda.capturing = False
            if cuda.fails is not None:
                raise cuda.fails

        names = {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "stream": on,
            "device": lambda device: nullcontext(),
            "current_stream": lambda device: Stream(self.stream),
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def work(self) -> None:
        self.said.append(f"{'captured' if self.capturing else 'done'} on {self.stream}")


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> NotingCuda:
    cuda = NotingCuda()
    cuda.install(monkeypatch)
    return cuda


def test_work_is_warmed_up_beside_the_current_stream_then_captured(noting: NotingCuda) -> None:
    repeat = captured(noting.work, GPU)
    assert noting.said == [
        "side waits for s1",
        *["done on side"] * 3,
        "captured on side",
        "s1 waits for side",
    ]
    noting.said.clear()
    noting.stream = "s2"
    repeat()
    assert noting.said == ["replay on s2"]


def test_work_that_cannot_be_captured_stays_as_it_is_and_says_so(noting: NotingCuda) -> None:
    noting.fails = RuntimeError("operation not permitted when stream is capturing")
    with pytest.warns(UserWarning, match="without a CUDA graph.*not permitted"):
        repeat = captured(noting.work, GPU)
    noting.said.clear()
    repeat()
    assert noting.said == ["done on s1"]


def test_running_out_of_memory_is_not_taken_for_work_that_cannot_be_captured(noting: NotingCuda) -> None:
    noting.fails = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        captured(noting.work, GPU)


def test_on_a_cpu_work_is_done_once_and_stays_as_it_is() -> None:
    done: list[int] = []

    def work() -> None:
        done.append(1)

    assert captured(work, torch.device("cpu")) is work
    assert done == [1]


def test_a_turn_waits_for_what_the_last_one_started_on_another_stream(noting: NotingCuda) -> None:
    turns = Turns(GPU, lambda: "thing")
    with turns.taken() as thing:
        assert thing == "thing"
    noting.stream = "s2"
    noting.said.clear()
    with turns.taken():
        noting.said.append("used on s2")
    assert noting.said == ["s2 waits for s1", "used on s2"]
    noting.stream = "s3"
    with turns.taken():
        pass
    assert noting.said[-1] == "s3 waits for s2"


def test_memory_goes_only_when_its_last_turn_is_over(noting: NotingCuda) -> None:
    turns = Turns(GPU, lambda: "thing")
    noting.stream = "s4"
    with turns.taken():
        pass
    noting.said.clear()
    del turns
    gc.collect()
    assert noting.said == ["host waits for s4"]


def test_turns_at_the_same_time_take_different_things_and_failure_gives_them_back() -> None:
    made = iter(range(10))
    turns = Turns(torch.device("cpu"), lambda: next(made))
    with turns.taken() as first, turns.taken() as second:
        assert {first, second} == {0, 1}
    with pytest.raises(ValueError, match="in use"), turns.taken() as third:
        raise ValueError("in use")
    with turns.taken() as fourth, turns.taken() as fifth:
        assert {fourth, fifth} == {0, 1}
    assert third in (0, 1)
    assert next(made) == 2


def test_a_thing_that_cannot_be_made_leaves_the_others() -> None:
    made = [0]
    turns = Turns(torch.device("cpu"), made.pop)
    with turns.taken(), pytest.raises(IndexError):
        turns.taken().__enter__()
    with turns.taken() as again:
        assert again == 0
