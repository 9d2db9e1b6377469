"""What a person sees during a run and at its end: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flowreel.engine.cli import printable
from flowreel.engine.errors import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flowreel.engine.manifest import SourceReport
    from flowreel.engine.many import ManyProgress, ManyReport
    from flowreel.engine.outputs import Progress
    from flowreel.engine.run_report import RunReport

_BAR_WIDTH = 26  # characters: a line of 80 also holds "1023 of 1188 flows, 12.34 flows/s, 1:02:03 to go"
_LOG_WIDTH = 10_000  # characters: names in a log are not broken
PLAIN_EVERY_S = 10.0  # a log file needs a line only now and then


class Live:
    """``show`` is a run's progress hook. Draws on stderr, so that stdout stays free for what commands print."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, markup=False, emoji=False)
        self._live = None if quiet or not self.console.is_terminal else RichLive(console=self.console, transient=True)
        self._quiet = quiet
        self._next_line_s = PLAIN_EVERY_S
        self._source = 0  # number of the last one that was named

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, words: str) -> None:
        """Prints a line above the live table."""
        if not self._quiet:
            self.console.print(printable(words), highlight=False, soft_wrap=True)

    def show(self, progress: Progress) -> None:
        if self._live is not None:
            self._live.update(Group(stage_table(progress), _bar(progress)))
        elif not self._quiet and progress.seconds >= self._next_line_s:
            self._next_line_s = progress.seconds + PLAIN_EVERY_S
            self.console.print(_headline(progress), highlight=False)

    def show_many(self, progress: ManyProgress) -> None:
        """The progress hook of a run over many sources."""
        if self._live is not None:
            one = [] if progress.run is None else [stage_table(progress.run), _bar(progress.run)]
            self._live.update(Group(*one, _sources_bar(progress)))
            return
        if progress.number != self._source:
            self._source, self._next_line_s = progress.number, PLAIN_EVERY_S
            if not self._quiet:
                self.console.print(_place(progress), highlight=False, soft_wrap=True)
        if progress.run is not None:
            self.show(progress.run)


def stage_table(progress: Progress) -> Table:
    """One line per stage: its items, the shares of time spent working and waiting, and the length of its queue."""
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "items", "busy", "waits for input", "waits for room", "queue"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in progress.stages:
        whole_s = max(stage.busy_s + stage.wait_in_s + stage.wait_out_s, 1e-9)
        shares = (f"{part / whole_s:.0%}" for part in (stage.busy_s, stage.wait_in_s, stage.wait_out_s))
        table.add_row(printable(stage.name), str(stage.items), *shares, str(stage.queue))
    return table


def _bar(progress: Progress) -> Table:
    return _beside(ProgressBar(progress.flow_count, progress.flows_done, width=_BAR_WIDTH), _headline(progress))


def _sources_bar(progress: ManyProgress) -> Table:
    return _beside(ProgressBar(progress.count, progress.number - 1, width=_BAR_WIDTH), _place(progress))


def _beside(bar: ProgressBar, words: str) -> Table:
    """The bar and the words on one line; words that do not fit are cut."""
    line = Table.grid(padding=(0, 1))
    line.add_row(bar, Text(words, no_wrap=True, overflow="ellipsis"))
    return line


def _place(progress: ManyProgress) -> str:
    failed = f", {progress.failed} failed" if progress.failed else ""
    return f"source {progress.number} of {progress.count}{failed}: {printable(progress.source)}"


def _headline(progress: Progress) -> str:
    rate = progress.flows_done / max(progress.seconds, 1e-9)
    left = ""
    if progress.flow_count is not None and progress.flows_done:
        left = f", {clock((progress.flow_count - progress.flows_done) / rate)} to go"
    count = progress.flow_count
    done = "" if count is None else f"{progress.flows_done} of "
    return f"{done}{counted(progress.flows_done if count is None else count, 'flow')}, {rate:.2f} flows/s{left}"


