"""``flowreel repair``: damaged shards of a store, computed again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flowreel.engine.cli import loading, printable
from flowreel.engine.cli.options import Debug, Device, Quiet, Weights
from flowreel.engine.cli.table import Live, clock, size
from flowreel.engine.cli.verify import verdict
from flowreel.engine.errors import counted

if TYPE_CHECKING:
    from flowreel.engine.repair import RepairReport


def repair(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A finished flow store.", show_default=False)],
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="What it was made of, as given to run.", show_default=False)
    ],
    weights: Weights = "baseline",
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what is wrong and what would be computed again.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Recompute the damaged shards of STORE from the SOURCE it was made of.

    Finds what verify finds: flipped bits, truncated or missing shards and chunks. Settings are taken from the store,
    and everything still readable is kept. On a CPU the new shards are byte-identical to the original ones.

    Exit code 0 if nothing is wrong in the end, else 1.

    \b
    [bold]Examples[/bold]
      flowreel repair dance.flow.zarr dance.mp4 --dry-run
      flowreel repair dance.flow.zarr dance.mp4
    """
    with loading():
        from flowreel.engine import repair as repairing

    with Live(quiet) as live:
        report = repairing.repair(store, source, weights=weights, device=device, dry_run=dry_run, progress=live.show)
    for line in summary(report, dry_run):
        live.say(line)
    if not (quiet and report.after.sound):
        typer.echo("\n".join(map(printable, verdict(report.after))))
    if not report.after.sound:
        raise typer.Exit(1)


def summary(report: RepairReport, dry_run: bool) -> list[str]:
    """What was wrong and what was done about it."""
    if report.before.sound:
        return []
    again = [*map(str, report.shards), *report.arrays]
    if dry_run:
        return [f"to be made again: {one}" for one in again] or ["nothing that can be computed again"]
    lines = [*verdict(report.before), *(f"made again: {one}" for one in again)]
    if report.shards:
        lines += [
            f"{counted(report.flows, 'flow')} of {counted(len(report.shards), 'shard')} "
            f"computed in {clock(report.seconds)}, {size(report.bytes_written)} written",
            report.how,
        ]
    return [*lines, *(f"note: {note}" for note in report.notes)]
