"""Stacks of flow to train on: ``FlowClips(videos, length=10, cache="flow")`` is a torch Dataset.

    index -> source, first flow -> flow[first : first + length] -> resized, cropped, mirrored -> (2L, h, w)

A stack is the input of a two-stream network: x and y of each flow alternate as channels, clipped to ``bound`` and
divided by it (Simonyan, Zisserman, "Two-Stream Convolutional Networks for Action Recognition in Videos", NeurIPS 2014).
"""

from __future__ import annotations

import operator
import os
import re
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowreel import sinks
from flowreel.engine.clip_view import ClipView, Size, ViewRule, random_below
from flowreel.engine.computed_flow import refuse_fork
from flowreel.engine.config import RunConfig, as_whole
from flowreel.engine.data import UNKNOWN_ABOVE, SourceId, is_known
from flowreel.engine.device import to_device
from flowreel.engine.errors import SourceChangedError, StoreError, UsageError, counted
from flowreel.engine.files import PathLike
from flowreel.engine.inference import Network, load_network
from flowreel.engine.lazy import LazyFlow
from flowreel.engine.models.weights import lasting_weights, require_same_weights
from flowreel.engine.options import ClipOptions
from flowreel.engine.sources import lasting_name
from flowreel.sinks import FlowStore

Source = PathLike | LazyFlow | FlowStore


@dataclass(frozen=True)
class _Extent:
    """The size of a source and the places of its clips, as determined when the dataset was made."""

    source: SourceId | None  # of a video; None: a flow store
    count: int  # flows
    height: int  # pixels of a flow
    width: int
    starts: Sequence[int]  # first flow of each fixed clip; for random clips only the number of them matters

    def differs(self, flows: LazyFlow | FlowStore) -> bool:
        """Whether the source, opened again, is not what it was."""
        source = flows.info.source if isinstance(flows, LazyFlow) else None
        return source != self.source or len(flows) < self.count or flows.shape[2:] != (self.height, self.width)


