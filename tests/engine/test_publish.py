"""Whichever step fails, a file or folder of the final name is whole, and what was there before is not lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowreel.engine import publish
from flowreel.engine.errors import OutputBusyError, OutputExistsError, OutputWriteError
from tests.fakes.disk import Disk


def fill(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "content").write_text(text)
    return folder


def test_bytes_appear_whole_with_their_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    descriptors = os.listdir("/proc/self/fd")
    assert publish.publish_bytes(path, b"one", b"", b"two") == 6
    assert os.listdir("/proc/self/fd") == descriptors
    assert path.read_bytes() == b"onetwo"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(NotADirectoryError, match="file"):
        publish.make_folder(path / "deeper")


def test_two_runs_may_make_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = tmp_path / "a" / "b", publish.sync_folder
    monkeypatch.setattr(publish, "sync_folder", lambda path: (real(path), folder.mkdir(exist_ok=True)))
    publish.make_folder(folder)
    assert folder.is_dir()


def test_replacing_a_file_is_one_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    publish.publish_bytes(path, b"old")
    with publish.atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert publish.partial_path(path).read_bytes() == b"new"
    assert path.read_bytes() == b"new"


def test_one_file_has_one_writer(tmp_path: Path) -> None:
    """Two of them shared the temporary file: the first to end published what the second had written by then."""
    path = tmp_path / "file"
    with publish.atomic_file(path) as file:
        file.write(b"first")
        with pytest.raises(OutputBusyError, match=r"file is being written by another run"):
            publish.publish_bytes(path, b"second")
    assert path.read_bytes() == b"first"
    publish.publish_bytes(path, b"third")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"third"]


def test_an_error_inside_the_block_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with publish.atomic_file(tmp_path / "file") as file:
            file.write(b"x")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_contents_reach_the_disk_before_the_name_and_the_name_before_returning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real_sync, real_replace = publish.sync_file, os.replace
    monkeypatch.setattr(publish, "sync_file", lambda path: (steps.append(f"sync {path.name}"), real_sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), real_replace(a, b)))
    publish.publish_bytes(tmp_path / "file", b"x")
    assert steps == ["sync file.partial", "rename", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_step_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputWriteError, match="free some space"), publish.write_errors(path):
        publish.publish_bytes(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_write_errors_name_the_path_and_keep_the_cause() -> None:
    denied = PermissionError(errno.EACCES, "Permission denied")
    expected = r"cannot write out\.zarr: Permission denied$"
    with pytest.raises(OutputWriteError, match=expected) as caught, publish.write_errors("out.zarr"):
        raise denied
    assert caught.value.__cause__ is denied
    with pytest.raises(OutputWriteError, match="of no known kind"), publish.write_errors("out.zarr"):
        raise OSError("of no known kind")
    with pytest.raises(OutputExistsError, match="already"), publish.write_errors("out.zarr"):
        raise OutputExistsError("already there")


def test_require_absent(tmp_path: Path) -> None:
    path = tmp_path / "link"
    publish.require_absent(path, overwrite=False)
    path.symlink_to(tmp_path / "nowhere")  # a dangling link counts as existing
    publish.require_absent(path, overwrite=True)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        publish.require_absent(path, overwrite=False)


@pytest.mark.parametrize("replaces", [False, True])
def test_folder_gets_its_name(tmp_path: Path, replaces: bool) -> None:
    path = tmp_path / "X.zarr"
    if replaces:
        fill(path, "old")
        fill(publish.replaced_path(path), "older")  # left by a process that was killed
    publish.publish_folder(fill(publish.partial_path(path), "new"), path)
    assert (path / "content").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_old_folder_returns_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fill(tmp_path / "X.zarr", "old")
    temporary = fill(publish.partial_path(path), "new")
    real = os.rename

    def fail_for_the_new(source: Path, target: Path) -> None:
        if source == temporary:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="Input/output"):
        publish.publish_folder(temporary, path)
    assert (path / "content").read_text() == "old"
    assert (temporary / "content").read_text() == "new"


@pytest.mark.parametrize("survivor", ["old", "new"])
def test_settle_after_a_death_between_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivor: str
) -> None:
    path, disk = tmp_path / "X[1].zarr", Disk(monkeypatch)
    fill(publish.replaced_path(path), "old")
    if survivor == "new":
        fill(path, "new")
    publish.sync_folder(tmp_path)
    publish.settle_replaced(path)
    assert not disk.waiting
    assert (path / "content").read_text() == survivor
    assert list(tmp_path.iterdir()) == [path]
    publish.settle_replaced(path)


@pytest.mark.parametrize("name", ["X.zarr.replaced", "X.zarr.yesterday's copy.replaced"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_of_the_users_is_not_taken_for_one_that_was_replaced(tmp_path: Path, exists: bool, name: str) -> None:
    path = tmp_path / "X.zarr"
    if exists:
        fill(path, "current")
    kept = fill(tmp_path / name, "a copy")
    publish.publish_folder(fill(publish.partial_path(path), "new"), path)
    assert (kept / "content").read_text() == "a copy"
    assert sorted(tmp_path.iterdir()) == [path, kept]


def test_folders_without_fsync_are_tolerated_but_io_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(code: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", lambda _: fail(errno.EINVAL))
    publish.sync_folder(Path("."))
    monkeypatch.setattr(os, "fsync", lambda _: fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        publish.sync_folder(Path("."))


def test_remove_takes_anything(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", "kept")
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    publish.remove(link)
    assert not os.path.lexists(link)
    assert (folder / "content").exists()
    publish.remove(folder / "content")
    publish.remove(folder)
    publish.remove(folder)
    assert list(tmp_path.iterdir()) == []


def test_files_that_belong_together_are_all_written_before_the_first_gets_its_name(tmp_path: Path) -> None:
    x, y = tmp_path / "new" / "x", tmp_path / "new" / "y"
    contents = {x: [b"ab", memoryview(np.zeros((2, 3), np.float32))], y: [b"c"]}
    assert publish.write_unfinished(contents) == 2 + 24 + 1
    assert sorted(os.listdir(tmp_path / "new")) == ["x.partial", "y.partial"]
    publish.give_names([y])
    assert sorted(os.listdir(tmp_path / "new")) == ["x.partial", "y"]
    publish.give_names([x])
    assert x.read_bytes() == b"ab" + bytes(24)
    with pytest.raises(OutputWriteError, match="/x"):
        publish.give_names([x])


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_many_pieces_in_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """However many bytes the system accepts at a time."""
    pieces = [bytes([number % 256]) * (number % 5) for number in range(3000)]
    calls = []

    def some(descriptor: int, buffers: list[memoryview]) -> int:
        calls.append(len(buffers))
        return os.write(descriptor, b"".join(buffers)[:at_once])

    monkeypatch.setattr(os, "writev", some)
    assert publish.write_unfinished({tmp_path / "x": pieces}) == 6000
    assert publish.partial_path(tmp_path / "x").read_bytes() == b"".join(pieces)
    assert all(count <= 1024 for count in calls)  # Linux refuses more
    assert len(calls) == {1 << 20: 3}.get(at_once, len(calls))


@pytest.mark.parametrize("too_large", ["x", "y"])
def test_when_one_of_several_files_does_not_fit_none_is_there(
    tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]], too_large: str
) -> None:
    with files_up_to(100), pytest.raises(OutputWriteError, match=f"/{too_large}"):
        publish.write_unfinished({tmp_path / name: [bytes(200 if name == too_large else 1)] for name in "xy"})
    assert os.listdir(tmp_path) == []


def test_a_folder_by_an_unfinished_name_stays(tmp_path: Path) -> None:
    """It is an error, and the folder is not removed: it may hold files of the user."""
    (tmp_path / "y.partial").mkdir()
    (tmp_path / "y.partial" / "mine").write_text("the only copy")
    (tmp_path / "x.partial").symlink_to("y.partial")  # but a link to one goes
    with pytest.raises(OutputWriteError, match="/y: Is a directory"):
        publish.write_unfinished({tmp_path / name: [b"1"] for name in "xy"})
    publish.drop_unfinished([tmp_path / "x", tmp_path / "y"])
    assert os.listdir(tmp_path) == ["y.partial"]
    assert (tmp_path / "y.partial" / "mine").read_text() == "the only copy"


@pytest.mark.parametrize("links", [True, False])
def test_the_first_of_a_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Also on a file system without hard links."""

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    disk = Disk(monkeypatch)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    assert publish.publish_first(tmp_path / "x", b"fir", b"st")
    publish.sync_folder(tmp_path)
    assert not disk.waiting
    assert not publish.publish_first(tmp_path / "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_is_claimed_anew_whatever_lay_there(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "leftover").write_text("of a killed run")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    for name in ("new", "leftover", "link", "nowhere", "pipe"):
        claim = publish.claimed_file(tmp_path / name, "x")
        assert (tmp_path / name).is_file()
        assert not (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == b""
        with pytest.raises(OutputBusyError):
            publish.claimed_file(tmp_path / name, "x")
        claim.withdraw()
        assert not os.path.lexists(tmp_path / name)
    assert (tmp_path / "target").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        publish.claimed_file(tmp_path / "folder", "x")


def test_what_two_runs_tidy_up_at_once_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.unlink

    def gone(path: Any, **options: Any) -> None:
        real(path, **options)
        raise FileNotFoundError(errno.ENOENT, "gone")

    fill(tmp_path / "old", "x")
    monkeypatch.setattr(os, "unlink", gone)
    publish.remove(tmp_path / "old")
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    fill(tmp_path / "old", "x")
    monkeypatch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))
    publish.remove(tmp_path / "old", ignore_errors=True)
    with pytest.raises(PermissionError):
        publish.remove(tmp_path / "old")
    publish.publish_folder(fill(tmp_path / "new", "y"), tmp_path / "old")  # what is left of the old one fails nothing
    assert (tmp_path / "old" / "content").read_text() == "y"
