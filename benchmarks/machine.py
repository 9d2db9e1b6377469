"""What a result was measured on: hardware, versions, commit, date, load."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.processes import ROOT

PACKAGES = (
    "flowreel",
    "torch",
    "numpy",
    "av",
    "zarr",
    "numcodecs",
    "pcodec",
    "opencv-python-headless",
    "torchvision",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "PyNvVideoCodec",
)


def machine() -> dict[str, object]:
    """What a result's header says about the machine, as plain JSON values."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": "avx512_bf16" in _flags() or "amx_bf16" in _flags(),
        "memory_gb": _memory_gb(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "commit": _commit(),
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "load": load(),
    }


def load() -> float | None:
    """Load average of the last minute, which shows what else was running. None where the system does not report it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _proc(name: str) -> list[str]:
    path = Path("/proc") / name
    return path.read_text().splitlines() if path.exists() else []


def _cpu() -> str:
    for line in _proc("cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _flags() -> set[str]:
    return next((set(line.split(":", 1)[1].split()) for line in _proc("cpuinfo") if line.startswith("flags")), set())


def _memory_gb() -> float | None:
    for line in _proc("meminfo"):
        if line.startswith("MemTotal"):
            return round(int(line.split()[1]) * 1024 / 1e9, 1)
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit; None where git cannot tell, or where flowreel is not imported from this checkout."""
    import flowreel.engine

    if not Path(str(flowreel.engine.__file__)).resolve().is_relative_to(ROOT):
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    if shutil.which("git") is None or not (head := git("rev-parse", "--short", "HEAD")):
        return None
    return head + ("+changes" if git("status", "--porcelain", "-uno") else "")
