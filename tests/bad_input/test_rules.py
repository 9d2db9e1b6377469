"""The rules by which cases are judged: what breaks one is found, and a case that keeps them all passes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.conftest import LONGEST_LINE, MOST_GROWN_BYTES, MOST_KEPT_BYTES, Case, listing, wrong_with

COUNTS: dict[str, Any] = {"threads": [], "grown_bytes": 0, "kept_bytes": 0, "out": "", "err": ""}
REFUSED = COUNTS | {"code": 1, "err": "flowreel: it is damaged\n"}  # by a command
UNREAD = COUNTS | {"error": "FlowFileError", "message": "it is damaged"}  # by a reader


@pytest.fixture
def case(tmp_path: Path) -> Case:
    (tmp_path / "input").write_text("damaged")
    return Case("x", tmp_path, {"call": ["info", "input"]}, None, None, (), False, None, listing(tmp_path))


def test_errors_in_one_line_keep_the_rules(case: Case) -> None:
    (case.folder / "a.zarr.partial").mkdir()
    (case.folder / "a.zarr.partial" / "zarr.json").write_text("{}")
    assert list(wrong_with(case, REFUSED)) == list(wrong_with(case, UNREAD)) == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"crash": "Segmentation fault"}, "Segmentation fault"),
        (REFUSED | {"threads": ["decode"]}, "left threads running"),
        (REFUSED | {"grown_bytes": MOST_GROWN_BYTES + 1}, "took 400 MiB"),
        (REFUSED | {"kept_bytes": MOST_KEPT_BYTES + 1}, "keeps 600 MiB"),
        (COUNTS | {"code": 0}, "passed as good"),
        (REFUSED | {"code": 3}, "exit code 3"),
        (REFUSED | {"err": ""}, "expected one line"),
        (REFUSED | {"err": "flowreel: one\nflowreel: two\n"}, "expected one line"),
        (REFUSED | {"err": "flowreel: no end"}, "expected one line"),
        (REFUSED | {"err": "flowreel: \x1b[31m\n"}, "control characters"),
        (REFUSED | {"err": "flowreel: \xff\n"}, "no UTF-8"),
        (REFUSED | {"err": "flowreel: unexpected KeyError\n"}, "nobody foresaw"),
        (REFUSED | {"err": f"flowreel: {'x' * 2 * LONGEST_LINE}\n"}, "a line of"),
        (REFUSED | {"out": "done"}, "although it failed"),
        (UNREAD | {"err": "a C library"}, "a reader prints"),
        (UNREAD | {"message": "x" * (LONGEST_LINE + 1)}, "a message of"),
        (COUNTS | {"value": 7}, "passed as good"),
    ],
)
def test_a_broken_rule_is_found(case: Case, answer: Mapping[str, Any], words: str) -> None:
    (wrong,) = wrong_with(case, dict(answer))
    assert words in wrong


@pytest.mark.parametrize(
    ("name", "words"), [("input", "changed"), ("canary", "code executed"), ("a.zarr/zarr.json", "left ['a.zarr")]
)
def test_files_that_should_not_be_there_are_found(case: Case, name: str, words: str) -> None:
    (case.folder / name).parent.mkdir(exist_ok=True)
    (case.folder / name).write_text("something else")
    assert words in next(wrong_with(case, REFUSED))
