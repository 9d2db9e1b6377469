"""What all commands that write flow share: naming, opening and finishing outputs, counting flows, progress."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from flowreel.engine.claims import Claim
from flowreel.engine.data import FlowBatch, FlowInfo
from flowreel.engine.device import download
from flowreel.engine.errors import FrameSizeError, StageError, TruncatedSourceError, UsageError, frame_of
from flowreel.engine.files import PathLike, as_names
from flowreel.engine.places import require_apart, require_outside_stores
from flowreel.engine.protocols import DeviceSink, LandingSink, MayLose, OneFileAFlow, Resumable, ResumableSink, Sink
from flowreel.engine.publish import claimed_file, partial_path, remove, sync_folder, write_errors
from flowreel.engine.stages import StageStatistics

ProgressHook = Callable[["Progress"], None]


@dataclass(frozen=True)
class Progress:
    """How far a run, an export or a repair has come."""

    stages: tuple[StageStatistics, ...]
    flow_count: int | None  # flows expected; None: unknown
    flows_done: int  # flows that every output has taken
    seconds: float  # since the first frame or flow was asked for


@dataclass(frozen=True)
class Report:
    """What a command did."""

    def as_json(self) -> dict[str, object]:
        """The report as plain values, for a file."""
        return asdict(self)


@dataclass(frozen=True)
class OutputReport:
    """One output that was written."""

    path: str
    bytes_written: int
    notes: tuple[str, ...] = ()  # e.g. how many vectors were beyond range
    flo_bytes: int | None = None  # what the flows written to it would have taken as .flo files; None: not compared


def output_report(sink: Sink, flo_bytes: int | None = None) -> OutputReport:
    """The report of a sink that is done."""
    return OutputReport(sink.path, sink.bytes_written, tuple(sink.notes), flo_bytes)


def is_finished(sink: Sink, flows: int) -> bool:
    """Whether the output is complete; where it is one file per flow, whether it holds that many flows."""
    if isinstance(sink, OneFileAFlow):
        return sink.holds(flows)
    return os.path.isfile(os.path.join(sink.path, "zarr.json") if isinstance(sink, Resumable) else sink.path)


def named_outputs(outputs: PathLike | Iterable[PathLike], stem: str) -> list[str]:
    """The outputs' names with ``{stem}`` filled in, spelt as their sinks spell them: ``X.zarr`` for ``./X.zarr``.

    Raises UsageError for no outputs, or two that would collide.
    """
    paths = [str(Path(name.replace("{stem}", stem))) for name in as_names(outputs)]
    if not paths:
        raise UsageError("give at least one output")
    for number, path in enumerate(paths):
        for before in paths[:number]:
            if os.path.realpath(path) == os.path.realpath(before):
                again = "" if path == before else f", the other time as {before}"
                raise UsageError(f"{path} is given twice as an output{again}")
            for one, other in ((path, before), (before, path)):
                require_apart(one, other, "another output")
                require_apart(one, f"{other}.partial", f"the unfinished {other}")
        require_outside_stores(path)
    return paths


def first_store(sinks: Iterable[Sink]) -> ResumableSink | None:
    """The output that --resume continues: the first store. The others are made anew, from it when it is complete."""
    return next((sink for sink in sinks if isinstance(sink, Resumable)), None)


@contextmanager
def opened_sinks(sinks: Sequence[Sink], header: FlowInfo, *, resumes: bool = False) -> Iterator[None]:
    """Opens the sinks; when the block raises, those that are open are aborted.

    What they keep nevertheless is added to the error as notes. With ``resumes``, the note of the store that --resume
    continues says so, unless that would fail in the same way.
    """
    opened: list[Sink] = []
    continued = first_store(sinks) if resumes else None
    try:
        for sink in sinks:
            sink.open(header)
            opened.append(sink)
        yield
    except TruncatedSourceError:
        raise  # the sinks were committed as unfinished and keep what they hold
    except BaseException as error:
        for sink in opened:
            if kept := sink.abort():
                goes_on = sink is continued and not isinstance(error.__cause__, FrameSizeError)
                error.add_note(kept + ("; --resume continues it" if goes_on else ""))
        raise


def named_files(sink: Sink) -> list[Path]:
    """The files, or the folder, of a finished output."""
    if isinstance(sink, OneFileAFlow):
        return [file for file in sink.files() if not file.is_dir()]
    return [Path(sink.path)] if is_finished(sink, 0) else []


def unname(sink: Sink) -> None:
    """Gives a finished output its unfinished name again, as it is about to be made anew.

    What is no output of ours, such as a folder of other files, is left to the sink, which refuses it. Raises
    OutputBusyError while another run writes the output.
    """
    lock = path = Path(sink.path)
    if isinstance(sink, OneFileAFlow):
        lock = path.with_name(f".{path.name}")
    named = named_files(sink)
    if not named:
        return
    with write_errors(sink.path):
        unfinished = partial_path(lock)
        claim = Claim.of_folder(unfinished, sink.path) if lock.is_dir() else claimed_file(unfinished, sink.path)
        try:
            for one in named:
                if one.is_dir():
                    remove(partial_path(one))  # a folder is renamed over nothing else
                os.replace(one, partial_path(one))
            sync_folder(path.parent)
        finally:
            claim.withdraw()


def commit(sink: Sink, *, complete: bool = True) -> None:
    """Finishes an output. What it still had to write may fail: that is its stage's failure, as it is before."""
    try:
        sink.commit(complete=complete)
    except Exception as error:
        raise StageError(f"write {sink.path}", frame_of(error, None), error) from error


