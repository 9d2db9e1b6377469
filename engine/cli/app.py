"""The commands, each in its own module."""

from __future__ import annotations

from typing import Annotated

import typer

from flowreel.engine.cli.demo import demo
from flowreel.engine.cli.info import info
from flowreel.engine.cli.run import run
from flowreel.engine.cli.train import train

app = typer.Typer(
    name="flowreel",
    help="Video in, dense optical flow out, as a stream: a compressed store or a colour video.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"flowreel {version('flowreel')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for command in (run, demo, info, train):
    app.command(no_args_is_help=command in (run, info))(command)
