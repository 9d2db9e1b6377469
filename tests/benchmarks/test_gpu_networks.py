"""The parts of ``python -m benchmarks gpu`` that compute or time flow judge made-up observations correctly."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import flowreel
from benchmarks.gpu import end_to_end, kernel_times, memory, network, peers, precision, profile, store
from benchmarks.gpu.findings import Settings
from benchmarks.gpu.original import kernels_of
from benchmarks.measure import Effort, Skipped
from flowreel.engine import device
from flowreel.engine.compiled import graphs
from flowreel.engine.compiled.plain import PlainNetwork
from flowreel.engine.data import FlowInfo
from flowreel.sinks.shard_processes import _Process
from tests.fakes.gpu_parts import Found

# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("card", "aim"), [("NVIDIA H200", 585), ("NVIDIA H100 80GB HBM3", None)])
def test_aims_are_shown_on_the_card_that_they_are_for(
    card: str, aim: int | None, findings: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    monkeypatch.setattr(network, "_cells", lambda *_: {"pairs/s": {"median": 117.0}})
    network._time(findings, network.TIMED[0], Settings("cuda", False, str(tmp_path), str(tmp_path)))
    (row,) = findings["rows"]
    assert (row.get("aim"), row.get("of the aim")) == (aim, aim and 0.2)
    assert ("asked for" in findings["headline"]) == (aim is not None)


class Compiled:
    """A compiled network that always gives the same flow."""

    def __init__(self, flow: torch.Tensor, program: PlainNetwork | None = None) -> None:
        self._flow, self._program = flow, program

    def __call__(self, *_: object) -> torch.Tensor:
        return self._flow


@pytest.mark.parametrize(("off_px", "within"), [(0.0, True), (0.5, True), (1.5, False)])
def test_filled_weights_are_judged_by_their_flow_and_told_in_pixels(
    off_px: float, within: bool, findings: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = torch.tensor([60.0, 80.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)  # 100 px long
    made = Compiled(flow + torch.tensor([0, off_px]).view(1, 2, 1, 1))
    monkeypatch.setattr(flowreel, "compile", lambda *_: made)
    frames = (torch.zeros(1, 3, 4, 4),) * 2
    precision._check(findings, "filled, width 1", "fp16", lambda: (torch.nn.Identity(), flow), frames)
    assert findings.verdicts["fp16, filled, width 1"] is within
    (row,) = findings["rows"]
    assert row["mean_px_apart"] == pytest.approx(off_px, abs=1e-5)
    assert row["within_aim"] is (off_px == 0)
    assert ("0.05 px holds" in findings["headline"]) == (off_px == 0)


@pytest.mark.parametrize(("captured", "as_written"), [(True, True), (False, True), (True, False)])
def test_a_network_that_runs_without_its_graph_fails(
    captured: bool, as_written: bool, findings: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = torch.ones(1, 2, 4, 4)

    def compiled(*_: object) -> Compiled:
        if not captured:
            warnings.warn(f"running {precision.WITHOUT_GRAPH}, which could not be captured", stacklevel=2)
        return Compiled(flow, None if as_written else PlainNetwork(torch.nn.Identity(), "fp16"))

    monkeypatch.setattr(flowreel, "compile", compiled)
    frames = (torch.zeros(1, 3, 4, 4),) * 2
    precision._check(findings, "baseline", "fp16", lambda: (torch.nn.Identity(), flow), frames)
    assert findings.verdicts["fp16, baseline: one CUDA graph"] is (captured and as_written)
    assert len(findings["notes"]) == (not captured)
    assert precision.WITHOUT_GRAPH in Path(graphs.__file__).read_text()


def test_kernels_are_told_apart_by_their_names() -> None:
    shares = profile.by_kind(
        {
            "sm90_xmma_fprop_implicit_gemm_f16f16_nhwc": 60.0,
            "bias_leaky_relu_half": 20.0,
            "void cudnn::ops::nchwToNhwcKernel<float>": 10.0,
            "void at::native::elementwise_kernel<128>": 6.0,
            "something_else": 4.0,
        }
    )
    assert shares == {"convolution": 0.6, "ours": 0.2, "layout": 0.1, "elementwise": 0.06, "other": 0.04}
    assert profile.bound(shares, 500, 1000) == (
        "busy 50% of 1.00 ms a call: convolution 60%, ours 20%, layout 10%, elementwise 6%, other 4%"
    )


def test_a_profile_that_dies_in_its_layers_is_not_filed_twice(
    findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "_kernels", lambda *_: findings.row(kernel="warp"))
    monkeypatch.setattr(profile, "_layers", lambda *_: None)
    for _ in range(2):  # the second as by the process that continues
        profile.run(findings, settings)
    assert findings["rows"] == [{"kernel": "warp"}]


# --- videos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong_px", [0.0, 0.1])
def test_a_store_that_is_not_what_the_network_gives_fails(
    wrong_px: float, findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Store(flowreel.FlowStore):
        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__(key) + wrong_px

    monkeypatch.setattr(flowreel, "open_store", Store)
    store._compare_store(findings, settings, "fp32")
    assert list(findings.verdicts.values()) == [True, not wrong_px, not wrong_px]


@pytest.mark.parametrize("answers", [[True, True], [True, False], []])
def test_steps_that_land_in_memory_that_is_not_pinned_fail(
    answers: list[bool], findings: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run itself does not notice: it is only slower."""

    def run(_: Path, path: Path, **__: object) -> None:
        path.mkdir()
        _Process.make(None, SimpleNamespace(number=0), None)  # type: ignore[arg-type]
        for _ in answers if path.stem == "processes" else ():
            device.pin(np.zeros(8, np.uint8), torch.device("cuda"))

    said = iter(answers)
    monkeypatch.setattr(store, "written_clip", lambda *_: tmp_path / "x.mp4")
    monkeypatch.setattr(store, "pin", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: next(said))
    monkeypatch.setattr(_Process, "make", lambda *_: None)
    monkeypatch.setattr(flowreel, "run", run)
    store._compare_processes(findings, Settings("cuda", False, str(tmp_path), str(tmp_path)))
    assert list(findings.verdicts.values()) == [True, answers == [True, True]]


