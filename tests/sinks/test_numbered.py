"""The contract of every output that writes one file per flow; all of it runs for each such line of the table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine import publish
from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import (
    OutputBusyError,
    OutputExistsError,
    OutputWriteError,
    StageError,
    UnknownOutputError,
    counted,
)
from flowreel.engine.pipeline import Pipeline
from flowreel.sinks import numbered, open_sink
from flowreel.sinks.numbered import NumberedFilesSink, NumberedName
from flowreel.sinks.registry import OUTPUTS, Output
from tests.sinks.waiting import Encoders

HEIGHT, WIDTH = 19, 23
INFO = FlowInfo(HEIGHT, WIDTH, frame_rate=None, frame_count=None, source=SourceId("test"))
COUNT = 7
WORKERS = (0, 1, 4)

Limit = Callable[[int], AbstractContextManager[None]]  # the fixture files_up_to


@pytest.fixture(autouse=True)
def _nobody_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files are written here, so syncing is skipped; ``test_publish.py`` tests that it happens."""
    monkeypatch.setattr(publish, "sync_file", lambda path: None)


@pytest.fixture(params=[output for output in OUTPUTS if "%" in output.form], ids=lambda output: output.form)
def output(request: pytest.FixtureRequest) -> Output:
    found: Output = request.param
    return found


@pytest.fixture(params=WORKERS, ids=lambda workers: f"{workers} workers")
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(numbered, "file_workers", lambda *_: request.param)
    return int(request.param)


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbered, "file_workers", lambda *_: 3)


def some_flows(count: int = COUNT, unknown: bool = False) -> torch.Tensor:
    """(N, 2, H, W), all flows different."""
    flows = torch.from_numpy(np.random.default_rng(5).normal(0, 8, (count, 2, HEIGHT, WIDTH)).astype(np.float32))
    if unknown:
        flows[:, 0, 0, 0] = torch.nan
        flows[:, 1, 1, 1] = torch.inf
        flows[:, :, 2, 2] = 1.6666668e9
    return flows


def batch_of(flows: torch.Tensor, index: int = 0, frame: int | None = None) -> FlowBatch:
    frames = np.arange(len(flows)) + (index if frame is None else frame)
    return FlowBatch(flows, index, frames, frames + 1, frames / 25, (frames + 1) / 25)


def sink_for(output: Output, folder: Path, **options: Any) -> NumberedFilesSink:
    sink = open_sink(output.form.replace("DIR", str(folder)), SinkConfig(**options))
    assert isinstance(sink, NumberedFilesSink)
    return sink


def written(output: Output, folder: Path, flows: torch.Tensor, sizes: Sequence[int] = (COUNT,)) -> NumberedFilesSink:
    sink = sink_for(output, folder)
    sink.open(INFO)
    index = 0
    for size in sizes:
        sink.write(batch_of(flows[index : index + size], index))
        index += size
    sink.commit()
    return sink


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def files_a_flow(output: Output) -> int:
    return len(sink_for(output, Path("anywhere"))._names)


@pytest.mark.parametrize("sizes", [(COUNT,), (1,) * COUNT, (3, 1, 3)], ids=str)
def test_each_flow_gets_its_own_file_whatever_the_batches_and_workers(
    tmp_path: Path, output: Output, workers: int, sizes: tuple[int, ...], encoders: Encoders
) -> None:
    flows = some_flows(unknown=True)
    sink = written(output, tmp_path / "all", flows, sizes)
    assert encoders() == []
    made = contents(tmp_path / "all")
    numbers = sorted(made)
    assert len(made) == COUNT * files_a_flow(output)
    assert sink.bytes_written == sum(map(len, made.values()))
    for number in range(COUNT):  # each flow written alone gives the same file
        alone = sink_for(output, tmp_path / str(number))
        alone.open(INFO)
        alone.write(batch_of(flows[number : number + 1], index=0, frame=number))
        alone.commit()
        assert list(contents(tmp_path / str(number)).values()) == [made[name] for name in numbers[number::COUNT]]
    assert len(set(made.values())) == len(made)


def test_names_follow_the_pattern_and_the_place_in_the_output(tmp_path: Path, output: Output) -> None:
    sink = sink_for(output, tmp_path / "100%dance")  # a percent sign in a folder's name has no meaning
    sink.open(INFO)
    sink.write(batch_of(some_flows(2), index=12))
    sink.commit()
    first = Path(output.form % 12).name
    assert first in contents(tmp_path / "100%dance")
    assert len(contents(tmp_path / "100%dance")) == 2 * files_a_flow(output)


