"""The threaded pipeline equals plain composition, keeps its bounds, and stops cleanly whatever happens."""

from __future__ import annotations

import _thread
import contextlib
import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flowreel.engine.pipeline as module
from flowreel.engine.config import QueueConfig
from flowreel.engine.data import Frame, FramePair
from flowreel.engine.errors import StageError, concerning
from flowreel.engine.pipeline import Cancelled, Pipeline, in_own_thread
from flowreel.engine.stages import Stage, StageStatistics, compose, joined
from tests.fakes.fresh import Fresh

Function = Callable[[Iterator[Any]], Iterator[Any]]
Ints = tuple[int, ...]


class Boom(Exception):
    pass


class Item:
    """An item of ``size`` bytes that comes from frame ``index``."""

    def __init__(self, index: int, size: int = 100, tensor: torch.Tensor | None = None) -> None:
        self.last_frame = index
        self.tensors = (torch.zeros(size, dtype=torch.uint8) if tensor is None else tensor,)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for a state that other threads must reach; the time limit only ends a broken test."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "never came to be"
        time.sleep(0.001)


def passing(items: Iterator[Any]) -> Iterator[Any]:
    yield from items


def head(count: int) -> Function:
    return lambda items: itertools.islice(items, count)


def drain(items: Iterator[Any]) -> None:
    for _ in items:
        pass


def stats(pipeline: Pipeline) -> dict[str, StageStatistics]:
    return {stage.name: stage for stage in pipeline.statistics()}


def noting(items: Iterable[Any], made: list[Any]) -> Iterator[Any]:
    """Passes items on and records each before: while all sinks are held, their number shows how far the source got."""
    for item in items:
        made.append(item)
        yield item


