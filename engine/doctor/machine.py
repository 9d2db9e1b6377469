"""The machine: Python, the processor, and the folder that outputs go to."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from flowreel.engine.doctor.checking import Finding
from flowreel.engine.errors import counted

OLDEST_PYTHON = (3, 11)


def python() -> Finding:
    found, where = platform.python_version(), f"{platform.system()} {platform.machine()}"
    return Finding("ok" if sys.version_info >= OLDEST_PYTHON else "broken", found, where)


def processor() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return Finding("ok", detail=counted(cores, "core") + (f", {memory / 1e9:.1f} GB of memory" if memory else ""))


def bf16() -> Finding:
    """Whether this processor has instructions to multiply bfloat16 numbers, as Linux reports."""
    flags = set(_cpu_flags().split())
    names = {"avx512_bf16": "AVX512_BF16", "amx_bf16": "AMX", "bf16": "Arm BF16"}
    found = [name for flag, name in names.items() if flag in flags]
    return Finding("ok", detail=", ".join(found)) if found else Finding("missing", detail="no bf16 instructions found")


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")


def working_folder() -> Finding:
    with tempfile.NamedTemporaryFile(dir=".", prefix=".flowreel-doctor-") as file:
        file.write(b"written")
    return Finding("ok", detail=f"{Path.cwd()}, {shutil.disk_usage('.').free / 1e9:.1f} GB free")
