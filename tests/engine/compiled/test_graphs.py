"""Captured work and turns: the order of calls, on a fake CUDA that only records them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from flowreel.engine.compiled.graphs import Turns, beside, captured

GPU = torch.device("cuda", 0)


class NotingCuda:
    """Stands for the streams, events and graphs of torch.cuda and records what is asked of them."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stream = "s1"  # the current one
        self.pools_in_use: list[object] = []  # pools that the allocator believes a capture is using
        self.pools_released: list[object] = []
        self.devices: list[torch.device] = []  # that were made current
        self.capturing = False
        self.fails: Exception | None = None  # raised at the end of a capture

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = self

        class Stream:
            def __init__(self, name: object = "side", priority: int = 0) -> None:
                made = not isinstance(name, str)  # rather than being the current one
                self.name = "side" if made else str(name)
                assert priority == (-1 if made else 0)  # torch keeps a separate pool of streams for each priority

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
            try:
                yield
            finally:
                cuda.stream = before

        @contextmanager
        def graph(made: CUDAGraph, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            """Like torch's: if the capture cannot be ended, its stream stays current and its pool stays in use."""
            assert capture_error_mode == "thread_local"
            before, cuda.stream, cuda.capturing = cuda.stream, stream.name, True
            cuda.pools_in_use.append(pool)
            try:
                yield
            finally:
                cuda.capturing = False
                if cuda.fails is not None:
                    raise cuda.fails
                cuda.stream = before
                cuda.pools_in_use.remove(pool)

        def end_allocating(index: int, pool: object) -> None:
            assert index == 0
            cuda.pools_in_use.remove(pool)

        names = {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "stream": on,
            "device": lambda device: nullcontext(self.devices.append(device)),
            "current_stream": lambda device: Stream(self.stream),
            "graph_pool_handle": lambda: object(),
            "is_current_stream_capturing": lambda: self.capturing,
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocating, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda index, pool: self.pools_released.append(pool), raising=False
        )

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
    assert noting.devices == [GPU]  # else the one that was current before gets a context
    noting.said.clear()
    noting.stream = "s2"
    repeat()
    assert noting.said == ["replay on s2"]


def test_work_that_cannot_be_captured_stays_as_it_is_and_says_so(noting: NotingCuda) -> None:
    noting.fails = RuntimeError("operation not permitted when stream is capturing")
    with pytest.warns(UserWarning, match="without a CUDA graph.*not permitted"):
        repeat = captured(noting.work, GPU)
    assert noting.said[-1] == "s1 waits for side"
    assert (noting.stream, noting.pools_in_use, len(noting.pools_released)) == ("s1", [], 1)
    noting.said.clear()
    repeat()
    assert noting.said == ["done on s1"]


@pytest.mark.parametrize("capturing", [True, False])
def test_work_beside_other_work_in_a_capture_alone(noting: NotingCuda, capturing: bool) -> None:
    noting.capturing = capturing
    awaited = beside(lambda: noting.work() or 3, GPU)
    noting.work()
    assert awaited() == 3
    noting.work()
    forked = ["side waits for s1", "captured on side", "captured on s1", "s1 waits for side", "captured on s1"]
    assert noting.said == (forked if capturing else ["done on s1"] * 3)


def test_what_runs_beside_belongs_to_its_own_threads_capture(noting: NotingCuda) -> None:
    """Three threads capture work that forks to a second stream; each capture ends before the next one begins."""

    def work() -> None:
        name = threading.current_thread().name
        awaited = beside(lambda: noting.said.append(f"{name} beside on {noting.stream}"), GPU)
        pause.wait(0.005)
        noting.said.append(f"{name} on {noting.stream}")
        awaited()

    pause = threading.Event()
    threads = [threading.Thread(target=captured, args=(work, GPU), name=f"t{number}") for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one_capture = len(noting.said) // 3
    for first in range(0, 3 * one_capture, one_capture):
        said = noting.said[first : first + one_capture]
        name = said[1].split()[0]
        assert said == [
            "side waits for s1",
            *[f"{name} beside on side", f"{name} on side"] * 3,  # warm-up, without a second stream
            "side waits for side",  # the fork
            f"{name} beside on side",
            f"{name} on side",
            "side waits for side",  # the join
            "s1 waits for side",
        ]


def test_this_torch_can_be_told_that_a_capture_is_over() -> None:
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
    assert any(hasattr(torch._C, name) for name in names)
    assert hasattr(torch._C, "_cuda_releasePool")


def test_work_that_fails_is_no_capture_that_failed(noting: NotingCuda) -> None:
    def broken() -> None:
        raise RuntimeError("a size is wrong")

    with pytest.raises(RuntimeError, match="a size is wrong"):
        captured(broken, GPU)
    assert noting.said == ["side waits for s1", "s1 waits for side"]  # the current stream waits for whatever was begun


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_running_out_of_memory_is_not_taken_for_work_that_cannot_be_captured(
    noting: NotingCuda, error: Exception
) -> None:
    noting.fails = error
    with pytest.raises(torch.OutOfMemoryError):
        captured(noting.work, GPU)
    assert noting.stream == "s1"


def test_memory_that_ends_inside_a_capture_is_known_although_the_capture_fails_too(noting: NotingCuda) -> None:
    noting.fails = RuntimeError("operation failed due to a previous error during capture")

    def greedy() -> None:
        if noting.capturing:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        captured(greedy, GPU)


def test_one_capture_at_a_time(noting: NotingCuda) -> None:
    """Before a capture torch waits for the whole device, which makes any other capture fail."""
    inside, most = [0], [0]

    def work() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        pause.wait(0.01)
        inside[0] -= 1

    pause = threading.Event()
    threads = [threading.Thread(target=captured, args=(work, GPU)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_on_a_cpu_work_is_done_once_and_stays_as_it_is() -> None:
    done: list[int] = []

    def work() -> None:
        done.append(1)

    assert captured(work, torch.device("cpu")) is work
    assert done == [1]


def test_a_turn_waits_for_what_the_last_one_started_on_another_stream(noting: NotingCuda) -> None:
    turns = Turns(GPU, "thing")
    with turns.taken() as thing:
        assert thing == "thing"
    assert noting.said == ["s1 waits for s1"]  # on which it was made
    noting.stream = "s2"
    noting.said.clear()
    with turns.taken():
        noting.said.append("used on s2")
    assert noting.said == ["s2 waits for s1", "used on s2"]
    noting.stream = "s3"
    with pytest.raises(ValueError, match="too late"), turns.taken():
        raise ValueError("too late")
    assert noting.said[-1] == "s3 waits for s2"
    noting.stream = "s4"
    with turns.taken():
        pass
    assert noting.said[-1] == "s4 waits for s3"  # which may have been given work before it failed


def test_memory_goes_only_when_its_last_turn_is_over(noting: NotingCuda) -> None:
    turns = Turns(GPU, "thing")
    noting.stream = "s4"
    with turns.taken():
        pass
    noting.said.clear()
    del turns
    assert noting.said == ["host waits for s4"]


def test_turns_at_the_same_time_are_taken_one_after_the_other_and_failure_ends_one() -> None:
    turns = Turns(torch.device("cpu"), [0])
    most: list[int] = []

    def use() -> None:
        with turns.taken() as thing:
            thing[0] += 1
            pause.wait(0.005)
            most.append(thing[0])
            thing[0] -= 1

    pause = threading.Event()
    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    with pytest.raises(ValueError, match="in use"), turns.taken():
        raise ValueError("in use")
    for thread in threads:
        thread.join()
    assert most == [1] * 4