class Held:
    """A sink that takes one item, and the others only after ``go`` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.got: list[Any] = []

    def __call__(self, items: Iterator[Any]) -> None:
        for item in items:
            self.got.append(item)
            assert self.go.wait(20)


def in_background(pipeline: Pipeline, consumers: dict[str, Callable[[Iterator[Any]], object]]) -> threading.Thread:
    thread = threading.Thread(target=pipeline.run, args=(consumers,))
    thread.start()
    eventually(lambda: stats(pipeline).keys() >= consumers.keys())
    return thread


# -- the same as plain composition -------------------------------------------------------------------------------


def mapping(k: int) -> Function:
    return lambda items: (tuple(x + k for x in item) for item in items)


def filtering(k: int) -> Function:
    return lambda items: (item for item in items if sum(item) % k)


def repeating(k: int) -> Function:
    return lambda items: (item for item in items for _ in range(k))


def batching(k: int) -> Function:
    def batch(items: Iterator[Ints]) -> Iterator[Ints]:
        while group := tuple(itertools.islice(items, k)):
            yield tuple(itertools.chain(*group))

    return batch


KINDS = (mapping, filtering, repeating, batching, head)
GRAPHS = st.lists(st.builds(lambda kind, k: kind(k), st.sampled_from(KINDS), st.integers(1, 3)), max_size=4)


@settings(max_examples=60, deadline=None)
@given(functions=GRAPHS, count=st.integers(0, 12), places=st.integers(1, 4), by_run=st.booleans())
def test_equals_composition(functions: list[Function], count: int, places: int, by_run: bool) -> None:
    source = [(i,) for i in range(count)]
    stages = [Stage(f"stage {i}", function) for i, function in enumerate(functions)]
    expected = list(compose(source, stages))
    pipeline = Pipeline("source", source, stages, QueueConfig(items=places))
    if by_run:
        one: list[Ints] = []
        two: list[Ints] = []
        pipeline.run({"one": one.extend, "two": two.extend})
        assert one == expected
        assert two == expected
    else:
        assert list(pipeline) == expected


def test_keeps_order_and_runs_once() -> None:
    pipeline = Pipeline("source", range(2000), [Stage("a", passing), Stage("b", passing)])
    assert list(pipeline) == list(range(2000))
    with pytest.raises(RuntimeError, match="runs once"):
        pipeline.run({})


def test_compose_closes_its_stages() -> None:
    closed: list[str] = []

    def stage(name: str) -> Function:
        def run(items: Iterator[int]) -> Iterator[int]:
            try:
                yield from map(abs, items)
            finally:
                closed.append(name)

        return run

    items = compose(iter(range(9)), [Stage(name, stage(name)) for name in "abc"])
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    assert closed == ["c", "b", "a"]


@settings(max_examples=30, deadline=None)
@given(functions=GRAPHS, count=st.integers(0, 12))
def test_joined_stages_give_what_they_give_one_by_one(functions: list[Function], count: int) -> None:
    source = [(i,) for i in range(count)]
    expected = list(compose(source, [Stage("", function) for function in functions]))
    assert (
        list(Pipeline("source", source, [Stage("all", joined(*(Stage("", function) for function in functions)))]))
        == expected
    )


@pytest.mark.parametrize("fails", ["a", "b", "c"])
def test_each_of_joined_stages_answers_for_its_own_errors(fails: str) -> None:
    """An error names the stage and the frame that it took last, also in a join inside another one."""

    def stage(name: str) -> Stage:
        def run(items: Iterator[Any]) -> Iterator[Any]:
            for item in items:
                if name == fails and item.last_frame == 3:
                    raise ValueError("it is odd")
                yield item

        return Stage(name, run)

    source = [SimpleNamespace(last_frame=number) for number in range(6)]
    inner = Stage("b and c", joined(stage("b"), stage("c")))
    pipeline = Pipeline("source", source, [Stage("all", joined(stage("a"), inner))])
    with pytest.raises(StageError, match=f"^{fails}, frame 3: it is odd") as failed:
        list(pipeline)
    assert isinstance(failed.value.__cause__, ValueError)


def test_joined_stages_name_the_frame_that_an_error_concerns() -> None:
    def failing(items: Iterator[Any]) -> Iterator[Any]:
        yield next(items)
        with concerning(7):
            raise ValueError("it is odd")

    source = [SimpleNamespace(last_frame=number) for number in range(6)]
    with pytest.raises(StageError, match=r"^odd, frame 7: it is odd"):
        list(Pipeline("source", source, [Stage("all", joined(Stage("odd", failing)))]))


@pytest.mark.parametrize("taken", [lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: bytearray(1 << 60)])
def test_memory_that_ends_on_a_cpu_says_what_to_try(taken: Callable[[], object]) -> None:
    def greedy(items: Iterator[Any]) -> Iterator[Any]:
        yield next(items), taken()

    with pytest.raises(StageError, match=r"^greedy: this machine has too little free memory: .*--batch") as failed:
        list(Pipeline("source", [1], [Stage("greedy", greedy)]))
    assert isinstance(failed.value.__cause__, RuntimeError | MemoryError)


def test_joined_stages_are_all_closed_and_the_last_error_is_heard() -> None:
    closed: list[str] = []

    def stage(name: str) -> Function:
        def run(items: Iterator[int]) -> Iterator[int]:
            try:
                yield from map(abs, items)
            finally:
                closed.append(name)
                if name == "a":
                    raise OSError("the file would not close")

        return run

    both = joined(Stage("a", stage("a")), Stage("b", stage("b")))
    pipeline = Pipeline("source", range(9), [Stage("both", both)])
    with pytest.raises(StageError, match="the file would not close"), contextlib.closing(pipeline.stream()) as items:
        next(items)
    assert sorted(closed) == ["a", "b"]
    with pytest.raises(OSError, match="the file would not close"), contextlib.closing(both(iter([1, 2]))) as items:  # type: ignore[type-var]
        next(items)


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="'a' twice"):
        Pipeline("a", [], [Stage("a", passing)])
    with pytest.raises(ValueError, match="'a' twice"):
        Pipeline("a", []).run({"a": drain})


# -- bounds ------------------------------------------------------------------------------------------------------


def test_a_slow_sink_holds_back_the_source_at_the_bound_in_items() -> None:
    made: list[int] = []
    sink = Held()
    pipeline = Pipeline("source", noting(range(50), made), [Stage("a", passing)], QueueConfig(items=3))
    thread = in_background(pipeline, {"sink": sink})
    eventually(lambda: len(made) == 3 + 3 + 3)  # in two channels, and one held by each of three threads
    assert [stage.queue for stage in pipeline.statistics()] == [0, 3, 3]
    sink.go.set()
    thread.join()
    assert len(sink.got) == 50
    assert [stage.peak_queue for stage in pipeline.statistics()] == [0, 3, 3]


def test_stream_holds_back_the_source() -> None:
    made: list[int] = []
    stream = Pipeline("source", noting(range(50), made), queues=QueueConfig(items=2)).stream()
    assert not made  # nothing starts before the first next
    for got in stream:
        eventually(lambda: len(made) == min(got + 1 + 2 + 1, 50))  # noqa: B023


def test_bound_in_bytes() -> None:
    made: list[Item] = []
    sink = Held()
    queues = QueueConfig(items=50, total_bytes=350)
    pipeline = Pipeline("source", noting(map(Item, range(20)), made), queues=queues)
    thread = in_background(pipeline, {"sink": sink})
    eventually(lambda: len(made) == 1 + 3 + 1)
    sink.go.set()
    thread.join()
    assert len(sink.got) == 20
    assert pipeline.peak_bytes == 300


def test_bound_in_bytes_is_one_for_all_channels() -> None:
    sink = Held()
    queues = QueueConfig(items=50, total_bytes=1000)
    pipeline = Pipeline("source", map(Item, range(60)), [Stage("a", passing), Stage("b", passing)], queues)
    thread = in_background(pipeline, {"sink": sink})
    eventually(lambda: pipeline.peak_bytes >= 1000)
    sink.go.set()
    thread.join()
    assert len(sink.got) == 60
    assert pipeline.peak_bytes <= 1000 + 3 * 100  # one item in each channel may have passed because it was empty


def test_bytes_that_come_free_in_one_channel_let_another_writer_go_on() -> None:
    filled, go = threading.Event(), threading.Event()
    sink = Held()

    def source() -> Iterator[Item]:
        yield Item(0)
        assert filled.wait(20)
        yield from map(Item, range(1, 5))

    def stage(items: Iterator[Item]) -> Iterator[Item]:
        yield from map(Item, range(4))
        filled.set()
        assert go.wait(20)
        yield from items

    pipeline = Pipeline("source", source(), [Stage("a", stage)], QueueConfig(items=9, total_bytes=400))
    thread = in_background(pipeline, {"sink": sink})
    assert filled.wait(20)
    eventually(lambda: stats(pipeline)["source"].wait_out_s > 0)
    sink.go.set()
    eventually(lambda: stats(pipeline)["a"].queue == 4)  # though the stage takes nothing
    go.set()
    thread.join()
    assert len(sink.got) == 4 + 5


def test_a_storage_is_counted_once_through_views_and_pairs() -> None:
    frames = [Frame(torch.zeros(3, 4, 5, dtype=torch.uint8), i, i / 25) for i in range(20)]
    pairs = list(itertools.starmap(FramePair, itertools.pairwise(frames)))
    made: list[FramePair] = []
    sink = Held()
    pipeline = Pipeline("source", noting(pairs, made), queues=QueueConfig(items=50, total_bytes=5 * 60))
    thread = in_background(pipeline, {"sink": sink})
    eventually(lambda: len(made) == 1 + 4 + 1)  # four pairs are five frames
    sink.go.set()
    thread.join()
    assert len(sink.got) == 19
    assert pipeline.peak_bytes == 5 * 60

    whole = torch.zeros(100, dtype=torch.uint8)
    views = Pipeline("source", [Item(i, tensor=whole[i : i + 9]) for i in range(20)], queues=QueueConfig(items=20))
    views.run({"sink": drain})
    assert views.peak_bytes == 100


def test_a_tee_counts_an_item_once() -> None:
    one, two = Held(), Held()
    pipeline = Pipeline("source", map(Item, range(9)), queues=QueueConfig(items=3, total_bytes=300))
    thread = in_background(pipeline, {"one": one, "two": two})
    eventually(lambda: stats(pipeline)["one"].queue == stats(pipeline)["two"].queue == 3)
    assert pipeline.peak_bytes == 300
    one.go.set()
    two.go.set()
    thread.join()
    assert len(one.got) == len(two.got) == 9


def test_a_fast_branch_does_not_overdraw_the_budget_before_a_slow_one() -> None:
    slow = Held()
    pipeline = Pipeline("source", map(Item, range(9)), queues=QueueConfig(items=4, total_bytes=1))
    thread = in_background(pipeline, {"fast": drain, "slow": slow})
    eventually(lambda: stats(pipeline)["fast"].items == 1 + 1 + 1)  # in the slow sink, in its channel, and before it
    slow.go.set()
    thread.join()
    assert len(slow.got) == 9
    assert stats(pipeline)["slow"].peak_queue == 1
    assert pipeline.peak_bytes <= 200


def test_an_item_larger_than_the_budget_passes_an_empty_channel() -> None:
    got: list[Item] = []
    queues = QueueConfig(items=4, total_bytes=1)
    pipeline = Pipeline("source", map(Item, range(30)), [Stage("a", passing), Stage("b", passing)], queues)
    pipeline.run({"one": got.extend, "two": drain})
    assert [item.last_frame for item in got] == list(range(30))
    assert [stage.peak_queue for stage in pipeline.statistics()] == [0, 1, 1, 1, 1]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), max_size=15),
    total=st.integers(1, 120),
    places=st.integers(1, 4),
    depth=st.integers(0, 3),
    sinks=st.integers(1, 3),
)
def test_never_deadlocks_nor_exceeds(sizes: list[int], total: int, places: int, depth: int, sinks: int) -> None:
    stages = [Stage(str(i), passing) for i in range(depth)]
    items = itertools.starmap(Item, enumerate(sizes))
    pipeline = Pipeline("source", items, stages, QueueConfig(items=places, total_bytes=total))
    got: list[list[Item]] = [[] for _ in range(sinks)]
    pipeline.run({f"sink {i}": got[i].extend for i in range(sinks)})
    assert all([item.last_frame for item in items] == list(range(len(sizes))) for items in got)
    assert pipeline.peak_bytes <= total + (depth + sinks) * 50
    assert all(stage.peak_queue <= places and stage.queue == 0 for stage in pipeline.statistics())


def test_the_threads_keep_no_item_alive() -> None:
    end = threading.Event()

    def source() -> Iterator[Item]:
        yield Item(0)
        assert end.wait(20)

    both = joined(Stage("a", lambda items: map(passed, items)), Stage("b", lambda items: map(passed, items)))
    stream = Pipeline("source", source(), [Stage("both", both)]).stream()
    item = next(stream)
    alive = weakref.ref(item)
    del item
    eventually(lambda: alive() is None)
    end.set()
    assert list(stream) == []


def passed(item: Item) -> Item:
    return item


class Model:
    def stage(self, items: Iterator[int]) -> Iterator[int]:
        yield from items

    def failing(self, items: Iterator[int]) -> None:
        raise Boom


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("how", ["run", "stream", "left", "failed"])
def test_after_its_end_no_model_is_kept_until_a_garbage_collection(how: str) -> None:
    model = Model()
    alive = weakref.ref(model)
    pipeline = Pipeline("source", iter(range(99)), [Stage("model", model.stage)])
    whole = weakref.ref(pipeline)
    if how == "run":
        pipeline.run({"sink": model.stage})
    elif how == "stream":
        drain(pipeline.stream())
    elif how == "left":
        next(pipeline.stream())
    else:
        with pytest.raises(StageError):
            pipeline.run({"sink": model.failing})
    del pipeline, model
    assert alive() is None
    gc.collect()
    assert whole() is None


# -- stages that end early ---------------------------------------------------------------------------------------


def test_a_stage_that_ends_early_cancels_what_comes_before_it() -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.set()

    stream = Pipeline("source", source(), [Stage("a", passing), Stage("head", head(3))]).stream()
    assert next(stream) == 0
    eventually(closed.is_set)  # long before the run is over
    assert list(stream) == [1, 2]


def test_a_sink_that_ends_early_leaves_the_others_going() -> None:
    made: list[Item] = []
    got: list[Item] = []

    def ending(items: Iterator[Item]) -> None:
        next(items)
        eventually(lambda: len(made) == 3)  # the tee waits for this sink, and the other one for the tee

    pipeline = Pipeline("source", noting(map(Item, range(100)), made), queues=QueueConfig(items=1))
    pipeline.run({"one": ending, "two": got.extend})
    assert [item.last_frame for item in got] == list(range(100))
    assert pipeline._board.budget.used == 0  # what that sink has not taken counts no more


def test_the_run_ends_with_its_last_sink() -> None:
    Pipeline("source", itertools.count()).run({"one": lambda items: next(items), "two": head(7)})


def test_a_last_stage_may_consume() -> None:
    got: list[int] = []
    pipeline = Pipeline("source", range(9), [Stage("a", passing), Stage("sink", lambda items: got.extend(items))])  # type: ignore[arg-type, return-value]
    pipeline.run()
    assert got == list(range(9))
    assert [stage.items for stage in pipeline.statistics()] == [9, 9, 9]


# -- errors ------------------------------------------------------------------------------------------------------

MOMENTS = ("called", "first", "middle", "end", "cleanup")


def failing(moment: str) -> Function:
    """Passes items on and raises Boom at the given moment, as a source, a stage or a sink."""

    def run(items: Iterator[Item]) -> Iterator[Item]:
        try:
            if moment == "first":
                raise Boom(moment)
            for item in items:
                if moment == "middle" and item.last_frame == 5:
                    raise Boom(moment)
                yield item
            if moment == "end":
                raise Boom(moment)
        finally:
            if moment == "cleanup":
                raise Boom(moment)

    def called(items: Iterator[Item]) -> Iterator[Item]:
        if moment == "called":
            raise Boom(moment)
        return run(items)

    return called


class FailingSource:
    def __init__(self, moment: str) -> None:
        self.moment = moment

    def __iter__(self) -> Iterator[Item]:
        return failing(self.moment)(map(Item, range(12)))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("way", "place"),
    [("run", place) for place in ("source", "a", "b", "one", "two")]
    + [("stream", place) for place in ("source", "a", "b")],  # a stream has no sinks
)
def test_a_failure_at_any_moment_in_any_place(moment: str, place: str, way: str) -> None:
    def at(name: str) -> Function:
        return failing(moment if name == place else "never")

    source = FailingSource(moment if place == "source" else "never")
    stages = [Stage(name, at(name)) for name in ("a", "b")]
    pipeline = Pipeline("source", source, stages, QueueConfig(items=1))
    if way == "run":
        with pytest.raises(StageError, match=moment) as caught:
            pipeline.run({name: at(name) for name in ("one", "two")})
    else:
        with pytest.raises(StageError, match=moment) as caught:
            drain(pipeline.stream())
    assert caught.value.stage == place
    assert isinstance(caught.value.__cause__, Boom)
    at_source = {"called": None, "first": None, "middle": 4, "end": 11, "cleanup": 11}
    elsewhere = {**at_source, "middle": 5}
    assert caught.value.frame == (at_source if place == "source" else elsewhere)[moment]


@pytest.mark.parametrize("leave", ["head", "close"])
def test_a_failure_while_a_generator_is_closed_surfaces(leave: str) -> None:
    def stage(items: Iterator[int]) -> Iterator[int]:
        try:
            yield from map(abs, items)
        except (GeneratorExit, Cancelled):
            raise Boom("cannot let go") from None

    made: list[int] = []
    stages = [Stage("a", stage)] if leave == "close" else [Stage("a", stage), Stage("head", head(2))]
    stream: Any = Pipeline("source", noting(itertools.count(), made), stages, QueueConfig(items=1)).stream()
    next(stream)
    if leave == "close":
        eventually(lambda: len(made) == 5)  # so the stage holds an item and waits for room
    with pytest.raises(StageError, match="cannot let go") as caught:
        stream.close() if leave == "close" else drain(stream)
    assert caught.value.stage == "a"


def test_a_generator_that_refuses_to_close_is_an_error() -> None:
    def stubborn(items: Iterator[int]) -> Iterator[int]:
        with contextlib.suppress(GeneratorExit):
            yield from itertools.count()
        yield 1

    with pytest.raises(StageError, match="ignored GeneratorExit"):
        list(Pipeline("source", itertools.count(), [Stage("a", stubborn), Stage("head", head(2))]))


@pytest.mark.parametrize("result", [None, [1, 2]])
def test_a_stage_must_return_an_iterator(result: Any) -> None:
    with pytest.raises(StageError, match="must return an iterator"):
        list(Pipeline("source", range(3), [Stage("a", lambda items: result)]))


def test_later_failures_are_notes_of_the_first() -> None:
    barrier = threading.Barrier(3)

    def sink(items: Iterator[int]) -> None:
        next(items)
        barrier.wait(20)
        raise Boom(threading.current_thread().name)

    with pytest.raises(StageError) as caught:
        Pipeline("source", range(3)).run({"one": sink, "two": sink, "three": sink})
    told = [str(caught.value), *caught.value.__notes__]
    assert len(told) == 3
    assert all(any(name in line for line in told) for name in ("one", "two", "three"))
    assert all("also failed" in line for line in told[1:])


def test_items_that_tell_no_frame_leave_the_last_one_known() -> None:
    def counting(items: Iterator[Item]) -> Iterator[int]:
        for item in items:
            yield item.last_frame
        raise Boom

    with pytest.raises(StageError) as caught:
        list(Pipeline("source", map(Item, range(9)), [Stage("a", counting)]))
    assert caught.value.frame == 8


def test_a_failure_in_an_inner_pipeline_keeps_its_place() -> None:
    def outer(items: Iterator[Item]) -> Iterator[Item]:
        return Pipeline("inner source", items, [Stage("inner", failing("middle"))]).stream()

    with pytest.raises(StageError) as caught:
        list(Pipeline("source", map(Item, range(9)), [Stage("outer", outer)]))
    assert (caught.value.stage, caught.value.frame) == ("inner", 5)


def test_cancelled_out_of_nowhere_does_not_pass_for_an_end() -> None:
    def stage(items: Iterator[int]) -> Iterator[int]:
        yield next(items)
        raise Cancelled

    with pytest.raises(StageError) as caught:
        list(Pipeline("source", range(9), [Stage("a", stage)]))
    assert isinstance(caught.value.__cause__, Cancelled)


def test_a_stage_that_swallows_cancelled_does_not_make_a_cut_stream_look_whole() -> None:
    whole: list[bool] = []

    def swallowing(items: Iterator[int]) -> Iterator[int]:
        with contextlib.suppress(Cancelled):
            yield from map(abs, items)

    def sink(items: Iterator[int]) -> None:
        drain(items)
        whole.append(True)

    def source() -> Iterator[int]:
        yield from range(5)
        eventually(lambda: stats(pipeline)["sink"].items == 5)
        raise Boom("cut")

    pipeline = Pipeline("source", source(), [Stage("a", swallowing)])
    with pytest.raises(StageError, match="cut"):
        pipeline.run({"sink": sink})
    assert not whole


@pytest.mark.parametrize("blocked", ["take", "put"])
def test_a_failure_elsewhere_ends_a_blocked_take_and_put(blocked: str) -> None:
    seen: list[type[BaseException]] = []
    made: list[int] = []
    left = threading.Event()

    def source() -> Iterator[int]:
        yield from noting(range(1 if blocked == "take" else 99), made)
        assert left.wait(20)  # set when the stage has ended

    def stage(items: Iterator[int]) -> Iterator[int]:
        try:
            yield from map(abs, items)
        except BaseException as error:
            seen.append(type(error))
            raise
        finally:
            left.set()

    def sink(items: Iterator[int]) -> None:
        next(items)
        eventually(lambda: stats(pipeline)["a"].items == 1 if blocked == "take" else len(made) == 5)
        raise Boom

    pipeline = Pipeline("source", source(), [Stage("a", stage)], QueueConfig(items=1))
    with pytest.raises(StageError) as caught:
        pipeline.run({"sink": sink})
    assert caught.value.stage == "sink"
    assert not hasattr(caught.value, "__notes__")  # the source's wait did not time out
    assert seen == [Cancelled if blocked == "take" else GeneratorExit]


# -- leaving early, stop, Ctrl-C ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "count"),
    [*itertools.product(("close", "break", "raise", "drop", "throw"), (0, 1, 2, 5, 20)), ("cycle", 0), ("cycle", 5)],
)
def test_leaving_a_stream_early_stops_everything(how: str, count: int) -> None:
    closed: list[tuple[str, str]] = []

    def stage(name: str) -> Function:
        def run(items: Iterator[int]) -> Iterator[int]:
            try:
                yield from map(abs, items)
            finally:
                closed.append((name, threading.current_thread().name))

        return run

    stages = [Stage(name, stage(name)) for name in ("a", "b")]
    before = set(threading.enumerate())
    stream: Any = Pipeline("source", stage("source")(itertools.count()), stages).stream()
    got = list(itertools.islice(stream, count))
    assert got == list(range(count))
    if how == "close":
        stream.close()
        stream.close()
    elif how == "break":
        for _ in stream:
            break
    elif how == "raise":
        with contextlib.suppress(Boom):
            for _ in stream:
                raise Boom
    elif how == "throw":
        with pytest.raises(Boom):
            stream.throw(Boom)
    elif how == "cycle":
        cycle = [stream]
        cycle.append(cycle)
        del cycle, stream
        gc.collect()
        stream = None
    del stream
    assert set(threading.enumerate()) <= before
    if count:  # for 0 the threads may have stopped before any generator began
        assert {name for name, _ in closed} <= {"source", "a", "b"}
        assert ("b", "b") in closed
    assert all(name == thread for name, thread in closed)


@pytest.mark.usefixtures("no_collection")
def test_a_stream_that_is_collected_in_a_stage_s_thread_stops_everything() -> None:
    """Even while that thread is putting an item into its channel."""
    before, dropped = set(threading.enumerate()), threading.Event()

    def source() -> Iterator[int]:
        yield 0
        assert dropped.wait(20)
        yield from itertools.count(1)

    pipeline = Pipeline("source", source(), [Stage("a", lambda items: map(abs, items))])
    pipeline._board.budget.hold = lambda storages: dropped.is_set() and gc.collect()  # type: ignore[assignment, method-assign]
    stream = pipeline.stream()
    assert next(stream) == 0
    cycle: list[Any] = [stream]
    cycle.append(cycle)
    del pipeline, stream, cycle
    dropped.set()
    eventually(lambda: set(threading.enumerate()) <= before)


def test_what_failed_ahead_of_a_caller_who_leaves_is_forgotten() -> None:
    go = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        assert go.wait(20)
        raise Boom

    stream: Any = Pipeline("source", source()).stream()
    assert next(stream) == 0
    go.set()
    eventually(lambda: all(thread.name != "source" for thread in threading.enumerate()))
    stream.close()


def test_generators_are_closed_in_their_own_thread_at_a_normal_end() -> None:
    closed: list[str] = []

    def stage(items: Iterator[int]) -> Iterator[int]:
        try:
            yield from map(abs, items)
        finally:
            closed.append(threading.current_thread().name)

    Pipeline("source", stage(iter(range(9))), [Stage("a", stage)]).run({"sink": stage})
    assert sorted(closed) == ["a", "sink", "source"]


def test_a_source_with_a_close_of_its_own_is_left_to_its_owner() -> None:
    class Source:
        closed = False

        def __iter__(self) -> Source:
            return self

        def __next__(self) -> int:
            return 1

        def close(self) -> None:
            self.closed = True

    source = Source()
    assert list(Pipeline("source", source, [Stage("head", head(3))])) == [1, 1, 1]
    assert list(compose(source, [Stage("head", head(3))])) == [1, 1, 1]
    assert not source.closed


def test_stop_from_a_stage() -> None:
    def sink(items: Iterator[int]) -> None:
        next(items)
        pipeline.stop()
        pipeline.stop()
        drain(items)

    pipeline = Pipeline("source", itertools.count(), [Stage("a", passing)])
    with pytest.raises(Cancelled):
        pipeline.run({"sink": sink})
    pipeline.stop()


def test_stop_where_nobody_takes() -> None:
    """Without a sink items are dropped and pass no channel, so the source's own thread has to notice the stop."""

    def source() -> Iterator[int]:
        yield 0
        pipeline.stop()
        yield 1
        raise Boom("went on")

    pipeline = Pipeline("source", source())
    with pytest.raises(Cancelled):
        pipeline.run()


