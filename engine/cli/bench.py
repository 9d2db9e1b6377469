"""``flowreel bench``: the named measurements, which are part of the repository and never installed."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import typer

from flowreel.engine.errors import UsageError

CHECKOUT = Path(__file__).resolve().parents[2]  # of an editable install


def bench(context: typer.Context) -> None:
    """Measure speed, memory and sizes by named cases; compare two results; make the README's tables from them."""
    if not (CHECKOUT / "benchmarks" / "__main__.py").is_file():
        raise UsageError(
            "the benchmarks are not part of the installed package, but of the repository: clone it, install it with "
            "pip install --editable . and ask again"
        )
    sys.path.insert(0, str(CHECKOUT))
    raise typer.Exit(import_module("benchmarks.__main__").main(context.args, prog="flowreel bench"))
