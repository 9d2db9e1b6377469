"""Runs a command in its own process and measures its time and peak memory.

**Whose peak it is.** ``ru_maxrss`` of a process started by a large process is at least the peak of that parent: between
fork and exec the child shares the parent's memory, and Linux keeps the larger number. So the command is started by a
launcher of only 10 MB, which waits for it and reports what the system counted.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEMORY = Path("/dev/shm")  # a folder in memory, on Linux

_LAUNCHER = """
import json, os, sys, time
began_s = time.perf_counter()
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
seconds = time.perf_counter() - began_s
told = [os.waitstatus_to_exitcode(status), used.ru_maxrss, used.ru_utime + used.ru_stime, seconds]
with open(sys.argv[1], "w") as file:
    json.dump(told, file)
"""


class CommandFailedError(RuntimeError):
    """A measured command failed; the message contains its output."""


@dataclass(frozen=True)
class Spent:
    """Resources used by a command."""

    seconds: float  # from its start to its end
    peak_bytes: int  # peak resident set size, of the command or of a child process it waited for
    cpu_s: float  # CPU time of all its threads
    stdout: str


def measured(command: Sequence[str], env: Mapping[str, str] | None = None) -> Spent:
    """Runs a command to its end, in the repository's root. Raises CommandFailedError when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(told), *command]
        done = subprocess.run(
            launcher, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **(env or {})}
        )
        code, peak, cpu_s, seconds = json.loads(told.read_text()) if told.exists() else (1, 0, 0.0, 0.0)
    if code:
        raise CommandFailedError(f"{' '.join(command)} ended with {code}: {done.stderr.strip()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return Spent(seconds, peak * unit, cpu_s, done.stdout)


def resident_bytes() -> int:
    """This process's resident memory now; 0 where the system does not report it."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * resource.getpagesize() if path.exists() else 0


def flowreel(*arguments: str) -> list[str]:
    """The command line of ``flowreel ARGUMENTS``, run by this interpreter."""
    return [sys.executable, "-m", "flowreel", *arguments]


def in_module(module: str, settings: Mapping[str, object]) -> tuple[dict[str, object], Spent]:
    """Runs ``python -m MODULE`` with the settings as JSON; its result is the last line it prints, as JSON."""
    spent = measured([sys.executable, "-m", module, json.dumps(settings)])
    return json.loads(spent.stdout.splitlines()[-1]), spent
