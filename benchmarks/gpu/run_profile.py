"""The bottleneck of a whole run from H.264 to a store: the chain without one end or the other, its threads.

Everything uses the chain that ``flowreel.run`` builds, with weights loaded once. The most informative runs come first.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.ceilings import written_rows
from benchmarks.gpu.chains import InMemory, Ran, ran, without_threads, written
from benchmarks.gpu.end_to_end import job_of
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.nvdec import numbered
from benchmarks.gpu.sampling import Watch
from benchmarks.gpu.surroundings import memory_folder
from benchmarks.processes import MEMORY
from flowreel.engine.config import RunConfig, SelectConfig
from flowreel.engine.inference import load_network
from flowreel.engine.protocols import Source
from flowreel.engine.sources import open_source
from flowreel.sinks import shard_processes

PAIRS = 12 * 32  # twelve shards of 1024x436
STORE_BYTES = 12 << 30  # two stores of LIGHT_PAIRS, as large as float32, and a margin
LIGHT, LIGHT_PAIRS = "FlowNet2C", 4 * PAIRS  # a network that leaves the other stages little time
MOST = 8  # places reported per thread
SOONER_S = 1e-4  # switch interval, instead of Python's 5 ms
QUOTA = Path("/sys/fs/cgroup/cpu.stat")  # Linux only: whether a quota throttled the process


class Chains:
    """The chain's variants, each a method that runs it."""

    def __init__(self, settings: Settings, model: str = "FlowNet2", pairs: int = PAIRS) -> None:
        self._device = numbered(settings.device)
        self._job = job_of(settings)
        self._frames = self._job.frames if settings.dry else pairs + 1
        self._config = RunConfig.of(**self._job.options, model=model, stop=self._frames)
        self._network = load_network(self._config.model)
        self.place = _place(settings)
        self._store = self.place / "run-profile.zarr"
        self.to_store()  # warms up the GPU and its libraries

    def to_store(self, decoder: Any = "auto", around: AbstractContextManager[object] | None = None) -> Ran:
        """The whole chain."""
        return ran(self._video(decoder), self._network, self._config, self._store, around=around)

    def dropped(self) -> Ran:
        """Without a store: the flow is dropped, as in a caller's own loop that keeps nothing."""
        return ran(self._video(), self._network, self._config, None)

    def dropped_on_the_host(self) -> Ran:
        """The flow is copied to the host, then dropped."""
        return ran(self._video(), self._network, self._config, None, to_host=True)

    def frames_there(self) -> Ran:
        """The frames are on the device beforehand, and the flow is dropped."""
        return ran(self._memory(), self._network, self._config, None)

    def frames_there_to_store(self) -> Ran:
        """Without decoding, but with everything after it."""
        return ran(self._memory(), self._network, self._config, self._store)

    def store_alone(self) -> Ran:
        """Without decoding and network: writing alone."""
        return written(self._memory(), self._network, self._config, self._store)

    def without_threads(self) -> Ran:
        """The frames are on the device, the stages run one after the other, the flow is dropped."""
        return without_threads(self._memory(), self._network, self._config)

    def _video(self, decoder: Any = "auto") -> Source:
        return open_source(self._job.clip, SelectConfig(stop=self._frames, decoder=decoder), self._device)

    def _memory(self) -> Source:
        return InMemory(self._job.height, self._job.width, self._frames, self._device)


