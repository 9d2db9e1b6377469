"""``flowreel weights``: the published checkpoints, and weights files of both kinds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from flowreel.engine.cli import loading, printable
from flowreel.engine.cli.help import Command, Group
from flowreel.engine.cli.info import print_facts
from flowreel.engine.cli.options import Debug, Quiet
from flowreel.engine.cli.table import line_console, size
from flowreel.engine.data import JSON
from flowreel.engine.errors import UsageError

PLAIN_STEP = 0.1  # without a terminal, a line for every tenth of the file

weights_app = typer.Typer(
    name="weights",
    cls=Group,
    help="Known checkpoints, and what weights files hold: list, info, convert, download.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")]


@weights_app.command("list", cls=Command)
def list_known(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the shipped weights and NVIDIA's seven checkpoints: model, size, licence, sha256, and which are downloaded.

    \b
    [bold]Examples[/bold]
      flowreel weights list
      flowreel weights list --json
    """
    with loading():
        from flowreel.engine.models.weights import known_weights

    facts = known_weights()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(_table(facts))


@weights_app.command(cls=Command)
def info(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A file, 'baseline', or a downloaded checkpoint's name.", show_default=False
        ),
    ],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a weights file contains: model, size, licence, history, and which known checkpoint it is, if any.

    \b
    [bold]Examples[/bold]
      flowreel weights info baseline
      flowreel weights info FlowNet2-C_checkpoint.pth.tar --json
    """
    with loading():
        from flowreel.engine.models.weights import read_weights

    facts = read_weights(source).summary()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    print_facts({"path": source, "kind": "weights", **facts})


@weights_app.command(cls=Command)
def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="IN", help="A .pth.tar, a .safetensors, or a downloaded checkpoint's name."),
    ],
    output: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="X.safetensors, or X.pth.tar as flownet2-pytorch loads it."),
    ],
    half: Annotated[
        bool, typer.Option("--half", help="Store float16: half the size; .safetensors only. Values lose digits.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    debug: Debug = False,
) -> None:
    """Convert NVIDIA's .pth.tar to .safetensors, or back. float32 values stay bit-identical.

    Licence and history go along, with the name and sha256 of what was converted.

    \b
    [bold]Examples[/bold]
      flowreel weights convert FlowNet2_checkpoint.pth.tar FlowNet2.safetensors
      flowreel weights convert FlowNet2-C small.safetensors --half
      flowreel weights convert mine.safetensors mine_checkpoint.pth.tar
    """
    with loading():
        from flowreel.engine.models.saving import convert as convert_file

    held = convert_file(source, output, half=half, overwrite=overwrite)
    typer.echo(f"{printable(str(output))}: {held.model}, licence: {printable(held.licence)}, sha256 {held.sha256}")


@weights_app.command(cls=Command)
def download(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A checkpoint that 'flowreel weights list' shows.", show_default=False)
    ],
    output: Annotated[
        str | None,  # a Path would lose the slash at the end of a folder
        typer.Option(
            "--output",
            "-o",
            help="A file, or a folder (DIR/). \\[default: the cache, where --weights NAME finds it]",
            show_default=False,
        ),
    ] = None,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Accept the licence without being asked, in scripts.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Fetch it again, replacing the file.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Download and check one of NVIDIA's checkpoints, after accepting its licence (research only).

    An interrupted download goes on where it stopped. Nothing has the file's name before its size and sha256 are right;
    of FlowNet2-SD and FlowNet2-CSS-ft-sd nobody knows the sha256: there the file must load as its model.
    Downloads go to $FLOWREEL_CACHE/weights, else to flowreel/weights in the user's cache folder.

    \b
    [bold]Examples[/bold]
      flowreel weights download FlowNet2
      flowreel run dance.mp4 --weights FlowNet2
      flowreel weights download FlowNet2-C -o weights/ --accept-licence
    """
    with loading():
        from flowreel.engine.models.checkpoints import LICENCE_TEXT, checkpoint
        from flowreel.engine.models.download import download as fetch

    wanted = checkpoint(name)
    if not accept_licence:
        _ask(LICENCE_TEXT)
    with _Meter(quiet) as meter:
        path = fetch(wanted, output, overwrite=overwrite, show=meter.show, tell=meter.tell)
    typer.echo(path)


def _ask(text: str) -> None:
    if sys.stdin is None or not sys.stdin.isatty():  # None: closed
        raise UsageError(
            "these weights have a licence to accept, and nobody is here to ask: pass --accept-licence. " + text
        )
    # Not typer.confirm, which prints a space to stdout: only the file's path belongs there.
    typer.echo(f"{text}\nAccept this licence and download? [y/N] ", err=True, nl=False)
    answer = sys.stdin.readline()
    if not answer:
        raise typer.Abort
    if answer.strip().lower() not in ("y", "yes"):
        typer.echo("not accepted: nothing was downloaded", err=True)
        raise typer.Exit(1)


class _Meter:
    """Download progress on stderr: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.console = line_console()
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        live = not quiet and self.console.is_terminal
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not live)
        self.task = self.progress.add_task("download", total=None)
        self._quiet = quiet
        self._next = PLAIN_STEP

    def __enter__(self) -> _Meter:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, done: int, whole: int | None) -> None:
        self.progress.update(self.task, completed=done, total=whole)
        if self.progress.disable and whole and done >= self._next * whole:
            self._next = done / whole + PLAIN_STEP
            self.tell(f"{size(done)} of {size(whole)}")

    def tell(self, line: str) -> None:
        if not self._quiet:
            self.console.print(printable(line))


def _table(facts: list[dict[str, JSON]]) -> str:
    """One line per checkpoint, in columns."""
    rows = [("NAME", "MODEL", "SIZE", "HERE", "LICENCE", "SHA256")]
    for one in facts:
        exact, about = one["size_bytes"], one["about_bytes"]
        bytes_there = size(exact) if isinstance(exact, int) else f"~{size(about)}" if isinstance(about, int) else "?"
        licence = str(one["licence"]).split(";")[0]
        rows.append(
            (
                str(one["name"]),
                str(one["model"]),
                bytes_there,
                "shipped" if one["shipped"] else "yes" if one["downloaded"] else "no",
                licence,
                str(one["sha256"] or "not known"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)
