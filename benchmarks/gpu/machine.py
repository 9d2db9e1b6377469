"""What everything else was measured on, and whether the kernels compile and load there."""

from __future__ import annotations

import importlib.metadata
import subprocess
import time

import torch

from benchmarks.gpu.findings import Findings, Settings
from benchmarks.machine import machine

LIBRARIES = (
    "torch",
    "numpy",
    "cupy",
    "triton",
    "av",
    "zarr",
    "numcodecs",
    "pcodec",
    "PyNvVideoCodec",
    "pytest",
    "nvidia-",
)
COMPILED = "our kernels compile and load"


def describe(findings: Findings, settings: Settings) -> None:
    """Fills the result's header: ``gpu``, ``versions``, ``commit``, ``machine``."""
    about = machine()
    found = {}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"] or ""
        if name.startswith(LIBRARIES):
            found[name] = package.version
    found |= {"python": about["python"], "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    gpu = about["gpu"]
    head = {"gpu": gpu, "versions": found, "commit": about["commit"], "machine": about}
    findings.add(head=head, headline=gpu or about["cpu"])
    if settings.dry:
        findings.check("what it runs on is told", bool(found))
        return
    if gpu is None:
        findings.check("there is a GPU that torch can use", False, torch=torch.__version__, cuda=torch.version.cuda)
        return
    findings.add(head=head | {"versions": found | {"driver": _driver()}})
    findings.attempt(COMPILED, lambda: _load(findings))


def _load(findings: Findings) -> None:
    """Fails, rather than being skipped, without CuPy: other checks then compare torch's operations with themselves."""
    from flowreel.engine.errors import MissingDependencyError
    from flowreel.kernels.compiling import load_cupy
    from flowreel.kernels.launch import prepare

    began_s = time.perf_counter()
    try:
        load_cupy()
        prepare(torch.device("cuda", 0))
    except MissingDependencyError as error:
        findings.check(COMPILED, False, said=str(error))
    else:
        findings.check(COMPILED, True, s=time.perf_counter() - began_s)


def _driver() -> str | None:
    """The driver's version from ``nvidia-smi``; None if that is missing, too slow, or does not work."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.decode(errors="replace").split()
    return lines[0] if done.returncode == 0 and lines else None
