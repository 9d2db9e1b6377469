"""Runs the parts one after the other, each for as long as it may take, and writes what they found."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.cases import SKIPPED
from benchmarks.gpu.findings import Settings
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.surroundings import environment
from benchmarks.processes import ROOT
from benchmarks.results import RESULTS
from benchmarks.tables import as_markdown

TOTAL_S = 525.0  # for all parts together: under nine minutes with what lies between them
DRY_TIMES = 20  # as long as that in a dry run, which may share a slow machine with others
LEAST_S = 5.0  # a part is not begun with less
LAST_WORDS = 1500  # characters of what a failed part said


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks gpu") -> int:
    """0: every check passed, or could not be made here. 1: one failed, or a part did. 2: wrong usage, or no GPU."""
    parser = argparse.ArgumentParser(prog=prog, description="Checks and times all that only a GPU can show.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use, installed into a temporary folder only")
    parser.add_argument("--only", metavar="PART,...", help=f"some parts of: {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--commit", help="what is measured, where the checkout itself cannot tell")
    parser.add_argument(
        "--original", type=Path, metavar="FILE", help="flownet2-pytorch's correlation_cuda_kernel.cu, to time it too"
    )
    parser.add_argument("--dry-run", action="store_true", help="walk through every part on a CPU with tiny sizes")
    given = parser.parse_args(arguments)
    wanted = PARTS if given.only is None else [part for part in PARTS if part.name in given.only.split(",")]
    if given.only is not None and len(wanted) < len(set(given.only.split(","))):
        parser.error(f"parts are {', '.join(part.name for part in PARTS)}, got {given.only}")
    for path in filter(None, (given.wheels, given.original)):
        if not path.exists():
            parser.error(f"{path} is not there")
    given.out.mkdir(parents=True, exist_ok=True)
    name = f"{datetime.date.today().isoformat()}-gpu{'-dry-run' if given.dry_run else ''}.json"
    result = _run(wanted, given, given.out / name)
    print(f"\n{as_markdown(summary(result))}\n\n{last_line(result)} -> {given.out / name}", flush=True)
    if result["gpu"] is None and not given.dry_run and any(part.name == "machine" for part in wanted):
        return 2
    return 1 if result["checks_failed"] else 0


def _run(wanted: Sequence[Part], given: argparse.Namespace, path: Path) -> dict[str, Any]:
    result: dict[str, Any] = {
        "case": "gpu",
        "dry_run": given.dry_run,
        "gpu": None,
        "versions": {},
        "commit": given.commit,
        "checks_passed": 0,
        "checks_failed": 0,
        "machine": {},
        "notes": [],
        "rows": [],  # the speeds of the networks, as other cases have their rows
        "parts": [],
    }
    began_s, patience = time.monotonic(), DRY_TIMES if given.dry_run else 1
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        env, result["notes"] = environment(Path(temporary), given.wheels)
        settings = Settings(
            device="cpu" if given.dry_run else "cuda",
            dry=given.dry_run,
            folder=temporary,
            out=str(given.out.resolve()),
            original=None if given.original is None else str(given.original.resolve()),
        )
        for part in wanted:
            left_s = patience * TOTAL_S - (time.monotonic() - began_s)
            found = (
                run_part(part, settings, env, min(patience * part.limit_s, left_s))
                if left_s > LEAST_S
                else no_time(part)
            )
            head = found.pop("head", {})
            result |= {key: value for key, value in head.items() if result.get(key) in (None, {})}
            result["parts"].append(found)
            result["rows"] += found["rows"] if part.name == "model times" else []
            result["checks_passed"] += sum(check["passed"] for check in found["checks"])
            result["checks_failed"] += sum(not check["passed"] for check in found["checks"])
            result["seconds"] = round(time.monotonic() - began_s, 1)
            path.write_text(json.dumps(result, indent=2) + "\n")
            print(f"{part.name}: {found['status']}, {found['seconds']} s{told(found)}", flush=True)
            if part.name == "machine" and result["gpu"] is None and not given.dry_run:
                print("there is no GPU that torch can use: nothing else is tried (--dry-run needs none)", flush=True)
                break
    return result


def run_part(part: Part, settings: Settings, env: Mapping[str, str], limit_s: float) -> dict[str, Any]:
    """What one part found, however it ended. What did not come to its end counts as a failed check."""
    path = Path(settings.folder) / f"{part.name}.json"
    command = [sys.executable, "-m", "benchmarks.gpu.one", part.module, part.function, str(path), settings.as_json()]
    began_s = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        # A session of its own: what the part starts ends with it.
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said, start_new_session=True)
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        if code != 0:
            _end(process)
        said.seek(0)
        words = said.read().strip()
    found = json.loads(path.read_text()) if path.exists() else {"checks": [], "rows": [], "notes": [], "skipped": []}
    reason = words[-LAST_WORDS:]
    if code == 0:
        status, reason = "done", ""
    elif code == SKIPPED:
        status, reason = "skipped", (words.splitlines() or ["no reason given"])[-1]
    elif code is None:
        status, reason = "stopped", f"not done after {limit_s:.0f} s; {reason}"
    else:
        status, reason = "failed", f"exit code {code}; {reason}"
    if status in ("stopped", "failed"):
        found["checks"].append({"name": f"{part.name} comes to its end", "passed": False, "reason": reason})
    seconds = round(time.monotonic() - began_s, 1)
    return {"name": part.name, "what": part.what, "status": status, "reason": reason, "seconds": seconds, **found}


def no_time(part: Part) -> dict[str, Any]:
    """A part for which the others left no time. It shows nothing, so it counts as a failed check too."""
    reason = "the parts before it took all the time"
    check = {"name": f"{part.name} comes to its end", "passed": False, "reason": reason}
    empty: dict[str, Any] = {"checks": [check], "rows": [], "notes": [], "skipped": []}
    return {"name": part.name, "what": part.what, "status": "no time", "reason": reason, "seconds": 0.0, **empty}


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a part that hangs, and what a part that failed has left running."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its session is its own, so its group is, too
    process.wait()


def told(found: Mapping[str, Any]) -> str:
    """What is worth a line while the others run."""
    failed = [check["name"] for check in found["checks"] if not check["passed"]]
    lines = [*(f"FAILED: {name}" for name in failed), *(f"skipped {text}" for text in found["skipped"])]
    if found["reason"]:
        lines.append(found["reason"].splitlines()[-1])
    return "".join(f"\n    {line}" for line in [*lines, *found["notes"]])


def summary(result: Mapping[str, Any]) -> list[dict[str, object]]:
    """One row a part."""
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
    where = "a dry run, which proves nothing about a GPU" if result["dry_run"] else result["gpu"] or "no GPU"
    return f"{where}: {result['checks_passed']} checks passed, {result['checks_failed']} failed, {result['seconds']} s"
