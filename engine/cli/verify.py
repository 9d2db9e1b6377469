"""``flowreel verify``: whether stores are still what was written."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn

from flowreel.engine.cli import printable
from flowreel.engine.cli.options import Debug, Quiet
from flowreel.engine.errors import counted

if TYPE_CHECKING:
    from flowreel.engine.verify import Verification


def verify(
    stores: Annotated[
        list[str], typer.Argument(metavar="STORE", help="Flow stores, finished or not.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Read whole stores and check checksums, metadata, timestamps and completeness.

    Exit code 0 if nothing is wrong, else 1 with a list of what is.

    \b
    [bold]Examples[/bold]
      flowreel verify dance.flow.zarr
      flowreel verify --json flows/*.zarr
    """
    from flowreel.engine import verify as verifying

    done = []
    console = Console(stderr=True)
    # Instead of the default first column, which takes brackets in a name for markup.
    columns = (TextColumn("{task.description}", markup=False), *Progress.get_default_columns()[1:])
    for store in stores:
        # One bar per store, as it must be gone from the terminal before the result is printed there.
        with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
            task = bar.add_task(printable(store), total=None)
            done.append(verifying.verify(store, partial(_show, bar, task)))
        if not as_json and not (quiet and done[-1].sound):
            typer.echo("\n".join(map(printable, verdict(done[-1]))))
    if as_json:
        typer.echo(json.dumps([one.as_json() for one in done], indent=2))
    if not all(one.sound for one in done):
        raise typer.Exit(1)


def _show(bar: Progress, task: TaskID, flows: int, available: int) -> None:
    bar.update(task, completed=flows, total=available)


def verdict(one: Verification) -> list[str]:
    """The lines printed for one store: that it is sound, or what is wrong with it."""
    if one.sound:
        part = "" if one.available == one.flows else f"{one.available} of "  # a cache
        return [f"{one.path}: sound, {part}{counted(one.flows, 'flow')} of {one.width}x{one.height}"]
    if len(one.findings) == 1 and one.findings[0].first_flow is None:
        return [f"{one.path}: {one.findings[0]}"]
    heading = f"{one.path}: {counted(len(one.findings), 'thing')} wrong"
    return [heading, *(f"  {finding}" for finding in one.findings)]
