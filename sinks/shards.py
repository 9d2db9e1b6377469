"""From flows to full shards in this process: compressed on several threads, gathered, handed to the store's writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from flowreel.engine.errors import concerning
from flowreel.sinks.chunk_pieces import Chunk
from flowreel.sinks.parallel import OrderedPool
from flowreel.sinks.store_layout import COORDINATES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from flowreel.sinks.codecs import FlowCodec
    from flowreel.sinks.store_writer import StoreWriter

Times = Mapping[str, Sequence[Any]]  # keyed by the names in ``COORDINATES``, one value per flow
Note = Callable[[int, int, int], None]  # unknown vectors, vectors beyond range, frame


class Shards(Protocol):
    """Takes the flows of one store in order. Raises what ``StoreWriter`` raises, also for earlier flows."""

    @property
    def count(self) -> int:
        """Flows assigned to a shard so far, including those of a resumed store."""
        ...

    def add_steps(self, steps: npt.NDArray[Any], times: Times) -> None:
        """Takes flows as a device has prepared them for ``FlowCodec.encode_prepared``. As long as the array is
        referenced, its memory is not changed."""
        ...

    def finish(self) -> None:
        """Waits until all flows taken are in their shard, and hands over the last shard, which may be short."""
        ...

    def stop(self) -> None:
        """Drops the flows that are not in a full shard."""
        ...

    def close(self) -> None:
        """Frees threads, processes and memory. Called after the writer has been flushed or closed."""
        ...


class _Made(NamedTuple):
    chunks: Sequence[Chunk]
    times: Times
    unknown: int = 0
    beyond_range: int = 0


class ShardsInThreads:
    """Compresses in threads of this process. See ``Shards``."""

    def __init__(
        self,
        files: StoreWriter,
        codec: FlowCodec,
        shard_length: int,
        count: int,
        workers: int,
        threads: int,
        note: Note,
    ) -> None:
        """count: flows stored already. threads: per worker, for a codec that is itself multi-threaded. note: called
        with the numbers of vectors that could not be kept, for flow that comes through ``add_flow``."""
        self.count = count
        self._files = files
        self._codec = codec
        self._shard_length = shard_length
        self._threads = threads
        self._note = note
        self._pool: OrderedPool[_Made] = OrderedPool(self._keep, workers)
        self._chunks: list[Chunk] = []  # of the shard being filled
        self._times: dict[str, list[Any]] = {name: [] for name in COORDINATES}  # of the same shard

    def add_flow(self, flow: npt.NDArray[np.float32], times: Times) -> None:
        """Takes one flow, (2, H, W) float32, pixels."""
        self._pool.submit(self._encoded, flow, times, nbytes=flow.nbytes)

    def add_steps(self, steps: npt.NDArray[Any], times: Times) -> None:
        together = len(steps) if self._codec.shuffles else 1  # one per call if the codec is single-threaded
        for first in range(0, len(steps), together):
            part = slice(first, first + together)
            theirs = {name: values[part] for name, values in times.items()}
            self._pool.submit(self._encoded_steps, steps[part], theirs, nbytes=steps[part].nbytes)

    def drain(self) -> None:
        """Waits until every flow is compressed."""
        self._pool.drain()

    def finish(self) -> None:
        self.drain()
        if self._chunks:
            self._is_full()

    def stop(self) -> None:
        self._pool.close()
        self._chunks = []

    def close(self) -> None:
        self._pool.close()

    def _encoded(self, flow: npt.NDArray[np.float32], times: Times) -> _Made:
        with concerning(int(times["frame"][0])):
            encoded = self._codec.encode(flow)
        return _Made([encoded.pieces], times, encoded.unknown, encoded.beyond_range)

    def _encoded_steps(self, steps: npt.NDArray[Any], times: Times) -> _Made:
        with concerning(int(times["frame"][0])):
            return _Made(self._codec.encode_prepared(steps, self._threads), times)

    def _keep(self, made: _Made) -> None:
        """Takes the next compressed flows, in order."""
        if made.unknown or made.beyond_range:
            self._note(made.unknown, made.beyond_range, int(made.times["frame"][0]))
        for place, chunk in enumerate(made.chunks):
            self._chunks.append(chunk)
            for name, values in made.times.items():
                self._times[name].append(values[place])
            self.count += 1
            if len(self._chunks) == self._shard_length:
                self._is_full()

    def _is_full(self) -> None:
        """Hands over the shard being filled, to be published."""
        number, chunks, times = (self.count - 1) // self._shard_length, self._chunks, self._times
        self._chunks, self._times = [], {name: [] for name in COORDINATES}
        self._files.submit(number, chunks, times)
