"""Flow by number, in any order: read from the cache, or else computed by the stages of a run.

    numbers -> those not in the cache -> planned batches -> their frames -> pairs -> batches -> model -> restore
                                         pairing            frame_reader    the stages of a run

A single batch is computed in the caller's thread; several go through a pipeline, so that frames are decoded while the
model works.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, replace
from itertools import chain, groupby, islice

import torch
from torch import Tensor

from flowreel.engine.api import Chain, stages
from flowreel.engine.config import RunConfig
from flowreel.engine.data import FlowBatch, FlowInfo, Frame
from flowreel.engine.device import to_device
from flowreel.engine.errors import DeviceError, StageError
from flowreel.engine.forked import limit_threads_of_fork
from flowreel.engine.frame_reader import FrameReader
from flowreel.engine.inference import Inference
from flowreel.engine.pairing import batches_of, planned
from flowreel.engine.pipeline import OneAtATime
from flowreel.engine.protocols import RandomAccess
from flowreel.engine.stages import Stage, StageFunction, compose
from flowreel.sinks import FlowCache

# What is planned at a time when all flow is read in order:
_STRETCH_BATCHES = 32  # batches, with a cache, where they are looked up
_STRETCH_FLOWS = 1 << 14  # flows, without one: the pipeline starts anew for each stretch, and a plan takes memory


@dataclass(frozen=True)
class LazyStatistics:
    """What reading has cost so far, in this process."""

    decoded: int = 0  # frames, including those from a key frame up to the requested one
    seeks: int = 0  # times decoding started over, or first started past the first frame; images: 0
    computed: int = 0  # flows computed by the model
    from_cache: int = 0  # flows read from the cache instead


class ComputedFlow:
    """The flows of one source by number, (2, H, W) float32 each. Threads may share one object; they take turns.

    Args:
        path: the source's name in messages.
        source: stays open; each process forked from this one reads it with its own decoder.
        info: header of the flow, at its full resolution.
        most_bytes: limit of the decoded frames that are kept, in bytes.
    """

    def __init__(
        self,
        path: str,
        source: RandomAccess,
        info: FlowInfo,
        inference: Inference,
        config: RunConfig,
        cache: FlowCache | None,
        most_bytes: int,
    ) -> None:
        self._path = path
        self._source = source
        self._inference = inference
        self._device = inference.device
        self._config = config
        self._cache = cache
        self._most_bytes = most_bytes
        self._shape = (2, info.height, info.width)
        self._count = len(source.wanted) - 1
        self._shard = info.shard_length(config.sink.shard_bytes)
        self._closed = False
        self._start_here()

    def _start_here(self) -> None:
        """Creates this process's own state: after a fork, the parent's decoder and locks cannot be used."""
        self._process = os.getpid()
        self._reader = FrameReader(self._source, self._most_bytes)
        self._turn = OneAtATime()  # guards the reader
        self._counting = OneAtATime()  # guards the statistics
        self._statistics = LazyStatistics()

    @property
    def statistics(self) -> LazyStatistics:
        with self._counting:
            return self._statistics

    # -- Reading -------------------------------------------------------------------------------------------------

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yields (number, flow) for these ascending numbers. The caller must copy each flow and read on at once: the
        next one may reuse its memory, and other threads wait."""
        missing: list[int] = []
        yield from self._found(numbers, missing)
        if missing:
            with self._turn:
                self._require_open()  # another thread may have closed it while this one waited
                still_missing: list[int] = []  # other threads may have computed some while this one waited
                yield from self._found(missing, still_missing)
                yield from self._computed(still_missing, self._reader)

    def in_order(self) -> Generator[Tensor, None, None]:
        """Each flow in order, in memory of its own. Uses a separate decoder, so other reads may go on meanwhile."""
        self.require_usable()
        most = _STRETCH_FLOWS if self._cache is None else _STRETCH_BATCHES * self._inference.batch
        stretch = max(most // self._shard, 1) * self._shard  # whole shards, so that no batch of a run is divided
        info = self._source.info
        with closing(FrameReader(self._source, 3 * info.height * info.width)) as reader:  # keeps the shared frame
            for first in range(0, self._count, stretch):
                yield from self._stretch(range(first, min(first + stretch, self._count)), reader)

    def _stretch(self, numbers: range, reader: FrameReader) -> Iterator[Tensor]:
        missing = [number for number in numbers if self._cache is None or not self._cache.has(number)]
        to_compute = set(missing)
        with closing(self._computed(missing, reader)) as computed:
            for number in numbers:
                if number in to_compute:
                    yield next(computed)[1].clone()  # not a view of its batch's memory
                else:
                    self.require_usable()
                    # All of it before any is given: a damaged entry is computed again, in this thread's turn, and
                    # whoever takes the flow may want to read in between.
                    yield from [flow for _, flow in self.read([number])]

    def frame(self, number: int) -> Frame:
        """A frame of the source, by its number there."""
        with self._turn, self._counted(self._reader), _plain_errors():
            self._require_open()
            return self._reader.frame(number)

    # -- Computing -----------------------------------------------------------------------------------------------

    def _found(self, numbers: Sequence[int], missing: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Yields the flows that the cache holds and adds the other numbers to ``missing``. Each flow reuses the memory
        of the one before."""
        if self._cache is None:
            missing += numbers
            return
        flow = torch.empty(self._shape, dtype=torch.float32, device="cpu")
        for number in numbers:
            if self._cache.find(number, flow.numpy()):
                self._add(LazyStatistics(from_cache=1))
                yield number, to_device(flow, self._device)
            else:
                missing.append(number)

    def _computed(self, numbers: Sequence[int], reader: FrameReader) -> Generator[tuple[int, Tensor], None, None]:
        """Computes these flows, in order. Each is a view of its batch's memory."""
        if not numbers:
            return
        plan = planned(numbers, self._inference.batch, self._shard, self._count)
        order = iter(numbers)
        with self._counted(reader), closing(self._batches(plan, reader)) as batches, _plain_errors():
            for batch in batches:
                self._add(LazyStatistics(computed=len(batch)))
                flows = to_device(batch.flow, self._device)
                yield from zip(islice(order, len(batch)), flows, strict=True)

    def _batches(self, plan: Sequence[Sequence[int]], reader: FrameReader) -> Generator[FlowBatch, None, None]:
        """The planned batches of flow, computed by the stages of a run from just the frames they need."""
        frames = reader.stretches(self._frames(plan))
        keep = self._cache is not None
        steps = stages(self._inference, self._config.model.direction, batches_of(plan), to_host=keep)
        if self._cache is not None:
            steps.append(Stage("keep", _kept(self._cache, chain.from_iterable(plan))))
        if len(plan) == 1:
            yield from compose(frames, steps)
            return
        with closing(Chain(frames, steps, self._config.queues, self._device).flows()) as results:
            yield from results

    def _frames(self, plan: Sequence[Sequence[int]]) -> Iterator[range]:
        """Frame numbers of each run of consecutive flows: one more than it has flows."""
        wanted = self._source.wanted
        numbers = [number for batch in plan for number in batch]
        for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0]):
            stretch = [number for _, number in run]
            yield wanted[stretch[0] : stretch[-1] + 2]

    # -- Counting ------------------------------------------------------------------------------------------------

    @contextmanager
    def _counted(self, reader: FrameReader) -> Iterator[None]:
        decoded, seeks = reader.decoded, reader.seeks
        try:
            yield
        finally:
            self._add(LazyStatistics(reader.decoded - decoded, reader.seeks - seeks))

    def _add(self, more: LazyStatistics) -> None:
        with self._counting:
            sums = (mine + its for mine, its in zip(astuple(self._statistics), astuple(more), strict=True))
            self._statistics = LazyStatistics(*sums)

    # -- Sharing -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Releases the decoder and the kept frames. Nothing can be read afterwards."""
        if os.getpid() != self._process:  # a fork, where the lock may be held by a thread that only the parent has
            self._closed = True
        elif not self._closed:
            with self._turn:
                self._closed = True
                self._reader.close()

    def require_usable(self) -> None:
        """Call before any other use: in a forked process, replaces the parent's state by the process's own.

        Raises ValueError when this is closed, DeviceError in a forked process on a GPU.
        """
        self._require_open()
        if os.getpid() == self._process:
            return
        refuse_fork(self._path, self._device)
        limit_threads_of_fork()
        self._start_here()

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self._path} is closed: open it again")


def refuse_fork(path: str, device: torch.device) -> None:
    """Raises DeviceError for a GPU: a forked process cannot use a network that its parent loaded there."""
    if device.type == "cuda":
        raise DeviceError(
            f"{path} was opened on {device} before this process was forked, and CUDA does not survive a fork: start "
            "the workers by spawn, as in DataLoader(..., multiprocessing_context='spawn')"
        )


def _kept(cache: FlowCache, numbers: Iterator[int]) -> StageFunction:
    """A stage that writes each flow to the cache and passes on what the cache will return: all reads are then equal.

    numbers: of the incoming flows, in order; batches may be smaller than planned when a device is short of memory.
    """

    def stage(batches: Iterator[FlowBatch]) -> Iterator[FlowBatch]:
        for batch in batches:
            kept = cache.keep(list(islice(numbers, len(batch))), batch.flow.numpy())
            yield replace(batch, flow=torch.from_numpy(kept))

    return stage


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raises a StageError's cause in its place, as without a pipeline, with a note that says where it happened."""
    try:
        yield
    except StageError as error:
        cause = error.__cause__
        assert cause is not None
        cause.add_note(f"while computing flow: {error}")
        raise cause from cause.__cause__
