"""What of the library works in a fork of its process, which lacks the threads of its parent."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Generator, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TypeVar

from flowreel.engine.errors import UsageError

Item = TypeVar("Item")

_process: int | None = None  # the first one that computed; any other here is a fork of it
# What a forked process has inherited and must neither use nor close. It is kept for ever: closing a decoder, or merely
# dropping it, would wait for threads that only the parent has.
ABANDONED: list[object] = []


def limit_threads_of_fork() -> None:
    """Lets torch compute with one thread in a fork of a process that has computed. Call it before computing.

    With more threads GNU's OpenMP may wait for ever for workers, or for a lock, that only the parent has. DataLoader
    limits its workers to one thread as well.
    """
    global _process
    if _process is None:
        _process = os.getpid()
    elif os.getpid() != _process:
        import torch

        torch.set_num_threads(1)


def end_openmp_workers() -> None:
    """Ends this thread's OpenMP workers, and waits for their end. Call it at the end of a thread that has computed.

    By themselves they would end shortly after the thread. An ending thread takes the locks of MKL's allocator, and a
    process forked in that moment, which lacks the thread that would release them, waits for them for ever.
    """
    if "torch" in sys.modules:  # otherwise nothing has computed
        _omp_pause()()


@cache
def _omp_pause() -> Callable[[], object]:
    """What ends and joins the OpenMP workers of the thread that calls it, if torch computes with GNU's OpenMP."""
    import torch

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        pause = library.omp_pause_resource_all
    except (OSError, AttributeError):  # another system, or an OpenMP from before 2018
        return lambda: None
    if hasattr(library, "kmp_set_blocktime"):  # Intel's or LLVM's, whose workers are not one thread's
        return lambda: None
    return partial(pause, 1)  # omp_pause_soft: settings stay


class OfOneProcess(Iterator[Item]):
    """The items of a generator that has threads: only the process that began to read it may go on, and closes it."""

    def __init__(self, items: Generator[Item, None, None]) -> None:
        self._items = items
        self._process: int | None = None  # that has begun to read

    def __next__(self) -> Item:
        if self._process is None:
            self._process = os.getpid()
        if not self._is_here():
            raise UsageError(
                "flow that was being read when this process was forked cannot be read on here, as the threads that "
                "compute it are the parent's: start again in this process"
            )
        return next(self._items)

    def close(self) -> None:
        """Stops early, as dropping it does."""
        if self._is_here():
            self._items.close()

    def __del__(self) -> None:
        if not self._is_here():
            ABANDONED.append(self._items)

    def _is_here(self) -> bool:
        return self._process in (None, os.getpid())
