"""Threads, bounded channels, stopping, errors and statistics: no other file of the engine makes threads.

    source ──▢▢▢▢──> stage ──▢▢▢▢──> stage ──┬──▢▢▢▢──> sink        ▢▢▢▢  a channel, bounded in items and in bytes
                                             └──▢▢▢▢──> sink        ───>  one thread each

``engine/stages.py`` defines a stage and the same chain without threads, whose results this one must equal.

Why nothing deadlocks. A writer waits only while its channel is not empty: the byte budget is shared by all channels,
but an empty channel accepts any item. So a writer that waits to put has a reader with work to do, also in each branch
of a tee, and a reader that waits to take has a writer that is not waiting to put. The channels together therefore
exceed the budget by at most one item per channel.

Waiting outside the lock. One lock guards all channels, and no thread sleeps while holding it: under the lock a thread
records that it is waiting; then it releases the lock, sleeps on its own gate, and checks again. Ctrl-C can therefore
interrupt a sleeping caller at any moment without leaving anything half done. A condition variable cannot promise that,
because it reacquires the lock as it wakes.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from flowreel.engine.budget import Budget, storages_of
from flowreel.engine.config import QueueConfig
from flowreel.engine.errors import StageError, frame_of
from flowreel.engine.forked import end_openmp_workers
from flowreel.engine.stages import Consumer, Stage, StageStatistics, Wrap, is_ours_to_close

Result = TypeVar("Result")
# For state that callers outside any pipeline share: ``with`` lets in one thread at a time, which may enter again.
OneAtATime = threading.RLock
TICK_S = 0.2  # how long the caller sleeps before it checks for Ctrl-C and reports progress
JOIN_S = 30.0  # how long a thread may take to finish its last item after a stop: a large batch on a slow CPU


class Cancelled(BaseException):
    """The run is stopping, or no stage reads this stage's items any more. Raised by take and put; let it pass."""


class _Gate:
    """Where one thread sleeps at one end of its channel, and the time it has spent there."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._since_s: float | None = None  # start of the current wait; None: not waiting
        self._waited_s = 0.0
        self._gate = threading.Lock()  # open (not locked): woken, but has not checked its channel yet
        self._gate.acquire()

    def will_sleep(self) -> None:
        """Call under the lock: from here on ``wake`` opens the gate."""
        if self._since_s is None:
            self._since_s = time.perf_counter()

    def sleep(self) -> None:
        self._gate.acquire(timeout=self._patience_s)

    def wake(self) -> None:
        """Call under the lock, so that no two threads open the gate at once."""
        if self._since_s is not None and self._gate.locked():
            self._gate.release()

    def awake(self) -> None:
        """Ends the wait, if there was one."""
        if self._since_s is not None:
            since_s, self._since_s = self._since_s, None
            self._waited_s += time.perf_counter() - since_s

    def waited_s(self, now_s: float) -> float:
        """Seconds waited so far, including a wait still in progress."""
        waited_s, since_s = self._waited_s, self._since_s
        return waited_s if since_s is None else waited_s + now_s - since_s


class _Party:
    """Takes from one channel and puts into others: a stage's thread, or the caller in ``Pipeline.stream``."""

    def __init__(self, name: str, patience_s: float = -1) -> None:
        """Args: patience_s: longest single sleep; -1: until woken."""
        self.name = name
        self.inlet: _Channel | None = None
        self.outlets: list[_Channel] = []
        self.to_take = _Gate(patience_s)
        self.to_put = _Gate(patience_s)
        self.cancelled = False  # its next take or put raises Cancelled
        self.lacks_bytes = False  # waits for the byte budget, not for a place in its channel
        self.taken = self.given = 0
        self.last_frame: int | None = None  # of the last item taken or given

    def cancel(self) -> None:
        """Call under the lock."""
        self.cancelled = True
        self.to_take.wake()
        self.to_put.wake()

    def saw(self, item: object) -> None:
        self.last_frame = getattr(item, "last_frame", self.last_frame)

    def give(self, item: object) -> None:
        """Puts the item into every outgoing channel, waiting for room in each."""
        self.saw(item)
        if self.outlets:
            storages = storages_of(item)
            for channel in self.outlets:
                channel.put(item, storages)
        elif self.cancelled:
            raise Cancelled
        self.given += 1


