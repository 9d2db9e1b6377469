"""A video indexed as if its flow were already there: ``flow = flowreel.open("dance.mp4"); flow[100:110]``.

    key -> which flows -> in which batches -> their frames -> pairs -> batches -> model -> restore -> tensor
                                              frame_reader    the stages of a run

One flow is composed in the caller's thread; what takes several batches goes through the pipeline's, so that frames are
decoded while the model works. Batches are those of a run wherever a whole one is wanted: then flow is the same to the
bit. Cut in another way, a batch gives results that differ by less than 1e-4 px in fp32.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import Tensor

from flowreel import sinks
from flowreel.engine.api import Chain, flow_header, stages
from flowreel.engine.config import RunConfig
from flowreel.engine.data import FlowBatch, SourceId
from flowreel.engine.device import to_device, to_host
from flowreel.engine.errors import DeviceError, MissingDependencyError, SourceChangedError, StageError, UsageError
from flowreel.engine.files import PathLike
from flowreel.engine.frame_reader import FrameReader
from flowreel.engine.inference import Network, load_network
from flowreel.engine.options import LazyOptions
from flowreel.engine.pairing import batches_of, planned
from flowreel.engine.pipeline import OneAtATime
from flowreel.engine.sources import lasting_name, open_random_access
from flowreel.engine.stages import Stage, compose
from flowreel.sinks import select

if TYPE_CHECKING:
    import numpy.typing as npt
    import xarray

    from flowreel.engine.data import Float64Array, Int64Array
    from flowreel.engine.stages import StageFunction
    from flowreel.sinks import ComputedStore, FlowCache

_STRETCH_BATCHES = 32  # looked up in the cache at a time, when all is read through
FRAMES_MB = 256.0  # of decoded frames that are kept: 700 of 640x360, 80 of 1920x1080
_RUNS_ONLY = ("resume", "overwrite", "tolerate_truncation")


def open(
    source: PathLike, *, cache: PathLike | None = None, frames_mb: float = FRAMES_MB, **options: Unpack[LazyOptions]
) -> LazyFlow:
    """Opens a video so that its flow can be indexed; each flow is computed when it is asked for.

    Args:
        source: a video file, a folder or glob of images, or ``synthetic:NAME``. All packets of a video are read, which
            is quick, and one frame is decoded, which tells how the picture is turned; no flow is computed.
        cache: a folder where flow is kept once it has been computed, encoded as a store is; any number of threads
            and processes may fill one. What comes out of the model is then given as it was kept, so that the first
            reading equals the second. None: nothing is kept.
        frames_mb: megabytes of decoded frames that are kept for reading in any order.
        **options: as of ``run``, by the same names: ``model``, ``weights``, ``device``, ``decoder``, ``batch``,
            ``precision``, ``fit``, ``start``, ``stop``, ``step``, ``stream``, ``direction``, ``queue_mb``; of a cache
            also ``max_error`` and ``codec``.

    Raises:
        UsageError: options that are impossible together, or stdin.
        SourceError, WeightsError, DeviceError: as of ``run``.
        CacheMismatchError: the cache holds flow of another source, model, precision, fit, encoding or selection.
    """
    return LazyFlow(source, cache=cache, frames_mb=frames_mb, **options)


@dataclass(frozen=True)
class LazyStatistics:
    """What reading has cost so far, in this process."""

    decoded: int = 0  # frames, those on the way from a key frame to the one that was asked for included
    seeks: int = 0  # times decoding began elsewhere than at the first frame or where it stood; of pictures: 0
    computed: int = 0  # flows that came out of the model
    from_cache: int = 0  # flows that were read from the cache instead


class LazyFlow:
    """The optical flow of a video, computed as it is looked at.

    ``flow[5]`` is a torch.Tensor (2, H, W), float32, pixels of the source frame, x (right) then y (down), on the
    model's device; ``flow[2:9]``, ``flow[[3, 1]]`` and ``flow[mask]`` are (N, 2, H, W). Negative numbers count from the
    end, and numbers and slices that follow pick from each flow as NumPy does: ``flow[5, :, 10:20, 30:40]``. Results are
    ordinary tensors that can take part in training (in ``torch.inference_mode`` they are of its kind). Iterating gives
    one flow after the other, decoding ahead.

    Threads may share one; they take turns. A copy that is pickled, or that a forked process inherits, opens the source
    again; in a forked process torch computes with one thread. ``with flowreel.open(...) as flow:`` or ``close()`` lets
    go of the decoder and the kept frames.

    Raises, when read: IndexError; TruncatedSourceError for a frame that the file lists but that does not decode;
    SourceNotFoundError and SourceChangedError when the source has gone or is another one; DeviceError in a forked
    process on a GPU.

    Attributes:
        shape: (T-1, 2, H, W).
        batch: pairs that go through the network together: slices of whole batches are what ``stream`` gives to the bit.
        timestamps_s, timestamps_to_s: (T-1,) float64, seconds: presentation times of each pair's two frames.
        frame, frame_to: (T-1,) int64, their numbers in the source.
        notes: what the user should know of the source.
    """

    dtype = torch.float32
    ndim = 4

    def __init__(
        self,
        source: PathLike,
        *,
        cache: PathLike | None = None,
        frames_mb: float = FRAMES_MB,
        network: Network | None = None,
        **options: Unpack[LazyOptions],
    ) -> None:
        """As of ``open``. network: loaded before, with the same options, so that many sources can share it."""
        if given := [name for name in _RUNS_ONLY if options.get(name)]:
            raise UsageError(f"{given[0].replace('_', '-')} is for runs that write an output to their end")
        if not 0 <= frames_mb < float("inf"):
            raise UsageError(f"frames-mb must be a number of megabytes, got {frames_mb!r}")
        config = RunConfig.of(**options)
        if config.sink.resolution != "full":
            raise UsageError("flow that is computed when it is looked at has full resolution")
        self.path = os.fspath(source)
        self._options = options
        self._config = config
        self._most_bytes = int(frames_mb * (1 << 20))
        self._lasting = lasting_name(self.path)
        self._source = open_random_access(self._lasting, config.select)
        info = self._source.info
        network = network or load_network(config.model)
        self._inference = network.fitted(info.height, info.width)
        self.info = flow_header(info, self._inference, config)
        self.device = self._inference.device
        self.batch = self._inference.batch
        self.shape: tuple[int, int, int, int] = (len(self._source.wanted) - 1, 2, self.info.height, self.info.width)
        self._shard = self.info.shard_length(config.sink.shard_bytes)
        self._cache = None if cache is None else sinks.open_cache(cache, self.info, config.sink, self)
        self._closed = False
        self._start_here()

    def _start_here(self) -> None:
        """What belongs to this process alone: another one's decoder and locks are of no use after a fork."""
        self._process = os.getpid()
        self._reader = FrameReader(self._source, self._most_bytes)
        self._turn = OneAtATime()  # of the reader
        self._counting = OneAtATime()
        self._statistics = LazyStatistics()

    # -- What it is ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        inference = self._inference
        how = f"{inference.model} ({inference.weights.name}), {inference.precision}, batch {inference.batch}"
        kept = "" if self._cache is None else f"; {self._cache.stored} of {len(self)} flows in {self._cache.path}"
        return f"<LazyFlow {self.path!r} {self.shape} float32 on {self.device}: {how}{kept}>"

    @property
    def notes(self) -> list[str]:
        return [*self._source.notes]

    @property
    def cached(self) -> int:
        """How many flows the cache holds; looks at the disk. 0 without one."""
        return 0 if self._cache is None else self._cache.stored

    @property
    def statistics(self) -> LazyStatistics:
        """Frames decoded, flows computed and flows read from the cache so far."""
        self._require_usable()
        with self._counting:
            return self._statistics

    @cached_property
    def frame(self) -> Int64Array:
        return self._ends[0]

    @cached_property
    def frame_to(self) -> Int64Array:
        return self._ends[1]

    @cached_property
    def timestamps_s(self) -> Float64Array:
        return _fixed(self._source.times_s[self.frame])

    @cached_property
    def timestamps_to_s(self) -> Float64Array:
        return _fixed(self._source.times_s[self.frame_to])

    @cached_property
    def _ends(self) -> tuple[Int64Array, Int64Array]:
        wanted = np.array(self._source.wanted, np.int64)
        earlier, later = _fixed(wanted[:-1]), _fixed(wanted[1:])
        return (earlier, later) if self._config.model.direction == "forward" else (later, earlier)

    # -- Reading -------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Tensor:
        chosen = select(key, self.shape)
        self._require_usable()
        places: dict[int, list[int]] = {}  # flow -> where it goes, so that each is computed once
        shape = (len(chosen.numbers), *chosen.inner_shape)
        for place, number in enumerate(chosen.numbers if 0 not in shape else ()):
            places.setdefault(number, []).append(place)
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for number, flow in self._read(sorted(places)):
            part = flow if chosen.whole else _inside(flow, chosen.inside)
            for place in places[number]:
                out[place] = part
        return out[0] if chosen.single else out

    def __iter__(self) -> Iterator[Tensor]:
        """Each flow in order, with a decoder of its own: other reading may go on meanwhile."""
        self._require_usable()
        stretch = len(self) if self._cache is None else _STRETCH_BATCHES * self._inference.batch
        info = self._source.info
        with closing(FrameReader(self._source, 3 * info.height * info.width)) as reader:  # the frame between stretches
            for first in range(0, len(self), stretch):
                yield from self._in_order(range(first, min(first + stretch, len(self))), reader)

    def _in_order(self, numbers: range, reader: FrameReader) -> Iterator[Tensor]:
        missing = [number for number in numbers if self._cache is None or not self._cache.has(number)]
        to_compute = set(missing)
        with closing(self._computed(missing, reader)) as computed:
            for number in numbers:
                if number in to_compute:
                    yield next(computed)[1].clone()  # of its own memory, not its batch's
                else:
                    yield self[number]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """All of it, computed, as NumPy's ``asarray`` asks for it."""
        if copy is False:
            raise ValueError("flow that is not there yet cannot be had without making it")
        return np.asarray(to_host(self[:]).numpy(), dtype)

    def played_at(self, seconds: float) -> Tensor:
        """The flow (2, H, W) of the pair whose first frame is shown at this time: from there to the next frame.

        Seconds are those of ``timestamps_s``, so of the container, whose first frame may come later than 0. Raises
        IndexError when nothing, or only the last frame, is shown then.
        """
        starts, ends = self._shown
        number = int(np.searchsorted(starts, seconds, "right")) - 1
        if not (number >= 0 and seconds < ends[-1]):
            raise IndexError(f"no flow at {seconds:g} s: there is some from {starts[0]:g} to {ends[-1]:g} s")
        return self[number]

    def in_range(self, start_s: float, stop_s: float) -> Tensor:
        """The flows (N, 2, H, W) of the pairs whose first frame begins to be shown from ``start_s`` on, before
        ``stop_s``; none when no frame does."""
        first, end = np.searchsorted(self._shown[0], [start_s, stop_s])
        return self[int(first) : int(end)]

    @property
    def _shown(self) -> tuple[Float64Array, Float64Array]:
        """(T-1,) seconds each: from when to when the earlier frame of each pair is shown."""
        first, second = self.timestamps_s, self.timestamps_to_s
        return (first, second) if self._config.model.direction == "forward" else (second, first)

    def to_xarray(self) -> xarray.DataArray:
        """An xarray.DataArray, float32, computed when it is looked at and only as far as needed.

        Dimensions time, component, y, x; the times and frame numbers are coordinates of time. Raises
        MissingDependencyError: xarray is not installed.
        """
        try:
            data_array = sinks.data_array
        except ImportError as error:
            raise MissingDependencyError(f"to_xarray needs xarray: pip install xarray ({error})") from error
        return data_array(_OnHost(self))

    def store(self) -> ComputedStore:
        """A read-only Zarr store, a group laid out like ``X.zarr``, whose chunks are computed when they are read.

        ``zarr.open_group(s)["flow"]``, ``xarray.open_zarr(s)``, ``dask.array.from_zarr(s, component="flow")``: float32
        pixels, the same values as here. Each chunk is one flow, so that one pixel costs a whole one; what is read
        concurrently is computed together. What goes wrong while computing comes out of the read.
        """
        return sinks.ComputedStore(self.info, _OnHost(self))

    def rgb(self, number: int) -> Tensor:
        """The frame in which flow ``number`` begins: (3, H, W) uint8 RGB on the host, cut as the flow is.

        Raises TypeError for anything but one whole number.
        """
        number = int(select(operator.index(number), self.shape[:1]).numbers[0])
        self._require_usable()
        with self._turn, self._counted(self._reader), _plain_errors():
            rgb = self._reader.frame(int(self.frame[number])).rgb
        fit = self._inference.fit
        return fit.apply(rgb[None])[0].contiguous() if fit.mode == "crop" else rgb.contiguous()

    # -- Computing -----------------------------------------------------------------------------------------------

    def _read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The flows with these ascending numbers, each (2, H, W); for a caller that takes them at once."""
        missing: list[int] = []
        yield from self._found(numbers, missing)
        if missing:
            with self._turn:
                still_missing: list[int] = []  # in their turn others may have computed them
                yield from self._found(missing, still_missing)
                yield from self._computed(still_missing, self._reader)

    def _found(self, numbers: Sequence[int], missing: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Those that the cache holds; the others are added to ``missing``. Each lies where the one before did."""
        if self._cache is None:
            missing += numbers
            return
        flow = torch.empty(self.shape[1:], dtype=self.dtype, device="cpu")
        for number in numbers:
            if self._cache.find(number, flow.numpy()):
                self._count(LazyStatistics(from_cache=1))
                yield number, to_device(flow, self.device)
            else:
                missing.append(number)

    def _computed(self, numbers: Sequence[int], reader: FrameReader) -> Generator[tuple[int, Tensor], None, None]:
        """Those out of the model, in order. Each is a part of its batch's memory."""
        if not numbers:
            return
        plan = planned(numbers, self._inference.batch, self._shard, len(self))
        order = iter(numbers)
        with self._counted(reader), closing(self._batches(plan, reader)) as batches, _plain_errors():
            for batch in batches:
                self._count(LazyStatistics(computed=len(batch)))
                flows = to_device(batch.flow, self.device)
                yield from zip(islice(order, len(batch)), flows, strict=True)

    def _batches(self, plan: Sequence[Sequence[int]], reader: FrameReader) -> Generator[FlowBatch, None, None]:
        """The planned batches of flow: a run's own stages, on the frames that are needed."""
        frames = reader.stretches(self._stretches(plan))
        keep = self._cache is not None
        steps = stages(self._inference, self._config.model.direction, batches_of(plan), to_host=keep)
        if self._cache is not None:
            steps.append(Stage("keep", _kept(self._cache, chain.from_iterable(plan))))
        if len(plan) == 1:
            yield from compose(frames, steps)
            return
        with closing(Chain(frames, steps, self._config.queues, self.device).flows()) as results:
            yield from results

    def _stretches(self, plan: Sequence[Sequence[int]]) -> Iterator[range]:
        """Numbers of the frames of each unbroken run of flows: one more than there are flows."""
        wanted = self._source.wanted
        numbers = [number for batch in plan for number in batch]
        for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0]):
            stretch = [number for _, number in run]
            yield wanted[stretch[0] : stretch[-1] + 2]

    # -- Sharing -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Lets go of the decoder and the kept frames. Nothing can be read afterwards."""
        if not self._closed and os.getpid() == self._process:
            with self._turn:
                self._closed = True
                self._reader.close()

    def __enter__(self) -> LazyFlow:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        options = self._options | {"frames_mb": self._most_bytes / (1 << 20)}
        if self._cache is not None:
            options["cache"] = str(self._cache.folder)
        return _reopened, (self._lasting, options, self.info.source, len(self))

    def _require_usable(self) -> None:
        if self._closed:
            raise ValueError(f"{self.path} is closed: open it again")
        if os.getpid() == self._process:
            return
        refuse_fork(self.path, self.device)
        # GNU's OpenMP waits for ever for threads that its parent had. DataLoader does the same for its workers.
        torch.set_num_threads(1)
        _ABANDONED.append(self._reader)
        self._start_here()

    @contextmanager
    def _counted(self, reader: FrameReader) -> Iterator[None]:
        decoded, seeks = reader.decoded, reader.seeks
        try:
            yield
        finally:
            self._count(LazyStatistics(reader.decoded - decoded, reader.seeks - seeks))

    def _count(self, more: LazyStatistics) -> None:
        with self._counting:
            sums = (mine + its for mine, its in zip(astuple(self._statistics), astuple(more), strict=True))
            self._statistics = LazyStatistics(*sums)


