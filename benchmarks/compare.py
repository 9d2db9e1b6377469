"""Two sets of results side by side: the ratio of each figure, and which figures got worse beyond their spread."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import cell_value
from benchmarks.results import RESULTS, Result, cases_in, filed_as, load, newest

WITHOUT_SPREAD = 0.10  # relative change from which figures recorded without a spread are flagged
LEAST = 0.01  # smaller relative changes count as none
HARDWARE = ("cpu", "cores", "cpu_capability", "gpu", "torch_threads")
SETTINGS = ("memory_gb", "python", "cuda", "omp_wait_policy")
# Units and words in a figure's name tell whether higher or lower is better. Without any, it is shown but not judged.
_HIGHER = re.compile(r"/s\b|\bof (the )?limit|\.flo /|\bthroughput|\bbest\b|\breached\b|/ slowest")
_LOWER = re.compile(r"\b(s|ms|us|seconds|MB|GB|px|CPU s|lowest|highest)\b|error|amplification|\bratio\b")

Key = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Change:
    """One figure in both results."""

    case: str
    row: str  # the names and counts that identify the row
    figure: str
    before: float
    after: float
    verdict: str  # "worse", "better", "same"; "" if it is unknown which way is better
    has_spread: bool

    @property
    def ratio(self) -> float | None:
        return self.after / self.before if self.before else None


@dataclass(frozen=True)
class Comparison:
    """What two sets of results have in common, and what only one of them has."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    incomparable: tuple[str, ...]  # differences in hardware or effort, which any ratio would reflect
    versions_differ: tuple[str, ...]  # Python, packages, settings: what a comparison may be about

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.verdict == "worse")


def compare(before: str, after: str) -> Comparison:
    """Each argument: a result file, a folder of results (the newest of each case), or a date within ``RESULTS``.

    Two results alone are compared whatever they are filed as: a short run with a whole one, a GPU with a CPU.

    Raises FileNotFoundError when nothing is found, ValueError when the two have no case in common.
    """
    a, b = _results(before), _results(after)
    if len(a) == len(b) == 1:
        a, b = ({result["case"]: result for result in found.values()} for found in (a, b))
    both = [case for case in a if case in b]
    if not both:
        raise ValueError(f"nothing in common: {before} has {', '.join(sorted(a))}; {after} has {', '.join(sorted(b))}")
    changes: list[Change] = []
    gone = [case for case in a if case not in b]
    come = [case for case in b if case not in a]
    unlike: dict[str, None] = {}
    versions: dict[str, None] = {}
    for case in both:
        rows_a, rows_b = _rows(a[case]), _rows(b[case])
        for key in rows_a:
            if key in rows_b:
                changes += _changes(case, key, rows_a[key], rows_b[key], b[case].get("unit", ""))
        gone += [f"{case}: {_shown(key)}" for key in rows_a if key not in rows_b]
        come += [f"{case}: {_shown(key)}" for key in rows_b if key not in rows_a]
        unlike |= dict.fromkeys(_differences(a[case]["machine"], b[case]["machine"], HARDWARE))
        if bool(a[case].get("short")) != bool(b[case].get("short")):
            unlike[f"{case}: one of the two is a short run"] = None
        versions |= dict.fromkeys(_differences(a[case]["machine"], b[case]["machine"], SETTINGS))
        versions |= dict.fromkeys(_versions(a[case]["machine"]["versions"], b[case]["machine"]["versions"]))
    return Comparison(tuple(changes), tuple(gone), tuple(come), tuple(unlike), tuple(versions))


def _results(what: str) -> dict[str, Result]:
    """By what they are filed as."""
    path = Path(what)
    if path.is_file():
        result = load(path)
        return {filed_as(result): result}
    folder, day = (path, None) if path.is_dir() else (RESULTS, what)
    found = {case: result for case in cases_in(folder, day) if (result := newest(case, folder, day)) is not None}
    if not found:
        raise FileNotFoundError(f"no results at {what}: expected a file, a folder of results, or a date (2026-01-31)")
    return found


def _rows(result: Result) -> dict[Key, Mapping[str, Any]]:
    """The rows by their names and counts; the first of those that share all of them."""
    found: dict[Key, Mapping[str, Any]] = {}
    for row in result["rows"]:
        row = {name: _figure(name, cell) for name, cell in row.items() if name != "skipped"}
        found.setdefault(tuple((name, v) for name, v in row.items() if isinstance(v, str | int)), row)
    return found


def _figure(name: str, cell: Any) -> Any:
    """The cell; measurements that were formatted as text, to fix their digits, become numbers again."""
    if isinstance(cell, str) and _judged(name):
        try:
            return float(cell)
        except ValueError:
            return cell
    return cell


def _judged(name: str) -> bool:
    return _HIGHER.search(name) is not None or _LOWER.search(name) is not None


def _shown(key: Key) -> str:
    return " ".join(str(value) for _, value in key) or "all"


def _changes(case: str, key: Key, before: Mapping[str, Any], after: Mapping[str, Any], unit: str) -> Iterator[Change]:
    """Better or worse only if the two intervals do not overlap; without intervals, from ``WITHOUT_SPREAD`` on.

    unit: of all figures of a result, for those whose names do not contain one.
    """
    for figure, one in before.items():
        other = after.get(figure)
        a, b = cell_value(one), cell_value(other)
        if a is None or b is None:
            continue
        spreads = isinstance(one, Mapping) and isinstance(other, Mapping)
        overlap = spreads and one["low"] <= other["high"] and other["low"] <= one["high"]
        same = overlap or abs(b - a) <= (LEAST if spreads else WITHOUT_SPREAD) * abs(a)
        yield Change(case, _shown(key), figure, a, b, _verdict(f"{figure} {unit}", a, b, same), spreads)


def _verdict(figure: str, before: float, after: float, same: bool) -> str:
    if not _judged(figure):
        return ""
    if same:
        return "same"
    return "better" if (after > before) == (_HIGHER.search(figure) is not None) else "worse"


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if name in a and name in b and a[name] != b[name]:
            yield f"{name}: {a[name]} and {b[name]}"


def _versions(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*a, *b}):
        if a.get(name) != b.get(name):
            yield f"{name}: {a.get(name)} and {b.get(name)}"


def as_text(comparison: Comparison) -> str:
    """For a terminal: how the machines differ, every figure, and the regressions once more at the end."""
    lines = [f"not measured alike: {difference}" for difference in comparison.incomparable]
    lines += [f"not the same: {difference}" for difference in comparison.versions_differ]
    lines += [f"only in the first: {what}" for what in comparison.only_before]
    lines += [f"only in the second: {what}" for what in comparison.only_after]
    lines += ["", *map(_line, comparison.changes), ""]
    worse = comparison.regressions
    lines += [f"{len(worse)} of {len(comparison.changes)} figures got worse beyond their spread", *map(_line, worse)]
    return "\n".join(lines).strip("\n")


def _line(change: Change) -> str:
    ratio = "      -" if change.ratio is None else f"{change.ratio:7.3f}"
    unsure = "" if change.has_spread else " (no spread recorded)"
    return (
        f"{ratio}  {change.verdict:6}  {change.case}: {change.row}, {change.figure}: "
        f"{change.before:.4g} -> {change.after:.4g}{unsure}"
    )
