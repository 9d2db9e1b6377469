"""Runs the parts one after the other, each within its time limit, and writes their findings."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.gpu.findings import Settings, publish
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.report import free_path, last_line, summary, told
from benchmarks.gpu.running import RUNNING, run_part
from benchmarks.gpu.surroundings import environment, memory_folder
from benchmarks.results import RESULTS
from benchmarks.tables import as_markdown

TOTAL_S = 525.0  # for all parts together: under nine minutes including the time between them
DRY_TIMES = 20  # factor on all times in a dry run, which may share a slow machine with others
MOST = 3  # a part gets at most 1 / MOST of the time left, or an equal share once fewer parts are left


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks gpu") -> int:
    """Returns 0: all checks passed or could not be made. 1: a check or a part failed. 2: wrong usage, or no GPU."""
    names = ", ".join(part.name for part in PARTS)
    parser = argparse.ArgumentParser(prog=prog, description="Checks and times all that only a GPU can show.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    parser.add_argument("--only", metavar="PART,...", help=f"some parts, beside the first, of: {names}")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for all parts together, %(default)s")
    parser.add_argument("--commit", help="what is measured, where the checkout itself cannot tell")
    parser.add_argument(
        "--original", type=Path, metavar="FILE", help="flownet2-pytorch's correlation_cuda_kernel.cu, to time it too"
    )
    parser.add_argument("--dry-run", action="store_true", help="walk through every part on a CPU with tiny sizes")
    given = parser.parse_args(arguments)
    asked = None if given.only is None else {name.strip() for name in given.only.split(",")}
    wanted = [part for part in PARTS if asked is None or part.name in asked or part == PARTS[0]]
    if unknown := (asked or set()) - {part.name for part in PARTS}:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {names}")
    if given.original is not None and not given.original.exists():
        parser.error(f"{given.original} is not there")
    if not given.seconds > 0:
        parser.error(f"seconds must be a positive number, got {given.seconds}")
    given.out.mkdir(parents=True, exist_ok=True)
    path = free_path(given.out, given.dry_run)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # this also ends the running part
    try:
        result = _run(wanted, given, path)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"\n{as_markdown(summary(result))}\n\n{last_line(result)} -> {path}", flush=True)
    if _has_no_gpu(result):
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
        "rows": [],  # the networks' speeds, in the form of other cases' rows
        "parts": [],
        "seconds": 0.0,
    }
    began_s, patience = time.monotonic(), DRY_TIMES if given.dry_run else 1
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, ExitStack() as afterwards:
        afterwards.callback(shutil.rmtree, memory_folder(temporary), ignore_errors=True)  # killed parts leave it behind
        env = environment(Path(temporary))
        settings = Settings(
            device="cpu" if given.dry_run else "cuda",
            dry=given.dry_run,
            folder=temporary,
            out=str(given.out.resolve()),
            name=path.stem,
            original=None if given.original is None else str(given.original.resolve()),
        )
        for number, part in enumerate(wanted):
            left_s = patience * given.seconds - (time.monotonic() - began_s)
            most_s = left_s / min(MOST, len(wanted) - number)
            found = run_part(part, settings, env, min(patience * part.limit_s, most_s))
            _enter(found, result)
            result["seconds"] = round(time.monotonic() - began_s, 1)
            publish(path, result, indent=2)
            settings.kept(RUNNING).unlink(missing_ok=True)
            print(f"{part.name}: {found['status']}, {found['seconds']} s{told(found)}", flush=True)
            if _has_no_gpu(result):
                print("there is no GPU that torch can use: nothing else is tried (--dry-run needs none)", flush=True)
                break
    return result


def _enter(found: dict[str, Any], result: dict[str, Any]) -> None:
    head = found.pop("head", {})
    result |= {key: value for key, value in head.items() if result.get(key) in (None, {})}
    result["parts"].append(found)
    result["rows"] += found["rows"] if found["name"] == "model times" else []
    result["checks_passed"] += sum(check["passed"] for check in found["checks"])
    result["checks_failed"] += sum(not check["passed"] for check in found["checks"])


def _has_no_gpu(result: Mapping[str, Any]) -> bool:
    """Whether there is no torch, or none with a usable GPU. False if the first part failed: then it is unknown, so the
    others run."""
    return not result["dry_run"] and result["gpu"] is None and result["parts"][0]["status"] in ("done", "skipped")