# Readers that a fork brought along. Their decoder's threads stayed behind, and closing it would wait for them.
_ABANDONED: list[FrameReader] = []


def refuse_fork(path: str, device: torch.device) -> None:
    """Raises DeviceError in a forked process, where a network that was loaded onto a GPU is of no use."""
    if device.type == "cuda":
        raise DeviceError(
            f"{path} was opened on {device} before this process was forked, and CUDA does not survive a fork: start "
            "the workers by spawn, as in DataLoader(..., multiprocessing_context='spawn')"
        )


def _reopened(path: str, options: dict[str, Any], source: SourceId, count: int) -> LazyFlow:
    """A pickled one in the process that unpickles it."""
    flow = LazyFlow(path, **options)
    if (flow.info.source, len(flow)) != (source, count):
        raise SourceChangedError(f"{path} is not what it was when its flow was pickled: open it again")
    return flow


class _OnHost:
    """The flow as a store gives it, in NumPy's arrays."""

    def __init__(self, flow: LazyFlow) -> None:
        self._flow = flow
        self.shape = flow.shape
        self.available = len(flow)
        self.timestamps_s, self.timestamps_to_s = flow.timestamps_s, flow.timestamps_to_s
        self.frame, self.frame_to = flow.frame, flow.frame_to

    def __reduce__(self) -> tuple[type[_OnHost], tuple[LazyFlow]]:
        return _OnHost, (self._flow,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _OnHost) and other._flow is self._flow

    def __hash__(self) -> int:
        return hash((_OnHost, id(self._flow)))

    def __repr__(self) -> str:
        return repr(self._flow)

    def __getitem__(self, key: Any) -> npt.NDArray[np.float32]:
        array: npt.NDArray[np.float32] = to_host(self._flow[key]).numpy()
        return array


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


def _inside(flow: Tensor, parts: Sequence[int | slice]) -> Tensor:
    """What is picked of a flow, as NumPy would; torch by itself knows no slices that go backwards."""
    for axis, part in reversed(list(enumerate(parts))):
        if isinstance(part, int):
            flow = flow.select(axis, part)
        else:
            places = range(*part.indices(flow.shape[axis]))
            flow = flow.index_select(axis, torch.tensor(places, device=flow.device, dtype=torch.int64))
    return flow


def _fixed(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same array, closed to writing: it is handed out again."""
    values.flags.writeable = False
    return values
