"""The named cases, and how one of them is run.

A case is a module in this folder and an entry in ``CASES``. The first line of its docstring says what it measures, and

    run(...) -> dict with "rows": a list of table rows, and whatever else the result should hold

measures it. ``run`` may take two parameters, which have defaults and are passed by name to a case that declares them:
``short: bool`` (a small set that takes about a minute; a case without it is left out of ``--short``) and ``ceilings``
(the machine's measured limits, see ``benchmarks.ceilings``). A cell of a row is a name or a count, which identify what
was measured; a *sample* (see ``benchmarks.measure``) or a float, which are measurements; or None. A case that cannot
run on this machine raises ``Skipped``; a row that could not be measured gives its reason under ``"skipped"``.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.measure import Skipped

CASES = (
    "ceilings",
    "startup",
    "kernels",
    "model",
    "decode",
    "encode",
    "lazy",
    "classical",
    "peers",
    "end_to_end",
    "backpressure",
    "memory",
    "old_way",
    "scaling",
    "accuracy",
    "clips",
    "storage",
    "kills",
)


SKIPPED = 3  # exit code of ``benchmarks.one`` for a case that says why it cannot run here


def describe(name: str) -> str:
    """The first line of the case's docstring."""
    return (ast.get_docstring(_source(name)) or "").partition("\n")[0]


def has_short(name: str) -> bool:
    return "short" in _parameters(name)


def takes_ceilings(name: str) -> bool:
    return "ceilings" in _parameters(name)


def _source(name: str) -> ast.Module:
    """Parsed, not imported: listing the cases must not wait for torch to load, nor fail where an extra is missing."""
    return ast.parse((Path(__file__).parent / f"{name}.py").read_text())


def _parameters(name: str) -> list[str]:
    runs = [node for node in _source(name).body if isinstance(node, ast.FunctionDef) and node.name == "run"]
    if len(runs) != 1:
        raise TypeError(f"benchmarks/{name}.py has no run()")
    arguments = runs[0].args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def measure(name: str, short: bool, ceilings: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Runs one case in this process. Raises what the case raises, and ``Skipped`` where a package is missing."""
    try:
        run = import_module(f"benchmarks.{name}").run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("benchmarks", "flowreel"):
            raise
        raise Skipped(f"{error.name} is not installed: pip install 'flowreel[test]' has everything") from error
    offered: dict[str, Any] = {"short": short, "ceilings": ceilings}
    result: dict[str, Any] = run(**{key: offered[key] for key in _parameters(name) if key in offered})
    return result
