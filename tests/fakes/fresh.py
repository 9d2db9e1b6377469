"""New processes that need not load torch: a server process has loaded it, and forks for each command.

The server loads nothing of flowreel, so a module that forgets an import fails as in any new process.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOADED = ("torch", "av", "zarr", "typer", "rich", "PIL.Image", "pytest", "hypothesis")


class Fresh:
    """``fresh("flowreel", ["doctor"], cwd)`` does in ``cwd`` what ``python -m flowreel doctor`` does there."""

    def __init__(self, scratch: Path) -> None:
        self._said = scratch / "said"
        self._running: int | None = None
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # read when torch is loaded
        )

    def __call__(
        self, module: str, arguments: Sequence[str], cwd: Path, env: Mapping[str, str] = os.environ
    ) -> tuple[int, str]:
        """The exit code (negative: the signal that ended it), and what it wrote to stdout and stderr."""
        self.start(module, arguments, cwd, env)
        return self.wait()

    def start(self, module: str, arguments: Sequence[str], cwd: Path, env: Mapping[str, str] = os.environ) -> None:
        """Starts the same, without waiting for its end."""
        self._end()
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._said.write_bytes(b"")  # all that one says which is killed at once
        task = [module, [*arguments], str(cwd), dict(env), str(self._said)]
        print(json.dumps(task), file=self._server.stdin, flush=True)
        self._running = int(self._server.stdout.readline())

    def until(self, path: Path) -> None:
        """Waits until what was started has made a file. Raises ProcessLookupError if it ends without."""
        assert self._running is not None
        while not path.exists():
            os.kill(self._running, 0)
            time.sleep(0.01)

    def stop(self, how: signal.Signals) -> tuple[int, str]:
        """Sends a signal to what was started: what a call gives."""
        assert self._running is not None
        os.kill(self._running, how)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """For what was started to end: what a call gives."""
        assert self._server.stdout is not None
        code, self._running = int(self._server.stdout.readline()), None
        return code, self._said.read_text(errors="replace")

    def _end(self) -> None:
        """Kills what a test that failed has left running."""
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._running, signal.SIGKILL)
            self.wait()

    def code(self, code: str, *arguments: str) -> tuple[int, str]:
        """The same for ``python -c CODE ARGUMENTS`` in the current folder."""
        return self("-c", [code, *arguments], Path.cwd())

    def close(self) -> None:
        self._end()
        self._server.communicate()


def serve() -> None:
    for name in LOADED:
        __import__(name)
    gc.freeze()  # as ``flowreel`` does itself where torch is not loaded yet
    os.fsync = os.fstat  # type: ignore[assignment]  # as in conftest.py
    assert not {"flowreel", "benchmarks"} & sys.modules.keys()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            end(code_of(*json.loads(line)))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def end(code: int) -> None:
    """Ends this process as Python does, but frees nothing: to take torch apart takes longer than most commands."""
    threading._shutdown()  # waits for threads, as do executors' in it
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def code_of(*task: Any) -> int:
    try:
        run(*task)
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(module: str, arguments: Sequence[str], cwd: str, env: Mapping[str, str], said: str) -> None:
    with open(said, "wb") as file, open(os.devnull) as nothing:
        for number, descriptor in enumerate((nothing.fileno(), file.fileno(), file.fileno())):
            os.dup2(descriptor, number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = cwd
    sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    if module == "-c":
        sys.argv = [module, *arguments[1:]]
        exec(arguments[0], {"__name__": "__main__"})
        return
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve()
