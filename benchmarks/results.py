"""Result files: ``YYYY-MM-DD-CASE.json``; CASE ends in ``-gpu`` on a machine with a GPU, ``-short`` for a short run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_NAME = re.compile(r"(?P<date>\d{4}-\d\d-\d\d)-(?P<case>[\w-]+?)(?:-(?P<number>\d+))?\.json")  # the day's second run: 2

Result = dict[str, Any]


def filed_as(result: Result) -> str:
    """The case and the kind of run: ``model``, ``model-gpu``, ``model-short``."""
    gpu = "-gpu" if result["machine"].get("gpu") else ""
    return f"{result['case']}{gpu}{'-short' if result.get('short') else ''}"


def file_name(result: Result) -> str:
    return f"{result['machine']['date']}-{filed_as(result)}.json"


def load(path: Path) -> Result:
    result: Result = json.loads(path.read_text())
    return result


def newest(case: str, folder: Path) -> Result | None:
    """The latest result filed as ``case`` that has rows, which some GPU runs of only a few parts have not; or None."""
    matches = [(match, path) for path in folder.glob("*.json") if (match := _NAME.fullmatch(path.name))]
    found = [(match["date"], int(match["number"] or 1), path) for match, path in matches if match["case"] == case]
    results = (load(path) for _, _, path in sorted(found, reverse=True))
    return next((result for result in results if result.get("rows")), None)


def cases_in(folder: Path) -> list[str]:
    """All cases with a result in the folder, named as by ``filed_as``."""
    return sorted({match["case"] for path in folder.glob("*.json") if (match := _NAME.fullmatch(path.name))})
