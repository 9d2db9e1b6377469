"""The thread pool: results come in order, its bounds hold, the first error is raised, and no thread stays behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from flowreel.sinks import parallel
from flowreel.sinks.parallel import OrderedPool, encode_workers, file_workers
from tests.sinks.waiting import Encoders

LONG_S = 60.0  # time limit for waiting, so that a broken test fails instead of hanging


def fail(message: str) -> int:
    raise RuntimeError(message)


class Gate:
    """A call that waits until ``opened`` is set; ``begun`` is released once for each call that has started."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.begun = threading.Semaphore(0)

    def __call__(self, value: int) -> int:
        self.begun.release()
        assert self.opened.wait(LONG_S)
        return value


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_and_in_the_callers_thread(workers: int, encoders: Encoders) -> None:
    taken: list[int] = []
    threads: set[threading.Thread] = set()

    def take(value: int) -> None:
        taken.append(value)
        threads.add(threading.current_thread())

    pool = OrderedPool(take, workers)
    for value in range(50):
        pool.submit(lambda value: value * value, value)
    pool.drain()
    pool.submit(int, "7")  # a drained pool can still be used
    pool.close()
    assert taken[:50] == [value * value for value in range(50)]
    assert threads == {threading.current_thread()}
    assert encoders() == []


def test_a_quick_call_waits_for_a_slow_one_before_it() -> None:
    taken: list[str] = []
    pool = OrderedPool(taken.append, workers=2)
    second_done = threading.Event()

    def first() -> str:
        assert second_done.wait(LONG_S)  # so it ends after the second, which runs in parallel
        return "first"

    def second() -> str:
        second_done.set()
        return "second"

    pool.submit(first)
    pool.submit(second)
    pool.drain()
    pool.close()
    assert taken == ["first", "second"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_second_steps_come_in_the_calls_order(workers: int) -> None:
    """Second steps run in the order of submission although a later first step ends sooner; results are in order too."""
    turns: list[int] = []
    taken: list[int] = []
    last_made = threading.Event()

    def make(value: int) -> int:
        if value == 2:
            last_made.set()
        assert workers < 3 or value > 0 or last_made.wait(LONG_S)
        return value

    def then(value: int) -> int:
        turns.append(value)
        return value * value

    pool = OrderedPool(taken.append, workers)
    for value in range(3):
        pool.submit_in_turn(partial(make, value), then)
    pool.drain()
    pool.submit_in_turn(partial(make, 3), then)  # with no earlier call left
    pool.drain()
    pool.close()
    assert (turns, taken) == ([0, 1, 2, 3], [0, 1, 4, 9])


@pytest.mark.parametrize("step", ["make", "then"])
def test_a_second_step_follows_a_call_that_failed(step: str, encoders: Encoders) -> None:
    """The second step of a later call still runs, so that it can handle the failure; its result is dropped."""
    turns: list[int] = []
    taken: list[int] = []
    last_made = threading.Event()

    def done(at: str, value: int) -> int:
        if value == 2:
            last_made.set()
        if (at, value) == (step, 1):
            assert last_made.wait(LONG_S)
            fail("call 1")
        if at == "then":
            turns.append(value)
        return value

    pool = OrderedPool(taken.append, workers=3)
    for value in range(3):
        pool.submit_in_turn(partial(done, "make", value), partial(done, "then"))
    with pytest.raises(RuntimeError, match="call 1"):
        pool.drain()
    assert (turns, taken) == ([0, 2], [0])
    assert encoders() == []


def test_no_more_calls_than_the_bound_are_in_flight() -> None:
    most = [0]
    running: list[int] = []
    lock = threading.Lock()
    pool: OrderedPool[int] = OrderedPool(lambda value: running.remove(value), workers=2)
    for value in range(40):
        pool.submit(lambda value: value, value)
        with lock:
            running.append(value)
            most[0] = max(most[0], len(running))
    pool.drain()
    pool.close()
    assert 1 <= most[0] <= 2 * parallel.CALLS_PER_WORKER


def test_bytes_are_bounded_and_a_larger_call_goes_alone() -> None:
    taken: list[int] = []
    pool = OrderedPool(taken.append, workers=4, most_bytes=100)
    for _ in range(2):  # the second time there is as much room as the first
        gate = Gate()
        taken.clear()
        pool.submit(gate, 1, nbytes=60)
        pool.submit(gate, 2, nbytes=40)
        assert taken == []  # both fit
        gate.opened.set()
        pool.submit(gate, 3, nbytes=1)  # 101 bytes: waits until the first result is taken
        assert taken[:1] == [1]
        pool.submit(gate, 4, nbytes=1000)
        assert taken == [1, 2, 3]
        pool.submit(gate, 5, nbytes=0)
        assert taken == [1, 2, 3, 4]
        pool.drain()
        assert taken == [1, 2, 3, 4, 5]
    pool.close()


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_first_error_comes_out_in_its_place(workers: int, encoders: Encoders) -> None:
    taken: list[int] = []
    pool: OrderedPool[int] = OrderedPool(taken.append, workers)

    def go() -> None:
        for value in range(10):
            pool.submit(*((fail, f"call {value}") if value in (3, 4) else (abs, value)))
        pool.drain()

    with pytest.raises(RuntimeError, match="call 3"):
        go()
    assert taken == [0, 1, 2]
    assert encoders() == []
    with pytest.raises(ValueError, match="closed"):
        pool.submit(abs, 1)
    pool.close()  # closing again is allowed


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_taker_ends_it_too(workers: int, encoders: Encoders) -> None:
    def take(value: int) -> None:
        if value == 1:
            raise OSError("disk full")

    pool = OrderedPool(take, workers)

    def go() -> None:
        for value in range(10):
            pool.submit(abs, value)
        pool.drain()

    with pytest.raises(OSError, match="disk full"):
        go()
    assert encoders() == []


def test_closing_drops_what_waits_and_waits_for_what_runs(encoders: Encoders) -> None:
    ran: list[int] = []
    gate = Gate()

    def call(value: int) -> int:
        gate(value)
        ran.append(value)
        return value

    taken: list[int] = []
    pool = OrderedPool(taken.append, workers=1)
    pool.submit(call, 1)
    pool.submit(call, 2)
    assert gate.begun.acquire(timeout=LONG_S)
    dropped = threading.Event()
    pool._in_flight[1][0].add_done_callback(lambda _: dropped.set())
    closing = threading.Thread(target=pool.close)
    closing.start()
    assert dropped.wait(LONG_S)
    gate.opened.set()
    closing.join(LONG_S)
    assert not closing.is_alive()
    assert ran == [1]
    assert taken == []
    assert encoders() == []


@pytest.mark.parametrize(
    ("cores", "workers", "alone"),
    [(None, 1, 1), (1, 1, 1), (2, 1, 1), (6, 3, 5), (16, 8, 15), (128, 8, 16)],
)
def test_workers_leave_half_of_the_cores_to_a_model_there(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, workers: int, alone: int
) -> None:
    count: Callable[[], int | None] = lambda: cores  # noqa: E731
    monkeypatch.setattr(parallel.os, "cpu_count", count)
    assert encode_workers() == workers
    assert encode_workers("cuda:0") == encode_workers(None) == alone
    assert (file_workers("cpu"), file_workers(None)) == (workers + 1, alone + 1)
