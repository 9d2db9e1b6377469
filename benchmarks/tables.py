"""Rows of a result as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


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
