"""The tests that take a GPU, through pytest: one run a folder, so that a package one of them lacks loses only that."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest  # noqa: F401  # where it is missing this part is skipped

from benchmarks.gpu.findings import Findings, Settings
from benchmarks.processes import ROOT

TAKES_A_GPU = re.compile(r"\b(gpu|card): torch\.device\b")
DRY = ["tests/engine/compiled/test_graphs.py"]


def run(findings: Findings, settings: Settings) -> None:
    """Each test is a check. A dry run takes one file of tests that want no GPU."""
    if settings.dry:
        _one_run(findings, settings, "dry", DRY, [])
        return
    folders: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if TAKES_A_GPU.search(path.read_text()):
            name = path.relative_to(ROOT).as_posix()
            folders.setdefault(name.split("/")[1], []).append(name)
    for folder, files in folders.items():
        _one_run(findings, settings, folder, files, ["-m", "gpu"])


def _one_run(findings: Findings, settings: Settings, name: str, files: list[str], options: list[str]) -> None:
    told = Path(settings.folder) / f"tests-{name}.xml"
    # Their own settings want a plug-in for time limits; a limit there is, for the whole of this part.
    plain = [
        "-o",
        "addopts=--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::pytest.PytestConfigWarning",
    ]
    command = [sys.executable, "-m", "pytest", "-q", *plain, f"--junit-xml={told}", *options, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip()
    if done.returncode in (0, 1) and told.exists():
        for case in ElementTree.parse(told).iter("testcase"):
            _file(findings, case)
        return
    if missing := re.search(r"No module named '([\w.]+)'", said):
        findings.skip(f"tests/{name}", f"{missing[1]} is not installed")
    else:
        findings.check(f"tests/{name} runs", False, exit_code=done.returncode, said=said[-1500:])


def _file(findings: Findings, case: ElementTree.Element) -> None:
    name = f"{case.get('classname')}::{case.get('name')}"
    if (skipped := case.find("skipped")) is not None:
        findings.skip(name, skipped.get("message"))
        return
    wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
    if wrong is None:
        findings.check(name, True)
    else:
        findings.check(name, False, said=(wrong.text or wrong.get("message") or "")[-1500:])
