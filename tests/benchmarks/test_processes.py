"""The time and memory measured for a command are its own, not those of its parent or of other commands."""

from __future__ import annotations

import sys

import pytest

from benchmarks.processes import CommandFailedError, measured


def test_peak_memory_is_the_commands_own() -> None:
    """This process has loaded torch, hundreds of megabytes; a small child must not be charged its parent's peak."""
    small = measured([sys.executable, "-S", "-c", "pass"])
    large = measured([sys.executable, "-S", "-c", "print(len(bytearray(200_000_000)))"])
    assert small.peak_bytes < 60e6
    assert 200e6 < large.peak_bytes < 260e6
    assert large.stdout == "200000000\n"


def test_time_is_wall_and_cpu() -> None:
    slept = measured([sys.executable, "-S", "-c", "import time; time.sleep(0.3)"])
    assert slept.seconds >= 0.3
    busy = measured([sys.executable, "-S", "-c", "import time\nwhile time.process_time() < 0.2: pass"])
    assert busy.cpu_s >= 0.2


def test_a_command_that_fails_is_told() -> None:
    with pytest.raises(CommandFailedError, match=r"(?s)ended with 3.*so it goes"):
        measured([sys.executable, "-S", "-c", "import sys; print('so it goes', file=sys.stderr); sys.exit(3)"])
