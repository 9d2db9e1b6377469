"""The commands, each in its own module."""

from __future__ import annotations

from typing import Annotated

import typer.main

from flowreel.engine.cli.bench import bench
from flowreel.engine.cli.color import color
from flowreel.engine.cli.demo import demo
from flowreel.engine.cli.doctor import doctor
from flowreel.engine.cli.export import export
from flowreel.engine.cli.help import Command, Group
from flowreel.engine.cli.info import info
from flowreel.engine.cli.repair import repair
from flowreel.engine.cli.run import run
from flowreel.engine.cli.train import train
from flowreel.engine.cli.verify import verify
from flowreel.engine.cli.weights import weights_app

app = typer.Typer(
    name="flowreel",
    cls=Group,
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


for command in (run, demo, info, color, export, verify, repair, train, doctor):
    app.command(cls=Command)(command)
# All arguments, --help included, are passed on to ``python -m benchmarks``.
passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command(cls=Command, context_settings=passed_on)(bench)
app.add_typer(weights_app)
command_line = typer.main.get_command(app)  # once: a call of ``app`` itself would make it anew, in 35 ms
