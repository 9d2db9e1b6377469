"""What the rest was measured on, and whether the kernels can be compiled and loaded there."""

from __future__ import annotations

import importlib.metadata
import shutil
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


def describe(findings: Findings, settings: Settings) -> None:
    """Fills the result's head: ``gpu``, ``versions``, ``commit``, ``machine``."""
    about = machine()
    found = {}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"] or ""
        if name.startswith(LIBRARIES):
            found[name] = package.version
    found |= {"python": about["python"], "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if (driver := _driver()) is not None:
        found["driver"] = driver
    gpu = about["gpu"]
    findings.add(head={"gpu": gpu, "versions": found, "commit": about["commit"], "machine": about})
    findings.add(headline=gpu or about["cpu"])
    if settings.dry:
        return
    if gpu is None:
        findings.note(f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU")
        return
    from flowreel.engine.errors import FlowreelError
    from flowreel.kernels.launch import kernels_on, prepare

    device = torch.device("cuda", 0)
    began_s = time.perf_counter()
    try:
        prepare(device)
        reason = "" if kernels_on(device) == "cuda" else "CuPy is not installed"
    except FlowreelError as error:
        reason = str(error)
    findings.check("our kernels compile and load", not reason, s=time.perf_counter() - began_s, reason=reason)


def _driver() -> str | None:
    """The driver's version, as its own tool says it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
