"""Export of stored flow to other outputs: no needless loss, and a failure leaves nothing that looks finished."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from flowreel.engine import export as exporting
from flowreel.engine.cli import call
from flowreel.engine.config import SinkConfig
from flowreel.engine.data import UNKNOWN, FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import (
    FlowFileError,
    FrameSizeError,
    OutputExistsError,
    SourceNotFoundError,
    StageError,
    UnknownOutputError,
    UsageError,
)
from flowreel.engine.export import export
from flowreel.sinks import open_sink, open_store, read_flo, reading

HEIGHT, WIDTH = 6, 8


def put_flo(path: Path, flow: np.ndarray) -> np.ndarray:
    """Writes a ``.flo`` without waiting for the disk. flow: (H, W, 2) float32."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(struct.pack("<f2i", 202021.25, flow.shape[1], flow.shape[0]) + flow.tobytes())
    return flow


def some_flow(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(height, width, 2)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``flows`` in the working folder: 1.flo to 10.flo, seeds 1 to 10."""
    monkeypatch.chdir(tmp_path)
    for number in range(1, 11):
        put_flo(Path("flows") / f"{number}.flo", some_flow(number))
    return Path("flows")


def write_store(path: str, flows: np.ndarray, **options: object) -> None:
    """flows: (N, 2, H, W); flow k goes from frame 3k to 3k+3 at k seconds."""
    sink = open_sink(path, SinkConfig(**options))  # type: ignore[arg-type]
    height, width = flows.shape[2:]
    made_by = {"model": "FlowNet2C", "weights_sha256": "1234"}
    sink.open(FlowInfo(height, width, Fraction(1), None, SourceId("dance.mp4", 99, 7.0), made_by))
    times_s, frame = np.arange(len(flows), dtype=float), 3 * np.arange(len(flows))
    sink.write(FlowBatch(torch.from_numpy(flows), 0, frame, frame + 3, times_s, times_s + 1))
    sink.commit()


def names(folder: Path | str = ".") -> list[str]:
    return sorted(file.name for file in Path(folder).iterdir())


def test_flo_to_store_and_back_to_the_bit(folder: Path) -> None:
    flow = some_flow(3)
    flow[0, 0], flow[1, 2] = (1.6666668e9, 1.6666668e9), (2e9, 0)
    put_flo(folder / "3.flo", flow)
    report = export(folder, "a.zarr", max_error=0, frame_rate="30000/1001")
    store = open_store("a.zarr")
    assert store.complete
    assert store.shape == (10, 2, HEIGHT, WIDTH)
    assert list(store.frame) == list(range(10))
    assert store.timestamps_s == pytest.approx(np.arange(10) * 1001 / 30000)
    assert store.attrs["frame_rate"] == "30000/1001"
    assert (report.flows, report.width, report.height) == (10, WIDTH, HEIGHT)
    assert report.flo_bytes == 10 * (12 + 8 * HEIGHT * WIDTH)
    assert report.bytes_written == report.outputs[0].bytes_written > 0
    export("a.zarr", "back/%06d.flo")
    assert names("back") == [f"{number:06d}.flo" for number in range(10)]
    for number in range(10):
        assert (Path("back") / f"{number:06d}.flo").read_bytes() == (folder / f"{number + 1}.flo").read_bytes()


@pytest.mark.parametrize("options", [{"codec": "pcodec"}, {"max_error": 1 / 4, "codec": "zstd"}, {"max_error": 0}])
def test_store_to_store_keeps_how_the_flow_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    flows = np.stack([some_flow(seed).transpose(2, 0, 1) for seed in range(4)])
    write_store("a.zarr", flows)
    report = export("a.zarr", ["b.zarr"], **options)
    before, after = open_store("a.zarr"), open_store("b.zarr")
    for name in ("model", "weights_sha256", "source", "frame_rate"):
        assert after.attrs[name] == before.attrs[name]
    assert after.attrs["codec"] == options.get("codec", "blosc")
    assert after.attrs["max_error"] == options.get("max_error", 1 / 64)
    assert after.attrs["earlier_max_error"] == 1 / 64
    assert np.array_equal(after.frame_to, before.frame_to)
    assert np.array_equal(after.timestamps_to_s, before.timestamps_to_s)
    assert np.abs(after[:] - before[:]).max() <= after.attrs["max_error"]
    if "max_error" not in options:  # rounded to the same steps: a second rounding changes nothing
        assert np.array_equal(after[:], before[:])
    assert any("within 0.015625 px" in note for note in report.notes)


def test_a_slice_into_several_outputs(folder: Path) -> None:
    export(folder, "a.zarr", max_error=0)
    report = export("a.zarr@2:9", ["{stem}-part.zarr", "{stem}/%d.flo", "{stem}/%d.npz"], start=1, stop=-1, max_error=0)
    assert [output.path for output in report.outputs] == ["a-part.zarr", "a/%d.flo", "a/%d.npz"]
    assert list(open_store("a-part.zarr").frame) == [3, 4, 5, 6, 7]
    for number in range(5):
        assert np.array_equal(read_flo(f"a/{number}.flo"), some_flow(number + 4))
        assert np.array_equal(open_store("a-part.zarr")[number].transpose(1, 2, 0), some_flow(number + 4))
    assert report.notes == ()


def test_dots_are_no_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "in").mkdir()
    monkeypatch.chdir(folder / "in")
    named = str(tmp_path / "{stem}.zarr")
    assert export("..", named).outputs[0].path == str(tmp_path / f"{folder.name}.zarr")
    monkeypatch.chdir(tmp_path / f"{folder.name}.zarr" / "flow")
    assert export("..", str(tmp_path / "{stem}-again.zarr")).outputs[0].path == str(
        tmp_path / f"{folder.name}-again.zarr"
    )


def test_options_that_no_output_reads_are_noted(folder: Path) -> None:
    bound = "bound has no effect here: it is for DIR/flow_x_%05d.jpg, DIR/flow_x_%05d.png"
    assert bound not in export(folder, "a.zarr", bound=9).notes  # the option also serves the reading of picture folders
    notes = export("a.zarr", "b/%d.flo", bound=9, codec="zstd", frame_rate=30).notes
    assert bound in notes
    assert "what is read keeps its own times: the frame rate that was given does not apply" in notes
    assert "codec has no effect here: it is for X.zarr" in notes
    assert bound not in export("a.zarr", "c/flow_x_%d.png", bound=9).notes
    export("c", "c.zarr", bound=9)
    assert np.allclose(open_store("c.zarr")[:], open_store("a.zarr")[:], atol=9 / 255 + 1 / 64)


def test_unknown_vectors_are_nan_in_stores_and_beyond_1e9_in_flo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flows = np.stack([some_flow(seed).transpose(2, 0, 1) for seed in range(2)])
    flows[1, 0, 2, 3], flows[1, 1, 4, 4] = np.nan, np.inf
    write_store("a.zarr", flows, max_error=0)
    write_store("lossy.zarr", flows)
    export("a.zarr", ["f/%d.flo", "b.zarr", "n/%d.npz"], max_error=0)
    export("lossy.zarr", "g/%d.flo")
    unknown = np.zeros((HEIGHT, WIDTH), bool)
    unknown[2, 3] = unknown[4, 4] = True
    for place in ("f", "g"):
        flow = read_flo(f"{place}/1.flo")
        assert (flow[unknown] == UNKNOWN).all()
        assert np.abs(flow[~unknown]).max() < 10
        assert np.abs(read_flo(f"{place}/0.flo")).max() < 10
    assert np.array_equal(open_store("b.zarr")[:], flows, equal_nan=True)  # unchanged by writing .flo


def test_it_equals_reading_and_writing_by_hand(folder: Path) -> None:
    export(folder, ["a.zarr", "a/%d.kitti.png"])
    sinks = [open_sink(path, SinkConfig()) for path in ("b.zarr", "b/%d.kitti.png")]
    flows = reading.open_flows(folder)
    for sink in sinks:
        sink.open(flows.info)
    for batch in flows:
        for sink in sinks:
            sink.write(batch)
    for sink in sinks:
        sink.commit()
    for kind in ("{}.zarr", "{}"):
        exported, by_hand = (
            {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            for folder in (Path(kind.format("a")), Path(kind.format("b")))
        )
        assert exported == by_hand != {}


def test_an_unfinished_store_is_taken_as_far_as_it_goes(folder: Path) -> None:
    export(folder, "a.zarr", max_error=0, shard_bytes=4 * 8 * HEIGHT * WIDTH)
    Path("a.zarr").rename("a.zarr.partial")
    Path("a.zarr.partial/flow/c/2/0/0/0").unlink()
    report = export("a.zarr", "b.zarr")
    assert len(open_store("b.zarr")) == 8
    assert "unfinished: 8 of 10" in report.notes[0]
    with pytest.raises(UsageError, match=r"a\.zarr would replace what is being read"):
        export("a.zarr", "a.zarr", overwrite=True)
    assert len(open_store("a.zarr")) == 10


def test_a_cut_source_leaves_a_store_that_says_why_it_is_unfinished(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(folder, "a.zarr", max_error=0)
    Path("a.zarr").rename("a.zarr.partial")
    said = "a.zarr.partial is unfinished: 10 flows so far; its source or its run was cut short, or it is being written"
    assert said in export("a.zarr", "b.zarr").notes[0]
    assert call(["info", "a.zarr"]) == 0
    assert said in capsys.readouterr().out
    assert call(["verify", "a.zarr"]) == 1
    assert "unfinished: 10 flows so far; its source or its run" in capsys.readouterr().out


def test_a_finished_store_may_be_replaced_by_its_own_export(folder: Path) -> None:
    export(folder, "a.zarr", max_error=0)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        export("a.zarr", "a.zarr", codec="pcodec", max_error=0)
    flows = open_store("a.zarr")[:]
    export("a.zarr", "a.zarr", codec="pcodec", max_error=0, overwrite=True)
    assert open_store("a.zarr").attrs["codec"] == "pcodec"
    assert np.array_equal(open_store("a.zarr")[:], flows)
    assert names() == ["a.zarr", "flows"]


@pytest.mark.parametrize(
    ("source", "part"),
    [("a.zarr@2:4", {}), ("a.zarr@3", {}), ("a.zarr", {"start": 1}), ("a.zarr", {"stop": -1}), ("./a.zarr@:9", {})],
)
def test_a_part_does_not_take_the_place_of_the_whole(folder: Path, source: str, part: dict[str, int]) -> None:
    export(folder, "a.zarr", max_error=0)
    with pytest.raises(UsageError, match=r"a\.zarr would replace what is being read"):
        export(source, "a.zarr", overwrite=True, **part)
    assert len(open_store("a.zarr")) == 10
    export(source, "b.zarr", **part)
    export("a.zarr@0:10", "a.zarr", overwrite=True)  # all of it
    assert len(open_store("a.zarr")) == 10


@pytest.mark.parametrize(
    ("source", "outputs", "options", "error", "words"),
    [
        ("none", "a.zarr", {}, SourceNotFoundError, "none"),
        ("flows", "a.gif", {}, UnknownOutputError, ".zarr"),
        ("flows", [], {}, UsageError, "at least one output"),
        ("flows", ["a.zarr", "./a.zarr"], {}, UsageError, "given twice"),
        ("flows", ["a.zarr", "a.zarr.partial/%d.flo"], {}, UsageError, "inside a.zarr.partial, the unfinished a.zarr"),
        ("flows", ["a.mp4.partial/b.zarr", "a.mp4"], {}, UsageError, "inside a.mp4.partial, the unfinished a.mp4"),
        ("flows", "a.zarr", {"model": "FlowNet2"}, UsageError, "unknown option model"),
        ("flows", "a.zarr", {"resume": True}, UsageError, "unknown option resume"),
        ("flows", "a.zarr", {"codec": "rar"}, UsageError, "codec"),
        ("flows", "a.zarr", {"max_error": -1}, UsageError, "max-error"),
        ("flows", "a.zarr", {"queue_mb": 0}, UsageError, "queue-mb"),
        ("flows", "a.zarr", {"frame_rate": 0}, UsageError, "frame-rate"),
        ("flows", "a.zarr", {"start": 10}, UsageError, "10"),
        ("flows", "flows/%06d.flo", {"overwrite": True}, UsageError, "would replace"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    folder: Path, source: str, outputs: object, options: dict[str, object], error: type[Exception], words: str
) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(error, match=words):
        export(source, outputs, **options)  # type: ignore[arg-type]
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("fault", ["size", "damage"])
def test_a_failure_on_the_way_leaves_nothing_finished(folder: Path, fault: str) -> None:
    if fault == "size":
        put_flo(folder / "9.flo", some_flow(0, 3, 5))
    else:
        (folder / "9.flo").write_bytes(b"PIEH")
    with pytest.raises(StageError, match=r"9\.flo") as caught:
        export(folder, ["a.zarr", "a.mkv"])
    assert isinstance(caught.value.__cause__, FrameSizeError if fault == "size" else FlowFileError)
    assert names() == ["flows"]


def test_a_sink_that_fails_aborts_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: str, config: SinkConfig) -> object:
        sink = open_sink(path, config)
        if path.endswith(".mkv"):
            monkeypatch.setattr(sink, "write", lambda batch: 1 / 0)
        return sink

    monkeypatch.setattr(exporting, "open_sink", failing)
    with pytest.raises(StageError, match=r"write a\.mkv") as caught:
        export(folder, ["a.zarr", "a.mkv"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert names() == ["flows"]


def test_reading_waits_for_a_slow_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a few flows are in memory at a time, however slow the output."""
    given = taken = most = 0
    real = reading.FileFlows.__iter__

    def one_by_one(self: reading.FileFlows) -> Iterator[FlowBatch]:
        nonlocal given
        for batch in real(self):
            given += len(batch)
            yield batch

    class Slow:
        path, notes, bytes_written = "slow.zarr", (), 0

        def open(self, info: FlowInfo) -> None: ...
        def commit(self, complete: bool = True) -> None: ...
        def abort(self) -> None: ...
        def write(self, batch: FlowBatch) -> None:
            nonlocal taken, most
            while given - taken < min(3, 10 - taken):  # until the reader is as far ahead as it should get
                time.sleep(0.001)
            most = max(most, given - taken)
            taken += len(batch)

    monkeypatch.setattr(reading.FileFlows, "__iter__", one_by_one)
    monkeypatch.setattr("flowreel.sinks.flow_readers.BATCH_FLOWS", 1)
    monkeypatch.setattr(exporting, "open_sink", lambda path, config: Slow())
    report = export(folder, "slow.zarr", queue_mb=1e-5)
    assert (given, taken, report.flows) == (10, 10, 10)
    assert most <= 3  # one being written, one in the channel, one held by the reader


def test_progress_and_statistics(folder: Path) -> None:
    told: list[exporting.Progress] = []
    report = export(folder, "a.zarr", progress=told.append)
    assert (told[-1].flows_done, told[-1].flow_count) == (10, 10)
    assert [stage.name for stage in report.stages] == ["read", "write a.zarr"]
    stats = json.loads(json.dumps(report.as_json()))
    assert stats["flows"] == 10
    assert stats["flows_per_s"] == pytest.approx(10 / stats["seconds"])
    for name in ("bytes_written", "flo_bytes", "source"):
        assert name in stats
