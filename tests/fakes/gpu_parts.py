"""Made-up parts of ``python -m benchmarks gpu`` that succeed or fail in various ways; findings that tests can read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from typing import Any

from benchmarks.gpu import findings as kept
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.parts import Part


class Found(Findings):
    """Findings whose file a test can read by kind: ``found["checks"]``."""

    def __getitem__(self, kind: str) -> Any:
        return json.loads(self._path.read_text())[kind] if self._path.exists() else []

    @property
    def verdicts(self) -> dict[str, bool]:
        return {check["name"]: check["passed"] for check in self["checks"]}


def part(name: str, **options: Any) -> Part:
    """The part that runs this module's function of that name."""
    return Part(name, __name__, name, 300, "made up", **options)


def head(findings: Findings, settings: Settings) -> None:
    findings.add(head={"gpu": "Abacus", "versions": {"beads": "1"}})
    findings.check("it is so", True)


def fine(findings: Findings, settings: Settings) -> None:
    findings.check("it is so", True, px=0.5)
    findings.check("so is this", settings.device == "cpu")


def wrong(findings: Findings, settings: Settings) -> None:
    findings.check("it is so", False, px=0.5, allowed_px=0.1, said="Traceback ...\nValueError: too far apart")


def silent(findings: Findings, settings: Settings) -> None:
    findings.row(number=1)


def crashes(findings: Findings, settings: Settings) -> None:
    findings.check("before", True)
    raise RuntimeError("the card fell off")


def junk(findings: Findings, settings: Settings) -> None:
    findings.check("before", True)
    os.write(1, bytes(range(256)) * 1000)
    os.write(2, b"\xff\xfe the last words")
    sys.exit(7)


def hangs(findings: Findings, settings: Settings) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    findings.row(child=child.pid, part=os.getpid())
    findings.check("before", True)
    time.sleep(1000)


def lacks(findings: Findings, settings: Settings) -> None:
    __import__("nothing_like_it")


def lacks_everywhere(findings: Findings, settings: Settings) -> None:
    for name in "ab":
        findings.attempt(name, lambda: __import__("nothing_like_it"))


def lacks_ours(findings: Findings, settings: Settings) -> None:
    __import__("flowreel.nothing_like_it")


def warns(findings: Findings, settings: Settings) -> None:
    for _ in range(2):
        warnings.warn("slower than it could be", stacklevel=1)
    findings.check("it is so", True)


def attempts(findings: Findings, settings: Settings) -> None:
    def fails() -> None:
        raise ValueError("not a number")

    def loses_the_card() -> None:
        def lost() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        kept.wait_for_device = lost  # its launches have returned long before they fail

    def dies() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    actions = {"a": fails, "b": dies, "c": lambda: __import__("nothing_like_it"), "d": loses_the_card}
    for name, action in (actions | {"e": lambda: None, "f": dies, "g": lambda: sys.exit(7)}).items():
        findings.attempt(name, action)
        findings.check(f"after {name}", True)
