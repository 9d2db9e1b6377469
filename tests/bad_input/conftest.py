"""The catalogue of bad input: tests add cases, which run in separate processes and are judged by the same rules.

A case may end in two ways. Either it fails, in bounded time and memory, with one clear line and without leaving
anything that looks like a finished output; or, if the input is still valid, it gives the right result.

All 9000 cases take ten minutes. By default, each test runs its first cases and a part of the others, the same ones
every time; ``FLOWREEL_ALL_CASES=1`` runs all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
AT_ONCE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # processes of pytest, each with its own workers
WORKERS = max(1, min(2, os.cpu_count() or 1) // AT_ONCE)
ALL = bool(os.environ.get("FLOWREEL_ALL_CASES"))
ALWAYS, ONE_IN = 10, 7  # a test's first 10 cases always run, and about one in 7 of the others
LIMIT_S = 60.0  # a case takes milliseconds; this only turns a hang into a failure
ROOM_BYTES = 3 << 29  # address space beyond what the libraries take; allocating more is a MemoryError
MOST_GROWN_BYTES = 400 << 20  # memory really in use
MOST_KEPT_BYTES = 600 << 20  # address space that stays; libraries' pools, threads and caches take some of it
LONGEST_LINE = 1500  # characters of a message, not counting the case's own names
SHOWN = 60  # failures that a test prints in full
STACK_LINES = 14  # shown of a crash

Answer = dict[str, Any]
Right = Callable[[Answer], bool]


@dataclass(frozen=True)
class Case:
    """One bad input and the results that are allowed."""

    name: str
    folder: Path
    task: Mapping[str, Any]  # "call": a command line, or "read" and "path": one of the worker's readers
    stdin: str | None
    right: Right | None  # whether an answer without an error is right; None: it must be an error
    may_write: tuple[str, ...]  # names in the folder that may change, or appear even if the case fails
    wordy: bool  # a command line that may print more than one line, for example one per input
    code: int | None  # the exit code a command line must have; None: any that fits the result
    before: Mapping[str, tuple[int, int]]  # the files in the folder


class Worker:
    """A process that runs cases. If a case kills it, the next case gets a new process."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, case: Case) -> Answer:
        if self._process is None:
            self._start()
        assert self._process is not None
        task = {**case.task, "folder": str(case.folder), "stdin": case.stdin, "limit_s": LIMIT_S}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(task), file=self._cases, flush=True)
        line = self._answers.readline()
        if line:
            answer: Answer = json.loads(line)
            if answer["kept_bytes"] > MOST_KEPT_BYTES:
                self.close()  # so that this does not count for later cases
            return answer
        self.close()
        stacks = (self._scratch / "stacks").read_text()
        return {"crash": f"the process ended with {self._code}\n{stacks}"}

    def _start(self) -> None:
        self._scratch.mkdir(exist_ok=True)
        cases, answers = os.pipe(), os.pipe()
        # Few malloc arenas, because each thread's own arena would take 64 MB of address space.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        environment |= {"FLOWREEL_CACHE": str(self._scratch / "cache"), "PYTHONWARNINGS": "always"}
        arguments = [cases[0], answers[1], self._scratch, ROOM_BYTES]
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), *map(str, arguments)],
            pass_fds=(cases[0], answers[1]),
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        os.close(cases[0])
        os.close(answers[1])
        self._cases, self._answers = os.fdopen(cases[1], "w"), os.fdopen(answers[0])

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._cases.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.5)  # at once for a process that has died
            self._answers.close()
            self._process.kill()
            self._code = self._process.wait()
            self._process = None


