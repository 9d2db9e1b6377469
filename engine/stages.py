"""What a stage is, and the chain without threads: the reference that the pipeline must equal.

A stage is a plain generator function, an iterator in and an iterator out. It owns no thread, queue or stream, so a test
calls it on a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import GeneratorType
from typing import Any

from flowreel.engine.errors import StageError

StageFunction = Callable[[Iterator[Any]], Iterator[Any]]
Consumer = Callable[[Iterator[Any]], object]  # runs to its end; what it yields or returns is dropped
Wrap = Callable[[Consumer, str], Consumer]


@dataclass(frozen=True)
class Stage:
    """One step of the chain."""

    name: str  # unique in its pipeline; names the thread, the statistics and the errors
    function: StageFunction


@dataclass(frozen=True)
class StageStatistics:
    """What one stage has done so far. Its thread's time is busy + waiting in + waiting out."""

    name: str
    items: int  # given on; of a sink: taken
    busy_s: float
    wait_in_s: float  # seconds without anything to take
    wait_out_s: float  # seconds held back by the next stage or by the byte budget
    peak_queue: int  # most items that ever waited in front of it
    queue: int  # items that wait in front of it now


def compose(source: Iterable[Any], stages: Sequence[Stage]) -> Iterator[Any]:
    """Gives what ``Pipeline(...).stream()`` gives, one item at a time and without threads. Errors pass as they are."""
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
    """Several stages as one, with one thread: for steps so short that handing each item on would cost more than they.

    On a GPU a hand-off is an event, a wait and a note for the allocator of each tensor, beside the channel's own. What
    fails is a StageError of the very stage, as if each had its own thread.
    """
    steps = [replace(stage, function=partial(_blamed, stage)) for stage in stages]
    return lambda items: compose(items, steps)


def _blamed(stage: Stage, items: Iterator[Any]) -> Iterator[Any]:
    """What the stage gives; its errors name it, and the frame of what it took or gave last."""
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
                raise StageError(stage.name, last_frame, error) from error
            yield seen(item)
            del item  # not kept alive while the next one is made
    finally:
        if is_ours_to_close(results, items):
            results.close()  # type: ignore[attr-defined]


def is_ours_to_close(iterator: object, source: object) -> bool:
    """Whether who runs the iterator closes it too; a source that iterates itself belongs to whoever opened it."""
    return hasattr(iterator, "close") and (iterator is not source or isinstance(iterator, GeneratorType))
