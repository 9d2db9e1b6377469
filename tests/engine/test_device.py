"""Devices: never a silent CPU run, and on a CPU everything passes through untouched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from flowreel.engine.data import FlowBatch, Frame
from flowreel.engine.device import (
    Streams,
    device_name,
    download,
    ran_out_of_memory,
    resolve_device,
    resolve_devices,
    resolve_precision,
    upload,
)
from flowreel.engine.errors import DeviceError, UsageError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_cpu_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert device_name(torch.device("cpu")).startswith("cpu (")


@no_gpu
def test_auto_takes_the_cpu_only_where_there_is_no_gpu() -> None:
    assert resolve_device("auto").type == "cpu"


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(DeviceError, match=f"{name} was .*flowreel doctor.*--device cpu"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", ""])
def test_what_is_no_device(name: str) -> None:
    with pytest.raises(UsageError, match="device must be"):
        resolve_device(name)


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("auto", [1]), ("cuda", [1]), ("cuda:2", [2]), ("cuda:0,1", [0, 1]), ("cuda:2, 0,cuda:1", [2, 0, 1])],
)
def test_several_gpus_in_the_order_they_are_named(three_gpus: None, name: str, numbers: list[int]) -> None:
    devices = resolve_devices(name)
    assert devices == tuple(torch.device("cuda", number) for number in numbers)
    assert resolve_device(name) == devices[0]
    assert device_name(*devices) == ", ".join(f"cuda:{number} (card {number})" for number in numbers)


@pytest.mark.parametrize(
    "name", ["cuda:0,0", "cuda:1,cuda:1", "cuda:0,cpu", "cuda:0,", "cuda:,1", "cpu:0,1", "cuda,cuda"]
)
def test_what_are_no_several_gpus(three_gpus: None, name: str) -> None:
    with pytest.raises(UsageError, match=name):
        resolve_devices(name)


def test_one_of_several_gpus_that_is_not_there(three_gpus: None) -> None:
    with pytest.raises(DeviceError, match="cuda:3 was asked for, but the last GPU is cuda:2"):
        resolve_devices("cuda:0,3")


def test_on_a_cpu_stages_frames_and_flow_pass_as_they_are() -> None:
    streams = Streams(torch.device("cpu"))

    def stage(items: Iterator[int]) -> Iterator[int]:
        yield from items

    assert streams.on_stream(stage, "x") is stage
    items = iter([1, 2])
    assert streams.handed_over(items) is items
    frame = Frame(torch.zeros(3, 4, 5, dtype=torch.uint8), 0, 0.0)
    assert next(upload(torch.device("cpu"))(iter([frame]))) is frame
    one = np.zeros(1, np.int64)
    batch = FlowBatch(torch.zeros(1, 2, 4, 5), 0, one, one, one.astype(float), one.astype(float))
    assert next(download(iter([batch]))) is batch


def test_precision_follows_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert (resolve_precision(None, cpu), resolve_precision(None, gpu)) == ("fp32", "fp16")
    assert resolve_precision("bf16", cpu) == "bf16"
    assert resolve_precision("bf16", gpu) == "bf16"
    assert resolve_precision("tf32", gpu) == "tf32"
    for precision in ("fp16", "tf32"):
        with pytest.raises(UsageError, match=precision):
            resolve_precision(precision, cpu)  # type: ignore[arg-type]


def test_older_gpus_have_neither_bf16_nor_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert [resolve_precision(precision, gpu) for precision in (None, "fp16", "fp32")] == ["fp16", "fp16", "fp32"]
    for precision in ("bf16", "tf32"):
        with pytest.raises(UsageError, match=rf"{precision} .*8\.0.*cuda:1 \(Tesla T4\) has 7\.5: take fp16 or fp32"):
            resolve_precision(precision, gpu)  # type: ignore[arg-type]


def test_memory_that_ended_is_found_behind_other_errors_even_such_as_hang_on_themselves() -> None:
    """The chain of causes is followed to an out-of-memory error, and a chain that forms a loop comes to an end."""
    inner, outer = ValueError("a"), RuntimeError("b")
    outer.__cause__, inner.__context__ = inner, outer
    assert not ran_out_of_memory(outer)
    inner.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert ran_out_of_memory(outer)
    assert not ran_out_of_memory(None)