class Catalogue:
    """Tests add cases to it, which start to run at once; ``judge`` waits for them and fails if any broke a rule."""

    def __init__(self, folder: Path, workers: queue.Queue[Worker], judged: set[bytes], chance: random.Random) -> None:
        self._folder = folder
        self._chance = chance
        self._workers = workers
        self._judged = judged  # of the whole session, by ``identity``: equal cases count once
        self._pool = ThreadPoolExecutor(WORKERS)
        self._running: list[tuple[Case, Future[Answer]]] = []
        self._identities: list[bytes] = []
        self._given: set[bytes] = set()

    def place(self) -> Path:
        """The folder of the next case, for tests that put more than plain files there."""
        folder = self._next()
        folder.mkdir(exist_ok=True)
        return folder

    def _next(self) -> Path:
        return self._folder / f"{len(self._running):04}"

    def call(
        self,
        name: str,
        arguments: Sequence[str],
        files: Mapping[str, bytes] | None = None,
        *,
        stdin: bytes | str | None = None,
        right: Right | None = None,
        may_write: Sequence[str] = (),
        wordy: bool = False,
        code: int | None = None,
    ) -> None:
        """Adds a command line, run in a folder with these files. stdin: its bytes, or the path to read it from."""
        self._add(name, {"call": list(arguments)}, files or {}, stdin, right, tuple(may_write), wordy, code)

    def read(
        self,
        name: str,
        reader: str,
        path: str,
        files: Mapping[str, bytes] | None = None,
        *,
        stdin: bytes | str | None = None,
        right: Right | None = None,
    ) -> None:
        """Adds a call of one of the worker's readers on one of these files."""
        self._add(name, {"read": reader, "path": path}, files or {}, stdin, right)

    def _add(
        self,
        name: str,
        task: Mapping[str, Any],
        files: Mapping[str, bytes],
        stdin: bytes | str | None,
        right: Right | None,
        may_write: tuple[str, ...] = (),
        wordy: bool = False,
        code: int | None = None,
    ) -> None:
        folder, files = self._next(), dict(files)
        if isinstance(stdin, bytes):
            files["stdin"] = stdin
            stdin = str(folder / "stdin")
        this = identity(task, stdin, folder, files)
        self._given.add(this)
        if len(self._given) > ALWAYS and not ALL and self._chance.randrange(ONE_IN):
            if folder.exists():
                shutil.rmtree(folder)
            return  # before its files are written, which takes longer than most cases run
        folder.mkdir(exist_ok=True)
        for file, data in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        self._identities.append(this)
        case = Case(name, folder, task, stdin, right, may_write, wordy, code, listing(folder))
        self._running.append((case, self._pool.submit(self._run, case)))

    def _run(self, case: Case) -> Answer:
        worker = self._workers.get()
        try:
            return worker.run(case)
        finally:
            self._workers.put(worker)

    def judge(self, least: int) -> list[Answer]:
        """Waits for the cases and fails if any broke a rule. Returns the answers of those that ran.

        least: how many different cases must have been added.
        """
        assert len(self._given) >= least, f"only {len(self._given)} different cases"
        answers, broken = [], []
        for case, running in self._running:
            answer = running.result() | {"folder": case.folder}
            answers.append(answer)
            wrong = [*wrong_with(case, answer)]
            if wrong:
                broken.append(f"{case.name}: {'; '.join(wrong)}\n    {case.task!s:.300}")
            else:
                shutil.rmtree(case.folder)
        more = f"\n... and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        if broken:
            pytest.fail(f"{len(broken)} of {len(answers)} cases:\n" + "\n".join(broken[:SHOWN]) + more, pytrace=False)
        self._judged.update(self._identities)
        self._running.clear()
        self._identities.clear()
        self._given.clear()
        return answers

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def wrong_with(case: Case, answer: Answer) -> Iterator[str]:
    """Yields each rule that the case's answer breaks."""
    if "crash" in answer:
        yield "\n    ".join(["...", *answer["crash"].rstrip().splitlines()[-STACK_LINES:]])
        return
    if answer["threads"]:
        yield f"left threads running: {answer['threads']}"
    if answer["grown_bytes"] > MOST_GROWN_BYTES:
        yield f"took {answer['grown_bytes'] >> 20} MiB"
    if answer["kept_bytes"] > MOST_KEPT_BYTES:
        yield f"keeps {answer['kept_bytes'] >> 20} MiB of address space"
    failed = "error" in answer or answer.get("code", 0) != 0
    if "code" in answer:
        yield from _wrong_words(case, answer, failed)
    else:
        if answer["out"] or answer["err"]:
            yield f"a reader prints: {answer['out']!r} {answer['err']!r}"
        if failed and len(answer["message"]) > LONGEST_LINE:
            yield f"a message of {len(answer['message'])} characters"
    if not failed:
        if case.right is None:
            yield f"passed as good: {answer}"
        elif not case.right(answer):
            yield f"gave a wrong result: {answer}"
    yield from _wrong_files(case, failed)


def _wrong_words(case: Case, answer: Answer, failed: bool) -> Iterator[str]:
    """The rules for a command line: its exit code, and what it prints."""
    try:
        out, err = (answer[name].encode("latin-1").decode() for name in ("out", "err"))
    except UnicodeDecodeError:
        yield f"prints what is no UTF-8: {answer['err']!r}"
        return
    for text in (out, err):
        if raw := [char for char in text if not char.isprintable() and char != "\n"]:
            yield f"control characters reach the terminal: {raw[:5]!r} in {text[:200]!r}"
    if case.code is not None and answer["code"] != case.code:
        yield f"exit code {answer['code']}, not {case.code}: {err!r}"
    if not failed:
        return
    if answer["code"] not in (1, 2):
        yield f"exit code {answer['code']}"
    if "Traceback" in out + err or "flowreel: unexpected" in out + err:
        yield f"an error that nobody foresaw: {err!r}"
    if case.wordy:
        return
    if len(err.splitlines()) != 1 or not err.endswith("\n") or not err.startswith("flowreel: "):
        yield f"expected one line, got {err!r}"
    if len(err) > LONGEST_LINE + 4 * sum(map(len, case.task["call"])):
        yield f"a line of {len(err)} characters"
    if out:
        yield f"prints {out!r} although it failed"


