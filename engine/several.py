"""One run over several GPUs: batches take turns at them, and flow leaves in order.

    batch 0, 2, 4, ... -> cuda:0 ─┐
    batch 1, 3, 5, ... -> cuda:1 ─┴─> flow of batch 0, 1, 2, ... on the first device

One thread serves all: it gives a GPU its work and waits for none of them. Of N GPUs each has a batch when the flow
of the first of them is handed on: a source that keeps the run waiting, a camera, gets its flow N-1 batches later.
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
        # Not before each lane has work: our stream waits for what is handed on, and the batches after that for it.
        if len(under_way) == len(lanes):
            yield from under_way.popleft()()
    while under_way:
        yield from under_way.popleft()()