def commit_in_order(sinks: Iterable[Sink], losses: Sequence[str], *, complete: bool, replaces: bool) -> None:
    """Finishes the outputs of a run. ``losses``: what its source lacked. ``replaces``: they may replace earlier ones.

    The store is named first: if the run is killed then, --resume makes the other outputs from it. A store that may
    replace one is named last: where it is complete, no other output is that of an earlier run.
    """
    continued = first_store(sinks)
    for sink in sorted(sinks, key=lambda sink: (sink is continued) == replaces):
        if losses and isinstance(sink, Resumable):
            sink.tell_losses(losses)
        commit(sink, complete=complete)


class Counting(Protocol):
    """Anything that takes flows in a pipeline and counts them."""

    @property
    def flows(self) -> int: ...


def preparing(sink: Sink) -> DeviceSink | None:
    """The sink, if part of its work is done on the device that holds the flow; else None."""
    return sink if isinstance(sink, DeviceSink) and sink.prepares else None


class Tally:
    """Writes to one sink and counts the flows. Copies flow from the GPU to the host, or what the sink made of it.

    source: what the flow is computed from, to tell the sink what it loses.
    """

    def __init__(self, sink: Sink, source: object = None, *, on_gpu: bool = False) -> None:
        self.sink = sink
        self.flows = 0
        self._source = source
        self._on_gpu = on_gpu

    def consume(self, flows: Iterator[FlowBatch]) -> None:
        if isinstance(self._source, MayLose) and isinstance(self.sink, Resumable):
            flows = _noting_loss(flows, self._source, self.sink)
        if self._on_gpu and (sink := preparing(self.sink)) is not None:
            landing = sink.landing if isinstance(sink, LandingSink) else None
            for prepared in download(sink.prepare(flows), landing):
                sink.take(prepared)
                self.flows += len(prepared)
        else:
            for batch in download(flows):
                self.sink.write(batch)
                self.flows += len(batch)


def _noting_loss(flows: Iterator[FlowBatch], source: MayLose, sink: Resumable) -> Iterator[FlowBatch]:
    """The flows; before one that a missing or damaged frame affects, the sink has been told of that frame."""
    for batch in flows:
        if source.first_loss is not None:
            sink.note_loss(source.first_loss)
        yield batch
        del batch  # not kept alive while the next one is made


def teller(
    progress: ProgressHook | None, tallies: Sequence[Counting], count: int | None
) -> Callable[[tuple[StageStatistics, ...]], None]:
    """A progress hook for a pipeline that tells the caller's hook how many flows all outputs have taken."""
    started_s = time.perf_counter()

    def tell(stages: tuple[StageStatistics, ...]) -> None:
        if progress is not None:
            done = min(tally.flows for tally in tallies)
            progress(Progress(stages, count, done, time.perf_counter() - started_s))

    return tell
