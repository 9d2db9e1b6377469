"""Where outputs may go: not over what is being read, not into each other, not inside a store.

All paths are checked before the work begins, so that an impossible one is not reported only after hours.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path

from flowreel.engine.errors import OutputExistsError, OutputWriteError, UsageError
from flowreel.engine.files import PathLike, json_object
from flowreel.engine.publish import write_errors
from flowreel.engine.sources import image_folders
from flowreel.engine.sources.kinds import IMAGE_SUFFIXES


def require_apart(path: PathLike, other: PathLike, what: str) -> None:
    """Raises UsageError if ``path`` is the same as ``other`` or inside it. ``what``: what ``other`` is."""
    here, there = os.path.realpath(path), os.path.realpath(other)
    if here == there:
        raise UsageError(f"{os.fspath(path)} is {what}: choose another place")
    if here.startswith(os.path.join(there, "")):
        raise UsageError(f"{os.fspath(path)} lies inside {os.fspath(other)}, {what}: choose another place")


def require_harmless(path: PathLike, source: PathLike) -> None:
    """Raises UsageError if writing to ``path`` would replace the source, or add a picture to its image folder.

    Also for an empty source name, which would stand for the working folder.
    """
    if not os.fspath(source):
        raise UsageError("the source's name is empty")
    folders = image_folders(source)
    if folders is None:
        require_apart(path, source, "what is being read")
        return
    require_not_among(path, set(map(os.path.realpath, folders)))


def require_not_among(path: PathLike, folders: Container[str]) -> None:
    """Raises UsageError if ``path`` is a picture in one of the folders, real paths, whose images are being read."""
    here = os.path.realpath(os.path.dirname(path) or ".")
    if Path(path).suffix.lower() in IMAGE_SUFFIXES and here in folders:
        raise UsageError(f"{os.fspath(path)} lies among the images that are being read: choose another folder")


def require_report(path: Path, outputs: Iterable[PathLike], sources: Iterable[PathLike]) -> None:
    """Checks, before the work begins, that a report can be written to ``path`` when the work is done.

    Raises:
        UsageError: it would replace an output or what is being read, or lies inside a store.
        OutputExistsError: a file exists there that is not a report.
        OutputWriteError: a folder is there, a file is in place of its parent folder, or that folder takes no files.
    """
    for output in outputs:
        require_apart(path, output, "an output")
    for source in sources:
        require_harmless(path, source)
    require_outside_stores(path)
    if path.is_dir():
        raise OutputWriteError(f"cannot write {path}: a folder of that name exists")
    if path.is_file() and path.stat().st_size and not _is_report(path):
        raise OutputExistsError(f"{path} exists and is not a report written by flowreel: choose another name")
    there = next((folder for folder in path.parents if os.path.lexists(folder)), None)
    if there is not None and not there.is_dir():
        raise OutputWriteError(f"cannot write {path}: {there} is not a folder")
    if there == path.parent and not os.path.lexists(path):
        with write_errors(path):  # some folders accept no new files, whatever their permissions say
            path.touch()
            path.unlink()


def _is_report(path: Path) -> bool:
    """Whether the file holds what a run, an export or a run over many sources reports, or a manifest."""
    held = None
    with suppress(OSError):
        held = json_object(path)
    return held is not None and ("sources" in held or {"seconds", "outputs"} <= held.keys())


def require_outside_stores(path: PathLike) -> None:
    """Raises UsageError if ``path`` lies inside a store."""
    for folder in Path(os.path.realpath(path)).parents:
        if (folder / "zarr.json").is_file():
            raise UsageError(f"{os.fspath(path)} lies inside the store {folder}: choose another place")
