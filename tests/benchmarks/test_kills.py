"""The case that kills runs counts only runs that were killed before they had finished."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNFINISHED = "from pathlib import Path; p = Path({store!r} + '.partial'); p.mkdir(parents=True, exist_ok=True); "
HANGS = UNFINISHED + "(p / str(len(list(p.iterdir())))).touch(); import time; time.sleep(600)"
FINISHES = UNFINISHED + "(p / 'all').touch(); p.rename({store!r})"
FAILS = UNFINISHED + "(p / 'some').touch(); raise SystemExit(3)"


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))  # benchmarks are not installed, only importable from the root
    import benchmarks.kills

    return benchmarks.kills


class Runs:
    """In place of flowreel: each run executes the next of these scripts."""

    def __init__(self, *scripts: str) -> None:
        self.left = list(scripts)
        self._now = ""
        self._running: subprocess.Popen[bytes]

    def process(self, job: Any, store: Path) -> subprocess.Popen[bytes]:
        self._now = self.left.pop(0)
        self._running = subprocess.Popen([sys.executable, "-c", self._now.format(store=str(store))])
        return self._running

    def draw_s(self) -> float:
        """How long to wait before killing: not at all if the run hangs; other runs have ended when this returns."""
        if self._now != HANGS:
            self._running.wait()
        return 0.0


def test_only_runs_that_died_on_the_way_count(
    kills: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "killed" / "x.zarr"
    runs = Runs(HANGS, FINISHES, HANGS, HANGS)
    monkeypatch.setattr(kills, "process", runs.process)
    deaths = kills.deaths_of(None, store, runs.draw_s, 2)
    assert runs.left == []
    assert [death.shards for death in deaths] == [0, 0]
    assert not store.exists()


def test_a_run_that_fails_by_itself_is_no_death(
    kills: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(FAILS)
    monkeypatch.setattr(kills, "process", runs.process)
    with pytest.raises(RuntimeError, match="failed by itself with exit code 3"):
        kills.deaths_of(None, tmp_path / "killed" / "x.zarr", runs.draw_s, 1)


def test_a_row_counts_stores_and_deaths(kills: ModuleType) -> None:
    deaths = kills.Death(0.1, 0, 1), kills.Death(0.2, 3, 0)
    tried = [kills.Trial(True, deaths), kills.Trial(False, deaths[1:])]
    assert kills.row("clip", kills.Job("clip", 2, 2, 9, 2), tried) == {
        "source": "clip",
        "flows": 8,
        "stores": 2,
        "runs killed while running": 3,
        "with shards published": 2,
        "while a file was written": 1,
        "byte-identical after --resume": 1,
    }
