"""Markdown tables from rows, and how a page's markers are filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import cases_in, newest
from benchmarks.tables import PAGES, as_markdown, filled


def test_a_table_has_every_column_in_order_of_appearance(sample: Any) -> None:
    rows = [
        {"op": "warp", "ms": sample(2.0, 0.05), "gpu": None},
        {"op": "norm", "share": 0.03, "ms": None, "gpu": None},
    ]
    assert as_markdown(rows).splitlines() == [
        "| op | ms | share |",
        "| --- | --- | --- |",
        "| warp | 2 ±5.0 % |  |",
        "| norm |  | 0.03 |",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.56, "1235"), (99.126, "99.13"), (0.1, "0.10"), (0.01234, "0.012"), (0.0, "0.00"), (7, "7"), ("a b", "a b")],
)
def test_numbers_have_the_digits_that_say_something(value: object, shown: str) -> None:
    assert as_markdown([{"x": value}]).splitlines()[-1] == f"| {shown} |"


def test_a_single_timing_has_no_spread(sample: Any) -> None:
    assert "±" not in as_markdown([{"x": sample(0.1234, 0.5, n=1)}])
    assert as_markdown([{"x": sample(1234.5, 0.1)}]).endswith("| 1234 ±10.0 % |")


PAGE = """Before.
<!-- table: model | size=8x8 | batch=1 -->
| stale |
<!-- where: model -->
old words

<!-- plot: speed -->

<!-- table: nothing-yet -->
| stays |

After."""


def test_pages_are_filled_from_the_newest_results(tmp_path: Path, write: Any) -> None:
    results, plots, page = tmp_path / "results", tmp_path / "docs" / "plots", tmp_path / "docs" / "page.md"
    rows = [{"model": m, "size": s, "batch": b, "ms": b * 1.5} for m in "CS" for s in ("8x8", "9x9") for b in (1, 2)]
    write(results, "model", [{"model": "older"}], {"date": "2031-05-05"})
    write(results, "model", [{"model": "short"}], {"date": "2031-05-07"}, short=True)
    write(results, "model", rows)
    plots.mkdir(parents=True)
    (plots / "speed.svg").touch()
    text = filled(PAGE, page, results, plots)
    assert text == (
        "Before.\n<!-- table: model | size=8x8 | batch=1 -->\n"
        "| model | ms |\n| --- | --- |\n| C | 1.50 |\n| S | 1.50 |\n"
        "<!-- where: model -->\n"
        "*Abacus, 2 cores, torch 2.13.0, 2031-05-06, commit abc1234; load 0.0 before and 0.5 after.*\n\n"
        "<!-- plot: speed -->\n![speed](plots/speed.svg)\n\n"
        "<!-- table: nothing-yet -->\n| stays |\n\nAfter."
    )
    assert filled(text, page, results, plots) == text
    at_root = filled("<!-- plot: speed -->\n", tmp_path / "README.md", results, plots)
    assert at_root == "<!-- plot: speed -->\n![speed](docs/plots/speed.svg)\n"


def test_of_several_runs_on_one_day_the_last_counts(tmp_path: Path) -> None:
    for name in (
        "2031-05-06-gpu",
        "2031-05-06-gpu-2",
        "2031-05-06-gpu-10",
        "2031-05-05-gpu-11",
        "2031-05-07-gpu-dry-run",
    ):
        (tmp_path / f"{name}.json").write_text(f'{{"rows": ["{name}"]}}')
    assert newest("gpu", tmp_path) == {"rows": ["2031-05-06-gpu-10"]}
    assert cases_in(tmp_path) == ["gpu", "gpu-dry-run"]


def test_a_result_without_rows_is_no_table(tmp_path: Path, write: Any) -> None:
    """A GPU run of only some parts may have no rows; then an older result is shown."""
    path = write(tmp_path, "model", [{"model": "C"}])
    (tmp_path / "2999-01-01-model.json").write_text('{"rows": []}')
    assert "| C |" in filled("<!-- table: model -->\n", tmp_path / "x.md", tmp_path), path


def test_a_condition_that_nothing_meets_is_an_error(tmp_path: Path, write: Any) -> None:
    write(tmp_path, "model", [{"model": "C"}])
    with pytest.raises(ValueError, match=r"no row .*model=D"):
        filled("<!-- table: model | model=D -->\n", tmp_path / "x.md", tmp_path)


def test_a_table_of_some_columns(tmp_path: Path, write: Any) -> None:
    write(tmp_path, "model", [{"model": "C", "ms": 3, "batch": 1, "size": "8x8"}, {"model": "S", "ms": 2, "batch": 2}])
    text = filled("<!-- table: model | batch=1 | only: ms, model -->\n", tmp_path / "x.md", tmp_path)
    assert text.splitlines()[1:] == ["| ms | model |", "| --- | --- |", "| 3 | C |"]
    with pytest.raises(ValueError, match=r"no row has speed: .*table: model"):
        filled("<!-- table: model | only: ms, speed -->\n", tmp_path / "x.md", tmp_path)


def test_every_marker_of_the_pages_names_a_case() -> None:
    """A marker with a misspelt name would stay empty without any error."""
    import re

    from benchmarks.cases import CASES
    from benchmarks.plots import NAMES

    for page in PAGES:
        for kind, asked in re.findall(r"<!-- (table|where|plot): ([^\n|]*?) *(?:\||-->)", page.read_text()):
            known = NAMES if kind == "plot" else ("gpu", *CASES, *(f"{case}-gpu" for case in CASES))
            assert asked in known, f"{page.name}: {kind} {asked}"
