"""A pseudo-terminal for commands that run in the test's own process, and Ctrl-C for those that run in another."""

from __future__ import annotations

import os
import pty
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.fresh import Fresh


def interrupt(command: Fresh, store: str) -> None:
    """Sends Ctrl-C to the command when it has begun to write the store: it ends with 130, without finishing it."""
    command.until(Path(f"{store}.partial/flow/zarr.json"))
    code, said = command.stop(signal.SIGINT)
    assert code == 130
    assert said.splitlines()[-1] == "flowreel: interrupted"
    assert "Traceback" not in said
    assert not Path(store).exists()


class Terminal:
    """A thread reads what is written to ``file``: the system holds only a few kilobytes that nobody has read."""

    def __init__(self) -> None:
        self._parent, child = pty.openpty()
        self.file = os.fdopen(child, "w")
        self._seen = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while seen := os.read(self._parent, 1 << 16):
                self._seen += seen
        except OSError:  # closed at the other end
            pass

    def said(self) -> str:
        """All that was written, with the codes that move the cursor. Nothing can be written afterwards."""
        self.file.close()
        self._reader.join()
        return self._seen.decode(errors="replace")

    def close(self) -> None:
        self.said()
        os.close(self._parent)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    made = Terminal()
    yield made
    made.close()
