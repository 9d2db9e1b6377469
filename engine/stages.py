"""What a stage is, and the chain without threads: the reference whose results the pipeline must equal.

A stage is a plain generator function, an iterator in and an iterator out. It owns no thread, queue or stream, so a test
calls it on a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import GeneratorType
from typing import Any

from flowreel.engine.errors import StageError, frame_of

StageFunction = Callable[[Iterator[Any]], Iterator[Any]]
Consumer = Callable[[Iterator[Any]], object]  # consumes the whole iterator; what it yields or returns is dropped
Wrap = Callable[[Consumer, str], Consumer]  # wraps stages as well, whose result is used: see ``Pipeline``


@dataclass(frozen=True)
class Stage:
    """One step of the chain."""

    name: str  # unique in its pipeline; used for the thread, the statistics and errors
    function: StageFunction


@dataclass(frozen=True)
class StageStatistics:
    """What one stage has done so far. Its thread's time is busy_s + wait_in_s + wait_out_s."""

    name: str
    items: int  # passed on; of a sink: taken
    busy_s: float
    wait_in_s: float  # seconds waiting for an item
    wait_out_s: float  # seconds held back by the next stage or by the byte budget
    peak_queue: int  # most items ever waiting in its input channel
    queue: int  # items waiting there now


def compose(source: Iterable[Any], stages: Sequence[Stage]) -> Iterator[Any]:
    """Yields what ``Pipeline(...).stream()`` yields, item by item and without threads. Errors pass unchanged."""
    opened: list[Any] = [iter(source)]
    try:
        for stage in stages:
            opened.append(stage.function(opened[-1]))
        yield from opened[-1]
    finally:
        for iterator in reversed(opened):
            if is_ours_to_close(iterator, source):
                iterator.close()


def joined(*stages: Stage) -> StageFunction:
    """Several stages as one, in one thread: for steps so short that handing items on would cost more than their work.

    On a GPU a hand-off costs an event, a wait and a ``record_stream`` for each tensor, besides the channel itself. A
    failure is a StageError that names the individual stage, as if each had its own thread.
    """
    steps = [replace(stage, function=partial(_blamed, stage)) for stage in stages]
    return lambda items: compose(items, steps)


def _blamed(stage: Stage, items: Iterator[Any]) -> Iterator[Any]:
    """The stage's items; its errors become StageErrors that name it and the frame it last took or gave."""
    last_frame: int | None = None

    def seen(item: Any) -> Any:
        nonlocal last_frame
        last_frame = getattr(item, "last_frame", last_frame)
        return item

    results = stage.function(map(seen, items))
    try:
        while True:
            try:
                item = next(results)
            except StopIteration:
                return
            except StageError:
                raise
            except Exception as error:
                raise StageError(stage.name, frame_of(error, last_frame), error) from error
            yield seen(item)
            del item  # not kept alive while the next one is made
    finally:
        if is_ours_to_close(results, items):
            results.close()  # type: ignore[attr-defined]


def is_ours_to_close(iterator: object, source: object) -> bool:
    """Whether the code that runs the iterator also closes it.

    A source that is its own iterator is left to its owner, unless it is a generator.
    """
    return hasattr(iterator, "close") and (iterator is not source or isinstance(iterator, GeneratorType))
