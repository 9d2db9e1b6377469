"""A disk that fills up while a store is written: a clear end, whole shards kept, the same bytes once there is room."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowreel.engine import publish
from flowreel.engine.cli import call
from flowreel.engine.data import FlowInfo
from flowreel.engine.models import build_model
from flowreel.engine.models.saving import save_weights
from flowreel.sinks import open_store

H, W, FRAMES, SHARD = 64, 96, 15, 4  # 14 flows: three full shards and one of two flows


class Disk:
    """Accepts ``free`` bytes, the last of them as a write cut short, and then fails every write with ``error``."""

    def __init__(self, free: int, error: int = errno.ENOSPC) -> None:
        self.free = free
        self.error = error

    def open(self, path: Path, mode: str, buffering: int = -1) -> io.FileIO | io.BufferedWriter:
        assert mode == "wb"
        return io.BufferedWriter(OnDisk(self, path)) if buffering else OnDisk(self, path)

    def writev(self, descriptor: int, buffers: Sequence[memoryview]) -> int:
        return self.write(b"".join(buffers), lambda data: os.write(descriptor, data))

    def write(self, data: Any, write: Callable[[memoryview], int]) -> int:
        if not self.free:
            raise OSError(self.error, os.strerror(self.error))
        written = write(memoryview(data)[: self.free])
        self.free -= written
        return written


class OnDisk(io.FileIO):
    def __init__(self, disk: Disk, path: Path) -> None:
        super().__init__(path, "w")
        self._disk = disk

    def write(self, data: Any) -> int:
        return self._disk.write(data, super().write)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``run(free, ...)``: ``flowreel run`` on a disk with ``free`` bytes left; gives the exit code."""
    torch.manual_seed(0)
    model = build_model("FlowNet2C", width=0.05)
    save_weights("tiny.safetensors", model.state_dict(), licence="none", made_by={}, width=0.05)
    texture = np.random.default_rng(0).integers(0, 255, (H, W + 2 * FRAMES, 3), np.uint8)
    Path("frames").mkdir()
    for number in range(FRAMES):
        Image.fromarray(texture[:, 2 * number : 2 * number + W]).save(f"frames/{number:03}.png")

    def on(free: int, *arguments: str, store: str = "X.zarr", error: int = errno.ENOSPC) -> int:
        disk = Disk(free, error)
        monkeypatch.setattr(publish, "open", disk.open, raising=False)
        monkeypatch.setattr(os, "writev", disk.writev)
        return call(["run", "frames", "-o", store, "--weights", "tiny.safetensors", "--batch", "2", "-q", *arguments])

    monkeypatch.setattr(FlowInfo, "shard_length", lambda *_: SHARD)
    return on


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    plenty = 1 << 40
    assert run(plenty, store="whole.zarr") == 0
    whole = contents("whole.zarr")
    total = sum(map(len, whole.values()))
    kept = []
    for free in (0, 3000, total // 2, total - 3000, total - 1):
        capsys.readouterr()
        assert run(free) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("flowreel: ")
        assert "No space left on device; free some space or choose another disk" in line
        assert not Path("X.zarr").exists()
        names = [path.name for path in Path().rglob("*.partial")]
        assert names in ([], ["X.zarr.partial"])  # the store itself, and no file inside it
        available = open_store("X.zarr").available if names else 0
        assert available in range(0, 4 * SHARD, SHARD) or available == FRAMES - 1
        assert bool(available) == bool(names)
        assert line.endswith(f"holds {available} of 14 flows; --resume continues it") == bool(names)
        assert run(1000, "--resume") == 1  # still full: nothing is lost
        assert (open_store("X.zarr").available if names else 0) >= available - available % SHARD
        assert run(plenty, "--resume") == 0
        assert contents("X.zarr") == whole
        kept.append(available)
        shutil.rmtree("X.zarr")
    assert kept[0] == 0
    assert kept[-1] >= 3 * SHARD


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_takes_nothing_any_more(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], error: int
) -> None:
    """Remounted read-only, permission withdrawn, or broken: before the run and in the middle of it."""
    assert run(1 << 40, store="whole.zarr") == 0
    whole = contents("whole.zarr")
    for free in (0, 2 * sum(map(len, whole.values())) // 3):
        capsys.readouterr()
        assert run(free, error=error) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"cannot write X.zarr: {os.strerror(error)}" in line
        assert Path("X.zarr.partial").exists() == bool(free)
    assert run(1 << 40, "--resume") == 0
    assert contents("X.zarr") == whole
