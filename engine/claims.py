"""One writer at a time: what is written under an unfinished name is held by the run that writes it.

The lock is the system's own (flock), on that very file or folder: it ends with the process, however that ends, and
leaves nothing behind. Where there are no such locks (not a Unix, some network disks) runs go on without.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowreel.engine.errors import OutputBusyError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]


class Claim:
    """A file or folder that is held until it is released, or until nobody has this object any more.

    It is made where it is missing; its contents are the caller's affair. The lock goes along when it is renamed.

    Raises:
        OutputBusyError: another run holds it. ``output`` is what that run is told to be writing.
        OSError: it can be neither made nor opened.
    """

    made: bool  # it was not there before
    descriptor: int | None = None  # of the open file, by which a process that inherits it holds it too; None: no locks
    _close: weakref.finalize[Any, Any]  # also when nobody has this object any more

    def __init__(self, path: Path, output: str, make: Callable[[Path], None]) -> None:
        self.path = path
        while True:
            try:
                make(path)
                self.made = True
            except FileExistsError:
                self.made = False
            if fcntl is None:
                self._close = weakref.finalize(self, int)
                return
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
            except FileNotFoundError:
                if os.path.lexists(path):  # a link to nothing
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
        """Others may have it now. More than once is no harm."""
        if self.held and fcntl is not None and self.descriptor is not None:
            with suppress(OSError):  # closing alone would not do where a child process has inherited it
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        self._close()

    def withdraw(self) -> None:
        """Releases it as if it had never been held: what was made for it goes, unless it holds something by now."""
        if self.made and self.held and (self.descriptor is None or still_named(self.descriptor, self.path)):
            with suppress(OSError):
                if self.path.is_dir():
                    self.path.rmdir()
                elif not self.path.stat().st_size:
                    self.path.unlink()
        self.release()


def locked(descriptor: int) -> bool:
    """Whether the open file is now locked for this descriptor alone; where there are no locks, it counts as locked."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def still_named(descriptor: int, path: Path) -> bool:
    """Whether nobody published or removed the open file between its opening and its locking."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
