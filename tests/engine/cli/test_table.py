"""Numbers for a person."""

from __future__ import annotations

import pytest

from flowreel.engine.cli.table import clock, size


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0.0 s"), (59.94, "59.9 s"), (60, "1:00"), (185.4, "3:05"), (3723, "1:02:03")]
)
def test_clock(seconds: float, said: str) -> None:
    assert clock(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (15.7e6, "15.7 MB"), (14.6e9, "14.6 GB")]
)
def test_size(count: float, said: str) -> None:
    assert size(count) == said
