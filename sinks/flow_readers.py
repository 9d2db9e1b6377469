"""Stored flow as a stream: a store, or flow files, a few fields at a time. ``reading.py`` opens them by name.

Both are FlowReaders: see ``engine/protocols.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import FlowFileError, FlowreelError, FrameSizeError, counted
from flowreel.engine.files import folder_name
from flowreel.engine.publish import partial_path

if TYPE_CHECKING:
    from flowreel.engine.data import Array, Float32Array
    from flowreel.sinks.store_reader import FlowStore

PairTimes = tuple[int, int, float, float]  # frame, frame_to, timestamp_s, timestamp_to_s
FRAME_RATE = Fraction(25)  # of flow without times; image sequences are read at the same rate
BATCH_BYTES = 16 << 20  # of float32 flow in one batch: a single field of 1920x1080
BATCH_FLOWS = 8  # in one batch, of small fields; more gain nothing

# Attributes that say how flow was stored, not how it was made. A copy of the store writes its own.
_STORAGE_ATTRIBUTES = {"format_version", "software_version", "source", "frame_rate", "max_error", "codec", "cache"}
_STORAGE_ATTRIBUTES |= {"resolution", "native", "flow_height", "flow_width"}  # what is read is full resolution
_SOURCE_FIELDS = [field.name for field in fields(SourceId)]


class StoreFlows:
    """The flows ``numbers`` of a store, with the frame numbers and times it keeps.

    ``info.made_by`` has the store's attributes and two more: ``earlier_max_error`` (pixels), the error that storing has
    added so far, and ``earlier_step`` (pixels), the step of which all components are whole multiples: storing them
    again with a step no larger adds no error.
    Iterating raises DamagedStoreError naming the flow and its frame.
    """

    has_times = True

    def __init__(self, store: FlowStore, numbers: range) -> None:
        self.stem = store_stem(store.path)
        self._store = store
        self._numbers = numbers
        self._complete = store.complete  # asked once: a cache lists its files to tell
        attributes: dict[str, Any] = store.attrs
        source = attributes.get("source") or {}
        rate = attributes.get("frame_rate")
        self.info = FlowInfo(
            height=store.shape[2],
            width=store.shape[3],
            frame_rate=None if rate is None else Fraction(rate),
            frame_count=len(numbers) + 1,
            source=_source_id(self.stem, source),
            made_by=_how_it_was_made(attributes, store),
        )
        self.notes: list[str] = []
        if not self._complete:
            self.notes.append(f"{store.path} is {store.state}")

    @property
    def names(self) -> Sequence[str]:
        """The number of each flow's first frame: ``000001``."""
        return [f"{frame:06d}" for frame in self._store.frame[self._numbers.start : self._numbers.stop].tolist()]

    def __iter__(self) -> Iterator[FlowBatch]:
        store, first, last = self._store, self._numbers.start, self._numbers.stop
        length = batch_length(self.info.flow_bytes)
        for start in range(first, last, length):
            part = slice(start, min(start + length, last))
            yield FlowBatch(
                flow=torch.from_numpy(store[part]),
                index=start - first,
                frame=store.frame[part],
                frame_to=store.frame_to[part],
                timestamp_s=store.timestamps_s[part],
                timestamp_to_s=store.timestamps_to_s[part],
            )

    def reads(self, output: str) -> bool:
        """Whether writing ``output`` would destroy flow: a part of a store must not replace the whole store, and an
        unfinished store would be removed before it is read. A whole store may be replaced by a copy of itself."""
        if self._complete:
            return len(self._numbers) < len(self._store) and _same(Path(output), Path(self._store.path))
        return _same(partial_path(Path(output)), Path(self._store.path))


