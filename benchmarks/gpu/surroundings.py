"""What the parts' processes see: packages from a folder of wheels, and flowreel itself where it is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

from benchmarks.processes import ROOT

INSTALL_S = 60.0  # for one wheel


def environment(folder: Path, wheels: Path | None) -> tuple[dict[str, str], list[str]]:
    """The variables of a part's process, and remarks: which wheels could not be installed.

    folder: for what is made here. Nothing is installed anywhere else.
    """
    notes: list[str] = []
    ways = [str(ROOT)]
    if wheels is not None:
        ways.insert(0, str(_installed(wheels, folder / "wheels", notes)))
    if find_spec("flowreel") is None:
        ways.append(str(_checkout(folder / "checkout")))
    before = os.environ.get("PYTHONPATH")
    joined = os.pathsep.join([*ways, *([before] if before else [])])
    return {**os.environ, "PYTHONPATH": joined, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}, notes


def _installed(wheels: Path, into: Path, notes: list[str]) -> Path:
    """Each by itself and without what it asks for, so that one that does not fit leaves the others."""
    for wheel in sorted(wheels.glob("*.whl")):
        options = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", "--target", str(into))
        command = [sys.executable, "-m", "pip", "install", *options, str(wheel)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        except subprocess.TimeoutExpired:
            notes.append(f"{wheel.name} was not installed within {INSTALL_S:.0f} s")
            continue
        if done.returncode:
            notes.append(
                f"{wheel.name} cannot be installed: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
            )
    return into


def _checkout(folder: Path) -> Path:
    """A folder on whose path this checkout is ``import flowreel``, as an installation would make it."""
    package = folder / "flowreel"
    package.mkdir(parents=True)
    for name in ("engine", "kernels", "sinks"):
        (package / name).symlink_to(ROOT / name)
    for path in (ROOT / "engine" / "public").iterdir():
        (package / path.name).symlink_to(path)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    told = folder / f"flowreel-{version}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flowreel\nVersion: {version}\n")
    return folder
