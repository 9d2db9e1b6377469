"""Helpers with which all tests run a check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowreel.engine.doctor import CHECKS, Check, Finding, examine


def check(name: str) -> Check:
    return next(check for check in CHECKS if check.name == name)


def found(name: str) -> Finding:
    """What an examination finds for one check."""
    ((_, finding),) = examine([check(name)]).found
    return finding


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail
