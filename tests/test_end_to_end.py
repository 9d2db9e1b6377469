"""Whole runs through the library: results equal those of the stages run without threads; failures leave no output."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

import flowreel
from flowreel.engine import api
from flowreel.engine.compiled import Program
from flowreel.engine.config import RunConfig
from flowreel.engine.data import FlowBatch
from flowreel.engine.describe import describe
from flowreel.engine.errors import (
    OutputExistsError,
    OutputWriteError,
    StageError,
    TooFewFramesError,
    TruncatedSourceError,
    UnknownOutputError,
    UsageError,
    WeightsMismatchError,
)
from flowreel.engine.inference import Inference, load_network
from flowreel.engine.outputs import Progress
from flowreel.engine.pairing import batches, pairs
from flowreel.engine.restore import restore
from flowreel.engine.sources import open_source
from flowreel.engine.stages import Stage, compose

SOURCE = "synthetic:objects?size=100x70&frames=9"


@pytest.fixture(scope="module")
def tiny(tiny_weights: str) -> str:
    return tiny_weights


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    ours = {t for t in threading.enumerate() if not t.name.startswith(("zarr", "asyncio"))}  # zarr never ends its own
    assert ours <= before


def composed(source: str, weights: str, **options: Any) -> list[FlowBatch]:
    """The result of the chain without threads: the reference for every run."""
    config = RunConfig.of(weights=weights, **options)
    frames = open_source(source, config.select)
    inference = load_network(config.model).fitted(frames.info.height, frames.info.width)
    shard = api.flow_header(frames.info, inference, config).shard_length(config.sink.shard_bytes)
    stages = [
        Stage("pairs", pairs),
        Stage("batches", batches(inference.batch, shard)),
        Stage("model", inference.stage),
        Stage("restore", restore(inference.fit)),
    ]
    return list(compose(frames, stages))


def test_all_that_a_run_needs_is_made_ready_before_its_clock_starts(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread builds the programs for all batch sizes; on a GPU, capturing their graphs takes seconds.

    The threads of the stages build none.
    """
    makers: list[threading.Thread] = []
    made = Inference._program

    def noted(self: Inference, batch: int) -> Program:
        if batch not in self.made.programs:
            makers.append(threading.current_thread())
        return made(self, batch)

    monkeypatch.setattr(Inference, "_program", noted)
    flowreel.run(SOURCE, tmp_path / "x.zarr", weights=tiny, batch=3)
    assert makers == [threading.main_thread()] * 2  # for 3 and for 2 pairs
    makers.clear()
    flows = flowreel.stream(SOURCE, weights=tiny, batch=3)
    assert len(makers) == 2
    list(flows)
    assert makers == [threading.main_thread()] * 2


