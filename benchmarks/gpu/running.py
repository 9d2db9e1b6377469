"""Runs one part in its own processes: it cannot harm the others, and its findings survive it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from benchmarks.cases import SKIPPED
from benchmarks.gpu.findings import LAST_WORDS, Settings, nothing_found, publish
from benchmarks.gpu.parts import Part
from benchmarks.processes import ROOT

RUNNING = "running.json"  # beside the result while a part runs: its findings so far


def run_part(part: Part, settings: Settings, env: Mapping[str, str], limit_s: float) -> dict[str, Any]:
    """Runs one part and returns what it found, however it ended.

    ``status``: done; skipped: something is missing, or too little time is left; failed; stopped: its time was up; cut
    short: likewise, but its timings so far are good; empty: it finished without a result. Failed, stopped and empty
    count as a failed check.
    """
    if limit_s < part.least_s:
        reason = f"{max(limit_s, 0):.0f} s are left for it, and it wants {part.least_s:.0f}"
        found = {name: value for name, value in nothing_found().items() if name not in ("begun", "under_way")}
        return {"name": part.name, "what": part.what, "status": "skipped", "reason": reason, "seconds": 0.0, **found}
    path = settings.kept(RUNNING)
    path.unlink(missing_ok=True)
    began_s, begun = time.monotonic(), 0
    command = [sys.executable, "-m", "benchmarks.gpu.one", part.module, part.function, str(path), settings.as_json()]
    while True:
        left_s = max(limit_s - (time.monotonic() - began_s), 0.0)
        code, words = _ran(command, {**env, **part.env}, left_s)
        found = json.loads(path.read_text()) if path.exists() else nothing_found()
        if code in (None, 0, SKIPPED) or len(found["begun"]) == begun:
            break
        begun = len(found["begun"])  # a new process continues after the attempts that this one has begun
        if found["under_way"] is not None:
            said = f"it ended its process with code {code}; {words}"
            found["checks"].append({"name": found["under_way"], "passed": False, "said": said})
            publish(path, found | {"under_way": None})
    status, reason = _ending(part, found, code, words, limit_s)
    if status in ("failed", "stopped", "empty"):
        found["checks"].append({"name": f"{part.name} comes to its end", "passed": False, "reason": reason})
    del found["begun"], found["under_way"]
    seconds = round(time.monotonic() - began_s, 1)
    return {"name": part.name, "what": part.what, "status": status, "reason": reason, "seconds": seconds, **found}


def _ending(part: Part, found: Mapping[str, Any], code: int | None, words: str, limit_s: float) -> tuple[str, str]:
    """The status and, unless it is done, the reason."""
    nothing = not found["rows" if part.times else "checks"]
    if code == 0 and nothing:  # what is missing for each of its attempts is told with them
        return ("skipped", "") if found["skipped"] else ("empty", "it came to its end and showed nothing")
    if code == 0:
        return "done", ""
    if code == SKIPPED:
        return "skipped", (words.splitlines() or ["no reason given"])[-1]
    if code is None:
        status = "cut short" if part.times and not nothing else "stopped"
        doing = f" at {found['under_way']}" if found["under_way"] else ""
        return status, f"not done after {limit_s:.0f} s{doing}; {words}"
    return "failed", f"exit code {code}; {words}"


def _ran(command: list[str], env: Mapping[str, str], limit_s: float) -> tuple[int | None, str]:
    """The exit code, or None when time was up, and the end of the output, which may be in any encoding."""
    with tempfile.TemporaryFile() as said:
        # A session of its own, so that all processes started by the part can be ended with it.
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said, start_new_session=True)
        code: int | None = None
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code != 0:
                _end(process)
        said.seek(max(said.seek(0, os.SEEK_END) - 4 * LAST_WORDS, 0))
        return code, said.read().decode(errors="replace").strip()[-LAST_WORDS:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a part that hangs, and any processes that a failed part has left running."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session has its own process group
    process.wait()