class _Switchboard:
    """What all channels of a pipeline share."""

    def __init__(self, queues: QueueConfig) -> None:
        # Re-entrant: a garbage collection while it is held may finalise an abandoned stream, which takes it again to
        # stop the run.
        self.lock = threading.RLock()
        self.budget = Budget(queues.total_bytes)
        self.items = queues.items
        self.parties: list[_Party] = []  # the source first

    def connect(self, writer: _Party, reader: _Party) -> _Channel:
        reader.inlet = _Channel(self, writer, reader)
        writer.outlets.append(reader.inlet)
        self.parties.append(reader)
        return reader.inlet

    def wake_who_lacks_bytes(self) -> None:
        """Call under the lock."""
        for party in self.parties:
            if party.lacks_bytes:
                party.to_put.wake()


class _Channel(Iterator[Any]):
    """A bounded queue from one thread to another."""

    def __init__(self, board: _Switchboard, writer: _Party, reader: _Party) -> None:
        self.writer = writer
        self.reader = reader
        self.peak = 0
        self._board = board
        self._lock = board.lock
        self._queue: deque[tuple[Any, dict[int, int]]] = deque()
        self._ended = False  # the writer puts no more
        self._left = False  # the reader takes no more

    def __len__(self) -> int:
        return len(self._queue)

    def __next__(self) -> Any:
        item = self._wait_for_item()
        self.reader.taken += 1
        self.reader.saw(item)
        return item

    def _wait_for_item(self) -> Any:
        reader = self.reader
        try:
            while True:
                with self._lock:
                    if reader.cancelled:
                        raise Cancelled
                    if self._queue:
                        item, storages = self._queue.popleft()
                        self.writer.to_put.wake()
                        if self._board.budget.release(storages):
                            self._board.wake_who_lacks_bytes()
                        return item
                    if self._ended:
                        raise StopIteration
                    reader.to_take.will_sleep()
                reader.to_take.sleep()
        finally:
            reader.to_take.awake()

    def put(self, item: object, storages: dict[int, int]) -> None:
        """Waits until there is room. Drops the item if this reader has left while other branches go on."""
        writer = self.writer
        try:
            while True:
                with self._lock:
                    if writer.cancelled:
                        raise Cancelled
                    if self._left:
                        return
                    has_place = len(self._queue) < self._board.items
                    if not self._queue or (has_place and self._board.budget.fits(storages)):
                        self._queue.append((item, storages))
                        self._board.budget.hold(storages)
                        self.peak = max(self.peak, len(self._queue))
                        self.reader.to_take.wake()
                        return
                    writer.lacks_bytes = has_place
                    writer.to_put.will_sleep()
                writer.to_put.sleep()
        finally:
            writer.lacks_bytes = False
            writer.to_put.awake()

    def end(self) -> None:
        """The writer has put its last item. Call under the lock."""
        self._ended = True
        self.reader.to_take.wake()

    def leave(self) -> None:
        """The reader takes no more; a writer without any reader left is cancelled. Call under the lock."""
        self._left = True
        while self._queue:
            _, storages = self._queue.popleft()
            self._board.budget.release(storages)
        self._board.wake_who_lacks_bytes()
        if all(channel._left for channel in self.writer.outlets):
            self.writer.cancel()
        self.writer.to_put.wake()  # it may be waiting for this branch while another one starves


