"""The part ``memory`` of ``python -m benchmarks gpu`` judges runs with too little memory correctly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import scarce
from benchmarks.gpu.findings import Settings
from benchmarks.gpu.scarce import BATCH, Runs, Taken
from flowreel.engine import inference
from tests.fakes.gpu_parts import Found


@contextmanager
def plenty(room: int) -> Iterator[None]:
    """In place of a way to limit memory: does not limit it."""
    yield


def verdicts(findings: Found, words: str) -> list[bool]:
    return [passed for name, passed in findings.verdicts.items() if words in name]


def test_a_run_with_too_little_for_a_batch(findings: Found, settings: Settings) -> None:
    scarce._for_a_batch(findings, "as if", scarce.as_if, Runs(settings))
    assert set(findings.verdicts.values()) == {True}
    assert findings["rows"][0]["went_on_with"] == 2
    assert findings["checks"][0]["pairs"] == [4, 2]


def test_a_run_that_lost_pairs_or_took_others_fails(
    findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Runs.run

    def short(self: Runs, batch: int) -> tuple[np.ndarray, Any]:
        flow, report = run(self, batch)
        return (flow[:-1] if batch == BATCH and not self._alone else flow), report

    monkeypatch.setattr(Runs, "run", short)
    scarce._for_a_batch(findings, "as if", scarce.as_if, Runs(settings))
    assert verdicts(findings, "every flow") == [False]
    assert verdicts(findings, "of an undisturbed run") == [False]


def test_flow_that_is_another_fails(findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(settings)
    right = runs.alone(2)
    runs._alone[2] = right * (1 + 1e-4)
    scarce._for_a_batch(findings, "as if", scarce.as_if, runs)
    assert verdicts(findings, "of an undisturbed run") == [False]
    assert verdicts(findings, "says so") == [True]


def test_memory_that_suffices_after_all_shows_nothing(findings: Found, settings: Settings) -> None:
    runs = Runs(settings)
    scarce._for_a_batch(findings, "plenty", plenty, runs)
    scarce._for_a_pair(findings, "plenty", plenty, runs)
    assert verdicts(findings, "says so") == [False]
    assert verdicts(findings, "what to do") == [False]
    assert verdicts(findings, "as before") == [True]


def test_too_little_for_one_pair(findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    scarce._for_a_pair(findings, "as if", scarce.as_if, Runs(settings))
    assert set(findings.verdicts.values()) == {True}
    assert "--precision fp16" in findings["checks"][0]["said"]


def test_too_little_for_the_weights_is_told_as_well(
    findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def full(room: int) -> Iterator[None]:
        def pack(*_: object) -> object:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(inference, "pack", pack)
            yield

    scarce._for_a_pair(findings, "full", full, Runs(settings))
    assert set(findings.verdicts.values()) == {True}


def test_the_room_lies_between_what_few_pairs_keep_and_many_need(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {1: Taken(150, 300), 2: Taken(200, 400), BATCH: Taken(800, 1600)}
    monkeypatch.setattr(Runs, "_taken", lambda self, batch: taken[batch])
    runs = Runs(Settings("cuda", False, settings.folder, settings.out))
    assert runs.for_some == (600, 500, 400)
    taken[2] = Taken(200, 900)
    with pytest.raises(RuntimeError, match="nothing lies between"):
        _ = Runs(Settings("cuda", False, settings.folder, settings.out)).for_some


@pytest.mark.parametrize(("free", "own", "room"), [(10 << 30, 0, 1 << 30), (3 << 20, 1 << 20, 1 << 20)])
def test_the_hog_takes_all_but_the_room(free: int, own: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Card:
        OutOfMemoryError = torch.OutOfMemoryError
        uint8 = torch.uint8

        class cuda:
            empty_cache = staticmethod(lambda: None)
            memory_reserved = staticmethod(lambda: own)
            mem_get_info = staticmethod(lambda: (free - sum(taken), 80 << 30))

        @staticmethod
        def empty(size: int, **_: object) -> object:
            assert size % scarce.BLOCK == 0
            taken.append(size)
            return object()

    monkeypatch.setattr(scarce, "torch", Card)
    with scarce.beside_a_hog(room):
        assert room <= free - sum(taken) + own < room + scarce.BLOCK


def test_the_limit_is_a_share_of_the_card_and_is_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", given.append)

    def within() -> None:
        with scarce.limited(20 << 30):
            raise ValueError("it fails")

    with pytest.raises(ValueError, match="it fails"):
        within()
    assert given == [0.25, 1.0]
