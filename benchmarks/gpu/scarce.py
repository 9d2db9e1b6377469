"""Too little GPU memory: for a batch, where a run continues with smaller ones; for one pair, where it says what to do.

Tested in two ways: a limit on torch's allocator, and other tensors that take nearly all memory of the GPU, so that
CUDA's and cuDNN's own allocations fail, too.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import flowreel
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.made_clips import written_clip
from flowreel.engine.config import ModelConfig
from flowreel.engine.errors import FlowreelError
from flowreel.engine.inference import Inference, load_network
from flowreel.engine.run_report import RunReport

MODEL = "FlowNet2C"  # a single network: a stack amplifies rounding differences
BATCH, FEWER = 8, 2  # pairs: the batch requested, and one that surely fits
SAME = 3e-5  # of the largest component: two runs with equal batches may be given different algorithms
WENT_ON = re.compile(r"pairs a batch did not fit in the memory of .*: (\d+) from flow")  # from ``engine/inference.py``
WORDS = "too little free memory"  # likewise
BLOCK, MOST_AT_ONCE = 2 << 20, 1 << 30  # bytes, for taking the rest: the allocator rounds up to whole blocks

Room = Callable[[int], AbstractContextManager[None]]  # of the bytes that may be used in total; in a dry run, pairs


class Taken(NamedTuple):
    """Peak GPU memory of a run, in bytes."""

    used: int
    reserved: int  # by torch's allocator, including what it caches


def check(findings: Findings, settings: Settings) -> None:
    """Uses float32, whose results can be compared closely."""
    runs = Runs(settings)
    ways: dict[str, Room] = {"a limit": limited, "a full GPU": beside_a_hog} if not settings.dry else {"as if": as_if}
    for name, room in ways.items():
        findings.attempt(f"{name}, too little for a batch", partial(_for_a_batch, findings, name, room, runs))
        findings.attempt(f"{name}, too little for a pair", partial(_for_a_pair, findings, name, room, runs))


class Runs:
    """Repeated runs of one clip to a lossless store."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.width, self.height = (64, 60) if settings.dry else (1024, 448)
        self.pairs = 2 * BATCH
        self._config: dict[str, Any] = {"device": settings.device, "precision": "fp32", "model": MODEL}
        self._alone: dict[int, np.ndarray] = {}

    def run(self, batch: int) -> tuple[np.ndarray, RunReport]:
        """A run's flow, (N, 2, H, W) px. Decodes on the host: NVDEC needs its own memory, with its own error."""
        folder = self._settings.folder
        clip = written_clip(folder, self.width, self.height, self.pairs + 1)
        path = Path(folder) / "scarce.zarr"
        options = self._config | {"decoder": "pyav", "max_error": 0, "overwrite": True}
        report = flowreel.run(clip, path, batch=batch, **options)
        return flowreel.open_store(path)[:], report

    def alone(self, batch: int) -> np.ndarray:
        """The flow of an undisturbed run."""
        if batch not in self._alone:
            self._alone[batch], _ = self.run(batch)
        return self._alone[batch]

    @cached_property
    def for_some(self) -> tuple[int, ...]:
        """Amounts of memory meant to suffice for batches of ``FEWER`` pairs but not of ``BATCH``, the largest first.

        This is not certain: with little memory left, cuDNN makes do with less than it takes otherwise.
        """
        if self._settings.dry:
            return (FEWER,)
        fits, too_much = self._taken(FEWER).reserved, self._taken(BATCH).used
        if fits >= too_much:
            raise RuntimeError(f"{FEWER} pairs keep {fits} bytes, {BATCH} need {too_much}: nothing lies between")
        return (fits + too_much) // 2, (3 * fits + too_much) // 4, fits

    @cached_property
    def for_none(self) -> int:
        """An amount of memory that suffices for the weights, but not for one pair."""
        if self._settings.dry:
            return 0
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        network = load_network(ModelConfig(**self._config))
        weights = torch.cuda.memory_allocated() - before
        del network
        return weights + (self._taken(1).used - weights) // 3

    def _taken(self, batch: int) -> Taken:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._alone[batch], _ = self.run(batch)
        return Taken(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def _for_a_batch(findings: Findings, name: str, room: Room, runs: Runs) -> None:
    for left in runs.for_some:
        with room(left):
            flow, report = runs.run(BATCH)
        told = [int(match[1]) for note in report.notes if (match := WENT_ON.search(note))]
        if told:
            break
    findings.check(f"{name}: it goes on with fewer pairs a batch, and says so", bool(told), room=left, pairs=told)
    findings.check(f"{name}: every flow is there", len(flow) == runs.pairs, flows=len(flow))
    fewer = told[-1] if told else BATCH
    apart, longest = _apart(flow, runs.alone(fewer))
    findings.check(f"{name}: the flow of an undisturbed run of such batches", apart <= SAME * longest, most_px=apart)
    apart, longest = _apart(flow, runs.alone(BATCH))
    findings.row(scarce=name, room=left, went_on_with=fewer, apart_from_whole_batches_px=apart, longest_px=longest)


def _for_a_pair(findings: Findings, name: str, room: Room, runs: Runs) -> None:
    before, left, said = runs.alone(BATCH), runs.for_none, ""
    with room(left):
        try:
            runs.run(BATCH)
        except FlowreelError as error:
            said = f"{type(error).__name__}: {error}"
    findings.check(f"{name}: too little for one pair is an error that says what to do", WORDS in said, said=said)
    flow, report = runs.run(BATCH)
    apart, longest = _apart(flow, before)
    good = apart <= SAME * longest and not any(WENT_ON.search(note) for note in report.notes)
    findings.check(f"{name}: afterwards all is as before", good, most_px=apart)


def _apart(flow: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """The largest difference and the largest component, px."""
    if flow.shape != wanted.shape:
        return float("inf"), 1.0
    return float(np.abs(flow - wanted).max()), float(np.abs(wanted).max())


# --- ways to have little ----------------------------------------------------------------------------------------------


@contextmanager
def limited(room: int) -> Iterator[None]:
    """Limits torch's allocator to ``room`` bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def beside_a_hog(room: int) -> Iterator[None]:
    """Occupies the GPU's memory except for ``room`` bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    own, hog = torch.cuda.memory_reserved(), []
    while (size := torch.cuda.mem_get_info()[0] + own - room) >= BLOCK:
        try:
            hog.append(torch.empty(min(size // BLOCK * BLOCK, MOST_AT_ONCE), dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:  # the free memory is fragmented
            break
    try:
        yield
    finally:
        hog.clear()
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def as_if(pairs: int) -> Iterator[None]:
    """For a dry run: a network that runs out of memory for more than ``pairs`` pairs."""
    flow = Inference.of_fitted

    def little(self: Inference, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if len(first) > pairs:
            raise torch.OutOfMemoryError("CUDA out of memory, as if")
        return flow(self, first, second)

    Inference.of_fitted = little  # type: ignore[method-assign]
    try:
        yield
    finally:
        Inference.of_fitted = flow  # type: ignore[method-assign]
