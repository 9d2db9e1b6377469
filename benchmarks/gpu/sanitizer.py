"""Every kernel under compute-sanitizer, which watches each access to memory, on small odd sizes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import launch_all
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.measure import Skipped
from benchmarks.processes import ROOT

PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
ERRORS = 99  # exit code when the tool has found something


def memcheck(findings: Findings, settings: Settings) -> None:
    """Accesses beyond what was allocated, or not aligned."""
    _run("memcheck", findings, settings)


def racecheck(findings: Findings, settings: Settings) -> None:
    """Shared memory that is read and written without a barrier between."""
    _run("racecheck", findings, settings)


def _run(tool: str, findings: Findings, settings: Settings) -> None:
    watched = [sys.executable, "-m", "benchmarks.gpu.launch_all", settings.device]
    if settings.dry:
        launch_all.main(settings.device)
        findings.check("every kernel is called", True)
        return
    found = shutil.which("compute-sanitizer") or next((path for path in PLACES if Path(path).exists()), None)
    if found is None:
        raise Skipped("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    command = [found, "--tool", tool, "--error-exitcode", str(ERRORS), *watched]
    # Each tensor in an allocation of its own, or an access beyond it would still be inside one of torch's.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    told = re.findall(r"ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?", said)
    if not told:
        raise Skipped(f"compute-sanitizer does not work here: {(said.strip() or 'it says nothing').splitlines()[-1]}")
    findings.check(f"{tool} is clean", done.returncode == 0, exit_code=done.returncode, said=said[-1500:])
