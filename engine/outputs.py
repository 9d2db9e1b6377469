"""What every command that writes flow shares: naming its outputs, opening and ending them, counting, telling."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flowreel.engine.data import ColorSink, FlowBatch, FlowInfo, Sink
from flowreel.engine.device import download
from flowreel.engine.errors import OutputExistsError, OutputWriteError, TruncatedSourceError, UsageError
from flowreel.engine.sources import IMAGE_SUFFIXES, image_folder
from flowreel.engine.stages import StageStatistics

PathLike = str | os.PathLike[str]
ProgressHook = Callable[["Progress"], None]
FLO_HEADER_BYTES = 12


@dataclass(frozen=True)
class Progress:
    """What is told while flow is on its way."""

    stages: tuple[StageStatistics, ...]
    flow_count: int | None  # flows there will be; None: unknown
    flows_done: int  # flows that every output has taken
    seconds: float  # since the first frame or flow was asked for


@dataclass(frozen=True)
class OutputReport:
    """One output that was written."""

    path: str
    bytes_written: int
    notes: tuple[str, ...] = ()  # e.g. how many vectors were beyond range


def output_report(sink: Sink) -> OutputReport:
    """What a sink says of itself when it is done."""
    return OutputReport(sink.path, sink.bytes_written, tuple(sink.notes))


def named_outputs(outputs: PathLike | Iterable[PathLike], stem: str) -> list[str]:
    """The outputs' names with ``{stem}`` filled in. Raises UsageError for none, or for two in one place."""
    given = [outputs] if isinstance(outputs, str | os.PathLike) else list(outputs)
    paths = [os.fspath(path).replace("{stem}", stem) for path in given]
    if not paths:
        raise UsageError("give at least one output")
    for number, path in enumerate(paths):
        for before in paths[:number]:
            if os.path.realpath(path) == os.path.realpath(before):
                again = "" if path == before else f", the other time as {before}"
                raise UsageError(f"{path} is given twice as an output{again}")
            require_apart(path, before, "another output")
            require_apart(before, path, "another output")
        _require_outside_stores(path)
    return paths


def require_apart(path: PathLike, other: PathLike, what: str) -> None:
    """Raises UsageError where something is to be written to the place of ``other``, or inside it."""
    here, there = os.path.realpath(path), os.path.realpath(other)
    if here == there:
        raise UsageError(f"{os.fspath(path)} is {what}: choose another place")
    if here.startswith(os.path.join(there, "")):
        raise UsageError(f"{os.fspath(path)} lies inside {os.fspath(other)}, {what}: choose another place")


def require_harmless(path: PathLike, source: PathLike) -> None:
    """Raises UsageError where writing there would replace what is read, or put more pictures among its images."""
    folder = image_folder(source)
    if folder is None:
        require_apart(path, source, "what is being read")
        return
    here = os.path.realpath(os.path.dirname(path) or ".")
    if Path(path).suffix.lower() in IMAGE_SUFFIXES and here == os.path.realpath(folder):
        raise UsageError(f"{os.fspath(path)} lies among the images that are being read: choose another folder")


def require_report(path: Path, outputs: Iterable[PathLike], sources: Iterable[PathLike]) -> None:
    """Looks, before the work begins, whether a report can be written to a file when it is done.

    Raises:
        UsageError: it would replace an output or what is being read.
        OutputExistsError: a file is there that is no report.
        OutputWriteError: a folder is there, or a file where its folder should be.
    """
    for output in outputs:
        require_apart(path, output, "an output")
    for source in sources:
        require_harmless(path, source)
    _require_outside_stores(path)
    if path.is_dir():
        raise OutputWriteError(f"cannot write {path}: a folder of that name is there")
    if path.is_file() and path.stat().st_size and not _is_report(path):
        raise OutputExistsError(f"{path} is there and is no report that flowreel wrote: choose another name")
    there = next((folder for folder in path.parents if os.path.lexists(folder)), None)
    if there is not None and not there.is_dir():
        raise OutputWriteError(f"cannot write {path}: {there} is no folder")
    if there == path.parent and not os.path.lexists(path):
        try:  # some folders take no files, whatever their permissions say
            path.touch()
            path.unlink()
        except OSError as error:
            raise OutputWriteError(f"cannot write {path}: {error.strerror or error}") from error


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"{"


def _require_outside_stores(path: PathLike) -> None:
    for folder in Path(os.path.realpath(path)).parents:
        if (folder / "zarr.json").is_file():
            raise UsageError(f"{os.fspath(path)} lies inside the store {folder}: choose another place")


def make_folder(folder: Path) -> None:
    """With the folders above it, where they are missing. Raises OutputWriteError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OutputWriteError(f"{folder} is there and is no folder: choose another name") from None
    except OSError as error:
        raise OutputWriteError(f"cannot make the folder {folder}: {error.strerror or error}") from error


@contextmanager
def opened_sinks(sinks: Sequence[Sink], header: FlowInfo) -> Iterator[None]:
    """Opens the sinks; when anything goes wrong inside, those that are open are aborted."""
    opened: list[Sink] = []
    try:
        for sink in sinks:
            sink.open(header)
            opened.append(sink)
        yield
    except TruncatedSourceError:
        raise  # they were committed as unfinished: what they hold stays
    except BaseException:
        for sink in opened:
            sink.abort()
        raise


class Counting(Protocol):
    """What takes flows in a pipeline and knows how many it has."""

    flows: int


class Tally:
    """Writes to one sink and counts what it took. Flow on a GPU is brought to the host here, or pictures of it are."""

    def __init__(
        self, sink: Sink, change: Callable[[FlowBatch], FlowBatch] = lambda batch: batch, *, on_gpu: bool = False
    ) -> None:
        self.sink = sink
        self.flows = 0
        self._change = change
        self._on_gpu = on_gpu

    def consume(self, flows: Iterator[FlowBatch]) -> None:
        if self._on_gpu and isinstance(self.sink, ColorSink):
            for pictures in download(self.sink.paint(flows)):
                self.sink.show(pictures)
                self.flows += len(pictures)
        else:
            for batch in download(flows):
                self.sink.write(self._change(batch))
                self.flows += len(batch)


def teller(
    progress: ProgressHook | None, tallies: Sequence[Counting], count: int | None
) -> Callable[[tuple[StageStatistics, ...]], None]:
    """A pipeline's progress hook that tells the caller's own one how many flows every output has taken."""
    started_s = time.perf_counter()

    def tell(stages: tuple[StageStatistics, ...]) -> None:
        if progress is not None:
            done = min(tally.flows for tally in tallies)
            progress(Progress(stages, count, done, time.perf_counter() - started_s))

    return tell
