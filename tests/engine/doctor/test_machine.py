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
    ("flags", "status", "says"),
    [
        ("fpu avx512f avx512_bf16 amx_bf16", "ok", "AVX512_BF16, AMX"),
        ("fp asimd bf16", "ok", "Arm BF16"),
        ("fpu avx2", "missing", "no bf16"),
    ],
)
def test_bf16(monkeypatch: pytest.MonkeyPatch, flags: str, status: str, says: str) -> None:
    monkeypatch.setattr(machine, "_cpu_flags", lambda: flags)
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
