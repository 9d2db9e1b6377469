"""The tests that take a GPU, through pytest: folder by folder, so that a package one of them lacks loses only that."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr

import pytest

from benchmarks.gpu.findings import Findings, Settings
from benchmarks.processes import ROOT

TAKES_A_GPU = re.compile(r"\b(gpu|card): torch\.device\b")
DRY = ["tests/engine/compiled/test_graphs.py"]
# Their own settings want a plug-in for time limits; a limit there is, for the whole of this part.
PLAIN = ("-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "--continue-on-collection-errors")
QUIET = ("-W", "ignore::pytest.PytestConfigWarning")


def run(findings: Findings, settings: Settings) -> None:
    """Each test is a check, filed as it ends. A dry run takes one file of tests that want no GPU."""
    if settings.dry:
        run_tests(findings, "tests", DRY)
        return
    folders: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if TAKES_A_GPU.search(path.read_text()):
            name = path.relative_to(ROOT).as_posix()
            folders.setdefault(name.split("/")[1], []).append(name)
    for folder, files in folders.items():
        run_tests(findings, f"tests/{folder}", files, "-m", "gpu")


def run_tests(findings: Findings, name: str, files: list[str], *options: str) -> None:
    """The files' tests in this process."""
    said = io.StringIO()
    with redirect_stderr(said):  # where pytest tells what is wrong before there is a test
        code = pytest.main([*PLAIN, *QUIET, *options, *files], plugins=[Recorder(findings)])
    if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR):
        _file_failure(findings, f"{name} runs", said.getvalue())


class Recorder:
    """A plug-in for pytest."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._findings.check(report.nodeid, False, said=report.longreprtext[-1500:])
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self._findings.skip(report.nodeid, reason)
        elif report.when == "call":
            self._findings.check(report.nodeid, True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            _file_failure(self._findings, f"{report.nodeid} can be collected", report.longreprtext)


def _file_failure(findings: Findings, what: str, said: str) -> None:
    if missing := re.search(r"No module named '([\w.]+)'", said):
        findings.skip(what, f"{missing[1]} is not installed")
    else:
        findings.check(what, False, said=said[-1500:])
