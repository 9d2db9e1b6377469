"""The command line: flags to settings to the library's functions, and errors to one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (143: by SIGTERM).
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from types import FrameType
from typing import NoReturn

from flowreel.engine.errors import FlowreelError, StageError, UsageError

INTERRUPTED = 130
SAME_INTERRUPT_S = 1.0  # in which another Ctrl-C is the same one, from a hand or a script that sends it twice


class EndOfFile(Exception):
    """Carries an EOFError past typer, which would take it for Ctrl-D at a prompt. ``__cause__`` is the error."""


class Interrupted(Exception):
    """Carries Ctrl-C past typer, which would keep nothing of it. ``__cause__`` is the KeyboardInterrupt."""


def main() -> NoReturn:
    """Entry point of ``flowreel`` and ``python -m flowreel``."""
    os.environ.update(patience() | os.environ)  # read when torch loads
    silence_pillow()
    if isinstance(sys.stdout, io.TextIOWrapper):  # as of stderr: a name is shown in whatever the terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    if not os.environ.get("COLUMNS", "").strip("0"):  # as some who have no terminal say; nothing would be shown
        os.environ.pop("COLUMNS", None)
    stopped_by = take_interrupts()
    code = call(sys.argv[1:])
    if code == INTERRUPTED and stopped_by:
        code = 128 + stopped_by[0]
        for number in (signal.SIGINT, signal.SIGTERM):  # as Python ends it would let the same one end it by force
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def silence_pillow() -> None:
    """In this process: what Pillow has to say of a file is either told by an error of ours or of no concern."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())


def take_interrupts() -> list[int]:
    """The first Ctrl-C, or SIGTERM, stops a command in good order, which takes its time; those right behind it mean the
    same. The numbers of the signals that came are added to what is returned.

    Cut short, that would leave threads inside torch, which abort the process as it ends. One that comes later ends it
    at once: what is unfinished keeps its unfinished name.
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

    # A shell that puts this in the background, where Ctrl-C is for others, has it ignored.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is usual:
            signal.signal(number, interrupt)
    return came


def patience() -> dict[str, str]:
    """How torch's idle threads wait, as OpenMP reads it from the environment: asleep, after some microseconds awake.

    By default they stay awake for milliseconds, on the cores that decoding and encoding need: on two cores, 50 frames
    of 1024x436 took 8.2 and 8.7 s so, 5.6 and 6.7 s asleep. But to wake one takes longer than the next small layer is
    away: with a short while awake the baseline's network gained a fifth over that.
    """
    return {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}


def call(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code; everything wrong becomes one line on stderr.

    ``--debug`` anywhere among the arguments shows an error's traceback before it.
    """
    if any("\0" in argument for argument in arguments):  # no shell can give it, and no file system takes it
        return _say("an argument holds a NUL character: no file or option goes by such a name", 2)
    if "" in arguments:
        return _say("an argument is empty: a shell variable that is not set?", 2)
    try:
        os.getcwd()
    except OSError as lost:  # MKL would end the process, blaming a file of torch's
        return _say(f"the working folder cannot be used ({lost.strerror}): change into one that is there", 1)
    try:
        from flowreel.engine.cli.app import app  # here, as Ctrl-C may come while it loads

        result = app(arguments, prog_name="flowreel", standalone_mode=False)
    except (KeyboardInterrupt, Interrupted) as stopped:
        return _say(_with_notes("interrupted", stopped.__cause__ or stopped), INTERRUPTED)
    except Exception as raised:
        error = raised.__cause__ if isinstance(raised, EndOfFile) else raised
        if "--debug" in arguments:
            traceback.print_exception(raised)
        assert isinstance(error, Exception)
        return _report(error)
    if result == INTERRUPTED:  # what typer makes of Ctrl-C
        return _say("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0


def _report(error: Exception) -> int:
    cause = error.__cause__ if isinstance(error, StageError) else error
    if isinstance(error, FlowreelError):
        message = _with_notes(str(error) or type(error).__name__, error)
        return _say(message, 2 if isinstance(cause, UsageError) else 1)
    if isinstance(error, OSError) and error.strerror:  # met where nobody looked for it: a name too long, a lost disk
        return _say(f"{error.strerror}: {error.filename}" if error.filename else error.strerror, 1)
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a value of the wrong kind
        if not error.format_message():  # no arguments at all: the help has been shown
            return 2
        command = getattr(getattr(error, "ctx", None), "command_path", "flowreel")
        return _say(f"{error.format_message()} ({command} --help shows what there is)", 2)
    if type(error).__name__ == "Abort":  # typer's, for Ctrl-C and Ctrl-D at a prompt
        return _say("interrupted", INTERRUPTED)
    return _say(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)


def _with_notes(message: str, error: BaseException) -> str:
    """With what is kept of the outputs, as the error's notes tell."""
    return "; ".join([message, *getattr(error, "__notes__", ())])


def _say(message: str, code: int) -> int:
    print(f"flowreel: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def printable(text: str) -> str:
    """The text on one line, with whatever could steer a terminal written out: names and files may hold anything."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
