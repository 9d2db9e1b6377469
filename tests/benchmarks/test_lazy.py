"""The lazy case on a tiny scene has a row for each way of reading, computed and cached.

Measured times are not judged, because no test may depend on the speed of the machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lazy
from benchmarks.compare import _verdict
from benchmarks.measure import Effort, cell_value
from benchmarks.tables import as_markdown


def test_every_way_computed_and_cached(monkeypatch: pytest.MonkeyPatch, tiny_flownetc: str) -> None:
    def rows_of(clip: Path, options: dict[str, Any], *more: Any) -> list[dict[str, Any]]:
        return measured(clip, options | {"weights": tiny_flownetc}, *more)

    measured = lazy.model_rows
    monkeypatch.setattr(lazy, "model_rows", rows_of)
    monkeypatch.setattr(lazy, "found", lambda *_: "synthetic:still?size=64x48&frames=40")
    monkeypatch.setattr(lazy, "Effort", lambda **_: Effort(least=1, most=1, warm_up=0))
    result = json.loads(json.dumps(lazy.run(short=True)))
    rows: list[dict[str, Any]] = result["rows"]
    assert result["flows"] == 24
    assert [(row["read"], row["from"]) for row in rows] == [
        ("stream", "model"), *((way, "model") for way in lazy.WAYS), *((way, "cache") for way in lazy.WAYS),
    ]  # fmt: skip
    assert len(as_markdown(rows).splitlines()) == 2 + len(rows)
    assert rows[0]["seconds / stream's"]["median"] == 1
    for row in rows:
        compared = "seconds / stream's" if row["from"] == "model" else "throughput / computing's"
        assert (cell_value(row[compared]) or 0) > 0
        assert (cell_value(row["flows/s"]) or 0) > 0


@pytest.mark.parametrize(
    ("figure", "after", "verdict"),
    [("seconds / stream's", 1.5, "worse"), ("throughput / computing's", 1.5, "better"), ("flows/s", 0.5, "worse")],
)
def test_its_figures_are_judged_the_right_way(figure: str, after: float, verdict: str) -> None:
    assert _verdict(figure, 1.0, after, False) == verdict
