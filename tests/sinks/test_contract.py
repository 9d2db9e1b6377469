"""The contract of every output, whatever its format (see ``Sink``); all of it runs for each line of the table."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import OutputExistsError, OutputWriteError
from flowreel.engine.outputs import is_finished
from flowreel.engine.protocols import OneFileAFlow, Resumable, Sink
from flowreel.sinks import open_sink
from flowreel.sinks.registry import OUTPUTS, Output
from tests.fakes.disk import Disk
from tests.sinks.waiting import Encoders

COUNT = 5
INFO = FlowInfo(16, 32, Fraction(25), COUNT + 1, SourceId("clip.mp4"))


@pytest.fixture(params=OUTPUTS, ids=lambda output: output.form)
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    output: Output = request.param
    return str(tmp_path / "new" / output.form)


def opened(name: str, **changes: Any) -> Sink:
    sink = open_sink(name, SinkConfig(**changes))
    sink.open(INFO)
    return sink


def written(sink: Sink, count: int = COUNT) -> Sink:
    for first in range(0, count, 2):
        frame = np.arange(first, min(first + 2, count))
        flow = torch.from_numpy(frame).float()[:, None, None, None].expand(-1, 2, 16, 32)
        sink.write(FlowBatch(flow, first, frame, frame + 1, frame / 25, (frame + 1) / 25))
    return sink


def unfinished(name: str) -> bool:
    """Whether nothing on the disk looks like a finished output."""
    sink = open_sink(name, SinkConfig())
    there = [path for path in Path(name).parent.rglob("*") if path.is_file()]
    partial = [path for path in there if any(part.endswith(".partial") for part in path.parts)]
    return not any(is_finished(sink, count) for count in range(1, COUNT + 1)) and partial == there


def test_an_output_is_there_when_it_is_committed_and_not_before(name: str, encoders: Encoders) -> None:
    sink = written(opened(name))
    assert unfinished(name)
    sink.commit()
    assert encoders() == []
    assert sink.abort() is None  # as where another output of the run fails to end
    assert is_finished(open_sink(name, SinkConfig()), COUNT)
    size = sum(path.stat().st_size for path in Path(name).parent.rglob("*") if path.is_file())
    assert sink.bytes_written == size > 0
    assert sink.path == name
    assert not list(Path(name).parent.rglob("*.partial"))


def test_what_is_aborted_never_looks_finished(name: str, encoders: Encoders) -> None:
    kept = written(opened(name)).abort()
    assert unfinished(name)
    assert encoders() == []
    there = [path for path in Path(name).parent.rglob("*") if path.is_file()]
    assert (kept is None) == (not there)  # ``abort`` reports what it keeps


def test_what_is_cut_is_kept_under_an_unfinished_name(name: str) -> None:
    written(opened(name), 3).commit(complete=False)
    assert unfinished(name)
    assert list(Path(name).parent.rglob("*.partial"))


def test_what_is_cut_before_its_first_flow_never_looks_finished(name: str) -> None:
    sink = opened(name)
    with suppress(OutputWriteError):  # a video needs at least one frame
        sink.commit(complete=False)
    sink.abort()
    assert unfinished(name)


def test_what_is_there_is_replaced_when_told_to_and_only_by_a_whole(name: str) -> None:
    written(opened(name)).commit()
    before = {path: path.read_bytes() for path in Path(name).parent.rglob("*") if path.is_file()}
    with pytest.raises(OutputExistsError):
        opened(name)
    written(opened(name, overwrite=True), 2).abort()
    assert {path: path.read_bytes() for path in before} == before
    written(opened(name, overwrite=True)).commit()
    assert is_finished(open_sink(name, SinkConfig()), COUNT)


def test_a_power_cut_takes_nothing_that_was_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    for overwrite in (False, True):
        written(opened(name, overwrite=overwrite, shard_bytes=2 * INFO.flow_bytes)).commit()
        assert not disk.waiting


def test_a_file_in_the_way_of_its_folder_is_told_of(name: str) -> None:
    Path(name).parents[name.count("DIR")].parent.mkdir(exist_ok=True)
    (Path(name).parents[name.count("DIR")]).touch()
    with pytest.raises((OutputWriteError, OutputExistsError)):
        opened(name)


def test_kinds_of_outputs_are_told_apart(name: str) -> None:
    sink = open_sink(name, SinkConfig())
    assert isinstance(sink, Resumable) == name.endswith(".zarr")
    assert isinstance(sink, OneFileAFlow) == ("%" in name)
