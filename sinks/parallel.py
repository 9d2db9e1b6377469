"""Encoding on several cores, results in order: a bounded pool inside one sink.

This is no second pipeline: it has no stages, channels or cancellation of its own. It spreads the work inside one
``write`` over threads, and the calling thread takes the results.

Only work that releases the GIL gains: zlib, Blosc, NumPy on large arrays, and writing files, which several threads do
faster than one. Work that holds the GIL is as fast in the calling thread: give it 0 workers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
Made = TypeVar("Made")

CORES_PER_WORKER = 2  # the decoder and the model need the other half
MOST_WORKERS = 8  # beside a model on the CPU, which produces no more than these can encode
MOST_ALONE = 16  # without such a model; beyond that a run waits for the disk, not the encoder
CALLS_PER_WORKER = 2  # one running, one queued, so that no worker is idle while a result is taken
CALLS_AT_ONCE = 3  # that are multi-threaded themselves: while one ends and another begins, the third keeps cores busy
MOST_BYTES = 256 << 20  # of input in flight; with 8 workers, 16 flows of 1920x1080 just fit


def encode_workers(device: str | None = "cpu") -> int:
    """How many threads a sink encodes with on this machine, for flow that is computed on ``device``, None for none.

    Beside a model on the CPU, one for every two cores, at most 8; otherwise one for every core but one, at most 16.
    """
    cores = os.cpu_count() or 1
    if device == "cpu":
        return min(MOST_WORKERS, max(1, cores // CORES_PER_WORKER))
    return min(MOST_ALONE, max(1, cores - 1))


def file_workers(device: str | None) -> int:
    """The same for calls that also write what they encode: one more, as the thread that submits them does little."""
    return encode_workers(device) + 1


def shared_out(threads: int) -> tuple[int, int]:
    """For calls that are multi-threaded themselves: how many at once, and how many threads per call."""
    calls = min(threads, CALLS_AT_ONCE)
    return calls, -(-threads // calls)


class OrderedPool(Generic[Result]):
    """Runs calls on worker threads and hands each result to ``take``, in the order the calls were submitted.

    ``take`` runs in the thread that calls ``submit`` or ``drain``, never in a worker. The first error, of a call or
    of ``take``, is raised by the ``submit`` or ``drain`` that reaches its place in the order; all results before it
    have been taken by then, none after it will be, and nothing is left running.
    """

    def __init__(self, take: Callable[[Result], None], workers: int, most_bytes: int = MOST_BYTES) -> None:
        """workers: threads, started when there is work for them; 0: each call runs at once, in ``submit`` itself."""
        self._take = take
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="pool") if workers else None
        self._most_calls = workers * CALLS_PER_WORKER
        self._most_bytes = most_bytes
        self._in_flight: deque[tuple[Future[Result], int]] = deque()  # oldest first, with the bytes of its input
        self._bytes = 0
        self._closed = False

    def submit(self, function: Callable[..., Result], *args: Any, nbytes: int = 0) -> None:
        """Starts ``function(*args)``, whose input takes ``nbytes``.

        First takes the results that are ready, and waits for as many as needed to keep within the bounds on calls and
        bytes; a call larger than the bound runs alone.
        """
        if self._closed:
            raise ValueError("this pool is closed")
        try:
            while self._in_flight and self._is_full(nbytes):
                self._take_next()
            self.take_ready()
            if self._executor is None:
                self._take(function(*args))
            else:
                self._in_flight.append((self._executor.submit(function, *args), nbytes))
                self._bytes += nbytes
        except BaseException:
            self.close()
            raise

    def submit_in_turn(self, make: Callable[[], Made], then: Callable[[Made], Result], nbytes: int = 0) -> None:
        """As ``submit``, in two steps: ``make`` runs beside other calls; ``then`` takes its result in their order.

        Both run in a worker. ``then`` begins when the call before has ended, whether or not it failed. A ``make`` that
        fails ends its call without waiting for those before.
        """
        before = self._in_flight[-1][0] if self._in_flight else None
        self.submit(_in_turn, before, make, then, nbytes=nbytes)

    def take_ready(self) -> None:
        """Takes the results that are ready, without waiting for any; raises as ``submit`` does."""
        try:
            while self._in_flight and self._in_flight[0][0].done():
                self._take_next()
        except BaseException:
            self.close()
            raise

    def drain(self) -> None:
        """Waits for every call that is in flight and takes its result. More may be submitted afterwards."""
        try:
            while self._in_flight:
                self._take_next()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drops the results not taken. Queued calls never start; running ones are waited for."""
        self._closed = True
        self._in_flight.clear()
        self._bytes = 0
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _is_full(self, more_bytes: int) -> bool:
        return len(self._in_flight) >= self._most_calls or self._bytes + more_bytes > self._most_bytes

    def _take_next(self) -> None:
        call, nbytes = self._in_flight.popleft()
        self._bytes -= nbytes
        self._take(call.result())


def _in_turn(before: Future[Result] | None, make: Callable[[], Made], then: Callable[[Made], Result]) -> Result:
    """Cannot deadlock: workers begin calls in order, so the call waited for is running or done."""
    made = make()
    if before is not None:
        wait((before,))
    return then(made)
