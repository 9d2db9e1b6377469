"""Writes flow into ``X.zarr``: a Zarr v3 group of whole, durable shards.

    X.zarr.partial/                    renamed to X.zarr by commit
      zarr.json                        group attribute "flowreel" and its checksum; consolidated from commit on
      flow/c/<shard>/0/0/0             S chunks, one a flow, and their index
      timestamp_s/c/<shard>  timestamp_to_s/...  frame/...  frame_to/...      S values
      flow_crc32c/c/<shard>  time_crc32c/...      S checksums (``store_checksums.py``)

Flows are compressed as they arrive, several at a time; only compressed bytes are held until the shard is full and
published (``store_writer.py``). The times, frame numbers and checksums of a shard go before its flow, so a flow that is
there can always be placed. The metadata is zarr-python's own, see ``store_metadata.py``; the shards are assembled by
us, because zarr-python rewrites a shard for each chunk that is added and never waits for the disk.

**Resume.** Shards are published in order and each is whole, so a run that was cut short is taken up after its last
full shard. Batches never cross shards: the resumed run computes the very batches the first one would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowreel.engine.data import Prepared, ResumePoint, StepsBatch
from flowreel.engine.errors import OutputBusyError, ResumeMismatchError, concerning
from flowreel.kernels.bitshuffle import bitshuffle
from flowreel.kernels.quantise import Quantised, quantise
from flowreel.sinks import blosc, publish
from flowreel.sinks.chunk_pieces import Chunk
from flowreel.sinks.codecs import EncodedFlow, FlowCodec, flow_codec
from flowreel.sinks.parallel import OrderedPool, encode_workers, shared_out
from flowreel.sinks.store_checksums import COVERED
from flowreel.sinks.store_layout import COORDINATES, published_shards
from flowreel.sinks.store_metadata import other_settings, places_in_frame, store_metadata
from flowreel.sinks.store_reader import FlowStore
from flowreel.sinks.store_target import LocalTarget
from flowreel.sinks.store_writer import StoreWriter

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from flowreel.engine.config import SinkConfig
    from flowreel.engine.data import FlowBatch, FlowInfo


class ZarrSink:
    """The flow store as a Sink (see ``engine/data.py``). Flows arrive in order, in batches of any size.

    Errors: OutputExistsError, OutputWriteError, OutputBusyError, ResumeMismatchError; ValueError for flow out of order
    or of another size.
    """

    def __init__(self, path: str, config: SinkConfig) -> None:
        self._target = LocalTarget(path)
        self._config = config
        self._state = "new"  # -> "open" -> "done"
        self._point: ResumePoint | None = None  # where to go on, as last asked for
        self._below: int | None = None  # with what it was asked
        self._asked = False
        self._taken = 0  # flows that arrived, those of a resumed store included
        self._count = 0  # flows compressed and in their shard
        self._announced = ""  # of how many flows they are, for messages
        self._chunks: list[Chunk] = []  # of the shard that is filling up
        self._coordinates: dict[str, list[Any]] = {name: [] for name in COORDINATES}  # of the same shard
        self._invalid: dict[str, tuple[int, int]] = {}  # what -> vectors, first frame
        self._pool: OrderedPool[list[tuple[EncodedFlow, dict[str, Any]]]] = OrderedPool(self._keep, 0)  # until ``open``
        self._files: StoreWriter | None = None  # from ``open`` on

    @property
    def path(self) -> str:
        return self._target.name

    @property
    def bytes_written(self) -> int:
        return 0 if self._files is None else self._files.bytes_written

    @property
    def notes(self) -> list[str]:
        if not self._invalid:
            return []
        total = self._count * self._codec.height * self._codec.width
        return [
            f"{vectors} of {total} vectors are {what}, first in frame {frame}: stored as missing"
            for what, (vectors, frame) in self._invalid.items()
        ]

    # -- Going on with what is there -----------------------------------------------------------------------------

    def resume_point(self, below: int | None = None) -> ResumePoint | None:
        """Where this store goes on; None: nothing is there, or no whole shard.

        below: keep fewer flows than this.

        Raises OutputBusyError while another run writes it, DamagedStoreError.
        """
        with publish.write_errors(self.path):
            self._target.require_free()
        self._point, self._below, self._asked = self._point_now(below), below, True
        return self._point

    def _point_now(self, below: int | None) -> ResumePoint | None:
        store = self._present()
        if store is None or len(store) == 0:
            return None
        flows = _whole_flows(store)
        # All is there but its name, or the caller wants to go farther back: the last shard is made again.
        while flows > 0 and ((not store.complete and flows >= len(store)) or (below is not None and flows >= below)):
            flows -= store.shard_length
        if flows <= 0 and not store.complete:
            return None
        place, later = (flows - 1, max) if flows > 0 else (0, min)  # after the last pair; or the first frame of all
        frame, frame_to, time_s, time_to_s = (store.files.value(name, place) for name in COVERED)
        batch = store.attrs.get("batch")
        recorded = batch if isinstance(batch, int) and batch > 0 else None
        return ResumePoint(
            max(flows, 0),
            int(later(frame, frame_to)),
            later(time_s, time_to_s),
            store.complete,
            store.available,
            recorded,
            store.shard_length,
        )

    def require_same(self, info: FlowInfo) -> None:
        """Raises ResumeMismatchError naming every setting that differs from those of the store that is there."""
        store = self._present()
        if store is None:
            return
        differing = other_settings(store, info, self._config)
        shard_length = info.shard_length(self._config.shard_bytes)
        if shard_length != store.shard_length:
            differing.append(f"shard length was {store.shard_length}, is {shard_length}")
        if not store.layout.checksums:
            differing.append("it is of an older version and has no checksums of its flows")
        if differing:
            raise ResumeMismatchError(
                f"cannot go on with {store.path}: {'; '.join(differing)}. Run it as before, or start afresh with "
                "--overwrite"
            )

    def _present(self) -> FlowStore | None:
        """What an earlier run left: the unfinished store, else the finished one."""
        for folder in (self._target.folder, self._target.final):
            if all((folder / name / "zarr.json").exists() for name in ("", "flow", *COORDINATES)):
                store = FlowStore(folder)
                if store.layout.cache:
                    raise ResumeMismatchError(
                        f"{folder} is a cache of flowreel.open: flowreel export makes a store of a full one"
                    )
                return store  # not so when it was killed while they were written: nothing to go on with
        return None

    # -- Writing -------------------------------------------------------------------------------------------------

    def open(self, info: FlowInfo) -> None:
        """Creates ``X.zarr.partial`` with empty arrays, or goes on with the one that is there if it is to resume.

        What is at ``X.zarr`` stays until ``commit``.
        """
        if self._state != "new":
            raise ValueError(f"{self.path} was opened before: a sink is used once")
        self._codec = flow_codec(*info.stored_size, self._config, max(info.height, info.width))
        self._native = info.native is not None
        self._shard_length = info.shard_length(self._config.shard_bytes)
        workers, self._threads = encode_workers(info.device), 1
        if self._codec.shuffles and info.device not in (None, "cpu"):
            workers, self._threads = shared_out(workers)  # flows come by ``take``
        self._pool = OrderedPool(self._keep, workers)
        with publish.write_errors(self.path):
            if self._config.resume and not self._asked:
                self.resume_point()
            try:
                self._target.hold()
                self._start_or_reopen(info)
            except BaseException:
                self._target.let_go()
                raise
            self._state = "open"
            try:
                length = max(info.flow_count or 0, self._count)
                self._announced = "" if info.flow_count is None else f" of {info.flow_count}"
                metadata = store_metadata(info, self._config, self._codec, self._shard_length, length)
                self._files = StoreWriter(self._target, metadata, self._shard_length)
                self._files.start(places_in_frame(info))
            except BaseException:
                self.abort()
                raise

    def _start_or_reopen(self, info: FlowInfo) -> None:
        point = self._point if self._config.resume else None
        if self._config.resume and self._point_now(self._below) != point:
            raise OutputBusyError(f"another run has gone on with {self.path} meanwhile: run the same again")
        if point is None or point.flows == 0:
            self._target.start(overwrite=self._config.overwrite or point is not None, afresh=self._config.resume)
            return
        self.require_same(info)  # as asked before, but now that nobody else can change it
        self._target.reopen(finished=point.complete)
        self._drop_from(point.flows // self._shard_length)
        self._taken = self._count = point.flows

    def write(self, batch: FlowBatch) -> None:
        """Compresses each flow, and publishes each shard that is full. The batch's tensor is on the CPU."""
        flows = self._stored(batch)
        if flows.device.type != "cpu":
            raise ValueError(f"a sink takes flow on the CPU, got {flows.device}")
        for place, flow in enumerate(flows.detach().numpy()):
            self._submit(batch, range(place, place + 1), flow.nbytes, partial(_encoded, self._codec, flow))

    @property
    def prepares(self) -> bool:
        """See ``DeviceSink``: unless flow is stored as it is."""
        return not self._codec.lossless

    def prepare(self, batches: Iterator[FlowBatch]) -> Iterator[StepsBatch]:
        """See ``DeviceSink``: whole numbers of steps, as they are stored, and as far compressed as a device can."""
        kind = torch.int16 if self._codec.dtype.itemsize == 2 else torch.int32
        for batch in batches:
            steps, found = quantise(self._stored(batch), self._codec.step, self._codec.limit, kind)
            if self._codec.shuffles:
                steps = bitshuffle(steps, blosc.BLOCK_VALUES)
            yield StepsBatch(steps, found, batch.index, **{name: getattr(batch, name) for name in COORDINATES})

    def take(self, prepared: Prepared) -> None:
        """See ``DeviceSink``."""
        assert isinstance(prepared, StepsBatch)
        made, steps = Quantised(prepared.steps, prepared.found), prepared.steps.numpy()
        unknown, beyond_range = made.unknown.tolist(), made.beyond_range.tolist()
        for frame, worst in zip(prepared.frame, made.worst.tolist(), strict=True):
            with concerning(int(frame)):
                self._codec.require_bound(worst)
        together = len(steps) if self._codec.shuffles else 1  # else the codec has no threads of its own
        for first in range(0, len(steps), together):
            part = slice(first, first + together)
            encode = partial(
                _encoded_steps, self._codec, steps[part], unknown[part], beyond_range[part], self._threads
            )  # a view that keeps the batch alive
            self._submit(prepared, range(len(steps))[part], steps[part].nbytes, encode)

    def commit(self, complete: bool = True) -> None:
        """Publishes the last, perhaps ragged shard; if complete, trims the arrays to what came and names the store."""
        files = self._require_open()
        files.flush()  # first: an error that nobody has heard of says more than the hole it has left
        files.require_no_hole()
        self._pool.drain()
        if self._chunks:
            self._shard_is_full()
        files.flush()
        self._pool.close()
        files.close()
        with publish.write_errors(self.path):
            if complete:
                files.finish(self._count)
                self._target.finish()
            self._target.let_go()
        self._state = "done"

    def abort(self) -> str | None:
        """Removes the unfinished store, unless it holds a whole shard: that is worth resuming from, and stays."""
        self._pool.close()
        if self._files is not None:
            self._files.close(in_haste=True)  # what is full is worth keeping
        kept = None
        if self._state == "open":
            self._state = "done"
            if shards := len(published_shards(self._target.folder)):
                flows = min(shards * self._shard_length, self._count)
                kept = f"{self._target.folder} holds {flows}{self._announced} flows"
            else:
                self._target.discard()
        self._target.let_go()
        self._chunks = []
        return kept

    def _flush(self) -> None:
        """Waits until every flow is compressed and every full shard on the disk."""
        self._pool.drain()
        self._require_open().flush()

    def _require_open(self) -> StoreWriter:
        if self._state != "open" or self._files is None:
            raise ValueError(f"{self.path} is not open")
        return self._files

    def _drop_from(self, shard: int) -> None:
        """Deletes every chunk file of the shards from this one on: a ragged last one, or one without its flow."""
        for key in sorted(self._target.keys()):  # the flow first: what is there can always be placed
            _, chunks, rest = key.partition("/c/")
            if chunks and int(rest.split("/")[0]) >= shard:
                self._target.delete(key)

    def _stored(self, batch: FlowBatch) -> Tensor:
        """What is to be kept of a batch."""
        flows = batch.native if self._native else batch.flow
        if flows is None:
            raise ValueError("opened for the network's own prediction, which did not come with the flow")
        return flows

    def _submit(
        self, batch: FlowBatch | StepsBatch, places: range, nbytes: int, encode: Callable[[], list[EncodedFlow]]
    ) -> None:
        """The next flows, to be encoded and kept: those at ``places`` of the batch, of so many bytes."""
        self._require_open().check()  # what went wrong with a shard is heard with the next flow, not shards later
        if batch.index + places[0] != self._taken:
            raise ValueError(f"flows arrive in order: expected number {self._taken}, got {batch.index + places[0]}")
        self._taken += len(places)
        coordinates = [{name: getattr(batch, name)[place] for name in COORDINATES} for place in places]
        self._pool.submit(_with_coordinates, encode, coordinates, nbytes=nbytes)

    def _keep(self, results: list[tuple[EncodedFlow, dict[str, Any]]]) -> None:
        """The next flows in order, compressed."""
        for encoded, coordinates in results:
            if encoded.unknown or encoded.beyond_range:
                self._note_invalid(encoded, int(coordinates["frame"]))
            self._chunks.append(encoded.pieces)
            for name, value in coordinates.items():
                self._coordinates[name].append(value)
            self._count += 1
            if len(self._chunks) == self._shard_length:
                self._shard_is_full()

    def _shard_is_full(self) -> None:
        """Hands the waiting flows over to be published."""
        number, chunks, times = (self._count - 1) // self._shard_length, self._chunks, self._coordinates
        self._chunks, self._coordinates = [], {name: [] for name in COORDINATES}
        self._require_open().submit(number, chunks, times)

    def _note_invalid(self, encoded: EncodedFlow, frame: int) -> None:
        reach = self._codec.limit * self._codec.step
        for what, vectors in (
            ("unknown (NaN, infinite or beyond 1e9 px)", encoded.unknown),
            (f"beyond the range of ±{reach:.6g} px", encoded.beyond_range),
        ):
            if vectors:
                before, first = self._invalid.get(what, (0, frame))
                self._invalid[what] = (before + vectors, first)


def _encoded(codec: FlowCodec, flow: npt.NDArray[np.float32]) -> list[EncodedFlow]:
    return [codec.encode(flow)]


def _encoded_steps(
    codec: FlowCodec, steps: npt.NDArray[Any], unknown: list[int], beyond_range: list[int], threads: int
) -> list[EncodedFlow]:
    return list(map(EncodedFlow, codec.encode_prepared(steps, threads), unknown, beyond_range))


def _with_coordinates(
    encode: Callable[[], list[EncodedFlow]], coordinates: list[dict[str, Any]]
) -> list[tuple[EncodedFlow, dict[str, Any]]]:
    with concerning(int(coordinates[0]["frame"])):
        return list(zip(encode(), coordinates, strict=True))


def _whole_flows(store: FlowStore) -> int:
    """How many flows the full shards from the first on hold. One that is damaged or misplaced counts as missing."""
    shards = len(store) // store.shard_length
    return store.shard_length * next((shard for shard in range(shards) if not store.files.whole(shard)), shards)
