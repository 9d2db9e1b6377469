"""A resumed store ends with exactly the bytes of an uninterrupted run, or resuming is refused with a clear error."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import threading
from collections.abc import Container, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine import publish
from flowreel.engine.claims import Claim
from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import OutputBusyError, OutputExistsError, OutputWriteError, ResumeMismatchError
from flowreel.engine.protocols import Resumable
from flowreel.sinks import open_store, store_target, zarr_store
from flowreel.sinks.shard_file import pack_shard
from flowreel.sinks.store_layout import BESIDE_FLOW, flow_shard
from flowreel.sinks.store_target import LocalTarget
from flowreel.sinks.store_writer import pack_values
from flowreel.sinks.zarr_store import ZarrSink
from tests.sinks.waiting import flush

H, W, SHARD, FLOWS = 6, 8, 3, 11
INFO = FlowInfo(
    H, W, Fraction(25), FLOWS + 1, SourceId("clip.mkv", 1000, 0.5, "aa"), {"model": "FlowNet2C", "batch": 2}
)

KILLED_FLOWS = 7
KILLED_INFO = replace(INFO, frame_count=KILLED_FLOWS + 1)


def config(**changes: Any) -> SinkConfig:
    return SinkConfig(**{"shard_bytes": SHARD * 8 * H * W, **changes})


def flow_of(number: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(number).uniform(-9, 9, (2, H, W)).astype(np.float32))


def batches(first: int, last: int) -> Iterator[FlowBatch]:
    for index in range(first, last):
        frame = np.array([index])
        yield FlowBatch(flow_of(index)[None], index, frame, frame + 1, frame / 25, (frame + 1) / 25)


def run(path: Path, flows: int = FLOWS, info: FlowInfo = INFO, **changes: Any) -> ZarrSink:
    """Uses the sink as ``flowreel run`` does: ask for the resume point, check, open, write the rest, commit."""
    sink = ZarrSink(str(path), config(**changes))
    point = sink.resume_point() if changes.get("resume") else None
    if point is not None:
        sink.require_same(info)
    sink.open(info)
    for batch in batches(0 if point is None else point.flows, flows):
        sink.write(batch)
    sink.commit()
    return sink


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cut_after(path: Path, flows: int, **changes: Any) -> None:
    """A run that is killed after this many flows."""
    sink = ZarrSink(str(path), config(**changes))
    sink.open(INFO)
    for batch in batches(0, flows):
        sink.write(batch)
    flush(sink)
    sink._target.let_go()  # releases the claim, as the system does for a killed process


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    run(folder / "X.zarr")
    return contents(folder / "X.zarr")


@pytest.mark.parametrize("flows", range(FLOWS + 1))
def test_any_cut_ends_in_the_same_bytes(tmp_path: Path, flows: int, whole: dict[str, bytes]) -> None:
    cut_after(tmp_path / "X.zarr", flows)
    point = ZarrSink(str(tmp_path / "X.zarr"), config()).resume_point()
    assert (0 if point is None else point.flows) == flows // SHARD * SHARD
    if point is not None:
        assert (point.frame, point.timestamp_s, point.complete) == (point.flows, point.flows / 25, False)
        assert point.batch == 2
    run(tmp_path / "X.zarr", resume=True)
    assert contents(tmp_path / "X.zarr") == whole
    assert sorted(os.listdir(tmp_path)) == ["X.zarr"]


def test_nothing_there_starts_and_it_is_resumable(tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert isinstance(ZarrSink(str(tmp_path / "X.zarr"), config()), Resumable)
    run(tmp_path / "X.zarr", resume=True)
    assert contents(tmp_path / "X.zarr") == whole


def test_killed_before_its_name_was_given(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """All nine flows are there in three full shards; only the final name is missing. The last shard is made again."""
    info = replace(INFO, frame_count=10)
    run(tmp_path / "Y.zarr", 9, info)
    expected = contents(tmp_path / "Y.zarr")
    os.rename(tmp_path / "Y.zarr", tmp_path / "Y.zarr.partial")
    point = ZarrSink(str(tmp_path / "Y.zarr"), config()).resume_point()
    assert point is not None
    assert point.flows == 6
    run(tmp_path / "Y.zarr", 9, info, resume=True)
    assert contents(tmp_path / "Y.zarr") == expected


def test_temporaries_and_a_damaged_shard_are_made_again(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted: list[str] = []
    real = LocalTarget.delete
    monkeypatch.setattr(LocalTarget, "delete", lambda target, key: (deleted.append(key), real(target, key)))
    cut_after(tmp_path / "X.zarr", 10)
    partial = tmp_path / "X.zarr.partial"
    (partial / "flow" / "c" / "3.partial").write_bytes(b"half")
    (partial / "frame" / "c" / "3").write_bytes(b"a shard's frames without its flow")
    shard = flow_shard(partial, 1)
    shard.write_bytes(shard.read_bytes()[:-7])
    point = ZarrSink(str(tmp_path / "X.zarr"), config()).resume_point()
    assert point is not None
    assert point.flows == SHARD
    run(tmp_path / "X.zarr", resume=True)
    assert contents(tmp_path / "X.zarr") == whole
    assert deleted[0] == "flow/c/3.partial"
    assert deleted[1:3] == ["flow/c/1/0/0/0", "flow/c/2/0/0/0"]  # before their times: no flow is ever without its time
    assert len(deleted) == 1 + 2 * (1 + len(BESIDE_FLOW)) + 1


@pytest.mark.parametrize(
    "what",
    ["swapped shards", "swapped chunks", "times of elsewhere", "no checksums", "empty frame", "empty time_crc32c"],
)
def test_what_is_not_in_its_place_is_made_again(tmp_path: Path, whole: dict[str, bytes], what: str) -> None:
    """Files that are intact but in the wrong place are detected: the run resumes before the first of them."""
    cut_after(tmp_path / "X.zarr", 10)
    partial = tmp_path / "X.zarr.partial"
    second, third = flow_shard(partial, 1), flow_shard(partial, 2)
    if what == "swapped shards":
        kept = second.read_bytes()
        second.write_bytes(third.read_bytes())
        third.write_bytes(kept)
    elif what == "swapped chunks":
        files = open_store(tmp_path / "X.zarr").files
        index = files.index(1)
        assert index is not None
        chunks = [files.chunk(1, int(offset), int(size)) for offset, size in index]
        second.write_bytes(b"".join(pack_shard([(chunk,) for chunk in chunks[::-1]], SHARD)))
    elif what == "times of elsewhere":
        shutil.copy(partial / "timestamp_s/c/2", partial / "timestamp_s/c/1")
    elif what == "no checksums":
        (partial / "flow_crc32c/c/1").write_bytes(b"")
    else:
        name = what.removeprefix("empty ")
        (partial / name / "c/1").write_bytes(pack_values(name, [], SHARD))
    point = ZarrSink(str(tmp_path / "X.zarr"), config()).resume_point()
    assert point is not None
    assert point.flows == SHARD
    run(tmp_path / "X.zarr", resume=True)
    assert contents(tmp_path / "X.zarr") == whole


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize(("before", "after"), [(2, 7), (3, 11), (7, 8), (9, 11)])
def test_a_recording_that_grew_is_appended_to(tmp_path: Path, before: int, after: int, announced: bool) -> None:
    def info(flows: int) -> FlowInfo:
        source = SourceId("clip.mkv", 100 * flows, flows / 25, "aa")
        return replace(INFO, frame_count=flows + 1 if announced else None, source=source)

    run(tmp_path / "grown.zarr", before, info(before))
    old = contents(tmp_path / "grown.zarr")
    sink = ZarrSink(str(tmp_path / "grown.zarr"), config(resume=True))
    point = sink.resume_point()
    assert point is not None
    assert (point.complete, point.flows, point.frame) == (True, before // SHARD * SHARD, before // SHARD * SHARD)
    sink.open(info(after))
    assert contents(tmp_path / "grown.zarr") == old  # unchanged until the new store is complete
    for batch in batches(point.flows, after):
        sink.write(batch)
    sink.commit()
    run(tmp_path / "straight.zarr", after, info(after))
    assert contents(tmp_path / "grown.zarr") == contents(tmp_path / "straight.zarr")
    assert sorted(os.listdir(tmp_path)) == ["grown.zarr", "straight.zarr"]


@pytest.mark.parametrize(
    ("info", "changes", "words"),
    [
        (replace(INFO, made_by={"model": "FlowNet2S", "batch": 2}), {}, "model was FlowNet2C, is FlowNet2S"),
        (replace(INFO, made_by={"model": "FlowNet2C", "batch": 4}), {}, "batch was 2, is 4"),
        (INFO, {"max_error": 0.25}, "max error was 0.015625, is 0.25"),
        (INFO, {"codec": "pcodec"}, "codec was blosc, is pcodec"),
        (INFO, {"shard_bytes": 5 * 8 * H * W}, "shard length was 3, is 5"),
        (replace(INFO, source=SourceId("other.mkv", 1000, 0.5)), {}, "source was clip.mkv, is other.mkv"),
        (replace(INFO, source=SourceId("clip.mkv", 1000, 0.5, "bb")), {}, "another file"),
        (replace(INFO, source=SourceId("clip.mkv", 999, 0.5, "aa")), {}, "had 1000 bytes, has 999"),
        (replace(INFO, width=16), {}, "flow width was 8, is 16"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, info: FlowInfo, changes: dict[str, Any], words: str) -> None:
    cut_after(tmp_path / "X.zarr", 7)
    before = contents(tmp_path)
    with pytest.raises(ResumeMismatchError, match=words):
        ZarrSink(str(tmp_path / "X.zarr"), config(resume=True, **changes)).require_same(info)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("below", "flows"), [(None, 9), (10, 9), (9, 6), (8, 6), (4, 3)])
def test_fewer_flows_are_kept_when_told_to(tmp_path: Path, below: int | None, flows: int) -> None:
    cut_after(tmp_path / "X.zarr", 10)
    point = ZarrSink(str(tmp_path / "X.zarr"), config()).resume_point(below)
    assert point is not None
    assert point.flows == flows


def test_a_source_that_now_ends_earlier_leaves_nothing_of_the_shards_behind_its_end(tmp_path: Path) -> None:
    sink = ZarrSink(str(tmp_path / "X.zarr"), config())
    sink.open(INFO)
    for batch in batches(0, 8):
        sink.write(batch)
    sink.commit(complete=False)
    run(tmp_path / "X.zarr", 6, resume=True)
    assert list(open_store(tmp_path / "X.zarr").check()) == []


def test_what_is_gone_on_with_is_not_cut_to_what_the_source_announces(tmp_path: Path) -> None:
    """The source now announces fewer flows than the store holds; a reader still sees all of them."""
    cut_after(tmp_path / "X.zarr", 10)
    sink = ZarrSink(str(tmp_path / "X.zarr"), config(resume=True))
    sink.resume_point()
    sink.open(replace(INFO, frame_count=8))
    store = open_store(tmp_path / "X.zarr")
    assert (len(store), store.available) == (9, 9)
    sink.abort()


def test_a_reader_of_an_unfinished_store_sees_a_ragged_shard_replaced(tmp_path: Path) -> None:
    path = tmp_path / "X.zarr"
    for flows in (8, 9):  # two flows of the last shard, then all three
        sink = ZarrSink(str(path), config(resume=True))
        point = sink.resume_point()
        sink.open(INFO)
        for batch in batches(0 if point is None else point.flows, flows):
            sink.write(batch)
        sink.commit(complete=False)
        if point is None:
            store = open_store(path)
        assert store.available == flows
        assert np.abs(store[flows - 1] - flow_of(flows - 1).numpy()).max() <= 1 / 64


def test_without_resume_an_unfinished_store_is_left_alone(tmp_path: Path) -> None:
    cut_after(tmp_path / "X.zarr", 7)
    with pytest.raises(OutputExistsError, match="--resume"):
        ZarrSink(str(tmp_path / "X.zarr"), config()).open(INFO)


@pytest.mark.parametrize("flows", [0, 2])
def test_a_run_killed_before_its_first_shard_left_nothing_to_ask_about(
    tmp_path: Path, flows: int, whole: dict[str, bytes]
) -> None:
    """It used to stop the next run over many sources, which promises to do the rest."""
    cut_after(tmp_path / "X.zarr", flows)
    run(tmp_path / "X.zarr")
    assert contents(tmp_path / "X.zarr") == whole
    cut_after(tmp_path / "X2.zarr", flows)
    for name in ("x", "frame"):  # of native resolution; killed between its times and its flow
        publish.publish_bytes(tmp_path / f"X2.zarr.partial/{name}/c/0", b"")
    run(tmp_path / "X2.zarr")
    assert contents(tmp_path / "X2.zarr") == whole
    cut_after(tmp_path / "Y.zarr", flows)
    Path(tmp_path, "Y.zarr.partial/mine").touch()
    with pytest.raises(OutputExistsError, match="--resume"):
        run(tmp_path / "Y.zarr")


Held = dict[str, bytes | None]  # what a folder holds, by path; None: a folder


def run_watched(folder: Path, resume: bool, calls: Container[int]) -> list[Held]:
    """Runs, and gives what the folder held before these calls that change the disk, if not the same as before the last.

    A run that is killed at that call leaves just this.
    """
    seen: list[Held] = []
    numbers = itertools.count()
    one_at_a_time = threading.RLock()  # shards are written by threads

    def watched(real: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            with one_at_a_time:
                if next(numbers) in calls and (now := held(folder)) not in seen[-1:]:
                    seen.append(now)
                return real(*args, **options)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "fsync", "mkdir", "link", "unlink", "rmdir"):
            patch.setattr(os, name, watched(getattr(os, name)))
        run(folder / "X.zarr", KILLED_FLOWS, KILLED_INFO, resume=resume)
    return seen


def held(folder: Path) -> Held:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def leave(folder: Path, what: Held) -> None:
    """Makes the folder hold what a killed run left."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name, data in what.items():  # a folder comes before what is in it
        (folder / name).mkdir() if data is None else (folder / name).write_bytes(data)


