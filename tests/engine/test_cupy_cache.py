"""Where CuPy keeps its cache once flowreel is imported, also for a user without a usable home folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowreel.engine import cupy_cache


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder is ``home``, which does not exist yet; no environment variable names a cache."""
    for name in ("CUPY_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def settled() -> str | None:
    cupy_cache.settle()
    return os.environ.get("CUPY_CACHE_DIR")


def test_what_loads_cupy_loads_without_a_home(user: Path) -> None:
    (user / "home").touch()  # a file, so that nobody can make a folder in it, not even root
    code = "import flowreel, os; print(folder := os.environ['CUPY_CACHE_DIR']); import cupy, zarr; os.listdir(folder)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not Path(done.stdout.strip()).exists()  # it was temporary


def test_cupys_cache_is_where_the_user_has_one(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled() is None  # left to CuPy
    assert not (user / "home").exists()  # an import makes no folders
    (user / "home").mkdir()
    assert settled() is None
    (user / "home" / ".cupy").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(user / "cache"))
    assert settled() == str(user / "cache" / "cupy")
    assert not (user / "cache").exists()
    monkeypatch.setenv("CUPY_CACHE_DIR", "/nowhere/at/all")
    assert settled() == "/nowhere/at/all"


def test_without_cupy_nothing_is_made(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_cache, "find_spec", lambda name: None)
    assert settled() is None
    assert not (user / "home").exists()
