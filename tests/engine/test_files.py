"""The cache folder, names with glob characters, and the natural order of file names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flowreel.engine.files import as_glob, cache_folder, natural_order


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLOWREEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("weights") == tmp_path / ".cache" / "flowreel" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification says to ignore relative paths
    assert cache_folder("kernels") == tmp_path / ".cache" / "flowreel" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
    assert cache_folder("weights") == tmp_path / "users" / "flowreel" / "weights"
    monkeypatch.setenv("FLOWREEL_CACHE", str(tmp_path / "own"))
    assert cache_folder("weights") == tmp_path / "own" / "weights"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWREEL_CACHE", "own")
    assert cache_folder("weights") == tmp_path / "own" / "weights"


def test_of_a_user_whom_the_system_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run under a user number without an account, and so without a known home folder."""
    for name in ("FLOWREEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert not cache_folder("kernels").is_absolute()


def test_a_folder_that_is_there_is_no_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip[1]" / "a*").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, pattern in {
        "clip[1]/x.png": None,
        "clip[1]/*.png": "clip[[]1]/*.png",
        "clip[1]/a*/b?": "clip[[]1]/a[*]/b?",
        "clip[1]/b*/x.png": "clip[[]1]/b*/x.png",
        "clip[1]": None,
        "clip[2]/x.png": "clip[2]/x.png",
        "*.png": "*.png",
        "x.png": None,
        "": None,
        "/*": "/*",
        f"{tmp_path}/clip[1]/*": f"{tmp_path}/clip[[]1]/*",
    }.items():
        assert as_glob(name) == pattern
        assert pattern is None or as_glob(pattern) == pattern


def test_natural_order() -> None:
    names = ["b/1.png", "a/x10.png", "a/X2.png", "a/x03.png", "a/x.png"]
    ordered = [str(path) for path in sorted(map(Path, names), key=natural_order)]
    assert ordered == ["a/X2.png", "a/x03.png", "a/x10.png", "a/x.png", "b/1.png"]
    padded = [Path(f"a/{number:3d}.png") for number in range(1001)]
    assert sorted(padded, key=natural_order) == padded