def test_killed_at_every_step_then_resumed_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While resuming, the run is killed again at a random step. There are two full shards and a ragged one."""
    run(tmp_path / "whole.zarr", KILLED_FLOWS, KILLED_INFO)
    whole = contents(tmp_path / "whole.zarr")
    monkeypatch.setattr(zarr_store, "encode_workers", lambda *_: 0)
    rng = random.Random(0)
    folder = tmp_path / "killed"
    folder.mkdir()
    moments = run_watched(folder, resume=False, calls=range(1000))
    assert len(moments) > 50
    for moment in moments:
        leave(folder, moment)
        if not is_complete(folder / "X.zarr"):
            for again in run_watched(folder, resume=True, calls=[rng.randrange(40)]):
                leave(folder, again)
        if not is_complete(folder / "X.zarr"):
            run(folder / "X.zarr", KILLED_FLOWS, KILLED_INFO, resume=True)
        assert contents(folder / "X.zarr") == whole
        assert os.listdir(folder) == ["X.zarr"]


def is_complete(path: Path) -> bool:
    return path.exists() and open_store(path).complete


# Two runs on one store

MODES: list[dict[str, Any]] = [{}, {"resume": True}, {"overwrite": True}]


@pytest.mark.parametrize("second", MODES, ids=str)
@pytest.mark.parametrize("first", MODES, ids=str)
@pytest.mark.parametrize("there", ["nothing", "unfinished", "shorter"])
def test_a_second_run_on_the_same_store_is_refused(
    tmp_path: Path, whole: dict[str, bytes], there: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    path = tmp_path / "X.zarr"
    if there == "unfinished":
        cut_after(path, 7)
    elif there == "shorter":
        run(path, 5)
    if there != "nothing" and not first:
        return  # here already the first run is refused, which other tests show
    one = ZarrSink(str(path), config(**first))
    point = one.resume_point() if first.get("resume") else None
    other = ZarrSink(str(path), config(**second))
    if second.get("resume"):
        other.resume_point()  # before the first run claims the store
    one.open(INFO)
    for batch in batches(0 if point is None else point.flows, 8):
        one.write(batch)
    flush(one)
    before = contents(tmp_path)
    with pytest.raises(OutputBusyError, match=rf"{path} is being written by another run"):
        other.open(INFO)
    other.abort()
    for late in (ZarrSink(str(path), config(**second)), ZarrSink(str(path), config(resume=True))):
        with pytest.raises(OutputBusyError):
            late.resume_point()
    assert contents(tmp_path) == before
    for batch in batches(8, FLOWS):
        one.write(batch)
    one.commit()
    assert contents(path) == whole
    assert os.listdir(tmp_path) == ["X.zarr"]


@pytest.mark.parametrize("meanwhile", ["went on", "began", "finished", "was made anew, otherwise"])
def test_a_run_that_slept_while_another_one_wrote(tmp_path: Path, whole: dict[str, bytes], meanwhile: str) -> None:
    """Another run writes between this run's ``resume_point`` and ``open``, so the resume point is outdated."""
    path = tmp_path / "X.zarr"
    if meanwhile != "began":
        cut_after(path, 7)
    slow = ZarrSink(str(path), config(resume=True))
    slow.resume_point()
    if meanwhile == "began":
        cut_after(path, 7)
    elif meanwhile == "went on":
        shutil.rmtree(tmp_path / "X.zarr.partial")
        cut_after(path, 10)
    elif meanwhile == "finished":
        run(path, resume=True)
    else:
        shutil.rmtree(tmp_path / "X.zarr.partial")
        sink = ZarrSink(str(path), config(max_error=0.25))
        sink.open(INFO)
        for batch in batches(0, 7):
            sink.write(batch)
        flush(sink)
        sink._target.let_go()
    before = contents(tmp_path)
    refusal = ResumeMismatchError if "otherwise" in meanwhile else OutputBusyError
    with pytest.raises(refusal, match="max error" if "otherwise" in meanwhile else "meanwhile"):
        slow.open(INFO)
    slow.abort()
    assert contents(tmp_path) == before
    if meanwhile in ("went on", "began"):
        run(path, resume=True)
        assert contents(path) == whole