class _Worker(_Party):
    """A stage with its thread."""

    def __init__(self, name: str, function: Consumer, wrap: Wrap | None, source: object = None) -> None:
        super().__init__(name)
        self.thread: threading.Thread | None = None
        self.started_s: float | None = None
        self.ended_s: float | None = None
        self.opened: list[Any] = []  # iterators to close when the work is over
        self._source = source

        def called(items: Iterator[Any]) -> object:
            return self._remember(function(items))

        # A generator hidden by the wrapper is closed too: a wrapper that merely drops it would lose its last error.
        self._function = called if wrap is None else wrap(called, name)

    def _remember(self, result: object) -> object:
        known = any(result is iterator for iterator in self.opened)
        if isinstance(result, Iterator) and is_ours_to_close(result, self._source) and not known:
            self.opened.append(result)
        return result

    def drive(self) -> None:
        """Calls the stage and passes on everything it yields."""
        if self.cancelled:
            raise Cancelled
        result = self._remember(self._function(iter(()) if self.inlet is None else self.inlet))
        if isinstance(result, Iterator):
            for item in result:
                self.give(item)
                del item  # not kept alive while the next one is made
        elif self.outlets:
            raise TypeError(f"stage {self.name} must return an iterator, got {type(result).__name__}")

    def forget(self) -> None:
        """Drops what only its work needed. Parties and channels refer to each other: a model held here would stay in
        memory after the run, until the garbage collector comes by."""
        self.opened.clear()
        del self._function, self._source

    def statistics(self) -> StageStatistics:
        """Reads without the lock, so that it never delays the stage; exact once the thread has ended."""
        now_s = self.ended_s or time.perf_counter()
        total_s = 0.0 if self.started_s is None else now_s - self.started_s
        wait_in_s, wait_out_s = self.to_take.waited_s(now_s), self.to_put.waited_s(now_s)
        return StageStatistics(
            name=self.name,
            items=self.given if self.outlets else max(self.taken, self.given),
            busy_s=max(total_s - wait_in_s - wait_out_s, 0.0),
            wait_in_s=wait_in_s,
            wait_out_s=wait_out_s,
            peak_queue=0 if self.inlet is None else self.inlet.peak,
            queue=0 if self.inlet is None else len(self.inlet),
        )


