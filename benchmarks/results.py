"""Result files: ``YYYY-MM-DD-CASE.json``; CASE ends in ``-gpu`` on a machine with a GPU, ``-short`` for a short run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_NAME = re.compile(r"(?P<date>\d{4}-\d\d-\d\d)-(?P<case>[\w-]+?)(?:-(?P<number>\d+))?\.json")  # the day's second run: 2

Result = dict[str, Any]


def filed_as(result: Result) -> str:
    """The case and the kind of run: ``model``, ``model-gpu``, ``model-short``; ``gpu`` itself needs no more."""
    gpu = "-gpu" if result["machine"].get("gpu") and result["case"] != "gpu" else ""
    return f"{result['case']}{gpu}{'-short' if result.get('short') else ''}"


def file_name(result: Result) -> str:
    return f"{result['machine']['date']}-{filed_as(result)}.json"


def load(path: Path) -> Result:
    result: Result = json.loads(path.read_text())
    return result


def newest(case: str, folder: Path, day: str | None = None) -> Result | None:
    """The latest result filed as ``case`` that has rows, which some GPU runs of only a few parts have not; or None."""
    files = [
        (match["date"], int(match["number"] or 1), path) for match, path in _in(folder, day) if match["case"] == case
    ]
    results = (load(path) for _, _, path in sorted(files, reverse=True))
    return next((result for result in results if result.get("rows")), None)


def cases_in(folder: Path, day: str | None = None) -> list[str]:
    """All cases with a result in the folder, named as by ``filed_as``. day: only those of this date."""
    return sorted({match["case"] for match, _ in _in(folder, day)})


def _in(folder: Path, day: str | None) -> Iterator[tuple[re.Match[str], Path]]:
    """The result files in a folder, each with the parts of its name."""
    for path in folder.glob("*.json"):
        if (match := _NAME.fullmatch(path.name)) and day in (None, match["date"]):
            yield match, path
