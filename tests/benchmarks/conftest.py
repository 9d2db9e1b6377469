"""Made-up results, and the arguments that parts of ``python -m benchmarks gpu`` take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import surroundings
from benchmarks.gpu.findings import Settings
from tests.fakes.gpu_parts import Found

Write = Callable[..., Path]

MACHINE: dict[str, Any] = {
    "date": "2031-05-06",
    "cpu": "Abacus",
    "cores": 2,
    "gpu": None,
    "python": "3.11.9",
    "versions": {"torch": "2.13.0"},
    "commit": "abc1234",
    "torch_threads": 2,
    "load": 0.04,
}


@pytest.fixture
def write() -> Write:
    """``write(folder, case, rows, machine={...}, **more)`` writes a result file and returns its path."""

    def written(
        folder: Path, case: str, rows: list[dict[str, Any]], machine: dict[str, Any] | None = None, **more: Any
    ) -> Path:
        from benchmarks.results import file_name

        result = {"case": case, "machine": MACHINE | (machine or {}), "load_after": 0.5, "rows": rows, **more}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file_name(result)
        path.write_text(json.dumps(result))
        return path

    return written


def sample(median: float, spread: float = 0.01, n: int = 9) -> dict[str, float]:
    """A measured cell whose quartiles are the fraction ``spread`` below and above the median."""
    return {"median": median, "low": median * (1 - spread), "high": median * (1 + spread), "n": n}


@pytest.fixture(name="sample")
def _sample() -> Callable[..., dict[str, float]]:
    return sample


@pytest.fixture
def findings(tmp_path: Path) -> Found:
    return Found(tmp_path / "found.json")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(surroundings, "MEMORY", tmp_path / "memory")  # /dev/shm is shared with other test sessions
    return Settings("cpu", True, str(tmp_path), str(tmp_path))
