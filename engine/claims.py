"""One writer at a time: a run locks the file or folder that it writes under an unfinished name.

The lock is the operating system's (flock), on that file or folder itself: it ends with the process, however the process
ends, and leaves nothing behind. Where there are no such locks (on some network file systems), runs go on without them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowreel.engine.errors import OutputBusyError


class Claim:
    """A lock on a file or folder, held until it is released or this object is garbage-collected.

    The file or folder is created if it is missing; its contents are up to the caller. The lock survives a rename.

    Raises:
        OutputBusyError: another run holds it. ``output``: what the message says that run is writing.
        OSError: it can be neither created nor opened.
    """

    made: bool  # it did not exist before
    descriptor: int  # of the open file; a child process that inherits it shares the lock
    _close: weakref.finalize[Any, Any]  # closes the descriptor, also when this object is garbage-collected

    def __init__(self, path: Path, output: str, make: Callable[[Path], None]) -> None:
        self.path = path
        while True:
            try:
                make(path)
                self.made = True
            except FileExistsError:
                self.made = False
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not block
            except FileNotFoundError:
                if os.path.lexists(path):  # a dangling link
                    raise
                continue  # its holder has just published or removed it
            self._close = weakref.finalize(self, os.close, descriptor)
            self.descriptor = descriptor
            if not locked(descriptor):
                self._close()
                raise OutputBusyError(f"{output} is being written by another run: wait for it to end")
            if still_named(descriptor, path):
                return
            self._close()

    @classmethod
    def of_file(cls, path: Path, output: str) -> Claim:
        return cls(path, output, lambda path: path.touch(exist_ok=False))

    @classmethod
    def of_folder(cls, path: Path, output: str) -> Claim:
        return cls(path, output, Path.mkdir)

    @property
    def held(self) -> bool:
        alive: bool = self._close.alive
        return alive

    def release(self) -> None:
        """Releases the lock. May be called more than once."""
        if self.held:
            import fcntl

            with suppress(OSError):  # closing is not enough when a child process has inherited it
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        self._close()

    def withdraw(self) -> None:
        """Releases the lock and, if the file or folder was created for it and is still empty, removes that."""
        with suppress(OSError):  # among others where the disk is gone
            if self.made and self.held and still_named(self.descriptor, self.path):
                if self.path.is_dir():
                    self.path.rmdir()
                elif not self.path.stat().st_size:
                    self.path.unlink()
        self.release()


def locked(descriptor: int) -> bool:
    """Tries to lock the open file for this descriptor alone. Returns whether it did; True where there are no locks."""
    import fcntl  # here: not every system has it, and reading flow needs no lock

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def still_named(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is still the open file: nobody renamed or removed it between opening and locking."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