@pytest.mark.usefixtures("several")
def test_what_is_there_is_kept_unless_asked(tmp_path: Path, output: Output) -> None:
    written(output, tmp_path, some_flows())
    before = contents(tmp_path)
    with pytest.raises(
        OutputExistsError, match=rf"{counted(COUNT * files_a_flow(output), 'file')} such as .*--overwrite"
    ):
        sink_for(output, tmp_path).open(INFO)
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("several")
def test_overwriting_replaces_and_removes_what_a_longer_run_left(tmp_path: Path, output: Output) -> None:
    written(output, tmp_path, some_flows())
    (tmp_path / "notes.txt").write_text("not of this pattern")
    (tmp_path / (Path(output.form % 6).name + ".partial")).write_text("of a run that was killed")
    old = set(contents(tmp_path))
    flows = -some_flows(2)
    sink = sink_for(output, tmp_path, overwrite=True)
    sink.open(INFO)
    sink.write(batch_of(flows))
    assert old - set(contents(tmp_path)) == set()  # nothing is removed until the new run is complete
    sink.commit()
    written(output, tmp_path / "fresh", flows, (2,))
    assert contents(tmp_path / "fresh") | {"notes.txt": b"not of this pattern"} == {
        file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()
    }
    assert any(f"removed {5 * files_a_flow(output) + 1} files" in note for note in sink.notes)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("complete", [None, False])
