"""The tests that need a GPU, run by pytest file by file, so that no file's failure affects another's tests."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial

import pytest

from benchmarks.gpu.findings import LAST_WORDS, Findings, Settings, device_is_lost
from benchmarks.processes import ROOT

TAKES_A_GPU = re.compile(r"\b(gpu|card): torch\.device\b")
GRAPHS = "tests/kernels/test_cuda_on_gpu.py"  # slow, as it uses torch.compile
# The project's own pytest settings need a plug-in for time limits, and turn warnings into errors, also those of other
# library versions. The whole part has a time limit anyway.
PLAIN = ("-q", "-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default", "-p", "no:cacheprovider")
PLAIN += ("-p", "no:unraisableexception")  # it collects garbage ten times a file, for warnings that nobody sees
NO_GPU = "no CUDA device"  # the reason when ``tests/conftest.py`` skips them


def kernels(findings: Findings, settings: Settings) -> None:
    """Runs the kernels' tests, but for those in ``GRAPHS``."""
    _run(findings, settings, lambda name: name.startswith("tests/kernels/") and name != GRAPHS)


def engine(findings: Findings, settings: Settings) -> None:
    """Runs the engine's tests."""
    _run(findings, settings, lambda name: name.startswith("tests/engine/"))


def others(findings: Findings, settings: Settings) -> None:
    """Runs all other tests."""
    _run(findings, settings, lambda name: not name.startswith(("tests/kernels/", "tests/engine/")))


def graphs(findings: Findings, settings: Settings) -> None:
    """Runs the tests of the kernels in captured graphs and under torch.compile."""
    _run(findings, settings, lambda name: name == GRAPHS)


def files() -> list[str]:
    """The test files with a test that needs a GPU."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path.relative_to(ROOT).as_posix() for path in paths if TAKES_A_GPU.search(path.read_text())]


def _run(findings: Findings, settings: Settings, chosen: Callable[[str], bool]) -> None:
    """Runs the GPU tests of the chosen files; a dry run only collects them."""
    options = ("-m", "gpu", *(["--collect-only"] if settings.dry else []))
    for name in filter(chosen, files()):
        findings.attempt(name, partial(run_tests, findings, name, *options))


def run_tests(findings: Findings, name: str, *options: str) -> None:
    """Runs a file's tests in this process; each becomes a check as soon as it ends."""
    recorder, said = Recorder(findings), io.StringIO()
    with redirect_stderr(said):  # where pytest reports errors that occur before any test
        code = pytest.main([*PLAIN, *options, name], plugins=[recorder])
    count, words = recorder.collected, said.getvalue()[-LAST_WORDS:]
    findings.check(f"{name}: tests are found", count > 0, tests=count, code=int(code), said=words)
    if recorder.lost:
        raise RuntimeError("an error has made the GPU unusable for this process: the tests after it did not run")


class Recorder:
    """A pytest plug-in that records each test as a check."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.collected = 0
        self.lost = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = len(session.items)
        self._session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._findings.check(f"{report.nodeid} can be collected", False, said=report.longreprtext[-LAST_WORDS:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._findings.check(report.nodeid, False, said=report.longreprtext[-LAST_WORDS:])
            if device_is_lost():
                self.lost, self._session.shouldstop = True, "the GPU is lost"
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            if NO_GPU in reason:
                self._findings.check(report.nodeid, False, said=reason)
            else:
                self._findings.skip(report.nodeid, reason)
        elif report.when == "call":
            self._findings.check(report.nodeid, True)