def test_files_that_are_not_ours_stay_when_a_store_goes_on(tmp_path: Path) -> None:
    run(tmp_path / "X.zarr", 5)
    others = ["flow/c/.DS_Store", "mask/c/4/0/0", "notes/c/zarr.json"]
    for name in others:
        (tmp_path / "X.zarr" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "X.zarr" / name).write_text("a user's")
    run(tmp_path / "X.zarr", resume=True)
    assert len(open_store(tmp_path / "X.zarr")) == FLOWS
    assert all((tmp_path / "X.zarr" / name).read_text() == "a user's" for name in others)


@pytest.mark.parametrize("resume", [False, True])
def test_no_other_run_slips_in_while_the_unfinished_store_is_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    cut_after(tmp_path / "X.zarr", 2 if resume else 7)  # no whole shard to go on after
    refused = []
    real = publish.remove

    def removed(path: Path) -> None:
        real(path)
        with pytest.raises(OutputBusyError):
            Claim.of_folder(tmp_path / "X.zarr.partial", "X.zarr")
        refused.append(path)

    sink = ZarrSink(str(tmp_path / "X.zarr"), config(resume=resume, overwrite=not resume))
    with monkeypatch.context() as patch:
        patch.setattr(publish, "remove", removed)
        sink.open(INFO)
    assert refused
    sink.abort()
    assert os.listdir(tmp_path) == []


