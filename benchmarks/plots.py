"""Plots of the newest results, as SVG under ``docs/plots``: size, throughput, scaling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import svg
from benchmarks.measure import cell_value
from benchmarks.results import RESULTS, Result, newest
from benchmarks.tables import PLOTS

Row = Mapping[str, Any]


def draw(results: Path = RESULTS, into: Path = PLOTS) -> list[Path]:
    """Draws every plot whose case has a result. Returns the files written."""
    made = []
    for case, plots in _PLOTS.items():
        result = newest(case, results)
        if result is None:
            continue
        for name, plot in plots.items():
            into.mkdir(parents=True, exist_ok=True)
            target = into / f"{name}.svg"
            target.write_text(plot(result))
            made.append(target)
    return made


def _under(result: Result) -> str:
    machine = result["machine"]
    return f"{machine.get('gpu') or machine['cpu']}, {machine['cores']} cores, {machine['date']}"


def _sizes(result: Result) -> str:
    values = {f"{row['flow']}, {row['codec']}": float(row[".flo / 1/64"]) for row in result["rows"]}
    return svg.bars("How many times smaller than .flo, at 1/64 px", values, _under(result))


def _models(result: Result) -> str:
    rows = [row for row in result["rows"] if (row["size"], row["batch"]) == ("1024x448", 1)]
    values = {f"{row['model']}, {row['weights']}, {row['precision']}": _number(row, "pairs/s") for row in rows}
    return svg.bars("Networks alone at 1024x448, pair by pair: pairs a second", values, _under(result))


def _scaling(axis: str, x_label: str, figure: str, y_label: str) -> Callable[[Result], str]:
    """One curve of the scaling case."""

    def plot(result: Result) -> str:
        points = [(float(row["x"]), _number(row, figure)) for row in _rows(result, axis)]
        title, speed = f"{y_label} against {x_label}", figure == "pairs/s"
        return svg.line(title, points, f"{x_label} ({_under(result)})", y_label, log_y=speed)

    return plot


def _rows(result: Result, axis: str) -> Sequence[Row]:
    return [row for row in result["rows"] if row["grows"] == axis and cell_value(row.get("pairs/s")) is not None]


def _number(row: Row, figure: str) -> float:
    value = cell_value(row[figure])
    assert value is not None
    return value


_AXES = {"resolution": "megapixels", "batch": "pairs a batch", "length": "frames", "outputs": "outputs"}
_PLOTS: dict[str, dict[str, Callable[[Result], str]]] = {
    "storage": {"sizes": _sizes},
    "model": {"models": _models},
    "scaling": {
        f"{axis}-{kind}": _scaling(axis, label, figure, name)
        for axis, label in _AXES.items()
        for kind, figure, name in (("speed", "pairs/s", "Pairs a second"), ("memory", "peak MB", "Peak memory, MB"))
    },
}
NAMES = tuple(name for plots in _PLOTS.values() for name in plots)
