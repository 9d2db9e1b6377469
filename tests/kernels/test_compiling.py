"""For which GPUs kernels are compiled, and where compiled programs are kept. ``test_cuda_compiles.py`` compiles all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from flowreel.engine.errors import DeviceError
from flowreel.kernels import compiling


@pytest.mark.parametrize(
    ("own", "architecture"),
    [((9, 0), "sm_90"), ((7, 5), "sm_75"), ((10, 3), "compute_90"), ((8, 7), "compute_86"), ((12, 0), "compute_90")],
)
def test_a_gpu_gets_its_own_program_or_the_newest_that_its_driver_translates(
    own: tuple[int, int], architecture: str
) -> None:
    assert compiling._architecture(*own, [75, 80, 86, 90]) == architecture


def test_a_gpu_older_than_the_compiler_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"capability 7\.5 and newer, not 7\.0"):
        compiling._architecture(7, 0, [75, 80, 86, 90])


def test_programs_of_a_user_without_a_home_are_kept_for_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("FLOWREEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(compiling, "_own_folder", lambda: tmp_path)
    assert compiling._cache_folder() == tmp_path
    monkeypatch.setenv("FLOWREEL_CACHE", str(tmp_path / "kept"))
    assert compiling._cache_folder() == tmp_path / "kept" / "kernels"
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLOWREEL_CACHE", str(tmp_path / "file"))
    assert compiling._cache_folder() == tmp_path
    monkeypatch.setenv("FLOWREEL_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # the folder belongs to another user
    assert compiling._cache_folder() == tmp_path


def test_a_program_that_does_not_fit_on_the_disk_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    others = [tmp_path / "whole.bin"]  # another process compiles the same program meanwhile
    monkeypatch.setattr(os, "fsync", lambda _: others and compiling._publish(others.pop(), b"program"))
    compiling._publish(tmp_path / "whole.bin", b"program")
    assert (tmp_path / "whole.bin").read_bytes() == b"program"
    (tmp_path / "as others").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # whoever may read other files here may read it
    (tmp_path / "as others").unlink()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        compiling._publish(tmp_path / "x.bin", b"program")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.bin"]
