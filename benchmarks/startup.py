"""What a command costs before it does anything: import, --help, the first flow."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import Sample
from benchmarks.processes import Spent, flowreel, measured

SCENE = "synthetic:translate?size=512x384&frames=2"


def run(short: bool = False) -> dict[str, object]:
    """Each command in its own process, all in turn. The first round, which warms bytecode and files, is not counted."""
    rounds = 3 if short else 9
    spent: dict[str, list[Spent]] = {}
    for round_number in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            for name, command in _commands(Path(folder)).items():
                found = measured(command)
                if round_number:
                    spent.setdefault(name, []).append(found)
    rows = [_row(name, found) for name, found in spent.items()]
    return {"rounds": rounds, "scene": SCENE, "rows": rows}


def _commands(folder: Path) -> dict[str, list[str]]:
    python = [sys.executable, "-c"]
    return {
        "python -c pass": [*python, "pass"],
        "import flowreel": [*python, "import flowreel"],
        "import torch": [*python, "import torch"],
        "flowreel --help": flowreel("--help"),
        "flowreel run --help": flowreel("run", "--help"),
        "first flow, default model": flowreel("run", SCENE, "-o", str(folder / "a.zarr"), "-q"),
        "first flow, FlowNet2C": flowreel("run", SCENE, "-o", str(folder / "b.zarr"), "-q", "--model=FlowNet2C"),
    }


def _row(name: str, found: list[Spent]) -> dict[str, Any]:
    return {
        "command": name,
        "seconds": Sample.of([one.seconds for one in found]).cell(),
        "CPU s": Sample.of([one.cpu_s for one in found]).cell(),
        "peak MB": Sample.of([one.peak_bytes / 1e6 for one in found]).cell(),
    }
