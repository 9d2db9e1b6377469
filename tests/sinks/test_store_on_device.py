"""A store is the same whether it is given flow, or integer steps that were already computed on the flow's device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId, StepsBatch
from flowreel.engine.errors import OutputError, OutputWriteError, frame_of
from flowreel.engine.protocols import DeviceSink
from flowreel.sinks import open_sink, shard_processes, zarr_store
from flowreel.sinks.codecs import FlowCodec
from flowreel.sinks.shards import ShardsInThreads
from flowreel.sinks.zarr_store import ZarrSink

SIZE = (64, 128)
INFO = FlowInfo(*SIZE, frame_rate=None, frame_count=None, source=SourceId("test"))


def batches(length: int, count: int = 7) -> list[FlowBatch]:
    """Flow with some unknown vectors, and some that are too long for 16 bits."""
    flow = 30 * torch.randn(count, 2, *SIZE, generator=torch.Generator().manual_seed(0))
    flow[1, 0, 3, 4], flow[1, :, 5, 6], flow[2, 1, 7, 8], flow[4, 0, :2, :2] = torch.nan, 1e10, torch.inf, 3e4
    native = flow[:, :, ::4, ::4].contiguous()
    made = []
    for index in range(0, count, length):
        frames = np.arange(index, min(index + length, count))
        part = slice(index, index + length)
        made.append(FlowBatch(flow[part], index, frames, frames + 1, frames / 50, frames / 50 + 0.02, native[part]))
    return made


def opened(path: Path, info: FlowInfo = INFO, **settings: object) -> ZarrSink:
    sink = open_sink(str(path), SinkConfig(**settings))  # type: ignore[arg-type]
    assert isinstance(sink, ZarrSink)
    sink.open(info)
    return sink


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("max_error", [1 / 64, 1e-6], ids=["int16", "int32"])
@pytest.mark.parametrize(
    ("codec", "device", "processes", "length"),
    [
        *(("blosc", device, False, length) for device in ("cpu", "cuda") for length in (1, 3, 7)),
        ("blosc", "cuda", True, 3),  # batches of other lengths: ``test_shard_processes.py``
        ("pcodec2d", "cuda", True, 3),
    ],
)
def test_the_same_either_way(
    tmp_path: Path,
    codec: str,
    device: str,
    processes: bool,
    max_error: float,
    length: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if the flow is said to come from a GPU, where more threads or processes compress it."""
    monkeypatch.setattr(zarr_store, "encode_workers", lambda device: {"cpu": 1, "cuda": 5}[device])
    monkeypatch.setattr(shard_processes, "are_worth_it", lambda *_: processes)
    info = replace(INFO, device=device)
    as_flow, as_steps = (
        opened(tmp_path / name, info, codec=codec, max_error=max_error) for name in ("x.zarr", "y.zarr")
    )
    for batch in batches(length):
        as_flow.write(batch)
    assert isinstance(as_steps, DeviceSink)
    assert as_steps.prepares
    for steps in as_steps.prepare(iter(batches(length))):
        as_steps.take(steps)
    for sink in (as_flow, as_steps):
        sink.commit()
    assert files(tmp_path / "y.zarr") == files(tmp_path / "x.zarr")
    assert as_steps.notes == as_flow.notes
    assert len(as_flow.notes) == 2  # unknown vectors, vectors out of range


def test_lossless_flow_is_not_prepared(tmp_path: Path) -> None:
    sink = opened(tmp_path / "x.zarr", max_error=0.0)
    assert not sink.prepares
    sink.abort()


def test_the_bound_is_checked_on_the_host(tmp_path: Path) -> None:
    sink = opened(tmp_path / "x.zarr")
    (steps,) = sink.prepare(iter(batches(7)))
    with pytest.raises(OutputError, match="more than the promised"):
        _write_all(sink, replace(steps, found=steps.found + 0x01000000 * torch.tensor([[0], [0], [1]])))
    sink.abort()