def _wrong_files(case: Case, failed: bool) -> Iterator[str]:
    """The rules for files: input is unchanged, and a failed case leaves nothing that looks finished."""
    after = listing(case.folder)
    changed = [name for name, seen in case.before.items() if after.get(name) != seen and name not in case.may_write]
    if changed:
        yield f"changed {changed[:3]}"
    if (case.folder / "canary").exists():
        yield "the file had code executed"
    new = [name for name in after if name not in case.before and name not in case.may_write]
    finished = [name for name in new if not any(part.endswith(".partial") for part in Path(name).parts)]
    if failed and finished:
        yield f"left {finished[:3]}"


def identity(task: Mapping[str, Any], stdin: str | None, folder: Path, files: Mapping[str, bytes]) -> bytes:
    """Equal for equal cases: the same task on the same bytes. Names and folders of cases do not matter.

    files: those still to be written, beside what the test itself has put into the folder.
    """
    found = hashlib.sha256(repr(sorted(task.items())).encode("utf-8", "surrogatepass"))
    for name, data in sorted(files.items()):
        found.update(name.encode("utf-8", "surrogateescape") + data)
    for path in sorted(folder.rglob("*")):
        found.update(os.fsencode(path.relative_to(folder)))
        if path.is_symlink():
            found.update(os.fsencode(path.readlink()))
        elif path.is_file():  # its first 4 MiB are enough
            with path.open("rb") as file:
                found.update(file.read(1 << 22) + str(path.stat().st_size).encode())
    return found.digest() + (stdin or "").removeprefix(str(folder)).encode()


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, with its size and modification time."""
    found = {}
    for path in folder.rglob("*"):
        seen = path.lstat()
        if not path.is_dir() or path.is_symlink():
            found[str(path.relative_to(folder))] = (seen.st_size, seen.st_mtime_ns)
    return found


def mangled(data: bytes, chance: random.Random) -> bytes:
    """A damaged copy: flipped bits; truncated; a part removed, doubled, zeroed or made noise; or noise appended."""
    size = len(data)
    start, stop = sorted(chance.randrange(size + 1) for _ in range(2))
    stop = min(stop, start + chance.choice((1, 4, 16, 64, size)))
    noise = chance.randbytes(min(stop - start, 4096))
    how = chance.randrange(9)
    if how < 3:
        copy = bytearray(data)
        for _ in range(chance.choice((1, 1, 1, 3, 10))):
            copy[chance.randrange(size)] ^= 1 << chance.randrange(8)
        return bytes(copy)
    middle = (data[:start], b"", data[start:stop] * 2, bytes(stop - start), noise)
    if how < 8:
        return data[:start] + middle[how - 3] + (b"" if how == 3 else data[stop:])
    return data + noise


@pytest.fixture(name="mangled", scope="session")
def _mangled() -> Callable[[bytes, random.Random], bytes]:
    return mangled


@pytest.fixture(scope="session")
def tiny(tiniest_weights: str) -> str:
    return tiniest_weights


@pytest.fixture(scope="session")
def _workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[queue.Queue[Worker]]:
    idle: queue.Queue[Worker] = queue.Queue()
    workers = [Worker(tmp_path_factory.mktemp("worker")) for _ in range(WORKERS)]
    for worker in workers:
        idle.put(worker)
    yield idle
    for worker in workers:
        worker.close()


@pytest.fixture(scope="session")
def judged() -> set[bytes]:
    """The cases of this session that were judged and kept all rules."""
    return set()


@pytest.fixture(scope="session")
def begun() -> set[str]:
    """The tests that used the catalogue in this process; with pytest-xdist, other processes may have run others."""
    return set()


@pytest.fixture
def catalogue(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    _workers: queue.Queue[Worker],
    judged: set[bytes],
    begun: set[str],
) -> Iterator[Catalogue]:
    begun.add(request.node.nodeid)
    catalogue = Catalogue(tmp_path, _workers, judged, random.Random(request.node.name))
    yield catalogue
    catalogue.close()