@pytest.mark.parametrize("by_run", [True, False], ids=["run", "stream"])
def test_nothing_is_called_after_a_stop_before_the_start(by_run: bool) -> None:
    called: list[Any] = []
    pipeline = Pipeline("source", [1], [Stage("a", lambda items: map(called.append, items))])
    pipeline.stop()
    with pytest.raises(Cancelled):
        pipeline.run({"sink": called.append}) if by_run else drain(pipeline.stream())
    assert not called


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Hypothesis adds a callback to the garbage collector, and a KeyboardInterrupt raised in it would be lost."""
    gc.disable()
    yield
    gc.enable()


def drain_and_close(stream: Generator[Any, None, None]) -> None:
    with contextlib.closing(stream):  # Ctrl-C may strike between two items
        drain(stream)


def interrupting(items: Iterator[int]) -> Iterator[int]:
    for item in items:
        if item == 3:
            _thread.interrupt_main()
        yield item


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("place", ["source", "a", "sink"])
@pytest.mark.parametrize("by_run", [True, False], ids=["run", "stream"])
def test_ctrl_c_stops_everything(place: str, by_run: bool) -> None:
    functions = {name: interrupting if name == place else passing for name in ("source", "a", "sink")}
    last = [] if by_run else [Stage("sink", functions["sink"])]
    pipeline = Pipeline("source", functions["source"](itertools.count()), [Stage("a", functions["a"]), *last])
    with pytest.raises(KeyboardInterrupt):
        pipeline.run({"sink": functions["sink"]}) if by_run else drain_and_close(pipeline.stream())


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("by_run", [True, False], ids=["run", "stream"])
def test_ctrl_c_while_everything_waits(by_run: bool) -> None:
    left = threading.Event()

    def source() -> Iterator[int]:
        eventually(lambda: stats(pipeline)["a"].wait_in_s > 0)
        _thread.interrupt_main()
        assert left.wait(20)  # yields nothing: only the interruption can wake the others
        yield 1

    def stage(items: Iterator[int]) -> Iterator[int]:
        try:
            yield from map(abs, items)
        finally:
            left.set()

    pipeline = Pipeline("source", source(), [Stage("a", stage)])
    with pytest.raises(KeyboardInterrupt) as caught:
        pipeline.run({"sink": drain}) if by_run else drain_and_close(pipeline.stream())
    assert not hasattr(caught.value, "__notes__")  # the source's wait did not time out


@pytest.mark.usefixtures("no_collection")
def test_what_fails_while_ctrl_c_stops_the_run_is_a_note() -> None:
    def sink(items: Iterator[int]) -> None:
        try:
            drain(map(abs, interrupting(items)))
        finally:
            raise Boom("cannot let go")

    with pytest.raises(KeyboardInterrupt) as caught:
        Pipeline("source", itertools.count()).run({"sink": sink})
    assert "also failed: sink: cannot let go" in caught.value.__notes__


@pytest.mark.parametrize("with_error", [True, False])
def test_a_thread_that_will_not_end_is_named(with_error: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOIN_S", 0.02)
    free = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        free.wait(20)

    def stage(items: Iterator[int]) -> Iterator[int]:
        yield next(items)
        if with_error:
            raise Boom
        yield from map(abs, items)

    stream: Any = Pipeline("stuck one", source(), [Stage("a", stage)]).stream()
    if with_error:
        with pytest.raises(StageError) as caught:
            list(stream)
        assert "left behind: stuck one" in caught.value.__notes__[0]
    else:
        next(stream)
        with pytest.warns(RuntimeWarning, match="left behind: stuck one"):
            stream.close()
    left = [thread for thread in threading.enumerate() if thread.name == "stuck one"]
    assert [thread.daemon for thread in left] == [True]
    free.set()
    left[0].join(20)


def test_a_stream_still_open_when_the_interpreter_ends_is_closed_in_order() -> None:
    script = """if True:
        import itertools
        from flowreel.engine.pipeline import Pipeline
        from flowreel.engine.stages import Stage
        def stage(items):
            try:
                yield from map(abs, items)
            finally:
                print("closed")
        stream = Pipeline("source", itertools.count(), [Stage("a", stage)]).stream()
        next(stream)
        print("leaving")
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["leaving", "closed"]
    assert done.stderr == ""