def test_a_link_under_the_unfinished_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "X.zarr.partial").symlink_to(tmp_path / "elsewhere")
    run(tmp_path / "X.zarr", overwrite=True)
    assert os.listdir(tmp_path / "elsewhere") == ["kept"]
    assert sorted(os.listdir(tmp_path)) == ["X.zarr", "elsewhere"]


def test_a_store_that_stepped_aside_for_a_killed_run_is_still_there(tmp_path: Path) -> None:
    """A run killed between its two renames left only ``X.zarr.replaced``; the next run gives it its name back.

    Without --overwrite, the store is then not overwritten.
    """
    run(tmp_path / "X.zarr", 5)
    before = contents(tmp_path / "X.zarr")
    (tmp_path / "X.zarr").rename(publish.replaced_path(tmp_path / "X.zarr"))
    with pytest.raises(OutputExistsError, match="--overwrite"):
        ZarrSink(str(tmp_path / "X.zarr"), config()).open(INFO)
    assert contents(tmp_path / "X.zarr") == before
    assert os.listdir(tmp_path) == ["X.zarr"]


def test_killed_while_a_finished_store_was_reopened(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """It left an empty unfinished store and a half-made copy beside it; both are ignored."""
    run(tmp_path / "X.zarr", 5)
    (tmp_path / "X.zarr.partial").mkdir()
    shutil.copytree(tmp_path / "X.zarr" / "frame", tmp_path / "X.zarr.partial.new" / "frame")
    (tmp_path / "X.zarr.partial.new" / "flow.zip").write_bytes(b"of another kind of store")
    run(tmp_path / "X.zarr", resume=True)
    assert contents(tmp_path / "X.zarr") == whole
    assert os.listdir(tmp_path) == ["X.zarr"]


def test_a_finished_store_that_cannot_be_reopened_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "X.zarr", 5)
    before = contents(tmp_path / "X.zarr")

    def full(source: Path, destination: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_target, "_link", full)
    with pytest.raises(OutputWriteError, match=r"^cannot write .*X.zarr: No space left on device; free some space"):
        run(tmp_path / "X.zarr", resume=True)
    assert contents(tmp_path / "X.zarr") == before
    assert os.listdir(tmp_path) == ["X.zarr"]