def test_a_run_that_is_out_of_memory_loses_no_flow(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = Inference.of_fitted

    def for_one_pair(self: Inference, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if len(first) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return flow(self, first, second)

    options = {"weights": tiny, "device": "cpu", "max_error": 0.0}
    flowreel.run(SOURCE, tmp_path / "one.zarr", batch=1, **options)
    monkeypatch.setattr(Inference, "of_fitted", for_one_pair)
    report = flowreel.run(SOURCE, tmp_path / "four.zarr", batch=4, **options)
    assert report.pairs == 8
    assert [note for note in report.notes if "did not fit" in note][-1].endswith("1 from flow 0 on")
    one, four = (flowreel.open_store(tmp_path / f"{name}.zarr") for name in ("one", "four"))
    assert np.array_equal(one[:], four[:])
    assert four.complete


def test_stream_equals_the_plain_composition(tiny: str) -> None:
    expected = composed(SOURCE, tiny, batch=3)
    got = list(flowreel.stream(SOURCE, weights=tiny, batch=3))
    assert [len(batch) for batch in got] == [3, 3, 2]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.flow, b.flow)
        assert a.index == b.index
        for name in ("frame", "frame_to", "timestamp_s", "timestamp_to_s"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert torch.cat([batch.flow for batch in got]).std() > 0.1


def test_run_writes_what_stream_gives(tiny: str, tmp_path: Path) -> None:
    flows = torch.cat([batch.flow for batch in flowreel.stream(SOURCE, weights=tiny, batch=2)]).numpy()
    outputs = [tmp_path / "new" / "x.zarr", tmp_path / "x.mp4", tmp_path / "f" / "%04d.flo"]
    report = flowreel.run(SOURCE, outputs, weights=tiny, batch=2, max_error=0)
    store = flowreel.open_store(outputs[0])
    assert store.complete
    np.testing.assert_array_equal(store[:], flows)
    np.testing.assert_allclose(store.timestamps_s, np.arange(8) / 25)
    np.testing.assert_array_equal(store.frame_to, np.arange(1, 9))
    np.testing.assert_array_equal(flowreel.read_flo(tmp_path / "f" / "0003.flo"), flows[3].transpose(1, 2, 0))
    with av.open(str(outputs[1])) as video:
        assert sum(1 for _ in video.decode(video=0)) == 8
    assert (report.pairs, report.batch, report.precision, report.model) == (8, 2, "fp32", "FlowNet2S")
    assert report.kernels == {}  # that network uses none
    assert report.flo_bytes == 8 * (12 + 100 * 70 * 8)
    assert report.bytes_written == sum(output.bytes_written for output in report.outputs)
    names = [stage.name for stage in report.stages]
    assert names[:5] == ["decode", "pairs", "batches", "model", "restore"]
    assert report.stages[0].items == 9
    json.dumps(report.as_json())


def test_options_that_nothing_reads_are_noted(tiny: str, tmp_path: Path) -> None:
    note = "codec has no effect here: it is for X.zarr"
    options = {"weights": tiny, "codec": "zstd", "max_flow": 9.0}
    assert note in flowreel.run(SOURCE, tmp_path / "a.mp4", **options).notes
    assert note not in flowreel.run(SOURCE, [tmp_path / "b.zarr", tmp_path / "b.mp4"], **options).notes


def test_the_store_records_how_its_flow_was_made(tiny: str, tmp_path: Path) -> None:
    flowreel.run(SOURCE, tmp_path / "x.zarr", weights=tiny, stop=4, step=1)
    attributes = flowreel.open_store(tmp_path / "x.zarr").attrs
    assert attributes["model"] == "FlowNet2S"
    assert attributes["weights_licence"] == "none"
    assert len(attributes["weights_sha256"]) == 64
    assert attributes["precision"] == "fp32"
    assert attributes["fit"] == "pad"
    assert attributes["max_error"] == 1 / 64
    assert attributes["source"]["name"].startswith("synthetic:objects")


def test_xarray_sees_float_flow_with_its_coordinates(tiny: str, tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    flowreel.run(SOURCE, tmp_path / "x.zarr", weights=tiny)
    opened = xarray.open_zarr(tmp_path / "x.zarr", chunks=None)
    assert opened.flow.dims == ("time", "component", "y", "x")
    assert opened.flow.dtype.kind == "f"
    assert {"timestamp_s", "timestamp_to_s", "frame", "frame_to"} <= set(opened.flow.coords)
    np.testing.assert_allclose(opened.flow[2], flowreel.open_store(tmp_path / "x.zarr")[2], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({"stop": 4}, [0, 1, 2]),
        ({"start": 5}, [5, 6, 7]),
        ({"start": 1, "stop": 8, "step": 3}, [1, 4]),
        ({"start": "0.08s", "stop": "0.2s"}, [2, 3]),
    ],
)
def test_which_frames(options: dict[str, Any], frames: list[int], tiny: str) -> None:
    got = list(flowreel.stream(SOURCE, weights=tiny, **options))
    assert np.concatenate([batch.frame for batch in got]).tolist() == frames
    step = options.get("step", 1)
    assert np.concatenate([batch.frame_to for batch in got]).tolist() == [frame + step for frame in frames]


def test_backward_flow_goes_from_the_later_frame(tiny: str) -> None:
    forward = next(flowreel.stream(SOURCE, weights=tiny, batch=1))
    backward = next(flowreel.stream(SOURCE, weights=tiny, batch=1, direction="backward"))
    assert (backward.frame[0], backward.frame_to[0]) == (1, 0)
    assert not torch.equal(forward.flow, backward.flow)


@pytest.mark.parametrize(("fit", "size"), [("pad", (70, 100)), ("crop", (64, 64)), ("resize", (70, 100))])
def test_fit(fit: str, size: tuple[int, int], tiny: str, tmp_path: Path) -> None:
    report = flowreel.run(SOURCE, tmp_path / "x.zarr", weights=tiny, fit=fit, stop=3)
    assert flowreel.open_store(tmp_path / "x.zarr").shape == (2, 2, *size)
    assert (report.height, report.width) == size


def test_bf16_is_close_to_fp32(tiny: str) -> None:
    exact = torch.cat([batch.flow for batch in flowreel.stream(SOURCE, weights=tiny)])
    half = torch.cat([batch.flow for batch in flowreel.stream(SOURCE, weights=tiny, precision="bf16")])
    assert half.dtype == torch.float32
    assert not torch.equal(exact, half)
    assert (exact - half).abs().mean() < 0.05 * exact.abs().mean()


def test_flow_can_take_part_in_training(tiny: str) -> None:
    batch = next(flowreel.stream(SOURCE, weights=tiny))
    weight = torch.ones((), requires_grad=True)
    (batch.flow * weight).sum().backward()
    assert weight.grad is not None
    assert not torch.is_inference(batch.flow)


def test_a_batch_is_printed_without_its_values(tiny: str) -> None:
    first, *_ = flowreel.stream(SOURCE, weights=tiny, batch=4)
    assert repr(first) == "<FlowBatch (4, 2, 70, 100) float32 on cpu: frame 0 to 3, 0 to 0.12 s>"
    none = {name: getattr(first, name)[:0] for name in ("flow", "frame", "frame_to", "timestamp_s", "timestamp_to_s")}
    assert repr(FlowBatch(index=0, **none)) == "<FlowBatch (0, 2, 70, 100) float32 on cpu>"


def test_leaving_a_stream_early_stops_everything(tiny: str) -> None:
    for batch in flowreel.stream("synthetic:still?size=64x64&frames=100000", weights=tiny, batch=1):
        if batch.index == 2:
            break


def test_the_default_output_is_named_after_the_source(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = flowreel.run(SOURCE, weights=tiny, stop=3)
    assert report.outputs[0].path == "objects.flow.zarr"
    assert flowreel.open_store("objects.flow.zarr").complete
    flowreel.run(SOURCE, "{stem}-x.mp4", weights=tiny, stop=3)
    assert Path("objects-x.mp4").exists()


def test_an_output_that_is_there_is_kept(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "x.zarr"
    flowreel.run(SOURCE, path, weights=tiny, stop=3)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        flowreel.run(SOURCE, path, weights=tiny)
    assert len(flowreel.open_store(path)) == 2
    flowreel.run(SOURCE, path, weights=tiny, overwrite=True)
    assert len(flowreel.open_store(path)) == 8


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "FlowNet2"}, WeightsMismatchError),
        ({"model": "FlowNet3"}, UsageError),
        ({"precision": "fp16", "device": "cpu"}, UsageError),
        ({"device": "quantum"}, UsageError),
        ({"fit": "crop", "source": "synthetic:still?size=32x32"}, UsageError),
        ({"output": "x.gif"}, UnknownOutputError),
        ({"output": ["x.zarr", "x.zarr"]}, UsageError),
        ({"output": []}, UsageError),
        ({"stop": 1}, TooFewFramesError),
        ({"colour": 3}, UsageError),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    options: dict[str, Any], error: type[Exception], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, output = options.pop("source", SOURCE), options.pop("output", "x.zarr")
    with pytest.raises(error):
        flowreel.run(source, output, weights=tiny, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}, {"resolution": "native"}])
