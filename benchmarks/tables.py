"""Rows of a result as a Markdown table, and the tables of README and docs made from the newest results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.results import RESULTS, load, newest

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))  # where tables stand


def as_markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """One column a key, in the order in which the keys first appear; a sample as its median and half its spread."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return _sample(value)
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _sample(cell: Mapping[str, float]) -> str:
    """Median, and half the distance from low to high as a share of it."""
    middle = cell["median"]
    shown = f"{middle:.3g}" if 0 < abs(middle) < 100 else f"{middle:.0f}"
    if cell["n"] < 2 or not middle:
        return shown
    return f"{shown} ±{abs(50 * (cell['high'] - cell['low']) / middle):.1f} %"


def with_tables(text: str, results: Path = RESULTS) -> str:
    """The text with every table below a ``<!-- table: NAME -->`` line replaced by the newest result of that name.

    A case that has no result yet leaves what stands there.
    """

    def table(match: re.Match[str]) -> str:
        path = newest(match["name"], results)
        return match[0] if path is None else f"{match['marker']}\n{as_markdown(load(path)['rows'])}\n"

    return re.sub(r"(?P<marker><!-- table: (?P<name>[\w-]+) -->)\n(?:[^\n]+\n)*", table, text)
