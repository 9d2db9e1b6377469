"""``flowreel info``: what a file is."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from flowreel.engine.cli.options import Debug


def info(
    path: Annotated[
        str, typer.Argument(help="A video, a .flo, a flow store (complete or not) or weights.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a video, a .flo file, a flow store or a weights file holds."""
    from flowreel.engine.describe import describe

    facts = describe(path)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        if value not in (None, [], {}):
            typer.echo(f"{name.replace('_', ' '):{width}}  {_plain(value)}")


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
