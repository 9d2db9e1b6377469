"""Every kernel under compute-sanitizer, which checks each memory access, on small odd sizes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.gpu import launch_all
from benchmarks.gpu.findings import LAST_WORDS, Findings, Settings
from benchmarks.measure import Skipped
from benchmarks.processes import ROOT

PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
ERRORS = 99  # exit code when the tool has found an error
UNSUPPORTED = "Device not supported"  # in some virtual machines; it then counts errors that are not ours
BROKEN = "Internal Sanitizer Error"  # in the tool itself, not in the program it checks
AT_ONCE = 4  # processes, each of which takes some GPU memory
FILTERS = ("--kernel-name", "--kernel-regex")  # options to select kernels; versions differ
KERNELS = ("correlation_", "warp_", "channel_norm_", "bias_leaky_relu_", "flow_", "yuv_to_rgb_", "convolution_")
KERNELS += ("normalise_frames_", "refining_input_", "fusing_input_", "enlarge_flow_", "quantise_", "bitshuffle_")


def memcheck(findings: Findings, settings: Settings) -> None:
    """Out-of-bounds and misaligned accesses."""
    _run("memcheck", findings, settings)


def racecheck(findings: Findings, settings: Settings) -> None:
    """Shared memory read and written without a barrier in between."""
    _run("racecheck", findings, settings)


def _run(tool: str, findings: Findings, settings: Settings) -> None:
    if settings.dry:
        launch_all.main(settings.device)
        findings.check("every kernel is called", True)
        return
    found = shutil.which("compute-sanitizer") or next((path for path in PLACES if Path(path).exists()), None)
    if found is None:
        raise Skipped("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    log = settings.kept(f"{tool}.log")
    findings.note(f"what the tool says comes to {log.name}")  # written as it comes, so it survives a time-out
    option = _option(found)
    code, said = _watched(found, tool, log, settings, option, KERNELS)
    if BROKEN in said and option is not None:  # some kernel breaks the tool: try each on its own
        watch = partial(_watched, found, tool, log, settings, option)
        with ThreadPoolExecutor(AT_ONCE) as several:
            apart = list(several.map(watch, [(name,) for name in KERNELS]))
        for name, (its_code, its_words) in zip(KERNELS, apart, strict=True):
            if BROKEN in its_words:
                findings.skip(f"{tool} of {name}*", BROKEN)
            else:
                findings.check(f"{tool} of {name}* is clean", its_code == 0, exit_code=its_code, said=its_words)
        if all(BROKEN in its_words for _, its_words in apart):
            raise Skipped(f"compute-sanitizer's {tool} works with no kernel here: {BROKEN}")
        return
    if UNSUPPORTED in said:
        raise Skipped(f"compute-sanitizer does not work here: {UNSUPPORTED}")
    if not re.search(r"ERROR SUMMARY: \d+ error|RACECHECK SUMMARY: \d+ hazard", said):
        raise Skipped(f"compute-sanitizer does not work here: {(said.strip() or 'it says nothing').splitlines()[-1]}")
    findings.check(f"{tool} is clean", code == 0, exit_code=code, said=said[-LAST_WORDS:])


def _watched(
    found: str, tool: str, log: Path, settings: Settings, option: str | None, kernels: Sequence[str]
) -> tuple[int, str]:
    """The tool's exit code and last output. It checks only these kernels if it can: with torch's it takes minutes."""
    log = log if len(kernels) > 1 else log.with_suffix(f".{kernels[0]}.log")
    chosen = [] if option is None else [word for name in kernels for word in (option, f"kns={name}")]
    chosen += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch makes calls that may fail
    command = [found, "--tool", tool, "--error-exitcode", str(ERRORS), "--log-file", str(log), *chosen]
    command += [sys.executable, "-m", "benchmarks.gpu.launch_all", settings.device]
    # Each tensor gets its own allocation, or an access beyond it could still lie within a block of torch's allocator.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    said = done.stdout.decode(errors="replace").strip()
    said += "\n" + log.read_text(errors="replace").strip() if log.exists() else ""
    return done.returncode, said[-LAST_WORDS:]


def _option(found: str) -> str | None:
    """This version's option that selects the kernels to check; None: it has none."""
    helped = subprocess.run([found, "--help"], capture_output=True, check=False).stdout.decode(errors="replace")
    return next((option for option in FILTERS if option in helped), None)