def _write_all(sink: ZarrSink, steps: StepsBatch) -> None:
    sink.take(steps)
    sink.commit()


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("how", ["write", "take"])
def test_flow_of_another_size_is_refused_whichever_way_it_comes(
    tmp_path: Path, how: str, processes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the flow has the expected number of bytes."""
    monkeypatch.setattr(shard_processes, "are_worth_it", lambda *_: processes)
    sink = opened(tmp_path / "x.zarr", replace(INFO, device="cuda"))
    for size in ((64, 64), (64, 129), (128, 64)):
        frame = np.zeros(1, np.int64)
        batch = FlowBatch(torch.zeros(1, 2, *size), 0, frame, frame + 1, frame / 50, frame / 50 + 0.02)
        with pytest.raises(ValueError, match=r"this store's flows are \(2, 64, 128\), got"):
            sink.write(batch) if how == "write" else next(sink.prepare(iter([batch])))
    sink.abort()


@pytest.mark.parametrize("how", ["write", "take"])
def test_flows_that_could_not_be_compressed_are_missed(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a caller ignores the error, ``commit`` refuses."""
    sink = opened(tmp_path / "x.zarr", replace(INFO, device="cuda"))
    given: list[Any] = batches(2)
    _failing_at(given[1].flow[0].numpy(), "encode", monkeypatch)
    if how == "take":
        given = list(sink.prepare(iter(given)))
        _failing_at(given[1].steps.numpy(), "encode_prepared", monkeypatch)
    with pytest.raises(ZeroDivisionError) as caught:
        _all_compressed(sink, getattr(sink, how), given)
    assert frame_of(caught.value, None) == 2
    with pytest.raises(OutputWriteError, match="some of its flows could not be compressed"):
        sink.commit()
    sink.abort()


def _failing_at(wanted: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = getattr(FlowCodec, method)

    def failing(codec: FlowCodec, values: Any, *threads: int) -> Any:
        return 1 / 0 if np.array_equal(values, wanted) else made(codec, values, *threads)

    monkeypatch.setattr(FlowCodec, method, failing)


def _all_compressed(sink: ZarrSink, take: Callable[[Any], None], given: list[Any]) -> None:
    for batch in given:
        take(batch)
    assert isinstance(sink._shards, ShardsInThreads)
    sink._shards.drain()


@pytest.mark.parametrize("ready", [False, True])
def test_what_waits_to_be_compressed_is_counted(tmp_path: Path, ready: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory stays bounded where flow comes faster than it can be compressed."""
    sink, counted = opened(tmp_path / "x.zarr"), []
    assert isinstance(sink._shards, ShardsInThreads)
    submit = sink._shards._pool.submit

    def noted(*call: Any, nbytes: int = 0) -> None:
        counted.append(nbytes)
        submit(*call, nbytes=nbytes)

    monkeypatch.setattr(sink._shards._pool, "submit", noted)
    values = 2 * SIZE[0] * SIZE[1]
    if ready:
        for steps in sink.prepare(iter(batches(4))):
            sink.take(steps)
        assert counted == [4 * 2 * values, 3 * 2 * values]  # int16, a batch at a time
    else:
        for batch in batches(4):
            sink.write(batch)
        assert counted == 7 * [4 * values]
    sink.abort()


@pytest.mark.parametrize("codec", ["blosc", "zstd"])
def test_steps_out_of_order_or_of_another_size_are_refused(tmp_path: Path, codec: str) -> None:
    sink = opened(tmp_path / "x.zarr", codec=codec)
    first, second = sink.prepare(iter(batches(4)))
    with pytest.raises(ValueError, match="expected number 0, got 4"):
        sink.take(second)
    with pytest.raises(ValueError, match="this store's flows come as"):
        _write_all(sink, replace(first, steps=first.steps[:, 1:]))
    sink.abort()
