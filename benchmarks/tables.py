"""Rows of a result as a Markdown table, and the README's tables made from the newest results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))  # where tables stand


def as_markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """One column a key of the first row; numbers with three significant digits."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def with_tables(text: str, results: Path = ROOT / "benchmarks" / "results") -> str:
    """The text with every table below a ``<!-- table: NAME -->`` line replaced by the newest result of that name."""

    def table(match: re.Match[str]) -> str:
        newest = max(results.glob(f"*-{match['name']}.json"))
        return f"{match['marker']}\n{as_markdown(json.loads(newest.read_text())['rows'])}\n"

    return re.sub(r"(?P<marker><!-- table: (?P<name>\w+) -->)\n(?:[^\n]+\n)*", table, text)
