"""Charts as plain SVG text: bars, and a line on linear or logarithmic axes. Needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50  # margins, px
COLOUR = "#1b6ca8"
FONT = 'font-family="sans-serif" font-size="12"'


def line(title: str, points: Sequence[tuple[float, float]], x_label: str, y_label: str, *, log_y: bool) -> str:
    """A chart of y against x, whose axis is logarithmic. Logarithmic axes need positive numbers."""
    xs, ys = zip(*sorted(points), strict=True)
    across = _Axis.around(xs, LEFT, WIDTH - RIGHT, log=True)
    up = _Axis.around(ys if log_y else [0.0, *ys], HEIGHT - BOTTOM, TOP, log_y)
    placed = [(across.place(x), up.place(y)) for x, y in zip(xs, ys, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts = [_frame(title, x_label, y_label), *_ticks(across, up)]
    parts.append(f'<polyline fill="none" stroke="{COLOUR}" stroke-width="2" points="{path}"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOUR}"/>' for x, y in placed]
    return _svg(parts, HEIGHT)


def bars(title: str, values: Mapping[str, float], x_label: str) -> str:
    """A chart of horizontal bars from zero, one per name, each with its value."""
    step, left = 22, 250
    height = TOP + step * len(values) + 30
    most = max(values.values(), default=0.0) or 1.0
    parts = [_text(WIDTH / 2, 22, title, "middle", size=15)]
    for number, (name, value) in enumerate(values.items()):
        y, length = TOP + step * number, (WIDTH - left - 70) * max(value, 0.0) / most
        parts.append(_text(left - 8, y + 14, name, "end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{step - 6}" fill="{COLOUR}"/>')
        parts.append(_text(left + length + 6, y + 13, f"{value:.3g}", "start"))
    parts.append(_text((left + WIDTH) / 2, height - 8, x_label, "middle"))
    return _svg(parts, height)


class _Axis:
    """Maps numbers to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool) -> None:
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, log: bool) -> _Axis:
        low, high = min(values, default=0.0), max(values, default=1.0)
        if log:
            if low <= 0:
                raise ValueError(f"a logarithmic axis takes positive numbers only, got {low}")
            low, high = low / 1.15, high * 1.15
        else:
            margin = 0.05 * (high - low) or 1.0
            low, high = (0.0 if low >= 0 else low - margin), high + margin
        return cls(low, high, start, end, log)

    def place(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers within the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**d for d in decades for m in (1, 2, 5)]
            inside = [tick for tick in found if self.low <= tick <= self.high]
            if len(inside) <= 9:
                return inside
            return [10.0**decade for decade in decades if self.low <= 10.0**decade <= self.high]
        raw = (self.high - self.low) / 6
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
        first = math.ceil(self.low / step)
        return [step * n for n in range(first, math.floor(self.high / step) + 1)]


def _ticks(across: _Axis, up: _Axis) -> list[str]:
    bottom, parts = HEIGHT - BOTTOM, []
    for tick in across.ticks():
        x = across.place(tick)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#dddddd"/>')
        parts.append(_text(x, bottom + 16, f"{tick:g}", "middle"))
    for tick in up.ticks():
        y = up.place(tick)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", "end"))
    return parts


def _frame(title: str, x_label: str, y_label: str) -> str:
    box = (
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}" '
        'fill="none" stroke="#888888"/>'
    )
    turned = f'<g transform="translate(16 {HEIGHT / 2}) rotate(-90)">{_text(0, 0, y_label, "middle")}</g>'
    labels = _text(WIDTH / 2, 22, title, "middle", size=15) + _text(WIDTH / 2, HEIGHT - 10, x_label, "middle")
    return box + labels + turned


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    font = FONT.replace("12", str(size))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222222" {font}>{escape(text)}</text>'


def _svg(parts: Sequence[str], height: int) -> str:
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    )
    return "\n".join((opening, f'<rect width="{WIDTH}" height="{height}" fill="white"/>', *parts, "</svg>")) + "\n"
