"""Runs named measurements and writes what they found as JSON.

``list`` says which there are. ``compare A B`` sets two results side by side: files, folders of results, or dates.
``gpu`` checks, then times, all that only a GPU can show: see ``gpu --help``.
``readme`` puts the newest results into the tables of README and docs, and draws the plots.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Set before torch loads, as the command line does: see ``flowreel.engine.cli.patience``.
os.environ.update({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"} | os.environ)

from benchmarks import compare as comparing
from benchmarks.cases import CASES, SKIPPED, describe, has_short, takes_ceilings
from benchmarks.plots import draw
from benchmarks.processes import ROOT
from benchmarks.results import RESULTS, file_name, load
from benchmarks.tables import PAGES, as_markdown, filled

OTHERS = ("list", "compare A B", "gpu", "readme")


def main(arguments: list[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """Returns 0: success. 1: a case failed, or ``compare`` found a regression. 2: wrong usage, or not comparable."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["gpu"]:
        from benchmarks.gpu.main import main as on_gpu

        return on_gpu(arguments[1:], f"{prog} gpu")
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").replace("``", "'"))
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"cases, or one of: {', '.join(OTHERS)}; none: every case"
    )
    parser.add_argument("--short", action="store_true", help="the small set: under ten minutes on two cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--anyway", action="store_true", help="compare even what was measured on other machines")
    given = parser.parse_args(arguments)
    if given.names == ["list"]:
        print("\n".join(f"{name:14}{'short  ' if has_short(name) else '       '}{describe(name)}" for name in CASES))
        return 0
    if given.names[:1] == ["compare"]:
        if len(given.names) != 3:
            parser.error("compare takes two results: files, folders, or dates")
        return _compare(*given.names[1:], anyway=given.anyway)
    if given.names == ["readme"]:
        draw()
        for page in PAGES:
            page.write_text(filled(page.read_text(), page))
        return 0
    if unknown := set(given.names) - set(CASES):
        parser.error(f"no case is called {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    return _run(given.names or list(CASES), given.out, given.short)


def _compare(before: str, after: str, *, anyway: bool) -> int:
    try:
        comparison = comparing.compare(before, after)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    if comparison.incomparable and not anyway:
        reasons = "; ".join(comparison.incomparable)
        print(f"compare: these were not measured alike: {reasons} (--anyway shows them all the same)", file=sys.stderr)
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
    first = ("ceilings",) if any(map(takes_ceilings, wanted)) else ()  # once; the other cases divide by them
    for name in dict.fromkeys((*first, *wanted)):
        print(f"{name} ...", file=sys.stderr, flush=True)
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
