"""What a part finds, written to its file each time something is added: a part that is stopped keeps what it has."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What every part is told."""

    device: str  # cuda; cpu in a dry run
    dry: bool  # tiny sizes on a CPU: walks the code, proves nothing
    folder: str  # shared by the parts of one run: clips, weights
    out: str  # for files that are to be kept
    original: str | None = None  # flownet2-pytorch's correlation_cuda_kernel.cu

    def as_json(self) -> str:
        return json.dumps(asdict(self))


class Findings:
    """Checks, rows of numbers, remarks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {"checks": [], "rows": [], "notes": [], "skipped": []}

    def check(self, name: str, passed: bool, **measured: object) -> None:
        """One promise, kept or not, and the numbers that say so."""
        self._found["checks"].append({"name": name, "passed": bool(passed), **measured})
        self._save()

    def row(self, **cells: object) -> None:
        """Numbers that are not judged."""
        self._found["rows"].append(cells)
        self._save()

    def note(self, text: str) -> None:
        self._found["notes"].append(text)
        self._save()

    def skip(self, what: str, reason: object) -> None:
        """Something that cannot be looked at on this machine."""
        self._found["skipped"].append(f"{what}: {reason}")
        self._save()

    def add(self, **values: object) -> None:
        """Anything else the result should hold."""
        self._found.update(values)
        self._save()

    def _save(self) -> None:
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps(self._found))
        os.replace(beside, self._path)
