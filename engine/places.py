"""Where may be written: not over what is read, not into each other, not among a store's files.

All of it is looked at before the work begins: what cannot be is not told of after hours.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from flowreel.engine.errors import OutputExistsError, OutputWriteError, UsageError
from flowreel.engine.files import PathLike
from flowreel.engine.sources import image_folders
from flowreel.engine.sources.kinds import IMAGE_SUFFIXES


def require_apart(path: PathLike, other: PathLike, what: str) -> None:
    """Raises UsageError where something is to be written to the place of ``other``, or inside it."""
    here, there = os.path.realpath(path), os.path.realpath(other)
    if here == there:
        raise UsageError(f"{os.fspath(path)} is {what}: choose another place")
    if here.startswith(os.path.join(there, "")):
        raise UsageError(f"{os.fspath(path)} lies inside {os.fspath(other)}, {what}: choose another place")


def require_harmless(path: PathLike, source: PathLike) -> None:
    """Raises UsageError where writing there would replace what is read, or put more pictures among its images.

    A source must have a name: an empty one would stand for the working folder.
    """
    if not os.fspath(source):
        raise UsageError("the source's name is empty")
    folders = image_folders(source)
    if folders is None:
        require_apart(path, source, "what is being read")
        return
    here = os.path.realpath(os.path.dirname(path) or ".")
    if Path(path).suffix.lower() in IMAGE_SUFFIXES and here in map(os.path.realpath, folders):
        raise UsageError(f"{os.fspath(path)} lies among the images that are being read: choose another folder")


def require_report(path: Path, outputs: Iterable[PathLike], sources: Iterable[PathLike]) -> None:
    """Looks, before the work begins, whether a report can be written to a file when it is done.

    Raises:
        UsageError: it would replace an output or what is being read.
        OutputExistsError: a file is there that is no report.
        OutputWriteError: a folder is there, or a file where its folder should be.
    """
    for output in outputs:
        require_apart(path, output, "an output")
    for source in sources:
        require_harmless(path, source)
    require_outside_stores(path)
    if path.is_dir():
        raise OutputWriteError(f"cannot write {path}: a folder of that name is there")
    if path.is_file() and path.stat().st_size and not _is_report(path):
        raise OutputExistsError(f"{path} is there and is no report that flowreel wrote: choose another name")
    there = next((folder for folder in path.parents if os.path.lexists(folder)), None)
    if there is not None and not there.is_dir():
        raise OutputWriteError(f"cannot write {path}: {there} is no folder")
    if there == path.parent and not os.path.lexists(path):
        try:  # some folders take no files, whatever their permissions say
            path.touch()
            path.unlink()
        except OSError as error:
            raise OutputWriteError(f"cannot write {path}: {error.strerror or error}") from error


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"{"


def require_outside_stores(path: PathLike) -> None:
    """Raises UsageError where a store is that something else would be written into."""
    for folder in Path(os.path.realpath(path)).parents:
        if (folder / "zarr.json").is_file():
            raise UsageError(f"{os.fspath(path)} lies inside the store {folder}: choose another place")


def make_folder(folder: Path) -> None:
    """With the folders above it, where they are missing. Raises OutputWriteError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OutputWriteError(f"{folder} is there and is no folder: choose another name") from None
    except OSError as error:
        raise OutputWriteError(f"cannot make the folder {folder}: {error.strerror or error}") from error