# -- statistics, progress, wrap ----------------------------------------------------------------------------------


def test_statistics_add_up() -> None:
    sink = Held()
    stages = [Stage("odd", lambda items: (item for item in items if item % 2)), Stage("twice", repeating(2))]
    pipeline = Pipeline("source", range(40), stages, QueueConfig(items=2))
    assert [stage.items for stage in pipeline.statistics()] == [0, 0, 0]
    thread = in_background(pipeline, {"sink": sink, "fast": drain})
    eventually(lambda: all(stats(pipeline)[name].wait_out_s > 0 for name in ("source", "odd", "twice")))
    before = stats(pipeline)["source"].wait_out_s
    eventually(lambda: stats(pipeline)["source"].wait_out_s > before)  # a wait counts while it lasts
    eventually(lambda: stats(pipeline)["fast"].wait_in_s > 0)  # it waits for the slow sink beside it
    eventually(lambda: stats(pipeline)["sink"].queue == 2)
    sink.go.set()
    thread.join()
    after = stats(pipeline)
    assert {name: stage.items for name, stage in after.items()} == {
        "source": 40,
        "odd": 20,
        "twice": 40,
        "sink": 40,
        "fast": 40,
    }
    assert after["source"].wait_in_s == 0
    assert after["sink"].wait_out_s == 0
    assert all(stage.queue == 0 and stage.busy_s > 0 for stage in after.values())
    assert stats(pipeline) == after  # the clocks have stopped


