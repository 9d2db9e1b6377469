"""Flow by number, in any order: out of the cache, or else out of a run's own stages.

    numbers -> those that are missing -> in which batches -> their frames -> pairs -> batches -> model -> restore
                 the cache has others     pairing            frame_reader    the stages of a run

One batch is composed in the caller's thread; what takes several goes through the pipeline's, so that frames are decoded
while the model works.
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
from flowreel.engine.frame_reader import FrameReader
from flowreel.engine.inference import Inference
from flowreel.engine.pairing import batches_of, planned
from flowreel.engine.pipeline import OneAtATime
from flowreel.engine.protocols import RandomAccess
from flowreel.engine.stages import Stage, StageFunction, compose
from flowreel.sinks import FlowCache

_STRETCH_BATCHES = 32  # looked up in the cache at a time, when all is read through


@dataclass(frozen=True)
class LazyStatistics:
    """What reading has cost so far, in this process."""

    decoded: int = 0  # frames, those on the way from a key frame to the one that was asked for included
    seeks: int = 0  # times decoding began elsewhere than at the first frame or where it stood; of pictures: 0
    computed: int = 0  # flows that came out of the model
    from_cache: int = 0  # flows that were read from the cache instead


class ComputedFlow:
    """The flows of one source by number, (2, H, W) float32 each. Threads may share one; they take turns.

    Args:
        path: what the source is called in messages.
        source: stays open; each process that was forked from this one reads it with a decoder of its own.
        info: header of the flow, at its full resolution.
        most_bytes: of decoded frames that are kept.
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
        """What belongs to this process alone: another one's decoder and locks are of no use after a fork."""
        self._process = os.getpid()
        self._reader = FrameReader(self._source, self._most_bytes)
        self._turn = OneAtATime()  # of the reader
        self._counting = OneAtATime()
        self._statistics = LazyStatistics()

    @property
    def statistics(self) -> LazyStatistics:
        with self._counting:
            return self._statistics

    # -- Reading -------------------------------------------------------------------------------------------------

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Number and flow of each of these ascending numbers; for a caller that takes them at once."""
        missing: list[int] = []
        yield from self._found(numbers, missing)
        if missing:
            with self._turn:
                still_missing: list[int] = []  # in their turn others may have computed them
                yield from self._found(missing, still_missing)
                yield from self._computed(still_missing, self._reader)

    def in_order(self) -> Iterator[Tensor]:
        """Each flow in order, of its own memory, with a decoder of its own: other reading may go on meanwhile."""
        stretch = self._count if self._cache is None else _STRETCH_BATCHES * self._inference.batch
        info = self._source.info
        with closing(FrameReader(self._source, 3 * info.height * info.width)) as reader:  # the frame between stretches
            for first in range(0, self._count, stretch):
                yield from self._stretch(range(first, min(first + stretch, self._count)), reader)

    def _stretch(self, numbers: range, reader: FrameReader) -> Iterator[Tensor]:
        missing = [number for number in numbers if self._cache is None or not self._cache.has(number)]
        to_compute = set(missing)
        with closing(self._computed(missing, reader)) as computed:
            for number in numbers:
                if number in to_compute:
                    yield next(computed)[1].clone()  # not its batch's memory
                else:
                    self.require_usable()
                    yield from (flow for _, flow in self.read([number]))

    def frame(self, number: int) -> Frame:
        """A frame of the source, by its number there."""
        with self._turn, self._counted(self._reader), _plain_errors():
            return self._reader.frame(number)

    # -- Computing -----------------------------------------------------------------------------------------------

    def _found(self, numbers: Sequence[int], missing: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Those that the cache holds; the others are added to ``missing``. Each lies where the one before did."""
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
        """Those out of the model, in order. Each is a part of its batch's memory."""
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
        """The planned batches of flow: a run's own stages, on the frames that are needed."""
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
        """Numbers of the frames of each unbroken run of flows: one more than there are flows."""
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
        """Lets go of the decoder and the kept frames. Nothing can be read afterwards."""
        if not self._closed and os.getpid() == self._process:
            with self._turn:
                self._closed = True
                self._reader.close()

    def require_usable(self) -> None:
        """To be called before anything else: makes a forked process's own of what was its parent's.

        Raises ValueError when it is closed, DeviceError in a forked process on a GPU.
        """
        if self._closed:
            raise ValueError(f"{self._path} is closed: open it again")
        if os.getpid() == self._process:
            return
        refuse_fork(self._path, self._device)
        # GNU's OpenMP waits for ever for threads that its parent had. DataLoader does the same for its workers.
        torch.set_num_threads(1)
        _ABANDONED.append(self._reader)
        self._start_here()


# Readers that a fork brought along. Their decoder's threads stayed behind, and closing it would wait for them.
_ABANDONED: list[FrameReader] = []


def refuse_fork(path: str, device: torch.device) -> None:
    """Raises DeviceError in a forked process, where a network that was loaded onto a GPU is of no use."""
    if device.type == "cuda":
        raise DeviceError(
            f"{path} was opened on {device} before this process was forked, and CUDA does not survive a fork: start "
            "the workers by spawn, as in DataLoader(..., multiprocessing_context='spawn')"
        )


def _kept(cache: FlowCache, numbers: Iterator[int]) -> StageFunction:
    """A stage that keeps each flow and passes it on as it will be read: first and second time are equal.

    numbers: of the flows that will come, however many there are in a batch: a device short of memory makes halves.
    """

    def stage(batches: Iterator[FlowBatch]) -> Iterator[FlowBatch]:
        for batch in batches:
            kept = cache.keep(list(islice(numbers, len(batch))), batch.flow.numpy())
            yield replace(batch, flow=torch.from_numpy(kept))

    return stage


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong in a stage as it would have without threads: its cause, with a note that says where."""
    try:
        yield
    except StageError as error:
        cause = error.__cause__
        assert cause is not None
        cause.add_note(f"while computing flow: {error}")
        raise cause from cause.__cause__
