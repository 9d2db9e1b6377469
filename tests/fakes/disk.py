"""A disk that knows what a power cut would lose.

A file's contents are safe once the file was synced with fsync; its name is safe once its folder was. At each renaming
and removal, ``Disk`` asserts that what must be safe by then is; ``waiting`` holds the names that are not safe yet.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowreel.engine import publish


class Disk:
    """Watches every call by which outputs change the disk, until the end of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: set[Path] = set()  # names of files and folders that a power cut would lose
        self._one = threading.RLock()  # shards are written in parallel
        self._kept: dict[tuple[int, int], tuple[int, int]] = {}  # (device, inode) -> size and time when last synced
        self._sync, real = publish.sync_file, {name: getattr(os, name) for name in ("replace", "rename", "link")}
        self._mkdir, self._unlink, self._rmtree = os.mkdir, os.unlink, shutil.rmtree
        monkeypatch.setattr(publish, "sync_file", self._synced)
        for name, call in real.items():
            monkeypatch.setattr(os, name, self._named(call))
        monkeypatch.setattr(os, "mkdir", self._made)
        monkeypatch.setattr(os, "unlink", self._removed)
        monkeypatch.setattr(shutil, "rmtree", self._removed_whole)

    def _synced(self, path: Path) -> None:
        with self._one:
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                self.waiting = {name for name in self.waiting if name.parent != path}
            else:
                if (status.st_dev, status.st_ino) not in self._kept:
                    self.waiting.add(path)
                self._kept[status.st_dev, status.st_ino] = status.st_size, status.st_mtime_ns
        self._sync(path)

    def _named(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Path, path: Path) -> None:
            with self._one:
                self._require_kept(source, path)
                real(source, path)
                self.waiting.discard(source)
                self.waiting.add(path)

        return call

    def _require_kept(self, source: Path, path: Path) -> None:
        if source.is_dir():
            inside = {name for name in self.waiting if source in name.parents}
            assert not inside, f"{path} gets its name before what is in it is on the disk: {inside}"
            return
        status = os.stat(source)
        kept = self._kept.get((status.st_dev, status.st_ino))
        assert kept == (status.st_size, status.st_mtime_ns), f"{path} gets its name before its contents are on the disk"
        if any(".zarr" in folder.suffixes for folder in path.parents):  # in a store, files rely on earlier ones
            before = {name for name in self.waiting if name.is_file() and name.suffix != ".partial"}
            assert not before, f"{path} gets its name before {before} are there to stay"

    def _made(self, path: Path, *mode: int) -> None:
        with self._one:
            self._mkdir(path, *mode)
            self.waiting.add(Path(path))

    def _removed(self, path: Path, **options: Any) -> None:
        """A published file may be removed only once what replaces it is safe, if only under its unfinished name."""
        with self._one:
            beside = {name for name in self.waiting if name.parent == Path(path).parent}
            assert str(path).endswith(".partial") or options or not beside, f"{path} goes before {beside} are to stay"
            status = os.lstat(path, dir_fd=options.get("dir_fd"))
            self._unlink(path, **options)
            self._kept.pop((status.st_dev, status.st_ino), None)  # a new file may get the same inode
            self.waiting.discard(Path(path))

    def _removed_whole(self, path: Path, *arguments: Any, **options: Any) -> None:
        with self._one:
            assert path.with_suffix("") not in self.waiting, f"{path} goes before what replaces it is there to stay"
            self._rmtree(path, *arguments, **options)
            self.waiting = {name for name in self.waiting if name != path and path not in name.parents}
