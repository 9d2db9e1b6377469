"""The example as a user runs it, with fewer clips: it learns, needs both streams, and computes flow once."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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


def test_a_clip_does_not_depend_on_how_many_there_are(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the cache would refuse it in a second run with more clips."""
    made: list[tuple[float, str, float]] = []

    def still(picture: Tensor, motion: str, speed: float, frame: int) -> Tensor:
        made.append((float(picture.sum()), motion, speed))
        return torch.zeros(3, example.HEIGHT, example.WIDTH, dtype=torch.uint8)

    monkeypatch.setattr(example, "moved", still)
    example.render(tmp_path, "few", 1, seed=1)
    few = set(made)
    made.clear()
    example.render(tmp_path, "many", 2, seed=1)
    assert len(few) == 8
    assert few < set(made)