def line_console(quiet: bool = False) -> Console:
    """Prints lines on stderr as they are."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=quiet)


def print_summary(report: RunReport) -> None:
    """What ran, how fast, and how large the outputs are compared with ``.flo`` files."""
    console = line_console()
    if not report.pairs:  # a resumed run that found everything done
        for note in report.notes:
            console.print(printable(note))
        return
    console.print(
        f"{counted(report.pairs, 'flow')} of {report.width}x{report.height} in {clock(report.seconds)} "
        f"({report.pairs_per_s:.2f} flows/s; startup {report.startup_s:.1f} s)"
    )
    console.print(printable(_how(report)))
    for output in report.outputs:
        share = beside_flo(output.flo_bytes or 0, output.bytes_written)
        # Only the store was resumed; the other outputs were made from all of it.
        added = " more" if report.flows > report.pairs and output is report.outputs[0] else ""
        console.print(f"{printable(output.path)}  {size(output.bytes_written)}{added}{share}")
        for note in output.notes:
            console.print(f"  {printable(note)}")
    for note in report.notes:
        console.print(f"note: {printable(note)}")


def print_many(report: ManyReport) -> None:
    """One line per source, the errors of those that failed, and where the manifest is."""
    console = line_console()
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    table = Table(box=None, pad_edge=False)
    for heading in ("source", "status", "flows", "time", "size"):
        table.add_column(heading, justify="left" if heading in ("source", "status") else "right", overflow="fold")
    for source in report.sources:
        table.add_row(*(Text(printable(cell)) for cell in _cells(source)))
    console.print(table)
    runs = [(source.source, source.run) for source in report.sources if source.run is not None]
    for note, names in _by_text((name, note) for name, run in runs for note in _notes(run)).items():
        alike = "note" if 1 < len(names) == len(runs) else _named(names)
        console.print(printable(f"{alike}: {note}"))
    ways = _by_text((name, _how(run)) for name, run in runs)
    for how, names in ways.items():
        console.print(printable(how if len(ways) == 1 else f"{_named(names)}: {how}"))
    for source in report.sources:
        if source.error is not None:
            told = "; ".join([str(source.error), *getattr(source.error, "__notes__", ())])
            console.print(printable(f"{source.source}: {told}"))
    counts = (f"{sum(s.status == status for s in report.sources)} {status}" for status in ("done", "skipped", "failed"))
    console.print(f"{', '.join(counts)} in {clock(report.seconds)}; see {printable(report.manifest)}")


def _cells(source: SourceReport) -> tuple[str, ...]:
    status = "skipped: there already" if source.status == "skipped" else source.status
    flows = "" if source.flows is None else str(source.flows)
    ran = source.status != "skipped"
    written = "" if source.run is None else size(source.run.bytes_written)
    return source.source, status, flows, clock(source.seconds) if ran else "", written


def _notes(report: RunReport) -> list[str]:
    return [note for output in report.outputs for note in output.notes] + list(report.notes)


def _by_text(said: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """From (source, text): each text once, with the sources it concerns."""
    by_text: dict[str, list[str]] = {}
    for name, text in said:
        names = by_text.setdefault(text, [])
        if name not in names[-1:]:  # two outputs of one source may say the same
            names.append(name)
    return by_text


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} sources such as {names[0]}"


def _how(report: RunReport) -> str:
    return (
        f"{report.model} ({report.weights}), {report.precision}, batch {report.batch}, on {report.device}; "
        f"decoded by {report.decoder}; kernels: {_which(report.kernels)}"
    )


def _which(kernels: Mapping[str, str]) -> str:
    """``cuda``; ``none``; or where they differ ``cuda (correlation), torch (channel_norm, warp)``."""
    by = {how: sorted(name for name in kernels if kernels[name] == how) for how in sorted(set(kernels.values()))}
    if len(by) < 2:
        return "".join(by) or "none"
    return ", ".join(f"{how} ({', '.join(names)})" for how, names in by.items())


def beside_flo(flo_bytes: int, written: int) -> str:
    """``, 4.2x smaller than .flo``; empty if there is nothing to compare or hardly a difference."""
    if not flo_bytes or not written or round(flo_bytes / written, 1) == 1:
        return ""
    smaller = flo_bytes / written
    return f", {smaller:.1f}x smaller than .flo" if smaller > 1 else f", {1 / smaller:.1f}x larger than .flo"


def clock(seconds: float) -> str:
    """42.0 s, 3:05 or 1:02:03."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """A number of bytes as text, in powers of ten, as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if round(count, 1) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
