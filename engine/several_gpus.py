"""One run over several GPUs: batches go to the GPUs in turn, and flow leaves in order.

    batch 0, 2, 4, ... -> cuda:0 ─┐
    batch 1, 3, 5, ... -> cuda:1 ─┴─> flow of batch 0, 1, 2, ... on the first device

One thread serves all GPUs: it queues work and waits for none of them. With N GPUs, the flow of a batch is handed on
once the next N-1 batches have been queued; so with a source that delivers slowly, such as a camera, flow comes N-1
batches late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle

from flowreel.engine.data import FlowBatch, PairBatch
from flowreel.engine.device import Lane

Computing = Callable[[PairBatch], list[FlowBatch]]


def in_turn(batches: Iterator[PairBatch], lanes: Sequence[tuple[Lane, Computing]]) -> Iterator[FlowBatch]:
    """The flow of each batch, computed on the next lane's device."""
    under_way: deque[Callable[[], list[FlowBatch]]] = deque()
    turns = cycle(lanes)
    for batch in batches:
        lane, computed = next(turns)
        under_way.append(lane.begun(batch, partial(computed, batch)))
        del batch
        # Not before every lane has work: our stream waits for the flow handed on, and later batches for our stream.
        if len(under_way) == len(lanes):
            yield from under_way.popleft()()
    while under_way:
        yield from under_way.popleft()()
