"""Stored flow to colour pictures: a PNG per flow and a video of all, as flow2image made them from ``.flo`` files.

read ──┬──▢▢▢▢──> paint and write pictures, several at a time
       └──▢▢▢▢──> write video
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Unpack

import numpy as np

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo
from flowreel.engine.errors import FrameSizeError, OutputExistsError, UnknownOutputError, UsageError
from flowreel.engine.export import export_config
from flowreel.engine.files import PathLike, as_names
from flowreel.engine.options import ColorOptions
from flowreel.engine.outputs import OutputReport, ProgressHook, Report, commit, opened_sinks, output_report, teller
from flowreel.engine.pipeline import Pipeline
from flowreel.engine.places import require_outside_stores
from flowreel.engine.protocols import FlowReader, Sink
from flowreel.engine.stages import StageStatistics
from flowreel.sinks import ColorPictures, flow_file_kind, frame_rate_of, is_store, open_flows, open_sink, without_effect

FRAME_RATE = Fraction(30)  # frames per second for flow files, which carry no times: flow2image's default
VIDEO_SUFFIXES = (".mp4", ".mkv")
OTHER_SUFFIXES = frozenset(  # names that cannot be meant as folders
    {".zarr", ".jpg", ".jpeg", ".gif", ".avi", ".mov", ".webm", ".bmp", ".tif", ".tiff", ".webp"}
    | {".m4v", ".txt", ".json", ".pdf"}
)


@dataclass(frozen=True)
class ColorReport(Report):
    """What ``color`` did."""

    flows: int
    seconds: float  # from the first flow asked for to the last output published
    flows_per_s: float
    bytes_written: int
    pictures: int
    outputs: tuple[OutputReport, ...]  # the folder or the picture, then the video
    stages: tuple[StageStatistics, ...]
    notes: tuple[str, ...] = ()


def color(
    inputs: PathLike | Iterable[PathLike],
    output: PathLike,
    *,
    video: bool = False,
    frame_rate: Fraction | float | str | None = None,
    max_flow: float | str | None = None,
    progress: ProgressHook | None = None,
    **options: Unpack[ColorOptions],
) -> ColorReport:
    """Paints stored flow with the Middlebury colours.

    Args:
        inputs: flow files (``.flo``, ``.kitti.png``, ``.npz``, two-stream pictures), folders or globs of them,
            stores, or slices of stores, ``X.zarr@a:b``, one after the other. Files of one kind in a row are taken in
            natural order, 2.flo before 10.flo.
        output: a folder, which gets ``NAME.flo.png`` for ``NAME.flo`` and ``STEM_000012.png`` for frame 12 of the
            store ``STEM.zarr``; or ``X.mp4`` or ``X.mkv`` for the video alone; or ``X.png`` for one single flow.
        video: also make a video in the folder, ``NAME.flo.mp4`` after the first file (``STEM.flo.mp4`` for a store).
        frame_rate: of the video, frames per second, constant. None: the flow of a store or of ``.npz`` files with times
            is shown at those, and other files at 30 frames per second; one input follows the other.
        max_flow: flow magnitude in pixels at full colour. None or "auto": in each picture its own longest vector; in
            the video one value for the whole clip, measured on the first flows.
        progress: called a few times a second with a ``Progress``.
        **options: ``encoder``, ``overwrite``, ``bound``, ``queue_mb`` as for ``run``.

    Unknown vectors are black. The flows may differ in size, but not in a video. Each picture is published whole or not
    at all; those finished before a failure stay.

    Raises:
        UsageError: options that are impossible together, or two flows whose pictures would have the same name.
        SourceError, FlowFileError, StoreError, OutputError: before the first flow is painted.
        StageError: reading, painting or writing failed on the way.
    """
    rate = None if frame_rate is None else frame_rate_of(frame_rate)
    config = export_config({**options, "max_flow": "auto" if max_flow is None else max_flow})
    readers = list(_readers(as_names(inputs), rate or FRAME_RATE, config.sink.bound))
    titles = [title for reader in readers for title in _picture_names(reader)]
    pictures, videos = _places(os.fspath(output), video, titles, readers[0])
    require_outside_stores(output)
    _require_free([*pictures, *videos], readers, config.sink.overwrite)
    sinks = [open_sink(path, config.sink) for path in videos]
    info = readers[0].info
    header = replace(info, frame_rate=rate or info.frame_rate, frame_count=len(titles) + 1)
    with opened_sinks(sinks, header):
        writers: list[PictureFeed | VideoFeed] = [VideoFeed(sink, header, titles, rate) for sink in sinks]
        if pictures:
            writers.insert(0, PictureFeed(os.fspath(output), ColorPictures(pictures, config.sink.max_flow)))
        pipeline = Pipeline("read", _one_by_one(readers), queues=config.queues)
        started_s = time.perf_counter()
        tell = teller(progress, writers, len(titles))
        pipeline.run({f"write {writer.path}": writer.consume for writer in writers}, tell)
        for sink in sinks:
            commit(sink)
        seconds = time.perf_counter() - started_s
        reports = tuple(writer.report() for writer in writers)
        return ColorReport(
            flows=len(titles),
            seconds=seconds,
            flows_per_s=len(titles) / seconds,
            bytes_written=sum(report.bytes_written for report in reports),
            pictures=len(pictures),
            outputs=reports,
            stages=pipeline.statistics(),
            notes=tuple(_notes(readers, pictures, videos, rate, config.sink)),
        )


def _notes(
    readers: Sequence[FlowReader],
    pictures: Sequence[Path],
    videos: Sequence[str],
    rate: Fraction | None,
    config: SinkConfig,
) -> Iterator[str]:
    for reader in readers:
        yield from reader.notes
    if rate is not None and not videos:
        yield "frame-rate has no effect here: no video is made (-v makes one)"
    # The bound is not reported as without effect: two-stream pictures are read with it.
    yield from without_effect([*pictures[:1], *videos], replace(config, bound=SinkConfig.bound))


class PictureFeed:
    """Writes each flow to its picture."""

    def __init__(self, path: str, pictures: ColorPictures) -> None:
        self.path = path  # the folder, or the one picture
        self._pictures = pictures

    @property
    def flows(self) -> int:
        return self._pictures.count

    def consume(self, flows: Iterator[FlowBatch]) -> None:
        with closing(self._pictures):
            for flow in flows:
                self._pictures.write(flow)
            self._pictures.finish()

    def report(self) -> OutputReport:
        return OutputReport(self.path, self._pictures.bytes_written)


class VideoFeed:
    """Writes the flows to the video, at a constant rate or, with a ``rate`` of None, at their own times.

    Own times are shifted so that each input's first flow begins when the last flow of the input before it ends.
    """

    def __init__(self, sink: Sink, header: FlowInfo, titles: Sequence[str], rate: Fraction | None) -> None:
        self.path = sink.path
        self.flows = 0
        self._sink = sink
        self._size = (header.height, header.width)
        self._rate = rate
        self._titles = titles

    def consume(self, flows: Iterator[FlowBatch]) -> None:
        shift_s = end_s = 0.0  # from an input's own times to the video's; end of the video so far
        for batch in flows:
            height, width = batch.flow.shape[2:]
            if (height, width) != self._size:
                here, first = (self._titles[number].removesuffix(".png") for number in (self.flows, 0))
                raise FrameSizeError(
                    f"{here} is {width}x{height}, but {first} is {self._size[1]}x{self._size[0]}: "
                    "a video needs flow of one size; pictures do not"
                )
            if self._rate is not None:
                start_s, end_s = self.flows / float(self._rate), (self.flows + 1) / float(self._rate)
            else:
                own_s, own_to_s = float(batch.timestamp_s[0]), float(batch.timestamp_to_s[0])
                if batch.index == 0:  # the first of its input
                    shift_s = end_s - own_s
                start_s = own_s + shift_s
                end_s = start_s + abs(own_to_s - own_s)  # in backward flow the second frame is the earlier one
            shown = replace(batch, index=self.flows, timestamp_s=np.array([start_s]), timestamp_to_s=np.array([end_s]))
            self._sink.write(shown)
            self.flows += 1

    def report(self) -> OutputReport:
        return output_report(self._sink)


def _readers(names: Sequence[str], frame_rate: Fraction, bound: float) -> Iterator[FlowReader]:
    """Opens the inputs in the order given; neighbouring files of one kind go together, in natural order."""

    def together(name: str) -> object:
        return flow_file_kind(name) if Path(name).is_file() else object()  # a store or folder by itself

    if not names:
        raise UsageError("name at least one store, folder or flow file")
    for _, group in groupby(names, together):
        yield open_flows(list(group), frame_rate=frame_rate, bound=bound, one_size=False)


def _one_by_one(readers: Sequence[FlowReader]) -> Iterator[FlowBatch]:
    """The flows of all readers, each as a batch of one; nothing is copied."""
    for reader in readers:
        for batch in reader:
            for place in range(len(batch)):
                one = slice(place, place + 1)
                yield FlowBatch(
                    batch.flow[one],
                    batch.index + place,
                    batch.frame[one],
                    batch.frame_to[one],
                    batch.timestamp_s[one],
                    batch.timestamp_to_s[one],
                )


def _picture_names(reader: FlowReader) -> list[str]:
    """``000001.flo.png`` for a file, ``dance_000001.png`` for a flow of a store."""
    return [f"{name}.png" if reader.stem is None else f"{reader.stem}_{name}.png" for name in reader.names]


def _places(output: str, video: bool, names: list[str], first: FlowReader) -> tuple[list[Path], list[str]]:
    """The paths of the pictures and of the video; either list may be empty."""
    place = Path(output)
    suffix = "" if place.is_dir() else place.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return [], [output]
    if suffix and flow_file_kind(place) not in (None, flow_file_kind("X.png")):
        raise UnknownOutputError(
            f"{output} is named like flow, not like a picture of it: choose another name; flowreel export writes flow"
        )
    if suffix in OTHER_SUFFIXES or "%" in place.name or not output:
        raise UnknownOutputError(
            f"expected a folder, X.png, X.mp4 or X.mkv, got {output!r}; flowreel export makes other outputs"
        )
    if is_store(output):
        raise UnknownOutputError(f"{output} is a flow store or named like one: give another folder for the pictures")
    if suffix == ".png":
        if video or len(names) > 1:
            raise UsageError(f"{output} takes the picture of one flow, and here are {len(names)}: give a folder")
        return [place], []
    if len(set(names)) < len(names):
        twice = next(name for name, before in zip(sorted(names)[1:], sorted(names), strict=False) if name == before)
        raise UsageError(f"two of the flows would both be painted as {twice}: paint them into different folders")
    title = f"{first.names[0] if first.stem is None else first.stem + '.flo'}.mp4"
    return [place / name for name in names], [str(place / title)] if video else []


def _require_free(places: Sequence[Path | str], readers: Sequence[FlowReader], overwrite: bool) -> None:
    """Raises OutputExistsError for outputs that exist, unless ``overwrite``; UsageError for those being read."""
    for place in places:
        if any(reader.reads(str(place)) for reader in readers):
            raise UsageError(f"{place} is being read: choose another output")
    present = [] if overwrite else [place for place in places if os.path.lexists(place)]
    if present:
        others = f" and {len(present) - 1} others are" if len(present) > 1 else " is"
        raise OutputExistsError(f"{present[0]}{others} already there: pass --overwrite to replace, or choose another")
