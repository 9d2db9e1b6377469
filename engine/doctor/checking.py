"""What a check is, and how it is run: whatever it raises becomes what it found."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Literal

from flowreel.engine.data import JSON

Status = Literal["ok", "missing", "broken"]
Demand = Literal["cpu", "gpu", "extra"]  # any run needs it; a run on a GPU needs it; it is an improvement only


@dataclass(frozen=True)
class Finding:
    """What one check found out."""

    status: Status
    version: str = ""
    detail: str = ""  # one line
    advice: str = ""  # one line on how to fix it; empty: the check's own advice, unless the status is ok


@dataclass(frozen=True)
class Check:
    """One thing to check."""

    name: str
    demand: Demand
    needed_for: str
    look: Callable[[], Finding]
    advice: str


@dataclass(frozen=True)
class Diagnosis:
    """All that was found, in the order of the checks."""

    found: tuple[tuple[Check, Finding], ...]

    def wanting(self, *demands: Demand) -> list[str]:
        """Names of the checks with one of these demands that are not ok."""
        return [check.name for check, finding in self.found if check.demand in demands and finding.status != "ok"]

    def as_json(self) -> dict[str, JSON]:
        return {
            "cpu_ok": not self.wanting("cpu"),
            "gpu_ok": not self.wanting("cpu", "gpu"),
            "checks": [
                {
                    "name": check.name,
                    "demand": check.demand,
                    "needed_for": check.needed_for,
                    "status": finding.status,
                    "version": finding.version or None,
                    "detail": finding.detail or None,
                    "advice": finding.advice or None,
                }
                for check, finding in self.found
            ],
        }


def look_at(check: Check) -> Finding:
    try:
        # Some packages print pages about what they lack; stdout is for the diagnosis.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            finding = check.look()
    except ModuleNotFoundError as error:
        finding = Finding("missing", detail=f"{error.name or error} is not installed")
    except Exception as error:
        finding = Finding("broken", detail=kind_and_line(error))
    if finding.status == "ok" or finding.advice:
        return finding
    return Finding(finding.status, finding.version, finding.detail, check.advice)


def kind_and_line(error: BaseException) -> str:
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def expect(right: object, what: str) -> None:
    if not right:
        raise RuntimeError(what)
