"""Fakes: a Python module or a shared library that is there, is missing, or is broken."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

Fake = Callable[..., types.ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """``module("cupy", arange=...)`` makes ``import cupy`` give a module with these names."""

    def fake(name: str, **names: object) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return fake


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Fake shared libraries by name: an object with functions, or the error that loading raises. No others exist."""
    there: dict[str, Any] = {}

    def load(name: str) -> Any:
        library = there.get(name, OSError(f"{name}: cannot open shared object file: No such file or directory"))
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    return there
