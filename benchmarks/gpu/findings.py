"""A part's findings, written to its file after each addition, so that a part that is stopped loses none."""

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

OURS = ("benchmarks", "flowreel", "tests")  # failing to import one of these is a bug, not a missing package
LAST_WORDS = 1500  # characters that are kept from the end of a failure's output


@dataclass(frozen=True)
class Settings:
    """The settings that every part gets."""

    device: str  # cuda; cpu in a dry run
    dry: bool  # tiny sizes on a CPU: exercises the code, proves nothing
    folder: str  # temporary, shared by the parts of one run: clips, weights
    out: str  # folder for files that are kept
    name: str = "gpu"  # prefix of their names
    original: str | None = None  # flownet2-pytorch's correlation_cuda_kernel.cu

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    def kept(self, name: str) -> Path:
        """The path of a file beside the result."""
        return Path(self.out) / f"{self.name}-{name}"


class DeviceLostError(Exception):
    """The GPU has become unusable for this process: a new process must continue."""


def nothing_found() -> dict[str, Any]:
    """Empty findings. ``begun``: names of all attempts so far; ``under_way``: the one that has not ended, or None."""
    return {"checks": [], "rows": [], "notes": [], "skipped": [], "begun": [], "under_way": None}


class Findings:
    """Checks, rows of numbers, notes. Continues the findings of an earlier process of the same part."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found = json.loads(path.read_text()) if path.exists() else nothing_found()
        self._one_at_a_time = threading.RLock()  # warnings come from any thread

    def check(self, name: str, passed: bool, **measured: object) -> None:
        """Adds one check, passed or not, with its numbers."""
        self._append("checks", {"name": name, "passed": bool(passed), **measured})

    def row(self, **cells: object) -> None:
        """Adds numbers that are not judged."""
        self._append("rows", cells)

    def note(self, text: str) -> None:
        """Adds a note, unless it is there already."""
        if text not in self._found["notes"]:
            self._append("notes", text)

    def skip(self, what: str, reason: object) -> None:
        """Adds something that cannot be checked or measured on this machine."""
        self._append("skipped", f"{what}: {reason}")

    def add(self, **values: object) -> None:
        """Sets anything else that the result should hold."""
        with self._one_at_a_time:
            self._found.update(values)
            publish(self._path, self._found)

    def attempt(self, name: str, action: Callable[[], object]) -> None:
        """Runs one of several independent actions. An error in it becomes a failed check.

        An attempt that an earlier process of this part has begun is skipped, so a crash costs only one attempt.

        Raises DeviceLostError when the action left the GPU unusable for this process.
        """
        if name in self._found["begun"]:
            return
        self.add(begun=[*self._found["begun"], name], under_way=name)
        try:
            action()
            wait_for_device()  # a launch that fails later than it returns fails here, not unnoticed
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


def publish(path: Path, value: object, indent: int | None = None) -> None:
    """Writes JSON atomically: a process killed meanwhile leaves the previous file. An indent makes it slow."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(value, indent=indent, default=str) + "\n")
    os.replace(beside, path)


def lacking(error: Exception) -> str | None:
    """What the error says is missing on this machine; None: it is another kind of error."""
    if isinstance(error, Skipped):
        return str(error)
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in OURS:
        return f"{error.name} cannot be imported" if error.name else str(error)
    return None


def wait_for_device() -> None:
    """Waits for all that the GPU was given, if one is in use. Raises RuntimeError when that fails."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def device_is_lost() -> bool:
    """Whether an error has made the GPU unusable for this process: then every later call fails with the same error."""
    try:
        wait_for_device()
    except RuntimeError:
        return True
    return False