def test_progress_is_called_while_waiting_and_at_the_end() -> None:
    seen: list[tuple[str, int]] = []
    twice = threading.Event()

    def progress(stages: tuple[StageStatistics, ...]) -> None:
        seen.append((threading.current_thread().name, stages[-1].items))
        if len(seen) == 2:
            twice.set()

    def sink(items: Iterator[int]) -> None:
        assert twice.wait(20)
        drain(items)

    Pipeline("source", range(9)).run({"sink": sink}, progress)
    assert {name for name, _ in seen} == {threading.current_thread().name}
    assert seen[-1][1] == 9


def test_a_failure_of_progress_stops_the_run() -> None:
    def progress(stages: tuple[StageStatistics, ...]) -> None:
        raise Boom

    with pytest.raises(Boom):
        Pipeline("source", itertools.count()).run({"sink": drain}, progress)


def test_wrap_sees_every_function_and_hides_none_from_closing() -> None:
    names: list[str] = []
    closed: list[str] = []

    def stage(items: Iterator[int]) -> Iterator[int]:
        try:
            yield from map(abs, items)
        finally:
            closed.append(threading.current_thread().name)

    def wrap(function: Callable[[Iterator[Any]], object], name: str) -> Callable[[Iterator[Any]], object]:
        names.append(name)
        kept: list[Any] = []

        def wrapped(items: Iterator[Any]) -> object:
            result = function(x + 1 for x in items)
            if not isinstance(result, Iterator):
                return None
            kept.append(result)  # kept alive: it ends only if it is closed
            return (x * 10 for x in result)

        return wrapped

    got: list[int] = []
    pipeline = Pipeline("source", stage(itertools.count()), [Stage("a", stage), Stage("head", head(2))], wrap=wrap)
    pipeline.run({"sink": got.extend})
    assert names == ["source", "a", "head", "sink"]
    assert got == [111, 1111]  # wrap adds 1 before each and multiplies by 10 after it
    assert sorted(closed) == ["a", "source"]


