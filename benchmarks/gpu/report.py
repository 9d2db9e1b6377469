"""A run's result: its file name, and what is printed about it."""

from __future__ import annotations

import datetime
import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST = 200  # characters that are shown of one value


def free_path(out: Path, dry: bool) -> Path:
    """``DATE-gpu.json``, for the day's second run ``DATE-gpu-2.json``, and so on: nothing is overwritten."""
    name = f"{datetime.date.today().isoformat()}-gpu{'-dry-run' if dry else ''}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in (out / f"{name}.json" for name in names) if not path.exists())


def told(found: Mapping[str, Any]) -> str:
    """What is printed about a part while the others run: failures, skipped attempts, its reason and notes."""
    failed = [f"{check['name']}{_measured(check)}" for check in found["checks"] if not check["passed"]]
    lines = [*(f"FAILED: {text}" for text in failed), *(f"skipped {text}" for text in found["skipped"])]
    if found["reason"]:
        lines.append(found["reason"].splitlines()[-1])
    return "".join(f"\n    {line}" for line in [*lines, *found["notes"]])


def _measured(check: Mapping[str, Any]) -> str:
    """What a check holds beside its verdict, on one line: of an error's words the last."""
    lines = {key: str(value).splitlines() for key, value in check.items() if key not in ("name", "passed", "reason")}
    return "".join(f"; {key}: {said[-1][:MOST]}" for key, said in lines.items() if said)


def summary(result: Mapping[str, Any]) -> list[dict[str, object]]:
    """One row per part."""
    return [
        {
            "part": found["name"],
            "status": found["status"],
            "s": found["seconds"],
            "passed": sum(check["passed"] for check in found["checks"]),
            "failed": sum(not check["passed"] for check in found["checks"]),
            "skipped": len(found["skipped"]),
            "found": found.get("headline", ""),
        }
        for found in result["parts"]
    ]


def last_line(result: Mapping[str, Any]) -> str:
    """The GPU, how many checks passed and failed, and how many parts did not finish, in one line."""
    where = "a dry run, which proves nothing about a GPU" if result["dry_run"] else result["gpu"] or "no GPU"
    statuses = Counter(found["status"] for found in result["parts"] if found["status"] != "done")
    others = "".join(f", {count} {'part' if count == 1 else 'parts'} {status}" for status, count in statuses.items())
    checks = f"{result['checks_passed']} checks passed, {result['checks_failed']} failed"
    return f"{where}: {checks}{others}, {result['seconds']} s"