class _Thread(threading.Thread):
    """A thread with a ``join`` that waits until nothing of it is left, and that Ctrl-C may interrupt.

    Before Python 3.13 a join ends before the system's thread does (why that matters: ``end_openmp_workers``), and one
    that is interrupted makes the thread count as ended: the next join would not wait for it.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._over = False
        self._gate = threading.Lock()  # opened once, when the work is over
        self._gate.acquire()

    def run(self) -> None:
        try:
            super().run()
        finally:
            end_openmp_workers()
            self._over = True
            self._gate.release()

    def join(self, timeout: float | None = None) -> None:
        deadline_s = time.monotonic() + (math.inf if timeout is None else timeout)
        while not self._over and self.is_alive():  # it is not alive in a fork
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return
            self._gate.acquire(timeout=min(TICK_S, left_s))
        super().join()
        deadline_s = time.monotonic() + JOIN_S
        while os.path.exists(f"/proc/self/task/{self.native_id}") and time.monotonic() < deadline_s:
            time.sleep(1e-4)


def in_own_thread(action: Callable[[], Result]) -> Result:
    """Runs ``action`` in a thread of its own that ends with it, and returns or raises what it returns or raises.

    Thread-bound state that ``action`` leaves behind ends as well: for instance a CUDA context that a library made
    current, and OpenMP's workers. OpenMP keeps workers for every thread that has computed, as long as that thread
    lives; once there are more of them than cores, GNU's OpenMP lets no waiting worker spin, however briefly, and a
    network of many small layers loses a fifth of its speed.
    """
    done: list[Result] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            done.append(action())
        except BaseException as error:
            failed.append(error)

    thread = _Thread(target=work, name="load")  # no daemon: an exit while it is inside torch would abort the process
    try:
        thread.start()
        thread.join()
    finally:  # Ctrl-C too comes out when it has ended
        with suppress(RuntimeError):  # it never started
            thread.join()
    if failed:
        raise failed[0]
    return done[0]


class Pipeline:
    """Runs a source and its stages once, each in its own thread.

    Args:
        source_name: name of the source's thread, statistics and errors.
        source: iterated once, in its own thread. A source that is not a generator is closed by its owner, not here.
        stages: in order; the items of the last one go to the sinks of ``run`` or to the caller of ``stream``.
        queues: bounds of the channels.
        wrap: called with each function, source and sinks included, and its name; returns the function to run instead,
            which sees the items going in and coming out (for a CUDA stream and its events, or a trace). The source is
            passed as a function of an empty iterator.

    The thread that runs a generator closes it. A stage may end before its input does; the stages before it are then
    cancelled. Any failure cancels all threads; each stops at its next take or put, so within one item's work.
    """

    def __init__(
        self,
        source_name: str,
        source: Iterable[Any],
        stages: Sequence[Stage] = (),
        queues: QueueConfig | None = None,
        wrap: Wrap | None = None,
    ) -> None:
        self._board = _Switchboard(queues or QueueConfig())
        self._lock = self._board.lock
        self._wrap = wrap
        self._workers: list[_Worker] = []
        self._unfinished = 0  # sinks still running, or the last stage if there are none
        self._settled = threading.Lock()  # open (not locked): all is done or stopped, the waiting caller may go on
        self._settled.acquire()
        self._stopped = False
        self._failure: StageError | None = None
        self._used = False
        self._add(_Worker(source_name, lambda _: iter(source), wrap, source), after=None)
        for stage in stages:
            self._add(_Worker(stage.name, stage.function, wrap), after=self._workers[-1])

    def run(
        self,
        consumers: Mapping[str, Consumer] | None = None,
        progress: Callable[[tuple[StageStatistics, ...]], None] | None = None,
    ) -> None:
        """Blocks until every consumer has run to its end, each in its own thread with its own channel.

        Args:
            consumers: name -> function of an iterator over the last stage's items; none: the items are dropped.
            progress: called in this thread a few times a second, and once more at the end.

        Raises:
            StageError: the first failure; later failures, and threads that did not stop, are added as notes.
            Cancelled: ``stop`` was called before the end.
            KeyboardInterrupt: passed on after all threads have stopped, like any error that ``progress`` raises.
        """
        self._claim()
        last = self._workers[-1]
        for name, consumer in (consumers or {}).items():
            self._add(_Worker(name, consumer, self._wrap), after=last)
        self._unfinished = len(last.outlets) or 1
        try:
            self._start()
            while not self._settled.acquire(timeout=TICK_S):
                if progress is not None:
                    progress(self.statistics())
        except BaseException as reason:
            self._finish(reason)
            raise
        self._finish(None)
        if progress is not None:
            progress(self.statistics())

    def stream(self) -> Generator[Any, None, None]:
        """Yields the last stage's items, in order, to the caller's own loop; a slow loop holds the stages back.

        Nothing starts before the first ``next``. Leaving the loop early, closing or dropping the iterator stops all
        threads. Failures in items that the caller had not reached by then are dropped; failures while stopping are
        raised.

        Raises:
            StageError, Cancelled, KeyboardInterrupt: as in ``run``.
        """
        self._claim()
        channel = self._board.connect(self._workers[-1], _Party("caller", patience_s=TICK_S))
        try:
            self._start()
            yield from channel  # keeps no item alive while the caller works
        except Cancelled:
            pass  # if a failure is the reason, it is raised below
        except GeneratorExit as reason:
            self._failure = None
            self._finish(reason)
            raise
        except BaseException as reason:
            self._finish(reason)
            raise
        finally:
            with self._lock:
                channel.leave()
        self._finish(None)

    __iter__ = stream

    def stop(self) -> None:
        """Cancels all threads and returns at once. May be called from any thread, repeatedly, and after the end."""
        with self._lock:
            self._stopped = True
            for party in self._board.parties:
                party.cancel()
            self._settle()

    def statistics(self) -> tuple[StageStatistics, ...]:
        """Current statistics of source, stages and sinks. May be called from any thread at any time."""
        return tuple(worker.statistics() for worker in self._workers)

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of tensors in all channels together."""
        return self._board.budget.peak

    def _claim(self) -> None:
        if self._used:
            raise RuntimeError("a pipeline runs once; make another one")
        self._used = True

    def _add(self, worker: _Worker, after: _Worker | None) -> None:
        if any(worker.name == other.name for other in self._workers):
            raise ValueError(f"names of stages and sinks must differ, got {worker.name!r} twice")
        self._workers.append(worker)
        if after is None:
            self._board.parties.append(worker)
        else:
            self._board.connect(after, worker)

    def _start(self) -> None:
        if self._stopped:  # before the sinks were added: not cancelled, they would see an empty but normal stream
            raise Cancelled("the pipeline was stopped before it started")
        # A daemon thread still inside torch when the interpreter exits can abort the process: stop it before that.
        atexit.register(self._stop_and_join)
        for worker in self._workers:
            worker.thread = _Thread(target=self._work, args=(worker,), name=worker.name, daemon=True)
            worker.thread.start()

    def _work(self, worker: _Worker) -> None:
        """Runs in the stage's thread, from its start to its end."""
        worker.started_s = time.perf_counter()
        try:
            self._attempt(worker, worker.drive)
            for iterator in reversed(worker.opened):
                self._attempt(worker, iterator.close)
        finally:
            worker.forget()
            worker.ended_s = time.perf_counter()
            with self._lock:
                if worker.inlet is not None:
                    worker.inlet.leave()
                for channel in worker.outlets:
                    channel.end()
                if not worker.outlets:
                    self._unfinished -= 1
                    if self._unfinished == 0:
                        self._settle()

    def _attempt(self, worker: _Worker, action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            # Cancelled is silent only if this worker was cancelled: otherwise a truncated stream would look complete.
            if not (isinstance(error, Cancelled) and worker.cancelled):
                self._fail(worker, error)

    def _fail(self, worker: _Worker, error: BaseException) -> None:
        self.stop()  # first: even if recording the error fails, no stage may take the end of its input for a normal end
        if isinstance(error, StageError):
            failure = error
        else:
            failure = StageError(worker.name, frame_of(error, worker.last_frame), error)
        with self._lock:
            if self._failure is None:
                self._failure = failure
            else:
                self._failure.add_note(f"also failed: {failure}")

    def _settle(self) -> None:
        """Call under the lock."""
        if self._settled.locked():
            self._settled.release()

    def _stop_and_join(self) -> list[str]:
        """Stops all threads and returns the names of those that did not end within ``JOIN_S``."""
        self.stop()
        threads = [w.thread for w in self._workers if w.thread is not None and w.thread.ident is not None]
        if threading.current_thread() in threads:
            return []  # garbage collection in a stage's thread finalised an abandoned stream: it cannot join itself
        deadline_s = time.monotonic() + JOIN_S
        for thread in threads:
            thread.join(max(deadline_s - time.monotonic(), 0))
        return [thread.name for thread in threads if thread.is_alive()]

    def _finish(self, reason: BaseException | None) -> None:
        """Stops all threads, then raises what went wrong, or notes it on ``reason`` if that is already an error."""
        stopped = self._stopped
        stuck = self._stop_and_join()
        atexit.unregister(self._stop_and_join)
        failure, self._failure = self._failure, None
        leaving = reason is None or isinstance(reason, GeneratorExit)
        trouble = failure if leaving else reason
        try:
            if stuck:
                message = f"did not stop within {JOIN_S:g} s and was left behind: {', '.join(stuck)}"
                if trouble is None:
                    warnings.warn(message, RuntimeWarning, stacklevel=3)
                else:
                    trouble.add_note(message)
            if failure is not None and not leaving and trouble is not None:
                trouble.add_note(f"also failed: {failure}")
            if leaving and failure is not None:
                raise failure
            if reason is None and stopped:
                raise Cancelled("the pipeline was stopped before its end")
        finally:
            del failure, trouble  # their tracebacks refer to this stack frame: the cycle would keep video frames alive