def test_an_unfinished_run_looks_unfinished_and_says_what_it_kept(
    tmp_path: Path, output: Output, there: bool, complete: bool | None, workers: int, encoders: Encoders
) -> None:
    """What an earlier run finished stays unchanged. ``complete`` None: the new run is aborted instead of committed."""
    folder = tmp_path / "out"
    if there:
        written(output, folder, some_flows())
    before = contents(folder) if there else {}
    sink = sink_for(output, folder, overwrite=there)
    sink.open(INFO)
    flows = -some_flows(3)
    sink.write(batch_of(flows))
    assert not {name for name in contents(folder) if not name.endswith(".partial")} - set(before)
    kept = sink.abort() if complete is None else None
    if complete is False:
        sink.commit(complete=False)
        kept = sink.notes[0]
    assert encoders() == []
    written(output, tmp_path / "whole", flows, (3,))
    whole, after = contents(tmp_path / "whole"), contents(folder)
    assert {name: after.pop(name) for name in before} == before
    assert {name.removesuffix(".partial"): data for name, data in after.items()}.items() <= whole.items()
    assert all(name.endswith(".partial") and name[0] != "." for name in after)
    if complete is False or not workers:
        assert len(after) == len(whole)
    if after:
        assert kept is not None
        assert f"keeps {counted(len(after), 'whole file')} such as {Path(output.form % 0).name}.partial" in kept
    assert not sink_for(output, folder).holds(3)
    assert sink_for(output, folder).holds(COUNT) == there
    again = sink_for(output, folder, overwrite=there)  # leftovers of an unfinished run do not hinder the next one
    again.open(INFO)
    again.write(batch_of(flows))
    again.commit()
    assert contents(folder) == whole


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("kind", ["unlink", "replace"])
def test_stopped_while_names_are_given(
    tmp_path: Path, output: Output, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When stopped at any step, finished names belong to one run only, and no flow of the new run is lost."""
    old, new = some_flows(), -some_flows(4)
    written(output, tmp_path / "old", old)
    written(output, tmp_path / "new", new, (4,))
    before, after = contents(tmp_path / "old"), contents(tmp_path / "new")
    steps = COUNT * files_a_flow(output) if kind == "unlink" else 4 * files_a_flow(output)
    for step in range(0, steps, 3):
        folder = tmp_path / str(step)
        written(output, folder, old)
        sink = sink_for(output, folder, overwrite=True)
        sink.open(INFO)
        sink.write(batch_of(new))
        calls = [0]
        place: Any = Path if kind == "unlink" else os
        real = getattr(place, kind)

        def stopped(*args: Any, real: Any = real, calls: list[int] = calls, step: int = step, **named: Any) -> Any:
            if calls[0] == step:
                raise KeyboardInterrupt
            calls[0] += 1
            return real(*args, **named)

        sink._pool.drain()
        with monkeypatch.context() as patched:
            patched.setattr(place, kind, stopped)
            with pytest.raises(KeyboardInterrupt):
                sink.commit()
        sink.abort()
        found = contents(folder)
        finished = {name: data for name, data in found.items() if not name.endswith(".partial")}
        assert finished.items() <= before.items() or finished.items() <= after.items()
        assert {name.removesuffix(".partial"): found[name] for name in found if name not in before}.items() <= (
            after.items()
        )
        assert {name.removesuffix(".partial") for name in found} >= set(after)
        assert not sink_for(output, folder).holds(4)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_run_on_the_same_files_is_refused(tmp_path: Path, output: Output, overwrite: bool) -> None:
    lock = tmp_path / f".{Path(output.form).name}.partial"
    lock.touch()  # left by a run that was killed
    first = sink_for(output, tmp_path, overwrite=overwrite)
    first.open(INFO)
    with pytest.raises(OutputBusyError, match="is being written by another run"):
        sink_for(output, tmp_path, overwrite=True).open(INFO)
    first.write(batch_of(some_flows(2)))
    first.commit()
    assert not lock.exists()
    assert first.holds(2)


@pytest.mark.parametrize("unfinished", ["", ".partial"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_the_way_is_found_before_the_work(
    tmp_path: Path, output: Output, overwrite: bool, unfinished: str
) -> None:
    place = tmp_path / (Path(output.form % 3).name + unfinished)
    place.mkdir()
    with pytest.raises(OutputExistsError, match=rf"{place.name} is a folder"):
        sink_for(output, tmp_path, overwrite=overwrite).open(INFO)
    assert os.listdir(tmp_path) == [place.name]


def test_files_that_came_up_during_the_run_are_not_replaced(tmp_path: Path, output: Output) -> None:
    sink = sink_for(output, tmp_path)
    sink.open(INFO)
    sink.write(batch_of(some_flows(2)))
    mine = tmp_path / Path(output.form % 1).name
    mine.write_text("mine")
    with pytest.raises(OutputExistsError, match=mine.name):
        sink.commit()
    assert f" {2 * files_a_flow(output)} whole files" in str(sink.abort())
    assert mine.read_text() == "mine"


def test_a_new_sink_that_is_aborted_leaves_an_empty_folder(tmp_path: Path, output: Output) -> None:
    sink = sink_for(output, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    sink.open(INFO)
    sink.abort()
    assert contents(tmp_path / "new") == {}
    assert (sink.bytes_written, sink.notes) == (0, [])


def test_an_error_while_encoding_comes_out_and_later_flows_do_not(
    tmp_path: Path, output: Output, workers: int, monkeypatch: pytest.MonkeyPatch, encoders: Encoders
) -> None:
    sink = sink_for(output, tmp_path)
    encode = type(sink).encode

    def faulty(self: NumberedFilesSink, flow: numbered.SingleFlow) -> numbered.FlowFiles:
        if flow.frame in (3, 4):
            raise MemoryError(f"frame {flow.frame}")
        return encode(self, flow)

    monkeypatch.setattr(type(sink), "encode", faulty)
    sink.open(INFO)

    def go() -> None:
        for index, flow in enumerate(some_flows()):
            sink.write(batch_of(flow[None], index))
        sink.commit()

    with pytest.raises(MemoryError, match="frame 3"):
        go()
    assert f" {3 * files_a_flow(output)} whole files" in str(sink.abort())
    assert encoders() == []
    assert len(contents(tmp_path)) == 3 * files_a_flow(output)


@pytest.mark.usefixtures("several")
def test_being_stopped_while_writing_leaves_whole_files_only(
    tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch, encoders: Encoders
) -> None:
    written(output, tmp_path / "whole", some_flows())
    sink = sink_for(output, tmp_path / "out")
    sink.open(INFO)

    def stopped(path: Path) -> None:
        if "00002" in path.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(publish, "sync_file", stopped)

    def go() -> None:
        sink.write(batch_of(some_flows()))
        sink.commit()

    with pytest.raises(KeyboardInterrupt):
        go()
    sink.abort()
    assert encoders() == []
    after, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert len(after) == 2 * files_a_flow(output)  # flows behind the third are dropped, even if written earlier
    assert {name.removesuffix(".partial"): data for name, data in after.items()}.items() <= whole.items()


def test_being_stopped_while_names_are_given_ends_with_all_of_them(
    tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier run's files are already gone then, so stopping would leave only part of a run."""
    written(output, tmp_path / "whole", some_flows())
    written(output, tmp_path / "out", some_flows(3))
    sink = sink_for(output, tmp_path / "out", overwrite=True)
    sink.open(INFO)
    sink.write(batch_of(some_flows()))
    real, calls = os.replace, [0]

    def stopped(source: Path, path: Path) -> None:
        real(source, path)
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        sink.commit()
    assert str(sink.abort()).endswith(
        f"{counted(len(contents(tmp_path / 'out')), 'whole file')} such as {Path(output.form % 0).name}"
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("several")
def test_what_goes_wrong_is_told_with_its_own_frame(
    tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the frame that failed, although the stage has taken later ones by then."""
    sink = sink_for(output, tmp_path)
    sink.open(INFO)

    def stopped(path: Path) -> None:
        if "00002" in path.name:
            raise OSError(5, "broken")

    monkeypatch.setattr(publish, "sync_file", stopped)
    flows = batch_of(some_flows(), frame=100)

    def consume(batches: Iterator[FlowBatch]) -> None:
        for batch in batches:
            sink.write(batch)
        sink.commit()

    with pytest.raises(StageError, match=r"write, frame 102: cannot write .*00002.*: broken") as caught:
        Pipeline("read", [flows]).run({"write": consume})
    assert caught.value.frame == 102
    sink.abort()


@pytest.mark.usefixtures("several")
def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(
    tmp_path: Path, output: Output, files_up_to: Limit, encoders: Encoders
) -> None:
    sink = sink_for(output, tmp_path)
    sink.open(INFO)

    def go() -> None:
        sink.write(batch_of(some_flows()))
        sink.commit()

    with files_up_to(100), pytest.raises(OutputWriteError, match=Path(output.form % 0).suffix):
        go()
    sink.abort()
    assert encoders() == []
    assert contents(tmp_path) == {}


@pytest.mark.usefixtures("several")
def test_flow_that_nobody_knows_is_no_trouble(tmp_path: Path, output: Output) -> None:
    for name, value in (("nan", np.nan), ("infinite", -np.inf), ("marked", 1.6666668e9), ("huge", 3e38)):
        sink = written(output, tmp_path / name, torch.full((1, 2, HEIGHT, WIDTH), value), (1,))
        assert all(f"{HEIGHT * WIDTH} of {HEIGHT * WIDTH} vectors (1e+02 %)" in note for note in sink.notes)
    flows = some_flows(3)
    flows[1:, 0, 0, :2] = torch.nan
    sink = written(output, tmp_path / "few", flows, (3,))
    unknown = [note for note in sink.notes if "unknown" in note]
    assert all(f"4 of {3 * HEIGHT * WIDTH} vectors" in note and "first in frame 1" in note for note in unknown)


def test_flow_of_another_size_or_place_is_refused(tmp_path: Path, output: Output) -> None:
    sink = sink_for(output, tmp_path)
    sink.open(INFO)
    with pytest.raises(ValueError, match="opened for"):
        sink.write(batch_of(torch.zeros(1, 2, HEIGHT, WIDTH + 1)))
    with pytest.raises(ValueError, match="on the CPU, got meta"):
        sink.write(batch_of(torch.zeros(1, 2, HEIGHT, WIDTH, device="meta")))
    sink.write(batch_of(torch.zeros(1, 2, HEIGHT, WIDTH, requires_grad=True)))
    sink.commit()
    assert len(contents(tmp_path)) == files_a_flow(output)


def test_a_folder_that_cannot_be(tmp_path: Path, output: Output) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError, match="file"):
        sink_for(output, tmp_path / "file").open(INFO)


@pytest.mark.parametrize("number", ["7", "%s", "%d_%d", "%9999d"])
def test_a_name_without_one_number(tmp_path: Path, output: Output, number: str) -> None:
    name = output.form.replace("DIR", str(tmp_path / "%06d")).rsplit("%", 1)[0] + number + output.suffix
    with pytest.raises(UnknownOutputError, match=r"one number, such as .*%0[56]d") as caught:
        open_sink(name, SinkConfig())
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "name"), [("%d.x", "12.x"), ("a%03d_b.x", "a012_b.x"), ("f%4d.x", "f  12.x"), ("%2d.x", "12.x")]
)
def test_patterns(tmp_path: Path, pattern: str, name: str) -> None:
    numbers = NumberedName(str(tmp_path / pattern), "%06d.x")
    assert numbers.file(12) == tmp_path / name
    for other in (name, "012.x", "a12_b.x", "f12.x", f"{name}.partial", "x.x"):
        (tmp_path / other).touch()
    assert numbers.present() == {12: tmp_path / name}
