"""``python -m benchmarks [NAME ...] [--short] [--out DIR]`` runs named cases and writes what they measured as JSON.

``python -m benchmarks --list`` says what there is; ``compare A B`` sets two results side by side; ``readme`` puts the
newest results into the tables of README and docs and draws the plots. ``flowreel bench`` is the same from anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Before torch loads, and as the command line does it: see ``flowreel.engine.cli.main``.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from benchmarks import compare as comparing
from benchmarks.cases import CASES, SKIPPED, describe, has_short
from benchmarks.plots import draw
from benchmarks.processes import ROOT
from benchmarks.results import RESULTS, file_name, load
from benchmarks.tables import PAGES, as_markdown, with_tables

OTHERS = ("compare A B", "readme")


def main(arguments: list[str] | None = None) -> int:
    """0: all is well. 1: a case failed, or ``compare`` found a regression. 2: wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases, or {' or '.join(OTHERS)}; none: every case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--short", action="store_true", help="the small set: under ten minutes on two cores")
    parser.add_argument("--list", action="store_true", help="name the cases and what they measure")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{name:14}{'short  ' if has_short(name) else '       '}{describe(name)}" for name in CASES))
        return 0
    if given.names[:1] == ["compare"]:
        if len(given.names) != 3:
            parser.error("compare takes two results: files, folders, or dates")
        return _compare(*given.names[1:])
    if given.names == ["readme"]:
        for page in PAGES:
            page.write_text(with_tables(page.read_text()))
        draw()
        return 0
    if unknown := set(given.names) - set(CASES):
        parser.error(f"no case is called {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    return _run(given.names or list(CASES), given.out, given.short)


def _compare(before: str, after: str) -> int:
    try:
        comparison = comparing.compare(before, after)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(comparing.as_text(comparison))
    return 1 if comparison.regressions else 0


def _run(names: list[str], out: Path, short: bool) -> int:
    out.mkdir(parents=True, exist_ok=True)
    left_out = [name for name in names if short and not has_short(name)]
    wanted = [name for name in names if name not in left_out]
    notes = [f"{name}: has no short form" for name in left_out]
    failed: list[str] = []
    ceilings: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(("ceilings", *wanted)):  # once, first, and the others divide by them
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "result.json"
            settings = json.dumps({"short": short, "ceilings": ceilings})
            command = [sys.executable, "-m", "benchmarks.one", name, str(made), settings]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                skipped = done.returncode == SKIPPED
                notes.append(f"{name}: {'skipped, ' + done.stdout.strip() if skipped else 'failed, see above'}")
                failed += [] if skipped else [name]
                continue
            result = load(made)
        if name == "ceilings":
            ceilings = result["ceilings"]
            if name not in wanted:
                continue
        path = out / file_name(result)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"\n{name} -> {path}  ({result['seconds']} s)\n\n{as_markdown(result['rows'])}", flush=True)
    print("\n" + "\n".join(notes) if notes else "", end="\n" if notes else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
