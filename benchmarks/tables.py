"""Rows of a result as a Markdown table, and the newest results in README and docs.

A line ``<!-- KIND: CASE -->`` in a page is a marker. The lines below it, up to an empty line or the next marker, are
generated from the newest result of that case, and left unchanged if there is none. KIND is

- ``table``: its rows. ``<!-- table: model | size=1024x448 | batch=1 -->`` keeps the rows with these cells, and omits
  these columns; ``<!-- table: model | only: model, pairs/s -->`` shows these columns only;
- ``where``: one line that says on which machine and when it was measured;
- ``plot``: the picture ``docs/plots/CASE.svg``, if it has been drawn (``benchmarks.plots``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.processes import ROOT
from benchmarks.results import RESULTS, Result, newest

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))  # pages that may contain markers
PLOTS = ROOT / "docs" / "plots"
_MARKED = re.compile(r"(?P<marker><!-- (?P<kind>table|where|plot): (?P<asked>[^\n]*?) -->)\n(?:(?!<!-- )[^\n]+\n)*")
_ONLY = "only: "

Row = Mapping[str, object]


def as_markdown(rows: Sequence[Row]) -> str:
    """One column per key, in order of first appearance; a sample as its median and half its spread.

    Columns without any value are left out.
    """
    columns = list(dict.fromkeys(key for row in rows for key, cell in row.items() if cell is not None))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return _sample(value)
    if isinstance(value, float) and 0 < abs(value) < 0.1:
        return f"{value:.2g}"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _sample(cell: Mapping[str, float]) -> str:
    """The median, and half the distance from low to high as a percentage of it."""
    middle = cell["median"]
    shown = f"{middle:.3g}" if 0 < abs(middle) < 100 else f"{middle:.0f}"
    if cell["n"] < 2 or not middle:
        return shown
    return f"{shown} ±{abs(50 * (cell['high'] - cell['low']) / middle):.1f} %"


def filled(text: str, page: Path, results: Path = RESULTS, plots: Path = PLOTS) -> str:
    """The text of ``page``, with the lines below each marker regenerated.

    Raises:
        ValueError: for a marker, no row of the result meets the conditions, or no row has one of the columns.
    """

    def below(match: re.Match[str]) -> str:
        case, *conditions = (part.strip() for part in match["asked"].split("|"))
        if match["kind"] == "plot":
            made = _picture(plots / f"{case}.svg", page)
        else:
            result = newest(case, results)
            made = None if result is None else _made(match["kind"], result, conditions, match["asked"])
        return match[0] if made is None else f"{match['marker']}\n{made}\n"

    return _MARKED.sub(below, text)


def _made(kind: str, result: Result, conditions: Sequence[str], asked: str) -> str:
    if kind == "where":
        return measured_on(result)
    columns = [name for part in conditions if part.startswith(_ONLY) for name in part[len(_ONLY) :].split(", ")]
    wanted = dict(condition.split("=", 1) for condition in conditions if not condition.startswith(_ONLY))
    rows = [row for row in result["rows"] if all(str(row.get(name)) == cell for name, cell in wanted.items())]
    if not rows:
        raise ValueError(f"no row of the result meets <!-- table: {asked} -->")
    if missing := [name for name in columns if all(row.get(name) is None for row in rows)]:
        raise ValueError(f"no row has {', '.join(missing)}: <!-- table: {asked} -->")
    shown = [columns or [name for name in row if name not in wanted] for row in rows]
    return as_markdown([{name: row.get(name) for name in names} for row, names in zip(rows, shown, strict=True)])


def measured_on(result: Result) -> str:
    """Hardware, torch's version, date, commit, load and any other remark, in one line."""
    machine = result["machine"]
    what = [f"{machine['gpu']}, " if machine.get("gpu") else "", f"{machine['cpu']}, {machine['cores']} cores"]
    torch = f"torch {machine['versions']['torch']}"
    commit = result.get("commit") or machine.get("commit") or "unknown"  # the first: given to a GPU run by --commit
    said = [f"{''.join(what)}, {torch}, {machine['date']}, commit {commit}"]
    if machine.get("load") is not None and "load_after" in result:
        said.append(f"load {machine['load']:.1f} before and {result['load_after']:.1f} after")
    if result.get("said"):
        said.append(str(result["said"]))
    return f"*{'; '.join(said)}.*"


def _picture(plot: Path, page: Path) -> str | None:
    if not plot.exists():
        return None
    return f"![{plot.stem.replace('-', ' ')}]({Path(os.path.relpath(plot, page.parent)).as_posix()})"
