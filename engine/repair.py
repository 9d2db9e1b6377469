"""Repairs a finished store: what cannot be read of it is computed again from the source, as it was the first time.

    read it all -> which shards are damaged -> their frames, network, shards -> read it all again

Only damaged shards are computed, each as a whole: batches start at multiples of B within a shard and never cross
shards, so the original batches recur, and on a CPU the original bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from flowreel.engine.api import Chain, flow_header, stages
from flowreel.engine.config import RunConfig, SelectConfig
from flowreel.engine.data import FlowBatch, FramePair, PairBatch
from flowreel.engine.device import device_name, resolve_device, resolve_precision
from flowreel.engine.errors import (
    DamagedStoreError,
    DeviceError,
    ResumeMismatchError,
    TruncatedSourceError,
    UsageError,
    WeightsMismatchError,
)
from flowreel.engine.files import PathLike
from flowreel.engine.inference import Network, load_network
from flowreel.engine.models.weights import read_weights
from flowreel.engine.outputs import Progress, ProgressHook, Report, teller
from flowreel.engine.pairing import batches
from flowreel.engine.sources import comes_once, open_source
from flowreel.engine.stages import StageStatistics
from flowreel.engine.verify import Verification, verify
from flowreel.sinks import ShardRewriter

if TYPE_CHECKING:
    from flowreel.engine.stages import StageFunction
    from flowreel.sinks.store_repair import ShardDamage

# What a store must record of how it was made, by the names of ``run``'s options.
SETTINGS = (
    "model", "precision", "batch", "fit", "direction", "start", "stop", "step", "stream", "max_error", "codec",
    "resolution",
)  # fmt: skip


@dataclass(frozen=True)
class RepairReport(Report):
    """What was wrong with a store, what was done about it, and what is wrong with it now."""

    before: Verification
    shards: tuple[ShardDamage, ...]  # that were, or in a dry run would be, computed again
    after: Verification  # for a dry run or a sound store, ``before``
    flows: int = 0  # computed
    seconds: float = 0.0  # of computing and publishing the shards, including opening the source for each group of them
    bytes_written: int = 0
    arrays: tuple[str, ...] = ()  # ``y`` and ``x`` of a native store that were, or would be, written again
    how: str = ""  # the network and what it ran on, as text
    notes: tuple[str, ...] = ()


def repair(
    store: PathLike,
    source: PathLike,
    *,
    weights: str = "baseline",
    device: str = "auto",
    dry_run: bool = False,
    progress: ProgressHook | None = None,
) -> RepairReport:
    """Finds what ``verify`` finds, and computes the damaged shards again from the source the store was made from.

    All settings but ``weights`` and ``device`` are those the store records. What can be read stays as it is: sound
    shards are not touched, and sound flows of a damaged shard are copied unchanged into the new one. Each file replaces
    the damaged one atomically, so that a repair stopped at any moment leaves the store no worse than before.

    Args:
        store: a finished flow store.
        source: what it was made from, as given to ``run``.
        weights: those it was made with.
        device: where to compute. The result is byte-identical to the original only on the same kind of device.
        dry_run: only find out what would be computed; source and weights are not opened.
        progress: called a few times a second, while the store is read and while flow is computed.

    Returns:
        What was wrong, what was done, and what remains: ``report.after.sound``.

    Raises:
        StoreNotFoundError, StoreError: no store, or an unfinished one, or a run has replaced it meanwhile.
        OutputBusyError: a run or another repair is writing it.
        DamagedStoreError: its metadata is damaged, or does not say how the flow was computed.
        ResumeMismatchError: another source, other weights or settings than it was made with, naming what differs.
        SourceError, WeightsError, DeviceError, OutputError: as for ``run``.
        StageError: a stage failed on the way; shards finished by then stay repaired.
    """
    rewriter = ShardRewriter(store)
    before = verify(store, _reading(progress))
    length = rewriter.store.shard_length
    suspected = {
        shard
        for finding in before.findings
        if finding.first_flow is not None and finding.last_flow is not None
        for shard in range(finding.first_flow // length, finding.last_flow // length + 1)
    }
    shards, arrays = rewriter.damage(suspected), rewriter.damaged_places()
    if dry_run or before.sound:
        return RepairReport(before, shards, before, arrays=arrays)
    computed = None
    with rewriter.held():
        if shards:
            computed = _Recomputing(rewriter, source, recorded_config(rewriter, weights, device), progress)
            computed.run(shards)
        rewriter.restore_places()
        rewriter.remove_leftovers()
    after = verify(store, _reading(progress))
    report = RepairReport(before, shards, after, rewriter.flows, bytes_written=rewriter.bytes_written, arrays=arrays)
    if computed is None:
        return report
    return replace(report, seconds=computed.seconds, how=computed.how, notes=tuple(_notes(computed.notes, rewriter)))


class _Recomputing:
    """Computes the damaged shards from the source, and collects what the report says about it."""

    def __init__(
        self, rewriter: ShardRewriter, source: PathLike, config: RunConfig, progress: ProgressHook | None
    ) -> None:
        self._rewriter, self._source, self._config, self._progress = rewriter, source, config, progress
        self.seconds = 0.0
        self.how = ""
        self.notes: list[str] = []

    def run(self, shards: Sequence[ShardDamage]) -> None:
        if not comes_once(self._source):
            with closing(open_source(self._source, self._config.select)) as whole:
                self._rewriter.require_source(whole.info.source)
        network = _load(self._config, self._rewriter)
        self._tell = teller(self._progress, [self._rewriter], sum(map(len, shards)))
        began_s = time.perf_counter()
        for group in [shards] if comes_once(self._source) else _neighbours(shards):
            self._group(group, network)
        self.seconds = time.perf_counter() - began_s

    def _group(self, shards: Sequence[ShardDamage], network: Network) -> None:
        """Computes some shards in one pass through the source, from the first one's frames to the last one's."""
        rewriter, config = self._rewriter, self._config
        select, first = self._frames(shards)
        before, wanted = rewriter.flows, sum(map(len, shards))
        with closing(open_source(self._source, select, str(network.device))) as frames:
            inference = network.fitted(frames.info.height, frames.info.width, native=config.sink.resolution == "native")
            rewriter.require_same(flow_header(frames.info, inference, config), config.sink)
            batched = batches_of_shards(shards, inference.batch, rewriter.store.shard_length, first)
            steps = stages(inference, config.model.direction, batched, to_host=True)
            pipeline = Chain(frames, steps, config.queues, inference.device)
            pipeline.run({f"write {rewriter.store.path}": self._consume}, self._tell)
            if rewriter.flows < before + wanted:
                lost = "".join(f"; {loss}" for loss in frames.losses)
                raise TruncatedSourceError(
                    f"{frames.info.source.name} gives {rewriter.flows - before} of the {wanted} flows that the damaged "
                    f"shards from flow {shards[0].first_flow} to {shards[-1].last_flow} hold{lost}"
                )
            self.how = (
                f"{inference.model} ({inference.weights.name}), {inference.precision}, batch {inference.batch}, on "
                f"{device_name(*inference.devices)}; decoded by {frames.decoder}"
            )
            self.notes += [note for note in (*frames.notes, *inference.notes) if note not in self.notes]

    def _frames(self, shards: Sequence[ShardDamage]) -> tuple[SelectConfig, int]:
        """The frames that the shards need, and the number of the flow between the first two of them."""
        select = self._config.select
        start, end = (
            self._rewriter.frame_at(
                place,
                backward=self._config.model.direction == "backward",
                start=select.start if isinstance(select.start, int) else None,
                step=select.step,
            )
            for place in (shards[0].first_flow, shards[-1].last_flow + 1)
        )
        if start is None or end is None:  # no frame number is readable, and ``start`` was given as a time
            return select, 0
        return replace(select, start=start, stop=end + 1), shards[0].first_flow

    def _consume(self, flows: Iterator[FlowBatch]) -> None:
        for batch in flows:
            self._rewriter.write(batch)


def recorded_config(rewriter: ShardRewriter, weights: str, device: str) -> RunConfig:
    """The settings of the run that made a store, as the store records them.

    Raises DamagedStoreError when it records none, because the flow was imported or exported, or when they are invalid.
    """
    store = rewriter.store
    told: dict[str, Any] = {name: store.attrs[name] for name in SETTINGS if name in store.attrs}
    missing = [name for name in SETTINGS if name not in told]
    if missing or "first_stored_by" in store.attrs:
        why = f"it does not tell {missing[0]}" if missing else "it was exported from another store"
        raise DamagedStoreError(f"{store.path} cannot be computed again from a source: {why}; export it again")
    flow_bytes = 8 * store.layout.codec.height * store.layout.codec.width
    told |= {"codec": store.layout.codec.codec, "shard_bytes": store.shard_length * flow_bytes}
    try:
        return RunConfig.of(weights=weights, device=device, **told)
    except UsageError as error:
        raise DamagedStoreError(f"{store.path} records settings that make no sense: {error}") from error


def batches_of_shards(shards: Sequence[ShardDamage], batch: int, length: int, first: int) -> StageFunction:
    """A stage that forms batches as ``pairing.batches`` does, but only for the flows of some shards.

    length: flows per shard. first: number of the first pair's flow.
    """

    def gather(pairs: Iterator[FramePair]) -> Iterator[PairBatch]:
        reached = first
        for shard in shards:
            end = shard.last_flow + 1
            wanted = islice(pairs, shard.first_flow - reached, end - reached)
            yield from batches(batch, length, shard.first_flow)(wanted)
            reached = end

    return gather


def _neighbours(shards: Sequence[ShardDamage]) -> Iterator[list[ShardDamage]]:
    """Groups of consecutive shards, each computed in one pass through the source."""
    for _, group in groupby(enumerate(shards), lambda item: item[1].shard - item[0]):
        yield [shard for _, shard in group]


def _load(config: RunConfig, rewriter: ShardRewriter) -> Network:
    """The network. Weights of another model raise ResumeMismatchError; an impossible precision, DeviceError.

    The precision comes from the store, so a UsageError would blame an option that the user did not give.
    """
    store, device = rewriter.store, resolve_device(config.model.device)
    try:
        resolve_precision(config.model.precision, device)
    except UsageError as error:
        raise DeviceError(f"{store.path} was computed in {config.model.precision}, but {error}") from error
    try:
        return load_network(config.model)
    except WeightsMismatchError as error:
        found = read_weights(config.model.weights).sha256
        raise ResumeMismatchError(
            f"cannot repair {store.path}: weights sha256 was {store.attrs.get('weights_sha256')}, is {found}: {error}"
        ) from error


def _reading(progress: ProgressHook | None) -> Callable[[int, int], None] | None:
    """A progress hook for ``verify`` that reports it to the caller's hook as a single stage of a run."""
    if progress is None:
        return None
    began_s = time.perf_counter()

    def tell(flows: int, available: int) -> None:
        seconds = time.perf_counter() - began_s
        progress(Progress((StageStatistics("verify", flows, seconds, 0.0, 0.0, 0, 0),), available, flows, seconds))

    return tell


def _notes(notes: list[str], rewriter: ShardRewriter) -> Iterator[str]:
    yield from notes
    if rewriter.others:
        yield (
            f"{rewriter.others} of {rewriter.others + rewriter.same} flows that could be read come out differently "
            f"here, by up to {rewriter.farthest:.3g} px; they stayed as they were, the others are as computed here"
        )
