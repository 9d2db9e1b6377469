"""Publish on success: write beside the destination, make it durable, then give it its name in one step.

Every output goes through here, so that a killed run or a full disk leaves either the whole file or folder, or something
whose name ends in ``.partial``. The order is always the same: contents to disk, rename, the folder's entry to disk;
a power cut between any two of them loses nothing that was already published.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from flowreel.engine.claims import Claim
from flowreel.engine.errors import OutputError, OutputExistsError, OutputWriteError

MOST_PIECES = 1024  # that Linux and macOS take at once


def partial_path(path: Path) -> Path:
    """Name of a file or folder that is still being written: ``X.zarr`` -> ``X.zarr.partial``."""
    return path.with_name(path.name + ".partial")


def replaced_path(path: Path) -> Path:
    """Where an old folder waits for the moment between its own renaming and its successor's."""
    return path.with_name(path.name + ".replaced")


def require_absent(path: Path, overwrite: bool) -> None:
    """Raises OutputExistsError when something is at ``path`` and nobody asked to replace it."""
    if not overwrite and os.path.lexists(path):
        raise OutputExistsError(f"{path} is already there: pass --overwrite to replace it, or choose another name")


@contextmanager
def write_errors(path: Path | str) -> Iterator[None]:
    """Turns the operating system's errors into OutputWriteError naming ``path``; flowreel's own pass unchanged."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        hint = "; free some space or choose another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OutputWriteError(f"cannot write {path}: {error.strerror or error}{hint}") from error


def sync_file(path: Path) -> None:
    """Waits until a file's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Waits until a folder's entries (new names, renames) are on the disk."""
    try:
        sync_file(path)
    except OSError as error:
        # Some network file systems know no fsync of a folder; there is nothing better to do on them.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, each one's entry on the disk before anything goes into it.

    Raises NotADirectoryError where something else is in its place or above it.
    """
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
        sync_folder(folder.parent)


def publish_file(temporary: Path, path: Path) -> None:
    """Gives a finished temporary file its name, replacing what was there. Both lie in the same folder."""
    sync_file(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A name to write a new file under, which gets its own name ``path`` when the block ends; else nothing remains.

    Parent folders are created. The temporary name is always the same one, so that leftovers of a killed run are
    replaced rather than collected.
    """
    make_folder(path.parent)
    temporary = partial_path(path)
    remove_leftover(temporary)
    try:
        yield temporary
        publish_file(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """The same, opened for writing."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def publish_bytes(path: Path, *pieces: bytes) -> int:
    """Writes the pieces one after another as one file, atomically. Returns the file's size in bytes."""
    with atomic_file(path) as file:
        file.writelines(pieces)
    return sum(len(piece) for piece in pieces)


def write_pieces(file: BinaryIO, pieces: Iterable[bytes | memoryview]) -> None:
    """Writes them one after another to a file that nothing waits in to be written, as many at once as a system takes.

    With a call for each piece a thread would have to come by the GIL after each, and in a fast run many want it.
    """
    if not hasattr(os, "writev"):  # as on Windows
        file.writelines(pieces)
        return
    waiting = deque(memoryview(piece).cast("B") for piece in pieces)
    while waiting:
        written = os.writev(file.fileno(), list(islice(waiting, MOST_PIECES)))
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.popleft())
        if written:  # a part of one
            waiting[0] = waiting[0][written:]


def write_unfinished(contents: Mapping[Path, Iterable[bytes | memoryview]], output: Path | str | None = None) -> int:
    """Writes files that belong together under their unfinished names, durably; on an error none of them is left.

    ``contents``: by the names they are to get, see ``give_names``. ``output``: what an error says cannot be written;
    None: the file. Parent folders are created. Returns their bytes.
    """
    written, nbytes = [], 0
    try:
        for path, pieces in contents.items():
            with write_errors(output or path):
                make_folder(path.parent)
                temporary = partial_path(path)
                remove_leftover(temporary)
                written.append(path)
                with open(temporary, "wb") as file:
                    write_pieces(file, pieces)
                    nbytes += file.tell()
                sync_file(temporary)
    except BaseException:
        drop_unfinished(written)
        raise
    return nbytes


def drop_unfinished(paths: Iterable[Path]) -> None:
    """Removes what ``write_unfinished`` wrote, by the names it was to get. Folders are somebody else's."""
    for path in paths:
        with suppress(OSError):
            remove_leftover(partial_path(path))


def give_names(paths: Iterable[Path]) -> None:
    """Finished files lose the ``.partial`` of their names, in this order. Their folders' entries are not synced."""
    for path in paths:
        with write_errors(path):
            os.replace(partial_path(path), path)


def give_name(path: Path) -> None:
    """A finished file loses the ``.partial`` of its name, durably."""
    os.replace(partial_path(path), path)
    sync_folder(path.parent)


def publish_first(path: Path, *pieces: bytes) -> bool:
    """Like ``publish_bytes``, for a file that several threads and processes may make at once: the first one stays.

    False: it was there already, and is as it was. Its name is on the disk after ``sync_folder``, its contents before.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(temporary, "xb") as file:
            file.writelines(pieces)
        sync_file(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system that knows no links: whoever comes last stays, and both are whole
            if path.exists():
                return False
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def publish_folder(temporary: Path, path: Path) -> None:
    """Gives a finished folder its name, replacing an old one. Its files must be on the disk already.

    A folder cannot be renamed over a full one, so the old one steps aside first and is deleted last. At every moment
    at least one of the two is whole; ``settle_replaced`` tidies up when the process dies in between.
    """
    settle_replaced(path)
    aside = replaced_path(path)
    replaces = os.path.lexists(path)
    if replaces:
        os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError:
        if replaces:
            os.rename(aside, path)
        raise
    sync_folder(path.parent)
    if replaces:
        remove(aside, ignore_errors=True)  # the new one is published; a leftover goes with the next run


def settle_replaced(path: Path) -> None:
    """Finishes what a process killed inside ``publish_folder`` left: puts the old one back, or deletes it."""
    aside = replaced_path(path)
    if not os.path.lexists(aside):
        return
    if os.path.lexists(path):
        remove(aside)
    else:
        os.rename(aside, path)
        sync_folder(path.parent)


def claimed_file(path: Path, output: str) -> Claim:
    """An empty file under an unfinished name, held; what lay there before is gone.

    Raises OutputBusyError while another run holds it, IsADirectoryError where a folder is.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.is_symlink():
        path.unlink(missing_ok=True)
    claim = Claim.of_file(path, output)
    if claim.made:
        return claim
    remove_leftover(path)
    try:
        return Claim.of_file(path, output)
    finally:
        claim.release()


def remove_leftover(path: Path) -> None:
    """Removes what lies under an unfinished name, so that no link there is followed and no pipe waited for.

    A folder stays: it is an error to whoever opens a file of that name.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Deletes a file, a link or a whole folder, if it is there. Another process may do the same at that moment."""
    while path.is_dir() and not path.is_symlink():
        if ignore_errors:
            return shutil.rmtree(path, ignore_errors=True)
        with suppress(FileNotFoundError):  # of what has gone already
            shutil.rmtree(path)
    with suppress(OSError) if ignore_errors else suppress(FileNotFoundError):
        path.unlink()
