"""Checks of Python, the CPU and the working folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowreel.engine.doctor import machine
from tests.engine.doctor.looking import found, raising


def test_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OLDEST_PYTHON", (9, 0))
    assert found("Python").status == "broken"


@pytest.mark.parametrize(
    ("cpuinfo", "status", "says"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16\nbugs\t: none", "ok", "AVX512_BF16, AMX"),
        ("Features\t: fp asimd bf16", "ok", "Arm BF16"),
        ("flags\t\t: fpu avx2", "missing", "no bf16"),
        ("", "missing", "no bf16"),
        (None, "missing", "no bf16"),
    ],
)
def test_bf16(monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, status: str, says: str) -> None:
    absent = raising(FileNotFoundError())
    monkeypatch.setattr(Path, "read_text", absent if cpuinfo is None else lambda path: cpuinfo)
    finding = found("CPU bf16")
    assert finding.status == status
    assert says in finding.detail


def test_one_core_is_not_called_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert "1 core," in found("processor").detail


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert found("working folder").status == "ok"
    assert list(tmp_path.iterdir()) == []
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(machine.tempfile, "NamedTemporaryFile", raising(full))
    assert "No space left" in found("working folder").detail
    assert found("working folder").status == "broken"