class FileFlows:
    """Flow files, one field each, opened one at a time. Frame k of the source is the k-th file, from 0.

    Args:
        paths: in order.
        numbers: which of them, counted from 0.
        read: reads one file: (H, W, 2) floats, pixels.
        read_times: reads the frame numbers and times of a file's pair, None if it holds none; None: no such file does.
            They are used if all files hold some, in order.
        frame_rate: frames per second, for the times; None: 25, with a note.
        one_size: whether a file whose size differs from the first raises FrameSizeError. If not, ``info`` has the first
            one's size, and a batch never mixes sizes.

    Raises, at construction for the first file and while iterating for the others: FlowFileError, SourceNotFoundError,
    FrameSizeError, each naming the file.
    """

    stem = None

    def __init__(
        self,
        paths: Sequence[Path],
        numbers: range,
        read: Callable[[Path], Array],
        read_times: Callable[[Path], PairTimes | None] | None = None,
        *,
        frame_rate: Fraction | None = None,
        one_size: bool = True,
    ) -> None:
        self._paths = paths
        self._numbers = numbers
        self._read_file = read
        self._one_size = one_size
        first = paths[numbers[0]]
        height, width = self._read(first).shape[1:]
        self._kept = None if read_times is None else _kept_times([paths[number] for number in numbers], read_times)
        self._rate = frame_rate or (FRAME_RATE if self._kept is None else _rate_of(self._kept[0]))
        self.info = FlowInfo(
            height=height,
            width=width,
            frame_rate=self._rate,
            frame_count=len(numbers) + 1,
            source=SourceId(folder_name(first.parent), sum(path.stat().st_size for path in paths)),
            made_by={"imported_from": f"{counted(len(numbers), 'file')} such as {first.name}"},
        )
        self.notes: list[str] = []
        if frame_rate is None and not self.has_times:
            self.notes.append(f"the flow files carry no usable times: {FRAME_RATE} frames per second are assumed")

    @property
    def has_times(self) -> bool:
        return self._kept is not None

    @property
    def names(self) -> Sequence[str]:
        """The files' names without their folders: ``000001.flo``."""
        return [self._paths[number].name for number in self._numbers]

    def __iter__(self) -> Iterator[FlowBatch]:
        waiting: list[Float32Array] = []  # all of one size
        first = self._numbers.start
        for number in self._numbers:
            flow = self._read(self._paths[number])
            if self._one_size:
                self._expect_size(self._paths[number], flow)
            if waiting and (flow.shape != waiting[0].shape or len(waiting) == batch_length(flow.nbytes)):
                yield self._batch(waiting, first)
                waiting, first = [], number
            waiting.append(flow)
        yield self._batch(waiting, first)

    def reads(self, output: str) -> bool:
        """Whether ``output`` is one of these files, or writes files of their kind beside them."""
        place = Path(output)
        if "%" in place.name and place.suffix.lower() == self._paths[0].suffix.lower():
            return any(_same(place.parent, folder) for folder in {path.parent for path in self._paths})
        return any(_same(place, path) for path in self._by_name.get(place.name, ()))

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        """The paths by file name, so that thousands of outputs can be checked quickly."""
        by_name: dict[str, list[Path]] = {}
        for path in self._paths:
            by_name.setdefault(path.name, []).append(path)
        return by_name

    def _batch(self, flows: list[Float32Array], first: int) -> FlowBatch:
        """The flows of the files from number ``first`` on."""
        times = [self._times(number) for number in range(first, first + len(flows))]
        frame, frame_to, timestamp_s, timestamp_to_s = zip(*times, strict=True)
        return FlowBatch(
            flow=torch.from_numpy(np.stack(flows)),
            index=first - self._numbers.start,
            frame=np.array(frame, np.int64),
            frame_to=np.array(frame_to, np.int64),
            timestamp_s=np.array(timestamp_s, np.float64),
            timestamp_to_s=np.array(timestamp_to_s, np.float64),
        )

    def _times(self, number: int) -> PairTimes:
        if self._kept is not None:
            return self._kept[self._numbers.index(number)]
        rate = float(self._rate)
        return number, number + 1, number / rate, (number + 1) / rate

    def _read(self, path: Path) -> Float32Array:
        """(2, H, W) float32, pixels; a view of what the format's own reader returns."""
        try:
            flow = self._read_file(path)
        except OSError as error:
            if isinstance(error, FlowreelError):
                raise
            raise FlowFileError(f"{path} cannot be read: {error.strerror or error}") from error
        return np.asarray(flow, np.float32).transpose(2, 0, 1)

    def _expect_size(self, path: Path, flow: Float32Array) -> None:
        (height, width), info = flow.shape[1:], self.info
        if (height, width) != (info.height, info.width):
            raise FrameSizeError(
                f"{path} is {width}x{height}, but {self._paths[self._numbers[0]].name} is {info.width}x{info.height}: "
                "flow that goes into one output must be of one size"
            )


def _kept_times(paths: Sequence[Path], read_times: Callable[[Path], PairTimes | None]) -> list[PairTimes] | None:
    """The times that all of the files hold; None if one holds none, is damaged, does not follow the one before, or has
    times that run the other way than its frames."""
    kept: list[PairTimes] = []
    for path in paths:
        try:
            times = read_times(path)
        except FlowreelError:
            return None  # told when its flow is read
        if times is None or (kept and any(now <= then for now, then in zip(times, kept[-1], strict=True))):
            return None
        frame, frame_to, time_s, time_to_s = times
        if frame == frame_to or (frame_to - frame) * (time_to_s - time_s) < 0:
            return None
        kept.append(times)
    return kept


def _rate_of(times: PairTimes) -> Fraction:
    """Frames per second of a pair: a rate such as 25 or 30000/1001, as far as its times tell."""
    gap_s = abs(times[3] - times[2])
    return Fraction(1 / gap_s).limit_denominator(1001) if 1e-6 < gap_s < 1e3 else FRAME_RATE


def batch_length(flow_bytes: int) -> int:
    """Flows in one batch, each of so many bytes as float32."""
    return max(1, min(BATCH_FLOWS, BATCH_BYTES // flow_bytes))


def store_stem(path: str) -> str:
    """``dance`` of ``dance.zarr``, ``dance.flow.zarr`` or ``dance.flow.zarr.partial``."""
    name = Path(os.path.abspath(path)).name  # also of "." and ".."
    for ending in (".partial", ".zarr", ".flow"):
        name = name.removesuffix(ending) or name
    return name


def _source_id(name: str, source: Mapping[str, Any]) -> SourceId:
    """The source that a store records; by ``name`` where it records none."""
    held = {"name": name} | {field: source[field] for field in _SOURCE_FIELDS if field in source}
    return SourceId(**held | {"heads_sha256": tuple(held.get("heads_sha256", ()))})


def _how_it_was_made(attributes: dict[str, Any], store: FlowStore) -> dict[str, Any]:
    """What a copy of the store should record about how its flow was made."""
    made_by = {name: value for name, value in attributes.items() if name not in _STORAGE_ATTRIBUTES}
    made_by.setdefault("first_stored_by", attributes.get("software_version"))
    error, before = (float(made_by.pop(f"earlier_{name}", None) or 0) for name in ("max_error", "step"))
    codec = store.layout.codec
    step = 0.0 if codec.lossless else codec.step
    if step > before:  # steps are powers of two: one no larger than ``before`` holds its multiples exactly
        error += float(attributes["max_error"])
    if not error:
        return made_by
    native = store.layout.native is not None  # the flow as read is interpolated
    return made_by | {"earlier_max_error": error, "earlier_step": 0.0 if native else max(step, before)}


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
