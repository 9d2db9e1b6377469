"""Writes flow into ``X.zarr``: a Zarr v3 group of whole, durable shards.

    X.zarr.partial/                    renamed to X.zarr by commit
      zarr.json                        group attribute "flowreel" and its checksum; consolidated by commit
      flow/c/<shard>/0/0/0             S chunks, one per flow, and their index
      timestamp_s/c/<shard>  timestamp_to_s/...  frame/...  frame_to/...      S values
      flow_crc32c/c/<shard>  time_crc32c/...      S checksums (``store_checksums.py``)

Flows are compressed as they arrive, several at a time, and only compressed bytes are held until the shard is full and
published (``store_writer.py``). Long runs on a GPU leave compressing and writing to other processes
(``shard_processes.py``) and hold the shard uncompressed. The times, frame numbers and checksums of a shard are
published before its flow, so every flow present can be placed. The metadata is zarr-python's own, see
``store_metadata.py``; the shards are assembled here, because zarr-python rewrites a shard for each chunk that is added
and never waits for the disk.

**Resume.** Shards are published in order and each is whole, so an interrupted run continues after its last full
shard. Batches never cross shards, so the resumed run computes exactly the batches the first one would have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowreel.engine import publish
from flowreel.engine.data import UNKNOWN_WORDS, Prepared, StepsBatch
from flowreel.engine.errors import OutputBusyError, OutputWriteError, ResumeMismatchError, concerning
from flowreel.engine.protocols import ResumePoint
from flowreel.kernels.bitshuffle import bitshuffle
from flowreel.kernels.quantise import numbers_found, quantise
from flowreel.sinks import blosc, shard_processes
from flowreel.sinks.codecs import flow_codec
from flowreel.sinks.parallel import encode_workers, shared_out
from flowreel.sinks.shard_maker import Setting
from flowreel.sinks.shard_processes import ShardsInProcesses
from flowreel.sinks.shards import Shards, ShardsInThreads
from flowreel.sinks.store_checksums import COVERED
from flowreel.sinks.store_layout import BESIDE_FLOW, COORDINATES, FIRST_LOSS, published_shards
from flowreel.sinks.store_metadata import other_settings, places_in_frame, store_metadata
from flowreel.sinks.store_reader import FlowStore
from flowreel.sinks.store_target import LocalTarget
from flowreel.sinks.store_writer import StoreWriter

if TYPE_CHECKING:
    from flowreel.engine.config import SinkConfig
    from flowreel.engine.data import FlowBatch, FlowInfo, Pin


class ZarrSink:
    """The flow store as a Sink (see ``engine/protocols.py``). Flows arrive in order, in batches of any size.

    Errors: OutputExistsError, OutputWriteError, OutputBusyError, ResumeMismatchError; ValueError for flow out of order
    or of the wrong size.
    """

    def __init__(self, path: str, config: SinkConfig) -> None:
        self._target = LocalTarget(path)
        self.path = self._target.name
        self._config = config
        self._state = "new"  # -> "open" -> "done"
        self._point: ResumePoint | None = None  # where to resume, as last returned by ``resume_point``
        self._below: int | None = None  # the argument of that call
        self._asked = False  # whether ``resume_point`` was called
        self._taken = 0  # flows received, including those of a resumed store
        self._announced = ""  # " of N", N flows being expected, for messages
        self._losses: tuple[str, ...] = ()  # what the source failed to give
        self._invalid: dict[str, tuple[int, int]] = {}  # why -> (vectors, first frame)
        self._files: StoreWriter | None = None  # from ``open`` on
        self._shards: Shards | None = None  # likewise

    @property
    def bytes_written(self) -> int:
        return 0 if self._files is None else self._files.bytes_written

    @property
    def notes(self) -> list[str]:
        if not self._invalid:
            return []
        total = self._taken * self._codec.height * self._codec.width
        return [
            f"{vectors} of {total} vectors are {what}, first in frame {frame}: stored as missing"
            for what, (vectors, frame) in self._invalid.items()
        ]

    # -- Resuming ------------------------------------------------------------------------------------------------

    def resume_point(self, below: int | None = None) -> ResumePoint | None:
        """Where this store resumes; None: nothing is there, or an unfinished store without a whole shard.

        below: keep fewer flows than this.

        Raises OutputBusyError while another run writes it, DamagedStoreError.
        """
        with publish.write_errors(self.path):
            if self._target.left_over:
                try:
                    self._target.hold()
                    if self._target.final.is_dir() and not published_shards(self._target.folder):
                        self._target.discard()  # of a run that was killed at once; what counts is the finished store
                finally:
                    self._target.let_go()
        self._point, self._below, self._asked = self._point_now(below), below, True
        return self._point

    def _point_now(self, below: int | None) -> ResumePoint | None:
        store = self._present()
        if store is None or len(store) == 0:
            return None
        flows = _whole_flows(store, len(store) if below is None else min(below, len(store)))
        # Redo the last shard if only the final rename is missing, and as many shards as ``below`` requires.
        while flows > 0 and ((not store.complete and flows >= len(store)) or (below is not None and flows >= below)):
            flows -= store.shard_length
        place, later = (flows - 1, max) if flows > 0 else (0, min)  # after the last kept pair, or the first frame
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
            _loss(store, flows),
        )

    def require_same(self, info: FlowInfo) -> None:
        """Raises ResumeMismatchError naming every setting that differs from those of the existing store."""
        store = self._present()
        if store is None:
            return
        differing = other_settings(store, info, self._config)
        shard_length = info.shard_length(self._config.shard_bytes)
        if shard_length != store.shard_length:
            differing.append(f"shard length was {store.shard_length}, is {shard_length}")
        if differing:
            raise ResumeMismatchError(
                f"cannot resume {store.path}: {'; '.join(differing)}. Run it as before, or start afresh with "
                "--overwrite"
            )

    def _present(self) -> FlowStore | None:
        """What an earlier run left: the unfinished store if any of its shards is kept, else the finished one."""
        for folder in (self._target.folder, self._target.final):
            # If one of these is missing, the run was killed while it created them: there is nothing to resume.
            if all((folder / name / "zarr.json").exists() for name in ("", "flow", *COORDINATES)):
                store = FlowStore(folder)
                if store.layout.cache:
                    raise ResumeMismatchError(
                        f"{folder} is a cache of flowreel.open: flowreel export makes a store of a full one"
                    )
                if store.complete or (len(store) > store.shard_length and store.files.whole(0)):
                    return store
        return None

    # -- Writing -------------------------------------------------------------------------------------------------

    def open(self, info: FlowInfo) -> None:
        """Creates ``X.zarr.partial`` with empty arrays, or continues where ``resume_point`` said, if it was called.

        An existing ``X.zarr`` stays until ``commit``.
        """
        if self._state != "new":
            raise ValueError(f"{self.path} was opened before: a sink is used once")
        self._codec = flow_codec(*info.stored_size, self._config, max(info.height, info.width))
        self._native = info.native is not None
        self._shard_length = info.shard_length(self._config.shard_bytes)
        with publish.write_errors(self.path):
            try:
                self._target.hold()
                self._start_or_reopen(info)
            except BaseException:
                self._target.let_go()
                raise
            self._state = "open"
            try:
                length = max(info.flow_count or 0, self._taken)
                self._announced = "" if info.flow_count is None else f" of {info.flow_count}"
                metadata = store_metadata(info, self._config, self._codec, self._shard_length, length)
                self._start(info, metadata)
                if self._taken and self._point is not None and self._point.loss is not None:
                    self.note_loss(self._point.loss[0])
                self._require_open().start(places_in_frame(info))
            except BaseException:
                self.abort()
                raise

    def _start_or_reopen(self, info: FlowInfo) -> None:
        point = self._point
        if self._asked and self._point_now(self._below) != point:
            raise OutputBusyError(f"another run has gone on with {self.path} meanwhile: run the same again")
        if point is None or point.flows == 0:
            self._target.start(overwrite=self._config.overwrite or point is not None, afresh=self._config.resume)
            return
        self.require_same(info)  # checked again, now that the lock keeps others from changing it
        self._target.reopen(finished=point.complete)
        self._drop_from(point.flows // self._shard_length)
        self._taken = point.flows

    def _start(self, info: FlowInfo, metadata: dict[str, dict[str, Any]]) -> None:
        """Sets up compressing and writing. Flow computed on a GPU arrives through ``take``."""
        workers, on_gpu = encode_workers(info.device), info.device not in (None, "cpu")
        shards = ((info.flow_count or 0) - self._taken) / self._shard_length  # a pipe gives no count, but is slow
        possible = shard_processes.are_possible(self._codec, self._shard_length)
        if on_gpu and possible and shard_processes.are_worth_it(shards, self._shard_length, workers):
            processes = shard_processes.how_many(workers)
            most_bytes = processes * self._shard_length * self._codec.flow_bytes
            self._files = StoreWriter(self._target, metadata, self._shard_length, processes, most_bytes)
            setting = Setting(self.path, self._codec, self._shard_length)
            with suppress(OSError):  # no process or no memory available: use threads instead
                self._shards = ShardsInProcesses(self._files, self._target, setting, self._taken, processes)
                return
        self._files = StoreWriter(self._target, metadata, self._shard_length)
        workers, threads = shared_out(workers) if on_gpu and self._codec.shuffles else (workers, 1)
        self._shards = ShardsInThreads(
            self._files, self._codec, self._shard_length, self._taken, workers, threads, self._note_invalid
        )

    def write(self, batch: FlowBatch) -> None:
        """Compresses each flow, and publishes each shard that is full. The batch's tensor is on the CPU."""
        flows = self._stored(batch)
        if flows.device.type != "cpu":
            raise ValueError(f"a sink takes flow on the CPU, got {flows.device}")
        shards = self._require_shards()
        if not isinstance(shards, ShardsInThreads):  # it takes only steps, as a GPU prepares them
            for prepared in self.prepare(iter([batch])):
                self.take(prepared)
            return
        for place, flow in enumerate(flows.detach().numpy()):
            times = self._times_of_next(batch, batch.index + place, slice(place, place + 1))
            shards.add_flow(flow, times)

    @property
    def prepares(self) -> bool:
        """See ``DeviceSink``. False for a lossless store, which keeps flow as it is."""
        return not self._codec.lossless

    def prepare(self, batches: Iterator[FlowBatch]) -> Iterator[StepsBatch]:
        """See ``DeviceSink``: quantises flow to the stored integers and, for Blosc, shuffles their bits."""
        kind = torch.int16 if self._codec.dtype.itemsize == 2 else torch.int32
        for batch in batches:
            steps, found = quantise(self._stored(batch), self._codec.step, self._codec.limit, kind)
            if self._codec.shuffles:
                steps = bitshuffle(steps, blosc.BLOCK_VALUES)
            yield StepsBatch(steps, found, batch.index, **{name: getattr(batch, name) for name in COORDINATES})

    def landing(self, prepared: Prepared, pin: Pin) -> Tensor | None:
        """See ``LandingSink``: memory shared with other processes, if they make the shards."""
        shards = self._require_shards()
        room = shards.room(len(prepared), pin) if isinstance(shards, ShardsInProcesses) else None
        return None if room is None else torch.from_numpy(room)

    def take(self, prepared: Prepared) -> None:
        """See ``DeviceSink``."""
        assert isinstance(prepared, StepsBatch)
        found = numbers_found(prepared.found)
        for frame, unknown, beyond_range, worst in zip(prepared.frame.tolist(), *found, strict=True):
            with concerning(frame):
                self._codec.require_bound(worst)
            if unknown or beyond_range:
                self._note_invalid(unknown, beyond_range, frame)
        times = self._times_of_next(prepared, prepared.index, slice(len(prepared)))
        self._require_shards().add_steps(prepared.steps.numpy(), times)

    def note_loss(self, frame: int) -> None:
        """See ``Resumable``."""
        self._require_open().note_loss(frame)

    def tell_losses(self, losses: Sequence[str]) -> None:
        """See ``Resumable``."""
        self._losses = tuple(losses)

    def commit(self, complete: bool = True) -> None:
        """Publishes the last, perhaps ragged shard; if complete, trims the arrays and names the store."""
        files, shards = self._require_open(), self._require_shards()
        files.flush()  # first: an error not raised yet says more than the hole it left
        files.require_no_hole()
        shards.finish()
        if shards.count < self._taken:
            raise OutputWriteError(f"cannot finish {self.path}: some of its flows could not be compressed")
        files.flush()
        shards.close()
        files.close()
        with publish.write_errors(self.path):
            if complete:
                files.finish(self._taken, self._losses)
                self._target.finish()
            self._target.let_go()
        self._state = "done"

    def abort(self) -> str | None:
        """Removes the unfinished store, unless it holds a whole shard and is worth resuming."""
        if self._shards is not None:
            self._shards.stop()
        if self._files is not None:
            self._files.close(in_haste=True)  # full shards are worth keeping
        if self._shards is not None:
            self._shards.close()
        kept = None
        if self._state == "open":
            self._state = "done"
            if shards := len(published_shards(self._target.folder)):
                flows = min(shards * self._shard_length, self._taken)
                kept = f"{self._target.folder} holds {flows}{self._announced} flows"
            else:
                self._target.discard()
        self._target.let_go()
        return kept

    def copy(self, finished: str) -> int:
        """See ``Resumable``."""
        with publish.write_errors(self.path):
            self._target.hold()
            try:
                self._target.start(overwrite=True)
                return self._target.copy(Path(finished))
            finally:
                self._target.let_go()

    def _require_open(self) -> StoreWriter:
        if self._state != "open" or self._files is None:
            raise ValueError(f"{self.path} is not open")
        return self._files

    def _require_shards(self) -> Shards:
        self._require_open()
        assert self._shards is not None, "open makes both"
        return self._shards

    def _drop_from(self, shard: int) -> None:
        """Deletes all chunk files of the shards from this one on: a ragged last one, or one without its flow.

        Other files stay: a user's own arrays, or what a file manager left.
        """
        for key in sorted(self._target.keys()):  # the flow first: a flow present always has its times
            name, _, rest = key.partition("/c/")
            number = rest.split("/")[0]
            if name in ("flow", *BESIDE_FLOW) and number.isdecimal() and int(number) >= shard:
                self._target.delete(key)
        self._target.tidy()  # else a shard's empty folder, if not filled again, looks like one after the last flow

    def _stored(self, batch: FlowBatch) -> Tensor:
        """The flow of a batch that is stored: full-resolution flow, or the network's own prediction."""
        flows = batch.native if self._native else batch.flow
        if flows is None:
            raise ValueError("opened for the network's own prediction, which did not come with the flow")
        if tuple(flows.shape[1:]) != (size := (2, self._codec.height, self._codec.width)):
            raise ValueError(f"this store's flows are {size}, got {tuple(flows.shape[1:])}")
        return flows

    def _times_of_next(self, batch: FlowBatch | StepsBatch, index: int, part: slice) -> dict[str, list[Any]]:
        """Times and frame numbers of the flows in ``part`` of a batch; the first is number ``index`` of the store."""
        self._require_open().check()  # so that the error of a shard is raised with the next flow, not shards later
        if index != self._taken:
            raise ValueError(f"flows arrive in order: expected number {self._taken}, got {index}")
        times = {name: getattr(batch, name)[part].tolist() for name in COORDINATES}
        self._taken += len(times["frame"])
        return times

    def _note_invalid(self, unknown: int, beyond_range: int, frame: int) -> None:
        reach = self._codec.limit * self._codec.step
        for what, vectors in (
            (UNKNOWN_WORDS, unknown),
            (f"beyond the range of ±{reach:.6g} px", beyond_range),
        ):
            if vectors:
                before, first = self._invalid.get(what, (0, frame))
                self._invalid[what] = (before + vectors, first)


def _whole_flows(store: FlowStore, most: int) -> int:
    """Flows in the full shards before the first that is not full. A damaged or misplaced shard counts as missing.

    Looks at the first ``most`` flows.
    """
    shards = most // store.shard_length
    return store.shard_length * next((shard for shard in range(shards) if not store.files.whole(shard)), shards)


def _loss(store: FlowStore, flows: int) -> tuple[int, int] | None:
    """See ``ResumePoint.loss``; ``flows``: how many are kept."""
    frame = store.attrs.get(FIRST_LOSS)
    if not isinstance(frame, int):
        return None
    sound = int(np.searchsorted(np.maximum(store.frame[:flows], store.frame_to[:flows]), frame))
    return (frame, sound) if sound < flows else None
