"""The command line: flags to settings to the library's functions, and errors to one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (143: by SIGTERM).
"""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from flowreel.engine.errors import FlowreelError, StageError, UsageError, lacks_memory, lacks_threads, said_by

INTERRUPTED = 130
SAME_INTERRUPT_S = 1.0  # a Ctrl-C this soon after the first counts as the same: a person or a script sent it twice


class PastTyper(Exception):
    """Carries an error, its ``__cause__``, past typer: an EOFError, which typer would take for Ctrl-D at a prompt, or a
    KeyboardInterrupt, whose notes it would discard."""


def main() -> NoReturn:
    """Entry point of ``flowreel`` and ``python -m flowreel``."""
    os.environ.update(patience() | os.environ)  # read when torch loads
    silence_pillow()
    shorten_warnings()
    outlive_stderr()
    if isinstance(sys.stdout, io.TextIOWrapper):  # as on stderr: escapes what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    if not os.environ.get("COLUMNS", "").strip("0"):  # as set where there is no terminal; nothing would be shown
        os.environ.pop("COLUMNS", None)
    stopped_by = take_interrupts()
    code = call(sys.argv[1:])
    ignore_interrupts()
    sys.exit(128 + stopped_by[0] if code == INTERRUPTED and stopped_by else code)


def silence_pillow() -> None:
    """Silences Pillow in this process: what it warns and logs about a file is in our own errors or does not matter."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())


def shorten_warnings() -> None:
    """Makes a warning one line of its kind and message, without the line of code that it came from."""
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"


class Unheard(io.FileIO):
    """Drops what cannot be written: the disk of a log is full, a terminal was closed, or nobody reads a pipe."""

    def write(self, data: Any, /) -> int:
        written = None
        with suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


def outlive_stderr() -> None:
    """Makes stderr an ``Unheard``: hours of computation do not end because a line about them cannot be shown."""
    if isinstance(sys.stderr, io.TextIOWrapper):
        file = io.BufferedWriter(Unheard(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(file, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)


def take_interrupts() -> list[int]:
    """Makes the first Ctrl-C or SIGTERM stop a command in good order, which takes a while; those right after it are
    ignored. Returns a list to which the numbers of the signals are added as they arrive.

    An immediate exit would leave threads inside torch, which abort the process as it ends. A signal that comes later
    does exit at once: what is unfinished keeps its unfinished name.
    """
    came: list[int] = []
    came_s: list[float] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        came_s.append(time.monotonic())
        if len(came) == 1:
            raise KeyboardInterrupt
        if came_s[-1] - came_s[0] > SAME_INTERRUPT_S:
            os._exit(128 + number)

    # A shell that starts this in the background makes it ignore Ctrl-C, which is for the foreground: that stays so.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is usual:
            signal.signal(number, interrupt)
    return came


def ignore_interrupts() -> None:
    """From here on nothing is left to stop. A signal that comes while Python exits would print a traceback, or kill."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def patience() -> dict[str, str]:
    """OpenMP's environment variables that make torch's idle threads spin for some microseconds and then sleep.

    By default they spin for milliseconds, on the cores that decoding and encoding need: on two cores, 50 frames of
    1024x436 took 8.2 and 8.7 s that way, 5.6 and 6.7 s with threads that sleep at once. But waking a thread takes
    longer than the wait for the next small layer: with a short spin the baseline's network gained a fifth over that.
    """
    return {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}


@contextmanager
def loading() -> Iterator[None]:
    """For the imports of a command: without garbage collection, and what they leave is never searched for garbage.

    Collections went through torch's objects again and again, and once more at exit: a quarter of the CPU time of a run
    of two frames, and over a third of painting or exporting one flow.
    """
    if not gc.isenabled() or "torch" in sys.modules:  # called from a program that has loaded torch: its objects stay
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def call(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code; every error becomes one line on stderr.

    With ``--debug`` anywhere among the arguments, the error's traceback is printed before it.
    """
    if any("\0" in argument for argument in arguments):  # no shell can pass it, and no file system accepts it
        return say("an argument holds a NUL character: no file or option goes by such a name", 2)
    if "" in arguments:
        return say("an argument is empty: a shell variable that is not set?", 2)
    try:
        os.getcwd()
    except OSError as lost:  # MKL would abort the process, blaming a file of torch's
        return say(f"the working folder cannot be used ({lost.strerror}): change to one that exists", 1)
    try:
        from flowreel.engine.cli.app import command_line  # here, so that Ctrl-C while it loads is handled

        result: int | None = command_line(arguments, prog_name="flowreel", standalone_mode=False)
    except (KeyboardInterrupt, Exception) as raised:
        error = (raised.__cause__ or raised) if isinstance(raised, PastTyper) else raised
        if not isinstance(error, Exception):
            return say(_with_notes("interrupted", error), INTERRUPTED)
        if "--debug" in arguments and sys.stderr is not None:  # None: see ``say``
            traceback.print_exception(error)
        return _report(error)
    if result == INTERRUPTED:  # what typer makes of Ctrl-C
        return say("interrupted", INTERRUPTED)
    return result or 0


def _report(error: Exception) -> int:
    if hasattr(error, "format_message") and not error.format_message():  # no arguments at all: the help has been shown
        return 2
    return say(*told(error))


def told(error: Exception) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    cause = error.__cause__ if isinstance(error, StageError) else error
    if isinstance(error, FlowreelError):
        message = _with_notes(str(error) or type(error).__name__, error)
        return message, 2 if isinstance(cause, UsageError) else 1
    if lacks_memory(error) or lacks_threads(error):
        return said_by(error), 1
    if isinstance(error, OSError) and error.strerror:  # one that was not foreseen: a name too long, a lost disk
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror, 1
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a value of the wrong kind
        command = getattr(getattr(error, "ctx", None), "command_path", "flowreel")
        return f"{error.format_message()} ({command} --help shows what there is)", 2
    if type(error).__name__ == "Abort":  # typer's, for Ctrl-C and Ctrl-D at a prompt
        return "interrupted", INTERRUPTED
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1


def _with_notes(message: str, error: BaseException) -> str:
    """The message and the error's notes, which say what is kept of the outputs."""
    return "; ".join([message, *getattr(error, "__notes__", ())])


def say(message: str, code: int) -> int:
    """Prints the message as one line on stderr and returns the exit code."""
    if sys.stderr is not None:  # None: closed, and print would turn to stdout instead
        print(f"flowreel: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def printable(text: str) -> str:
    """The text on one line, with control characters escaped: names and files may hold terminal codes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
