"""Fixtures shared by the tests of sinks."""

from __future__ import annotations

import threading

import pytest

from tests.sinks.waiting import Encoders


@pytest.fixture
def encoders() -> Encoders:
    """Gives the threads of pools that the test has begun and that still run. Sinks that earlier tests abandoned may
    have others."""
    before = set(threading.enumerate())
    return lambda: [each for each in threading.enumerate() if each.name.startswith("pool") and each not in before]
