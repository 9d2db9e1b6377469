"""``python -m benchmarks [NAME ...] [--out DIR]``: runs named cases and writes what they measured as JSON.

``python -m benchmarks readme`` puts the newest results into the tables of README and docs.

Each case is a module beside this one with ``run() -> dict`` and a first docstring line that says what it measures.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.tables import PAGES, as_markdown, with_tables

CASES = ("accuracy", "memory", "clips", "storage", "old_way")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(CASES)}, or readme; none: every case")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {*CASES, "readme"}:
        parser.error(f"no case is called {', '.join(sorted(unknown))}; there are {', '.join(CASES)} and readme")
    if arguments.names == ["readme"]:
        for page in PAGES:
            page.write_text(with_tables(page.read_text()))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    where = machine()
    for name in arguments.names or CASES:
        result = {"case": name, "machine": where, **import_module(f"benchmarks.{name}").run()}
        path = arguments.out / f"{where['date']}-{name}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"\n{name} -> {path}\n\n{as_markdown(result['rows'])}", flush=True)


if __name__ == "__main__":
    main()