def test_a_stream_takes_no_options_of_outputs(options: dict[str, Any], tiny: str) -> None:
    with pytest.raises(UsageError, match=r"for runs|for flow stores"):
        flowreel.stream(SOURCE, weights=tiny, **options)


def test_cuda_is_never_silently_a_cpu(tiny: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(flowreel.errors.DeviceError, match="cuda"):
        flowreel.stream(SOURCE, weights=tiny, device="cuda")


class Broken(Exception):
    pass


@pytest.mark.parametrize("when", ["open", "write", "commit"])
def test_a_failing_output_leaves_nothing_half_written(
    when: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowreel.sinks.video import ColorVideoSink

    def fail(*_: object, **__: object) -> None:
        raise Broken("the disk is on fire")

    monkeypatch.setattr(ColorVideoSink, when, fail)
    outputs = [tmp_path / "x.mp4", tmp_path / "x.zarr"]
    with pytest.raises(Broken if when == "open" else StageError, match="on fire") as caught:
        flowreel.run(SOURCE, outputs, weights=tiny)
    assert when == "open" or isinstance(caught.value.__cause__, Broken)
    if when == "commit":  # the store is whole by then, and has its name first: the others can be made from it
        monkeypatch.undo()
        flowreel.run(SOURCE, outputs, weights=tiny, resume=True)
    assert [path.exists() for path in outputs] == [when == "commit"] * 2


def test_what_fails_only_as_an_output_is_finished_names_stage_and_frame(
    tiny: str, tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    """An output may write its last files only in ``commit``; an error there still names its stage and frame."""
    frames, store = "synthetic:objects?size=100x70&frames=3", tmp_path / "x.zarr"
    flowreel.run(frames, store, weights=tiny)
    for name in ("y.zarr", "y/%06d.flo"):
        output = str(tmp_path / name)
        with files_up_to(3000), pytest.raises(StageError) as caught:
            flowreel.run(frames, output, weights=tiny, max_error=0)
        assert (caught.value.stage, caught.value.frame) == (f"write {output}", 0)
        assert isinstance(caught.value.__cause__, OutputWriteError)
        with files_up_to(3000), pytest.raises(StageError) as caught:
            flowreel.export(store, output, max_error=0)
        assert (caught.value.stage, caught.value.frame) == (f"write {output}", 0)


def test_an_output_below_a_file_is_named(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError, match="file"):
        flowreel.run(SOURCE, tmp_path / "file" / "x.zarr", weights=tiny)


def test_an_interrupt_stops_everything_and_finishes_nothing(tiny: str, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stages[0].items:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        flowreel.run("synthetic:still?size=64x64&frames=100000", tmp_path / "x.zarr", weights=tiny, progress=interrupt)
    assert not (tmp_path / "x.zarr").exists()


def clip(path: Path, frames: int = 20, size: tuple[int, int] = (128, 96)) -> Path:
    """An MPEG-4 video with motion; as .mkv it can be cut anywhere and still be read up to there."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 255, (size[1] // 8 + 8, size[0] // 8 + 8, 3)), np.ones((8, 8, 1))).astype(
        np.uint8
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            picture = np.ascontiguousarray(texture[i : i + size[1], 2 * i : 2 * i + size[0]])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_cut_video_stays_unfinished_unless_told_otherwise(tiny: str, tmp_path: Path) -> None:
    whole = clip(tmp_path / "whole.mkv")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    outputs = [tmp_path / "x.zarr", tmp_path / "x.mp4"]
    with pytest.raises(TruncatedSourceError, match="--tolerate-truncation"):
        flowreel.run(cut, outputs, weights=tiny)
    assert not any(path.exists() for path in outputs)
    unfinished = flowreel.open_store(outputs[0])
    assert not unfinished.complete
    assert unfinished.available > 0
    report = flowreel.run(cut, outputs, weights=tiny, tolerate_truncation=True, overwrite=True)
    store = flowreel.open_store(outputs[0])
    assert store.complete
    assert store.attrs["source_losses"][0] in " ".join(report.notes)
    assert list(store.check()) == []
    assert describe(str(outputs[0]))["notes"] == [
        f"what its source did not give was let pass: {loss}" for loss in store.attrs["source_losses"]
    ]
    assert flowreel.verify(outputs[0]).sound
    shard = outputs[0] / "flow/c/0/0/0/0"
    made = shard.read_bytes()
    shard.write_bytes(b"damaged!" + made[8:])
    assert flowreel.repair(outputs[0], cut, weights=tiny).after.sound  # needs no tolerate_truncation
    assert shard.read_bytes() == made
    flowreel.run(whole, outputs[0], weights=tiny, overwrite=True)
    assert "source_losses" not in flowreel.open_store(outputs[0]).attrs
    assert 0 < report.pairs < 19
    assert any("cut" in note or "decoded" in note for note in report.notes)


def test_a_cut_video_ends_a_stream_with_an_error(tiny: str, tmp_path: Path) -> None:
    whole = clip(tmp_path / "whole.mkv")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    flows = flowreel.stream(cut, weights=tiny, batch=1)
    assert next(flows).index == 0
    with pytest.raises(TruncatedSourceError):
        list(flows)


def test_a_size_that_changes_is_not_told_to_resume(tiny: str, tmp_path: Path) -> None:
    """The error suggests ``--stop``, not ``--resume``, which would only fail at the same frame again."""
    parts = []
    for number, width in enumerate((64, 128)):
        with av.open(str(tmp_path / f"{number}.ts"), "w") as container:
            stream: Any = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p"
            for _ in range(60):  # more than the channels hold, so some flows are written before the error
                container.mux(stream.encode(av.VideoFrame(width, 64, "yuv420p")))
            container.mux(stream.encode())
        parts.append((tmp_path / f"{number}.ts").read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with pytest.raises(flowreel.errors.StageError, match=r"frame 60: .*--stop 60") as caught:
        flowreel.run(tmp_path / "both.ts", tmp_path / "x.zarr", weights=tiny, batch=1, shard_bytes=8 * 64 * 64)
    notes = getattr(caught.value, "__notes__", [])
    assert any("x.zarr.partial holds" in note for note in notes)
    assert not any("--resume" in note for note in notes)


def test_memory_in_the_queues_stays_in_its_bound(tiny: str) -> None:
    """A network slower than its source holds the source back: the budget is exceeded by at most an item per channel."""
    config = RunConfig.of(weights=tiny, batch=2, queue_mb=0.1)
    frames = open_source("synthetic:still?size=64x64&frames=120", config.select)  # 1.5 MB, were they all queued
    inference = load_network(config.model).fitted(64, 64)
    steps = api.stages(inference, "forward", batches(2, shard=8), to_host=True)
    queues = replace(config.queues, items=1000)  # so that only the bound in bytes holds anything back
    pipeline = api.Chain(frames, steps, queues, inference.device)
    pipeline.run({"end": lambda flows: [len(batch) for batch in flows]})
    largest = 2 * 2 * 64 * 64 * 4
    assert pipeline.peak_bytes <= (0.1 * (1 << 20)) + largest * len(pipeline.statistics())