@pytest.mark.parametrize("links", [True, False])
def test_a_reopened_store_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool, whole: dict[str, bytes]
) -> None:
    """Otherwise a power cut after the finished store was replaced could lose its shards."""
    run(tmp_path / "X.zarr", 5)
    synced: set[Path] = set()
    named = []
    sync, rename, link = publish.sync_file, os.rename, os.link

    def note(path: Path) -> None:
        synced.add(path)
        sync(path)

    def checked(source: Path, destination: Path) -> None:
        if source.suffix == ".new":
            inside = {path for path in source.rglob("*") if path.is_dir() or not links}
            assert {source, *inside} <= synced
            named.append(destination)
        rename(source, destination)

    def linked(source: Path, destination: Path) -> None:
        if not links:
            raise OSError(errno.EPERM, "Operation not permitted")
        link(source, destination)

    monkeypatch.setattr(publish, "sync_file", note)
    monkeypatch.setattr(os, "rename", checked)
    monkeypatch.setattr(os, "link", linked)
    run(tmp_path / "X.zarr", resume=True)
    assert named
    assert contents(tmp_path / "X.zarr") == whole


def test_what_a_killed_overwriting_run_left_is_not_taken_for_the_finished_store(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """The killed run had only begun: the finished store is resumed, and its first shards are not lost."""
    run(tmp_path / "X.zarr", 5)
    (tmp_path / "X.zarr.partial" / "flow").mkdir(parents=True)
    shutil.copy(tmp_path / "X.zarr" / "zarr.json", tmp_path / "X.zarr.partial")
    run(tmp_path / "X.zarr", resume=True)
    assert contents(tmp_path / "X.zarr") == whole


@pytest.mark.parametrize("flows", [0, 2, 4])
def test_of_an_overwriting_run_that_was_killed_whole_shards_are_continued(
    tmp_path: Path, flows: int, whole: dict[str, bytes]
) -> None:
    """Without one it counts as never begun: the finished store is what --resume is about, and nothing else is left."""
    path, other = tmp_path / "X.zarr", {"max_error": 0.25}
    run(path, **other)
    before = contents(path)
    cut_after(path, flows, overwrite=True)
    (tmp_path / "X.zarr.partial.new").mkdir()
    if flows > SHARD:
        run(path, resume=True)
        assert contents(path) == whole
    else:
        sink = ZarrSink(str(path), config(resume=True))
        point = sink.resume_point()
        assert point is not None
        assert point.complete
        with pytest.raises(ResumeMismatchError, match=r"X\.zarr: max error was 0\.25"):
            sink.require_same(INFO)
        assert contents(path) == before
    assert os.listdir(tmp_path) == ["X.zarr"]


def test_resuming_a_complete_store_ends_what_was_left_of_replacing_it(tmp_path: Path) -> None:
    run(tmp_path / "X.zarr")
    shutil.copytree(tmp_path / "X.zarr", publish.replaced_path(tmp_path / "X.zarr"))
    point = ZarrSink(str(tmp_path / "X.zarr"), config(resume=True)).resume_point()
    assert point is not None
    assert point.complete
    assert os.listdir(tmp_path) == ["X.zarr"]


def test_a_copy_that_the_disk_refuses_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "X.zarr")
    real = shutil.copyfile
    copied: list[Path] = []

    def full(source: Path, destination: Path) -> None:
        copied.append(real(source, destination))
        if len(copied) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OutputWriteError, match="No space left"):
        ZarrSink(str(tmp_path / "Y.zarr"), config()).copy(str(tmp_path / "X.zarr"))
    assert len(copied) == 3
    assert os.listdir(tmp_path) == ["X.zarr"]
