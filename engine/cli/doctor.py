"""``flowreel doctor``: what is there, what works, and how to mend what does not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from flowreel.engine.cli import loading, printable
from flowreel.engine.cli.options import Debug

if TYPE_CHECKING:
    from flowreel.engine.doctor import Diagnosis

_STYLES = {"ok": "green", "missing": "yellow", "broken": "red"}


def doctor(
    gpu: Annotated[bool, typer.Option("--gpu", help="Fail also when something a GPU run needs is missing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
    debug: Debug = False,
) -> None:
    """Check what flowreel builds on: torch, decoders, codecs, weights, and the GPU's own parts.

    The exit code is 0 when all that a run on the CPU needs works (with --gpu: all that a run on a GPU needs).
    """
    from flowreel.engine.doctor import examine

    with loading():  # each check imports what it looks at
        diagnosis = examine()
    if as_json:
        typer.echo(json.dumps(diagnosis.as_json(), indent=2, allow_nan=False))
    else:
        _print(diagnosis)
    if diagnosis.wanting("cpu", "gpu") if gpu else diagnosis.wanting("cpu"):
        raise typer.Exit(1)


def _print(diagnosis: Diagnosis) -> None:
    """One aligned line per check, below it the advice if it is not ok, and the overall result at the end."""
    console = Console(soft_wrap=True, highlight=False)
    width = max(len(check.name) for check, _ in diagnosis.found)
    for check, finding in diagnosis.found:
        about = printable(", ".join(filter(None, (finding.version, finding.detail))))
        status = (f"{finding.status:7}", _STYLES[finding.status])
        console.print(Text.assemble(status, "  ", (check.name.ljust(width), "bold"), f"  {about}"))
        if finding.status != "ok":
            advice = f"for {check.needed_for}: {printable(finding.advice)}"
            console.print(Text(" " * (width + 11) + advice, "dim"))
    for device, wanting in (("the CPU", diagnosis.wanting("cpu")), ("a GPU", diagnosis.wanting("cpu", "gpu"))):
        outcome = f"lacks {', '.join(wanting)}" if wanting else "has all it needs"
        console.print(f"a run on {device} {outcome}")