class FlowClips(Dataset[Any]):
    """Clips of flow as items for a ``torch.utils.data.DataLoader``; flow that does not exist yet is computed.

    Each item is a dict, unless ``transform`` turns it into something else:

    - ``flow``: (2L, h, w) float32, channels x, y of the first flow, x, y of the second, ...; in units of ``bound``,
      from -1 to 1, or, if ``bound`` is None, in pixels of the resized frame. Unknown vectors are 0.
    - ``source``: number of the source; ``first``: number of the clip's first flow in it; ``timestamp_s``: the
      timestamp of that flow.
    - ``rgb``: (3, h, w) uint8, the frame where the clip starts, resized, cropped and mirrored like the flow; if
      requested.
    - ``label``: the label of the source, if there are labels.

    Works in a DataLoader with spawned workers (or forked ones, without a GPU), and in a single process on a GPU. With
    a seed, an item depends on seed, epoch and index alone, however many workers there are; without one, torch's own
    generator is used, which DataLoader seeds for each worker and epoch. For one thread at a time.

    Raises, when read, what ``LazyFlow`` and ``FlowStore`` raise.

    Attributes:
        shape: (2L, h, w) of every ``flow``; None if it differs because the sources' sizes differ.
    """

    def __init__(
        self,
        sources: Source | Iterable[Source],
        length: int = 10,
        stride: int | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        *,
        bound: float | None = 20.0,
        random: bool = False,
        clips: int | None = None,
        size: Size | None = None,
        crop: Size | None = None,
        mirror: bool = False,
        rgb: bool = False,
        labels: Sequence[Any] | None = None,
        seed: int | None = None,
        cache: PathLike | None = None,
        open_at_once: int = 8,
        **options: Unpack[ClipOptions],
    ) -> None:
        """Opens every source once to learn its length.

        Args:
            sources: videos (files, folders of images, ``synthetic:NAME``), flow stores and full caches, by path; or
                objects returned by ``flowreel.open`` and ``open_store``.
            length: flows in a clip, L.
            stride: flows from the start of one clip to the start of the next; None: ``length``, so that clips do not
                overlap.
            transform: called last, with each item; the Dataset returns its result instead.
            bound: pixels of the resized frame that become 1; None: flow stays in pixels.
            random: each clip starts anywhere in its source, is cropped anywhere, and may be mirrored. If False, clips
                are placed by ``stride`` or ``clips``, and cropped in the centre.
            clips: number of clips per source, spread from its first flow to its last; instead of ``stride``.
            size: pixels (height, width) that frames are resized to; one number: their shorter side.
            crop: pixels (height, width) of the part cropped from the resized frame; one number: a square.
            mirror: half of the random clips, at random, are mirrored left to right, the flow's x components negated.
            rgb: include the frame. Stores have none.
            labels: one for each source.
            seed: of everything random, combined with the epoch (``set_epoch``). None: torch's own generator.
            cache: a folder that holds one cache per video, named after its file.
            open_at_once: how many of the videos given by path stay open, with decoder and decoded frames; and, apart
                from them, how many of the stores.
            **options: for videos given by path, as in ``flowreel.open``. ``frames_mb``, by default 64 here, applies to
                each open video.

        Raises:
            UsageError: impossible settings, a source shorter than a clip, ``rgb`` of a store, two videos of the same
                name with a cache.
            StoreError: a cache that is not full; opening the source by ``flowreel.open(..., cache=...)`` fills it.
            SourceError, WeightsError, DeviceError, CacheMismatchError: as in ``flowreel.open``.
        """
        given = [sources] if isinstance(sources, str | os.PathLike | LazyFlow | FlowStore) else list(sources)
        self._given = [source if isinstance(source, LazyFlow | FlowStore) else lasting_name(source) for source in given]
        if not self._given:
            raise UsageError("give at least one source of clips")
        length, open_at_once = _whole("length", length, 1), _whole("open_at_once", open_at_once, 1)
        stride, clips, seed = (
            None if value is None else _whole(name, value, least)
            for name, value, least in (("stride", stride, 1), ("clips", clips, 1), ("seed", seed, 0))
        )
        if stride is not None and clips is not None:
            raise UsageError("stride and clips both say where clips lie: give one of them")
        if bound is not None:
            bound = RunConfig.of(bound=bound).sink.bound
        if mirror and not random:
            raise UsageError("mirror is for random clips: fixed ones are the same every time")
        if labels is not None and len(labels) != len(self._given):
            raise UsageError(f"got {counted(len(labels), 'label')} for {counted(len(self._given), 'source')}")
        self.length, self.bound, self.random, self.seed = length, bound, random, seed
        self.transform = transform
        self._rule = ViewRule(size, crop, mirror)
        self._rgb = rgb
        self._labels = None if labels is None else list(labels)
        self._open_at_once = open_at_once
        # Even where all sources are stores: a misspelt argument of this class arrives among the options.
        model = RunConfig.of(**{name: value for name, value in options.items() if name != "frames_mb"}).model
        self._model = replace(model, weights=lasting_weights(model.weights))
        self._options = {"frames_mb": 64.0} | options | {"weights": self._model.weights}
        self._weights_sha256: str | None = None  # None: no weights loaded so far
        self._caches = None if cache is None else _caches(Path(cache).absolute(), self._given)
        # Shared memory, since DataLoader workers may persist from epoch to epoch.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu")
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._start_here()
        self._extents: list[_Extent] = []
        for number in range(len(self._given)):
            self._extents.append(self._extent(number, stride, clips))
        self._ends = list(accumulate(len(extent.starts) for extent in self._extents))
        cuts = {self._rule.sizes(extent.height, extent.width)[1] for extent in self._extents}
        self.shape = (2 * length, *cuts.pop()) if len(cuts) == 1 else None

    def _start_here(self) -> None:
        # Of the sources given by path; least recently used first.
        self._opened: OrderedDict[int, LazyFlow | FlowStore] = OrderedDict()
        self._network: tuple[int, Network] | None = None  # (id of the process that loaded it, network)

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        kind = "random" if self.random else "fixed"
        size = "of different sizes" if self.shape is None else str(self.shape)
        clips, flows = counted(len(self), f"{kind} clip"), counted(self.length, "flow")
        return f"<FlowClips {clips} of {flows}, {size}, from {counted(len(self._given), 'source')}>"

    def __getitem__(self, index: int) -> Any:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        extent, flows = self._extents[number], self._open(number)
        first, view = self._chosen(extent, index, index - self._ends[number] + len(extent.starts))
        item = {
            "flow": self._stack(flows[first : first + self.length], view),
            "source": number,
            "first": first,
            "timestamp_s": flows.time_of(first) if isinstance(flows, FlowStore) else float(flows.timestamps_s[first]),
        }
        if self._rgb:
            assert isinstance(flows, LazyFlow)
            item["rgb"] = to_device(view.rgb(flows.rgb(first)), flows.device)
        if self._labels is not None:
            item["label"] = self._labels[number]
        return item if self.transform is None else self.transform(item)

    def set_epoch(self, epoch: int) -> None:
        """Selects other random clips: call it before each epoch when there is a seed. It reaches running workers too.

        Raises UsageError for anything but a whole number from 0 on, below 2^63.
        """
        number = _whole("epoch", epoch, 0)
        if number >= 1 << 63:
            raise UsageError(f"epoch must be below 2^63, got {number}")
        self._epoch.fill_(number)

    # -- One clip ------------------------------------------------------------------------------------------------

    def _chosen(self, extent: _Extent, index: int, place: int) -> tuple[int, ClipView]:
        """The clip's first flow, and its view."""
        if not self.random:
            return extent.starts[place], self._rule.middle(extent.height, extent.width)
        generator = None
        if self.seed is not None:
            state = np.random.SeedSequence([self.seed, int(self._epoch), index]).generate_state(1, np.uint64)
            generator = torch.Generator("cpu").manual_seed(int(state[0]))
        first = random_below(extent.count - self.length + 1, generator)
        return first, self._rule.random(extent.height, extent.width, generator)

    def _stack(self, flows: Any, view: ClipView) -> Tensor:
        """(L, 2, H, W) pixels of the source, a tensor or NumPy array, to a (2L, h, w) stack."""
        given = flows if isinstance(flows, Tensor) else torch.from_numpy(flows)
        low, high = torch.aminmax(given)  # NaN if any is, which no comparison holds for
        if not (low >= -UNKNOWN_ABOVE and high <= UNKNOWN_ABOVE):  # rare: in most clips every vector is known
            given = torch.where(is_known(given).all(1, keepdim=True), given, 0)
        seen = view.flow(given)
        if self.bound is not None:
            seen = (seen / self.bound).clamp(-1, 1)
        return seen.flatten(0, 1)

    # -- Sources -------------------------------------------------------------------------------------------------

    def _extent(self, number: int, stride: int | None, clips: int | None) -> _Extent:
        flows = self._open(number)
        name = flows.path
        count = len(flows)
        if isinstance(flows, FlowStore):
            if self._rgb:
                raise UsageError(f"{name} is a flow store, which holds no frames: give the video instead, with a cache")
            if flows.layout.cache and not flows.complete:
                raise StoreError(
                    f"{name} is a cache with {flows.stored} of {count} flows in it: give the video, opened with it"
                )
            count = flows.available
        if count < self.length:
            raise UsageError(
                f"{name} has {counted(count, 'flow')}, a clip takes {self.length}: leave it out, or take shorter clips"
            )
        last = count - self.length
        starts: Sequence[int] = range(0, last + 1, stride or self.length)
        if clips is not None:
            starts = np.linspace(0, last, clips).round().astype(int).tolist() if clips > 1 else [last // 2]
        source = flows.info.source if isinstance(flows, LazyFlow) else None
        return _Extent(source, count, *flows.shape[2:], starts)

    def _open(self, number: int) -> LazyFlow | FlowStore:
        given = self._given[number]
        if not isinstance(given, str):
            return given
        flows = self._opened.pop(number, None)
        if flows is None:
            flows = self._open_path(given)
            known = self._extents
            if number < len(known) and known[number].differs(flows):
                raise SourceChangedError(f"{given} is not what it was when the clips were laid out: create them again")
        self._opened[number] = flows
        video = isinstance(flows, LazyFlow)  # stores must not evict videos, which are slow to open
        alike = [other for other, held in self._opened.items() if isinstance(held, LazyFlow) == video]
        for other in alike[: -self._open_at_once]:
            oldest = self._opened.pop(other)
            if isinstance(oldest, LazyFlow):
                oldest.close()
        return flows

    def _open_path(self, path: str) -> LazyFlow | FlowStore:
        if sinks.is_store(path):
            return sinks.open_store(path)
        cache = None if self._caches is None else self._caches[path]
        return LazyFlow(path, cache=cache, network=self._loaded(path), **self._options)

    def _loaded(self, path: str) -> Network:
        """The network, loaded once per process for all videos."""
        if self._network is None:
            loaded = load_network(self._model)
            if self._weights_sha256 is not None:  # a worker, which has it from the process that started it
                require_same_weights(loaded.weights, self._weights_sha256)
            self._network, self._weights_sha256 = (os.getpid(), loaded), loaded.weights.sha256
        process, network = self._network
        if process != os.getpid():
            refuse_fork(path, network.device)
        return network

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_opened", "_network")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._start_here()


def _whole(name: str, value: object, least: int) -> int:
    """The value as a Python int; NumPy and torch integers are accepted too. Raises UsageError for anything else."""
    whole = as_whole(value)
    if whole is None or whole < least:
        raise UsageError(f"{name} must be a whole number from {least} on, got {value!r}")
    return whole


def _caches(folder: Path, given: Sequence[Source]) -> dict[str, Path]:
    """Path -> cache folder of each video given by path. Raises UsageError for two videos of the same name."""
    videos = [source for source in given if isinstance(source, str) and not sinks.is_store(source)]
    names = {video: re.sub(r"[^\w.-]+", "_", os.path.basename(video)) for video in videos}
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        same = [video for video, name in names.items() if name == twice[0]]
        raise UsageError(
            f"{same[0]} and {same[1]} would share the cache {folder / twice[0]}: give what flowreel.open(..., "
            "cache=...) makes of each"
        )
    return {video: folder / name for video, name in names.items()}
