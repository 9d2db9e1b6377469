"""Work spread over processes, its results in order.

Not by torch's DataLoader: a thread of its workers passes on tensors while Python already exits, which on a busy machine
aborts the worker, and in the process that trains it turns the end of any worker into an error wherever that one is.
Here a worker has one thread, and is killed when it is no longer needed; it has nothing to clean up.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeVar

from flowreel.engine.errors import FlowreelError, SentError
from flowreel.engine.pipeline import in_own_thread

Result = TypeVar("Result")

AHEAD = 4  # results per process that are asked for before they are needed
EXIT_S = 10.0  # how long a process whose connection is closed may take to be gone


def made_in_order(make: Callable[[int], Result], count: int, workers: int) -> Generator[Result, None, None]:
    """Yields ``make(0)`` to ``make(count - 1)``, made by ``workers`` processes, which end with this generator.

    ``make`` and its results are pickled. The processes ignore Ctrl-C, which a terminal sends to them too.

    Raises:
        FlowreelError: a process ended early.
        Exception: what ``make`` raised, in its turn: see ``SentError``.
    """
    with ExitStack() as started:
        processes = dict(_start(make, started) for _ in range(workers))
        connections = list(processes)
        made: dict[Connection, deque[bytes]] = {connection: deque() for connection in connections}
        asked = 0
        for number in range(count):
            while asked < min(number + AHEAD * workers, count):
                connection = connections[asked % workers]
                with _at_work(processes[connection]):
                    # Not send(): as its failure is garbage-collected, Python 3.13 complains of a buffer still in use.
                    connection.send_bytes(pickle.dumps(asked))
                asked += 1
            here = made[connections[number % workers]]
            while ready := wait(connections, 0 if here else None):  # the others' too, so that none waits to hand over
                for connection, process in processes.items():
                    if connection in ready:
                        with _at_work(process):
                            made[connection].append(connection.recv_bytes())
            answer = pickle.loads(here.popleft())
            if isinstance(answer, SentError):
                answer.arise()
            yield answer


def _start(make: Callable[[int], object], started: ExitStack) -> tuple[Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")  # a fork lacks the threads of torch's pools
    ours, theirs = context.Pipe()
    started.enter_context(ours)
    process = context.Process(target=_serve, args=(make, theirs), daemon=True)

    def start() -> None:
        resource_tracker.ensure_running()  # now, because its start unblocks the signals
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # inherited by the process
        process.start()
        started.callback(_end, process)

    # A process that is half started would print a traceback, so Ctrl-C and SIGTERM come out after that. To block them
    # in this thread does not do: any other thread of this process, such as OpenMP's, takes them for it.
    with theirs:
        in_own_thread(start)
    return ours, process


def _end(process: SpawnProcess) -> None:
    process.kill()
    process.join()


@contextmanager
def _at_work(process: SpawnProcess) -> Iterator[None]:
    """For what is sent to the process or received from it."""
    try:
        yield
    except (EOFError, OSError) as error:
        process.join(EXIT_S)
        raise FlowreelError(
            f"a process that makes scenes ended early (exit code {process.exitcode}; -9: killed, perhaps for lack of "
            "memory): pass fewer --workers or a smaller --batch"
        ) from error


def _serve(make: Callable[[int], object], connection: Connection) -> None:
    """Runs in the process: makes what is asked for until the other end is closed."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # how multiprocessing ends what was not ended
    with suppress(EOFError, OSError):
        while True:
            number = connection.recv()
            try:
                answer: object = make(number)
            except Exception as error:
                answer = SentError.of(error)
            connection.send_bytes(pickle.dumps(answer))  # by torch's way of sending, tensors go through shared memory