def run(findings: Findings, settings: Settings) -> None:
    """1024x436 in fp16: a few hundred pairs per run with FlowNet2, more with a lighter network."""
    chains = cache(partial(Chains, settings))
    light = cache(partial(Chains, settings, LIGHT, LIGHT_PAIRS))
    told: dict[str, str] = {}

    def tell(what: str, words: str) -> None:
        told[what] = words
        findings.add(headline="; ".join(told.values()))

    def timed(name: str, way: Callable[[Chains], Ran], short: str = "", on: Callable[[], Chains] = chains) -> None:
        one = way(on())
        findings.row(run=name, decoder=one.decoder, pairs_s=one.pairs_s, by_shard=one.by_shard.cell(), **_stages(one))
        if short:
            tell(name, f"{short} {one.pairs_s:.0f} pairs/s")

    alone_by_processes = partial(by_processes, way=Chains.store_alone)
    for name, action in (
        ("to a store", partial(timed, way=Chains.to_store, short="whole run")),
        ("the flow dropped", partial(timed, way=Chains.dropped, short="no store")),
        ("frames there, the flow dropped", partial(timed, way=Chains.frames_there, short="no decoder either")),
        ("to a store, the GIL requested sooner", partial(timed, way=asking_sooner, short="GIL requested sooner")),
        ("watched", lambda _: _watch(findings, chains(), "", tell)),
        ("frames there, without threads", partial(timed, way=Chains.without_threads)),
        ("frames there, to a store", partial(timed, way=Chains.frames_there_to_store)),
        ("the flow dropped on the host", partial(timed, way=Chains.dropped_on_the_host)),
        ("to a store, PyAV", partial(timed, way=partial(Chains.to_store, decoder="pyav"))),
        (f"{LIGHT}, to a store", partial(timed, way=Chains.to_store, short=f"{LIGHT}, to a store", on=light)),
        (f"{LIGHT}, to a store, shards made by processes", partial(timed, way=by_processes, on=light)),
        ("files of the store's folder", lambda _: _files(findings, light(), 1 if settings.dry else 4)),
        (f"{LIGHT}, the flow dropped", partial(timed, way=Chains.dropped, on=light)),
        (f"{LIGHT}, frames there, to a store", partial(timed, way=Chains.frames_there_to_store, on=light)),
        (f"{LIGHT}, flow there, to a store", partial(timed, way=Chains.store_alone, on=light)),
        (
            f"{LIGHT}, flow there, to a store, by processes",
            partial(timed, way=alone_by_processes, on=light),
        ),
        (f"{LIGHT}, watched", lambda _: _watch(findings, light(), f"{LIGHT}, ", lambda *_: None)),
    ):
        findings.attempt(name, partial(action, name))


def asking_sooner(chains: Chains) -> Ran:
    """The whole chain with a shorter switch interval: a thread that needs the GIL lets others keep it less long."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(SOONER_S)
    try:
        return chains.to_store()
    finally:
        sys.setswitchinterval(before_s)


def by_processes(chains: Chains, way: Callable[[Chains], Ran] = Chains.to_store) -> Ran:
    """The same, but worker processes make the shards, as in longer runs."""
    before, shard_processes.are_worth_it = shard_processes.are_worth_it, lambda *_: True
    try:
        return way(chains)
    finally:
        shard_processes.are_worth_it = before


def _files(findings: Findings, chains: Chains, times: int) -> None:
    """How fast the stores' folder takes files, by itself."""
    with TemporaryDirectory(dir=chains.place) as folder:
        for row in written_rows("files", folder, times):
            findings.row(files=row["limit"], gb_s=row["reached"], best_gb_s=row["best"])


def _stages(one: Ran) -> dict[str, object]:
    """How each stage's thread spent its time, as fractions of the run's."""
    return {
        "seconds": one.seconds,
        "with_outputs_s": one.with_outputs_s,
        "stages": {
            stage.name: {
                "items": stage.items,
                "busy": round(stage.busy_s / one.seconds, 3),
                "busy_ms_an_item": round(1e3 * stage.busy_s / max(stage.items, 1), 3),
                "waits_in": round(stage.wait_in_s / one.seconds, 3),
                "waits_out": round(stage.wait_out_s / one.seconds, 3),
                "peak_queue": stage.peak_queue,
            }
            for stage in one.stages
        },
    }


def _watch(findings: Findings, chains: Chains, of: str, tell: Callable[[str, str], None]) -> None:
    """Where the threads are, their CPU time, and how long a thread that needs the GIL waits for it."""
    withheld_us = _withheld_us()
    with_watch = Watch()
    one = chains.to_store(around=with_watch)
    findings.row(run=f"{of}to a store, watched", pairs_s=one.pairs_s, **with_watch.paid(), **_stages(one))
    waits, whose = with_watch.gil_waits(), {"model": of.rstrip(", ")} if of else {}
    findings.row(**whose, gil=f"{len(with_watch.late_s)} looks, how late", **waits)
    tell("GIL", f"the GIL comes {waits['median_ms']:.2f} ms late, 1 of 10 times {waits['nine_of_10_ms']:.2f}")
    for row in (*with_watch.processors(), *with_watch.stood(MOST)):
        findings.row(**whose, **row)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings.note(
        f"{cores} processors may be used, {sys.getswitchinterval() * 1e3:g} ms until the GIL is requested, "
        f"{(_withheld_us() - withheld_us) / 1e3:.0f} ms of processors withheld by a quota"
    )


def _place(settings: Settings) -> Path:
    """A folder in memory if there is room, since a disk may be the bottleneck."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= STORE_BYTES:
        folder = memory_folder(settings.folder)
        folder.mkdir(exist_ok=True)
        return folder
    return Path(settings.folder)


def _withheld_us() -> int:
    """How long a CPU quota has throttled this container's threads so far; 0 where there is no such quota."""
    try:
        found = re.search(r"^throttled_usec (\d+)", QUOTA.read_text(), re.M)
    except OSError:
        return 0
    return int(found[1]) if found else 0
