"""What a part finds, written to its file each time something is added: a part that is stopped keeps what it has."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Skipped

OURS = ("benchmarks", "flowreel", "tests")  # what of these cannot be imported is a mistake, not a missing package
LAST_WORDS = 1500  # characters of what something that failed said


@dataclass(frozen=True)
class Settings:
    """What every part is told."""

    device: str  # cuda; cpu in a dry run
    dry: bool  # tiny sizes on a CPU: walks the code, proves nothing
    folder: str  # shared by the parts of one run: clips, weights
    out: str  # for files that are to be kept
    name: str = "gpu"  # what those begin with
    original: str | None = None  # flownet2-pytorch's correlation_cuda_kernel.cu

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    def kept(self, name: str) -> Path:
        """A file beside the result."""
        return Path(self.out) / f"{self.name}-{name}"


class DeviceLostError(Exception):
    """The card answers nothing more to this process: another one must go on."""


def nothing_found() -> dict[str, Any]:
    """``begun``: names of the attempts; ``under_way``: the one that has not ended, or None."""
    return {"checks": [], "rows": [], "notes": [], "skipped": [], "begun": [], "under_way": None}


class Findings:
    """Checks, rows of numbers, remarks. Goes on with what an earlier process of the same part has left."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found = json.loads(path.read_text()) if path.exists() else nothing_found()
        self._one_at_a_time = threading.RLock()  # warnings come from whatever thread

    def check(self, name: str, passed: bool, **measured: object) -> None:
        """One promise, kept or not, and the numbers that say so."""
        self._append("checks", {"name": name, "passed": bool(passed), **measured})

    def row(self, **cells: object) -> None:
        """Numbers that are not judged."""
        self._append("rows", cells)

    def note(self, text: str) -> None:
        """Once, however often it is said."""
        if text not in self._found["notes"]:
            self._append("notes", text)

    def skip(self, what: str, reason: object) -> None:
        """Something that cannot be looked at on this machine."""
        self._append("skipped", f"{what}: {reason}")

    def add(self, **values: object) -> None:
        """Anything else the result should hold."""
        with self._one_at_a_time:
            self._found.update(values)
            publish(self._path, self._found)

    def attempt(self, name: str, action: Callable[[], object]) -> None:
        """One of several things that should not take each other along. What goes wrong in it is a failed check.

        What an earlier process of this part has begun is not begun again, so a crash costs one attempt.

        Raises DeviceLostError when it left the card unusable for this process.
        """
        if name in self._found["begun"]:
            return
        self.add(begun=[*self._found["begun"], name], under_way=name)
        try:
            action()
        except Exception as error:
            if (reason := lacking(error)) is not None:
                self.skip(name, reason)
            else:
                self.check(name, False, said=traceback.format_exc()[-LAST_WORDS:])
        self.add(under_way=None)
        if device_is_lost():
            raise DeviceLostError(name)

    def _append(self, kind: str, value: object) -> None:
        with self._one_at_a_time:
            self._found[kind].append(value)
            publish(self._path, self._found)


def publish(path: Path, value: object) -> None:
    """As JSON, whole or not at all: whoever is killed meanwhile leaves what was there before."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(beside, path)


def lacking(error: Exception) -> str | None:
    """What is not there on this machine; None: that is not what the error is about."""
    if isinstance(error, Skipped):
        return str(error)
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in OURS:
        return f"{error.name} cannot be imported" if error.name else str(error)
    return None


def device_is_lost() -> bool:
    """Whether an error has made the card unusable for this process: then it gives the same error ever after."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
