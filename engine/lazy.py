"""A video indexed as if its flow were already there: ``flow = flowreel.open("dance.mp4"); flow[100:110]``.

    key -> which flows -> each by its number -> the part selected -> tensor, NumPy array, store, xarray
           select         computed_flow

Wherever all flows of a run's batch are wanted, that very batch is computed, and its flow equals the run's bit for bit.
Batches cut in another way give results that differ by less than 1e-4 px in fp32.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from torch import Tensor

from flowreel import sinks
from flowreel.engine.api import flow_header, refuse_output_options
from flowreel.engine.computed_flow import ComputedFlow, LazyStatistics
from flowreel.engine.config import RunConfig, bytes_of
from flowreel.engine.data import SourceId
from flowreel.engine.device import to_host
from flowreel.engine.errors import SourceChangedError, UsageError
from flowreel.engine.files import PathLike
from flowreel.engine.forked import OfOneProcess
from flowreel.engine.inference import Network, load_network
from flowreel.engine.models.weights import lasting_weights, require_same_weights
from flowreel.engine.options import LazyOptions
from flowreel.engine.sources import lasting_name, open_random_access
from flowreel.sinks import select

if TYPE_CHECKING:
    import numpy.typing as npt
    import xarray

    from flowreel.engine.data import Float64Array, Int64Array
    from flowreel.sinks import ComputedStore

FRAMES_MB = 256.0  # MiB of decoded frames to keep: 700 frames of 640x360, 80 of 1920x1080


def open(
    source: PathLike, *, cache: PathLike | None = None, frames_mb: float = FRAMES_MB, **options: Unpack[LazyOptions]
) -> LazyFlow:
    """Opens a video so that its flow can be indexed; each flow is computed when it is requested.

    Args:
        source: a video file, a folder or glob of images, or ``synthetic:NAME``. All packets of a video are scanned,
            which is quick, and one frame is decoded to learn the picture's rotation; no flow is computed.
        cache: a folder where computed flow is kept, encoded as in a store; any number of threads and processes may
            fill one. Newly computed flow is then returned as it was stored, so that the first read equals every later
            one. None: nothing is kept.
        frames_mb: MiB of decoded frames to keep for reading in any order.
        **options: those of ``run``, by the same names: ``model``, ``weights``, ``device``, ``decoder``, ``batch``,
            ``precision``, ``fit``, ``start``, ``stop``, ``step``, ``stream``, ``direction``, ``queue_mb``; with a cache
            also ``max_error`` and ``codec``.

    Raises:
        UsageError: options that contradict each other, or stdin as the source.
        SourceError, WeightsError, DeviceError: as in ``run``.
        CacheMismatchError: the cache holds flow of another source, model, precision, fit, encoding or selection.
    """
    return LazyFlow(source, cache=cache, frames_mb=frames_mb, **options)


class LazyFlow:
    """The optical flow of a video, computed on demand.

    ``flow[5]`` is a torch.Tensor (2, H, W), float32, pixels of the source frame, x (right) then y (down), on the
    model's device; ``flow[2:9]``, ``flow[[3, 1]]`` and ``flow[mask]`` are (N, 2, H, W). Negative numbers count from the
    end, and further integers and slices index into each flow as in NumPy: ``flow[5, :, 10:20, 30:40]``. Results are
    ordinary tensors that can take part in training (under ``torch.inference_mode`` they are inference tensors).
    Iterating yields the flows in order, decoding ahead.

    Threads may share one object; they take turns. An unpickled copy, and one that a forked process inherits, opens the
    source again; in a forked process torch computes with one thread. ``with flowreel.open(...) as flow:`` or
    ``close()`` releases the decoder and the kept frames.

    Raises, when read: IndexError; TruncatedSourceError for a frame that the file lists but that does not decode;
    SourceNotFoundError and SourceChangedError when the source is gone or has changed; DeviceError in a forked process
    on a GPU.

    Attributes:
        shape: (T-1, 2, H, W).
        batch: pairs that go through the network together: slices of whole batches equal ``stream`` bit for bit.
        timestamps_s, timestamps_to_s: (T-1,) float64, seconds: presentation timestamps of each pair's two frames.
        frame, frame_to: (T-1,) int64, their numbers in the source.
        notes: what the user should know about the source.
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
        """As ``open``. network: one loaded earlier with the same options, so that many sources can share it."""
        self._most_bytes = bytes_of("frames-mb", frames_mb)
        config = RunConfig.of(**options)
        refuse_output_options(config)
        if config.tolerate_truncation:
            raise UsageError("tolerate-truncation is for runs and streams, which read a source to its end")
        self.path = os.fspath(source)
        self._options = options | {"weights": lasting_weights(config.model.weights)}
        self._config = config
        self._lasting = lasting_name(self.path)
        self._source = open_random_access(self._lasting, config.select)
        info = self._source.info
        network = network or load_network(config.model)
        self._inference = network.fitted(info.height, info.width)
        self.info = flow_header(info, self._inference, config)
        self.device = self._inference.device
        self.batch = self._inference.batch
        self.shape: tuple[int, int, int, int] = (len(self._source.wanted) - 1, 2, self.info.height, self.info.width)
        self._cache = None if cache is None else sinks.open_cache(cache, self.info, config.sink, self)
        self._flows = ComputedFlow(
            self.path, self._source, self.info, self._inference, config, self._cache, self._most_bytes
        )

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
        """How many flows the cache on disk holds now; 0 without a cache."""
        return 0 if self._cache is None else self._cache.stored

    @property
    def statistics(self) -> LazyStatistics:
        """Frames decoded, flows computed and flows read from the cache so far."""
        self._flows.require_usable()
        return self._flows.statistics

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
        self._flows.require_usable()
        places: dict[int, list[int]] = {}  # flow -> its places in the result, so that each is computed only once
        shape = (len(chosen.numbers), *chosen.inner_shape)
        for place, number in enumerate(chosen.numbers if 0 not in shape else ()):
            places.setdefault(number, []).append(place)
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for number, flow in self._flows.read(sorted(places)):
            part = flow if chosen.whole else _inside(flow, chosen.inside)
            for place in places[number]:
                out[place] = part
        return out[0] if chosen.single else out

    def __iter__(self) -> Iterator[Tensor]:
        """Yields each flow in order. Uses a separate decoder, so other reads may go on meanwhile."""
        return OfOneProcess(self._flows.in_order())

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Computes all flow, for ``numpy.asarray``."""
        if copy is False:
            raise ValueError("flow that is not there yet cannot be had without making it")
        return np.asarray(to_host(self[:]).numpy(), dtype)

    def played_at(self, seconds: float) -> Tensor:
        """The flow (2, H, W) of the pair whose earlier frame is on screen at this time, until the next frame is shown.

        Seconds are those of ``timestamps_s``, so of the container, whose first frame may come later than 0. Raises
        IndexError when no frame, or only the last one, is shown then.
        """
        starts, ends = self._shown
        number = int(np.searchsorted(starts, seconds, "right")) - 1
        if not (number >= 0 and seconds < ends[-1]):
            raise IndexError(f"no flow at {seconds:g} s: there is some from {starts[0]:g} to {ends[-1]:g} s")
        return self[number]

    def in_range(self, start_s: float, stop_s: float) -> Tensor:
        """The flows (N, 2, H, W) of the pairs whose earlier frame appears at ``start_s`` or later, but before
        ``stop_s``; N = 0 when there is none."""
        first, end = np.searchsorted(self._shown[0], [start_s, stop_s])
        return self[int(first) : int(end)]

    @property
    def _shown(self) -> tuple[Float64Array, Float64Array]:
        """(T-1,) seconds each: when the earlier frame of each pair appears, and when the next frame replaces it."""
        first, second = self.timestamps_s, self.timestamps_to_s
        return (first, second) if self._config.model.direction == "forward" else (second, first)

    def to_xarray(self) -> xarray.DataArray:
        """A float32 xarray.DataArray, computed on demand and only as far as needed.

        Dimensions time, component, y, x; timestamps and frame numbers are coordinates of time. Raises
        MissingDependencyError when xarray is not installed.
        """
        return sinks.data_array(_OnHost(self))

    def store(self) -> ComputedStore:
        """A read-only Zarr store, a group laid out like ``X.zarr``, whose chunks are computed when they are read.

        ``zarr.open_group(s)["flow"]``, ``xarray.open_zarr(s)``, ``dask.array.from_zarr(s, component="flow")``: float32
        pixels, the same values as here. Each chunk is one flow, so reading one pixel computes a whole flow; chunks
        read concurrently are computed together. The read raises what goes wrong while computing.
        """
        return sinks.ComputedStore(self.info, _OnHost(self))

    def rgb(self, number: int) -> Tensor:
        """The frame where flow ``number`` starts: (3, H, W) uint8 RGB on the host, cropped like the flow.

        Raises TypeError for anything but a single integer.
        """
        number = int(select(operator.index(number), self.shape[:1]).numbers[0])
        self._flows.require_usable()
        rgb = self._flows.frame(int(self.frame[number])).rgb
        fit = self._inference.fit
        return fit.apply(rgb[None])[0].contiguous() if fit.mode == "crop" else rgb.contiguous()

    # -- Sharing -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Releases the decoder and the kept frames. Nothing can be read afterwards."""
        self._flows.close()

    def __enter__(self) -> LazyFlow:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        options = self._options | {"frames_mb": self._most_bytes / (1 << 20)}
        if self._cache is not None:
            options["cache"] = str(self._cache.folder)
        return _reopened, (self._lasting, options, self.info.source, len(self), self._inference.weights.sha256)


def _reopened(path: str, options: dict[str, Any], source: SourceId, count: int, weights_sha256: str) -> LazyFlow:
    """Unpickles a LazyFlow by opening its source again."""
    flow = LazyFlow(path, **options)
    require_same_weights(flow._inference.weights, weights_sha256)
    if (flow.info.source, len(flow)) != (source, count):
        raise SourceChangedError(f"{path} is not what it was when its flow was pickled: open it again")
    return flow


class _OnHost:
    """The flow as ``sinks/indexed_flow.py`` takes it: indexing gives NumPy arrays, as with a flow store."""

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


def _inside(flow: Tensor, parts: Sequence[int | slice]) -> Tensor:
    """Indexes into one flow as NumPy does: torch itself does not support slices with a negative step."""
    for axis, part in reversed(list(enumerate(parts))):
        if isinstance(part, int):
            flow = flow.select(axis, part)
        else:
            places = range(*part.indices(flow.shape[axis]))
            flow = flow.index_select(axis, torch.tensor(places, device=flow.device, dtype=torch.int64))
    return flow


def _fixed(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Makes the array read-only, since the same object is returned to every caller."""
    values.flags.writeable = False
    return values
