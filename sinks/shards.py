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

Times = Mapping[str, Sequence[Any]]  # by the names of ``COORDINATES``, a value a flow
Note = Callable[[int, int, int], None]  # vectors unknown, and beyond range; of which frame


class Shards(Protocol):
    """Takes the flows of one store in order. Errors, also of what was taken before: as of ``StoreWriter``."""

    @property
    def count(self) -> int:
        """Flows that are in their shard, those of a resumed store included."""
        ...

    def add_steps(self, steps: npt.NDArray[Any], times: Times) -> None:
        """Flows as a device has prepared them: what ``FlowCodec.encode_prepared`` takes. As long as the array is held
        nobody changes it."""
        ...

    def finish(self) -> None:
        """Hands over the last shard, perhaps a short one, when all that came is in its shard."""
        ...

    def stop(self) -> None:
        """Drops what is in no full shard."""
        ...

    def close(self) -> None:
        """After the writer has heard of the last full shard, or has been closed."""
        ...


class _Made(NamedTuple):
    chunks: Sequence[Chunk]
    times: Times
    unknown: int = 0
    beyond_range: int = 0


class ShardsInThreads:
    """The threads of this process compress. See ``Shards``."""

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
        """count: flows that are there already. threads: for each of the workers, where a codec has any of its own.
        note: told of what could not be kept of flow that comes by ``add_flow``."""
        self.count = count
        self._files = files
        self._codec = codec
        self._shard_length = shard_length
        self._threads = threads
        self._note = note
        self._pool: OrderedPool[_Made] = OrderedPool(self._keep, workers)
        self._chunks: list[Chunk] = []  # of the shard that is filling up
        self._times: dict[str, list[Any]] = {name: [] for name in COORDINATES}  # of the same

    def add_flow(self, flow: npt.NDArray[np.float32], times: Times) -> None:
        """One, (2, H, W) float32, pixels."""
        self._pool.submit(self._encoded, flow, times, nbytes=flow.nbytes)

    def add_steps(self, steps: npt.NDArray[Any], times: Times) -> None:
        together = len(steps) if self._codec.shuffles else 1  # else the codec has no threads of its own
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
        """The next flows in order."""
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
        """Hands the waiting flows over to be published."""
        number, chunks, times = (self.count - 1) // self._shard_length, self._chunks, self._times
        self._chunks, self._times = [], {name: [] for name in COORDINATES}
        self._files.submit(number, chunks, times)
