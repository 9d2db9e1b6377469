"""Plots: points and bars are in the right place, and every plot is made from its case's rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import svg
from benchmarks.plots import NAMES, draw


def places(picture: str) -> list[tuple[float, float]]:
    ElementTree.fromstring(picture)  # well-formed
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', picture)]


def test_powers_stand_evenly_on_a_logarithmic_axis() -> None:
    found = places(svg.line("t", [(1, 1), (10, 100), (100, 10_000)], "x", "y", log_y=True))
    (x0, y0), (x1, y1), (x2, y2) = found
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert x0 < x2
    assert y0 > y2  # y decreases upwards


def test_a_linear_axis_begins_at_zero_and_points_are_sorted() -> None:
    (x0, y0), (x1, y1) = places(svg.line("t", [(20, 200), (10, 100)], "x", "y", log_y=False))
    assert x0 < x1
    bottom = svg.HEIGHT - svg.BOTTOM
    assert (bottom - y0) * 2 == pytest.approx(bottom - y1, abs=0.2)


def test_a_logarithmic_axis_has_no_zero() -> None:
    with pytest.raises(ValueError, match="positive"):
        svg.line("t", [(0, 1)], "x", "y", log_y=False)


@pytest.mark.parametrize("values", [[(1.0, 5.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, -3.0), (1.0, 3.0)]])
def test_few_or_equal_points_are_drawn(values: list[tuple[float, float]]) -> None:
    assert len(places(svg.line("t", values, "x", "y", log_y=False))) == len(values)


def test_bars_are_as_long_as_their_numbers() -> None:
    picture = svg.bars("a < b & c", {"one": 1.0, "two & more": 2.0, "none": 0.0}, "x")
    ElementTree.fromstring(picture)
    one, two, none = (float(width) for width in re.findall(r'<rect x="250" [^>]*width="([\d.]+)"', picture))
    assert two == pytest.approx(2 * one, abs=0.2)
    assert none == 0


def test_every_plot_is_drawn_where_its_case_has_a_result(tmp_path: Path, write: Any, sample: Any) -> None:
    write(tmp_path, "storage", [{"flow": "clip", "codec": "blosc", ".flo / 1/64": 20.0}])
    network = {"weights": "width 1", "precision": "fp32", "size": "1024x448", "batch": 1, "pairs/s": sample(3.0)}
    write(tmp_path, "model", [network | {"model": "FlowNet2"}, network | {"model": "FlowNet2C", "batch": 4}])
    grown = [
        {"grows": axis, "x": x, "pairs/s": sample(5.0), "peak MB": sample(400.0)}
        for axis in ("resolution", "batch", "length", "outputs")
        for x in ("0.5", "2")
    ]
    write(tmp_path, "scaling", grown)
    made = draw(tmp_path, tmp_path / "plots")
    assert sorted(path.stem for path in made) == sorted(NAMES)
    for path in made:
        ElementTree.parse(path)
    assert (tmp_path / "plots" / "models.svg").read_text().count("fp32") == 1  # only the row with batch 1
    assert len(places((tmp_path / "plots" / "length-speed.svg").read_text())) == 2


def test_without_results_nothing_is_drawn(tmp_path: Path) -> None:
    assert draw(tmp_path, tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()