def test_threads_bear_the_names_of_their_stages() -> None:
    seen: list[str] = []

    def stage(items: Iterator[int]) -> Iterator[int]:
        seen.append(threading.current_thread().name)
        yield from map(abs, items)

    Pipeline("source", stage(iter([1])), [Stage("a", stage)]).run({"sink": stage})
    assert sorted(seen) == ["a", "sink", "source"]


def test_work_before_a_run_is_done_in_a_thread_that_ends() -> None:
    threads: list[threading.Thread] = []

    def work() -> int:
        threads.append(threading.current_thread())
        return 3

    assert in_own_thread(work) == 3
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()


THREADS = """
import os, sys, threading, torch
from flowreel.engine.pipeline import Pipeline, in_own_thread
from flowreel.engine.stages import Stage

def threads():
    return set(os.listdir("/proc/self/task"))

class AtTheEnd:
    def __init__(self):
        self.before = threads()

    def __del__(self):
        left.append(threads() - self.before)

torch.set_num_threads(4)
numbers = torch.rand(500_000)
of_thread = threading.local()

def compute():
    of_thread.witness = AtTheEnd()
    numbers.sin().sum()
    assert threads() - of_thread.witness.before  # the workers

def stage(items):
    for _ in items:
        yield compute()

def own_thread():
    in_own_thread(compute)

def pipeline():
    list(Pipeline("source", [1], [Stage("a", stage)]))

before = threads()
for _ in range(100):
    left = []
    locals()[sys.argv[1]]()
    assert left == [set()], "workers live on as their thread ends"
    assert threads() == before, "a thread is still ending"
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists no threads")
@pytest.mark.parametrize("work", ["own_thread", "pipeline"])
def test_no_thread_is_still_ending_afterwards(work: str, fresh: Fresh) -> None:
    # A process forked meanwhile may inherit what an ending thread has locked.
    code, said = fresh.code(THREADS, work)
    assert code == 0, said


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Raises KeyboardInterrupt in the main thread, and returns once it has been raised."""
    raised = threading.Semaphore(0)

    def handle(*_: object) -> None:
        raised.release()
        raise KeyboardInterrupt

    def send() -> None:
        time.sleep(0.05)  # by now the main thread waits, unless it wrongly goes on
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it, unlike interrupt_main
        raised.acquire()

    before = signal.signal(signal.SIGINT, handle)
    yield send
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_comes_out_when_such_work_has_ended(interrupt: Callable[[], None]) -> None:
    ended: list[str] = []

    def work() -> None:
        interrupt()
        time.sleep(0.05)
        ended.append("work")

    with pytest.raises(KeyboardInterrupt):
        in_own_thread(work)
    assert ended == ["work"]


def test_ctrl_c_as_such_work_starts_comes_out_when_it_has_ended() -> None:
    ended: list[str] = []

    def work() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # which waits for this to have started
        time.sleep(0.05)
        ended.append("work")

    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            in_own_thread(work)
    assert len(ended) == 5


def test_threads_that_a_second_ctrl_c_leaves_behind_are_waited_for_at_exit(
    interrupt: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(module.os.path, "exists", lambda _: False)  # not by /proc, which not every system has

    def source() -> Iterator[int]:
        yield 0
        interrupt()
        interrupt()
        time.sleep(0.05)
        ended.append("source")

    pipeline = Pipeline("source", source())
    with pytest.raises(KeyboardInterrupt):
        pipeline.run()
    pipeline._stop_and_join()  # as at exit
    assert ended == ["source"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_what_such_work_raises_comes_out(kind: type[BaseException]) -> None:
    def work() -> None:
        raise kind("here")

    with pytest.raises(kind, match="here") as caught:
        in_own_thread(work)
    assert "work" in [entry.name for entry in caught.traceback]
