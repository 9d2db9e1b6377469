"""The environment of the parts' processes: this checkout can be imported, as ``flowreel`` if that is not installed."""

from __future__ import annotations

import os
import tomllib
from importlib.util import find_spec
from pathlib import Path

from benchmarks.processes import MEMORY, ROOT


def memory_folder(folder: str) -> Path:
    """A run's folder in memory, with the same name as its temporary folder. ``gpu/main.py`` removes both."""
    return MEMORY / Path(folder).name


def environment(folder: Path) -> dict[str, str]:
    """The environment variables of a part's process. Files go to ``folder``; nothing is installed."""
    ways = [str(ROOT)]
    if find_spec("flowreel") is None:
        ways.append(str(_checkout(folder / "checkout")))
    if before := os.environ.get("PYTHONPATH"):
        ways.append(before)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(ways),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "10000",
    }


def _checkout(folder: Path) -> Path:
    """A folder that makes this checkout importable as ``flowreel`` when on the path, as an installation would."""
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