def test_the_memory_check_ends_with_a_whole_shard_of_whole_batches() -> None:
    """Otherwise the engine would build a program for a shorter batch just when the last sample is taken."""
    width, height, frames = memory.LONG
    header = FlowInfo(height, width, None, frames, None, made_by={"batch": 8})  # type: ignore[arg-type]
    shard = header.shard_length(None)
    assert (frames - 1) % shard == 0
    assert (frames - 1) // shard >= 10
    assert shard % 8 == 0


def test_the_speed_of_a_run_is_that_of_its_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a run takes 3 s plus 0.01 s per flow, its speed is 100 flows per second; here in shards of 7."""
    asked: list[int] = []

    def run(_: Path, __: Path, stop: int, **___: object) -> SimpleNamespace:
        asked.append(stop - 1)
        return SimpleNamespace(seconds=3 + (stop - 1) / 100)

    monkeypatch.setattr(flowreel, "run", run)
    monkeypatch.setattr(flowreel, "open_store", lambda _: SimpleNamespace(shard_length=7))
    for name, long in (("x.zarr", [98, 98]), ("x.mp4", [98])):
        asked.clear()
        sample, _ = end_to_end._rate(end_to_end.Job(tmp_path, 4, 4, 100, {}), tmp_path / name, 1.0)
        assert sample.median == pytest.approx(100)
        assert asked[1:] == [7, 7, *long]


def test_x264s_threads_are_not_those_of_a_gpu_that_encodes(
    findings: Found, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, object]] = []  # for each run: without parts, and the encoder asked for

    def rate(*_: object, **options: object) -> tuple[None, SimpleNamespace]:
        asked.append((end_to_end.video_writer.ROWS_OF_A_THREAD == 0, options.get("encoder")))
        return None, SimpleNamespace(decoder="NVDEC", batch=8)

    monkeypatch.setattr(end_to_end, "job_of", lambda _: end_to_end.Job(tmp_path, 4, 4, 100, {}))
    monkeypatch.setattr(end_to_end, "_rate", rate)
    for unused in ("_alone", "_file", "_decoder_alone", "_require_memory"):
        monkeypatch.setattr(end_to_end, unused, lambda *_: None)
    end_to_end.run(findings, settings)
    assert findings["checks"] == []
    assert [encoder for by_threads, encoder in asked if by_threads] == ["cpu", "cpu"]


# --- kernels and peers ------------------------------------------------------------------------------------------------


def test_on_a_cpu_calls_are_timed_as_they_are() -> None:
    calls: list[int] = []
    action, count, how = kernel_times.repeated(lambda: calls.append(1), "cpu")
    action()
    assert (len(calls), count, how) == (3, 1, "calls")


def test_a_peer_beside_ours(findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "raft_and_ours", lambda *_: (lambda: sum(range(10**5)), lambda: sum(range(10**4))))
    peers._compare(findings, settings, "128x128", (128, 128), Effort(least=3, most=3))
    assert [row["peer"] for row in findings["rows"]] == [peers.RAFT, peers.OURS]
    assert f"{peers.RAFT} takes " in findings["headline"]


def test_only_the_kernels_of_a_fetched_source_are_compiled() -> None:
    source = (
        '#include "x.cuh"\n#include <ATen/ATen.h>\nusing at::Half;\n__global__ void correlation_forward() {}\n\n'
        "int correlation_forward_cuda_kernel(at::Tensor& output) {}\n"
    )
    text = kernels_of(source)
    assert "ATen" not in text
    assert "at::" not in text
    assert "__global__ void correlation_forward() {}" in text
    with pytest.raises(Skipped, match="not flownet2-pytorch's"):
        kernels_of("int main() {}")
