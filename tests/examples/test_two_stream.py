"""The example as a user runs it, with fewer clips: it learns, needs both streams, and computes flow once."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "two_stream.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("two_stream", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns_from_flow_that_is_computed_once(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, picture_alone, motion_alone = example.main(["--folder", str(tmp_path), "--clips", "4", "--epochs", "8"])
    assert both > 0.9
    assert picture_alone < 0.6  # it shows no more than the ground, which four motions share
    assert motion_alone < both
    told = capsys.readouterr().out
    computed = [int(number) for number in re.findall(r"(\d+) flows computed", told)]
    assert computed == [4 * 8 * 6, 0, 0, 0, 0, 0, 0, 0]
    assert f"held out: {both:.0%} recognised" in told
