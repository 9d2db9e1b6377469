"""Counts the catalogue's cases. By its name this is the last file of the folder, so it runs last."""

from __future__ import annotations

from pathlib import Path

import pytest

CASES = 2000  # different ones: the same task on the same bytes counts once
HERE = Path(__file__).parent


def test_the_catalogue_has_thousands_of_cases(
    request: pytest.FixtureRequest, judged: set[bytes], begun: set[str]
) -> None:
    items = [item for item in request.session.items if Path(item.path).parent == HERE]
    ran = {Path(item.path).name for item in items}
    if ran != {path.name for path in HERE.glob("test_*.py")} or request.config.getoption("keyword"):
        pytest.skip("only a part of the catalogue was asked for")
    if not begun.issuperset(item.nodeid for item in items if "catalogue" in getattr(item, "fixturenames", ())):
        pytest.skip("another process has a part of the catalogue")
    assert len(judged) >= CASES
