"""Publish on success: write beside the destination, make it durable, then rename it into place.

Every output goes through here, so that a killed run or a full disk leaves either the whole file or folder, or something
whose name ends in ``.partial``. The order is always the same: sync the contents, rename, sync the folder's entry; a
power cut between any two of these steps loses nothing that was already published.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from flowreel.engine.claims import Claim
from flowreel.engine.errors import OutputError, OutputExistsError, OutputWriteError

MOST_PIECES = 1024  # IOV_MAX of Linux and macOS: buffers that one writev takes


def partial_path(path: Path) -> Path:
    """Name of a file or folder that is still being written: ``X.zarr`` -> ``X.zarr.partial``."""
    return path.with_name(path.name + ".partial")


def replaced_path(path: Path) -> Path:
    """A name for an old folder between its own renaming and that of its successor.

    The random part tells it from a user's own ``X.zarr.replaced``.
    """
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.replaced")


def require_absent(path: Path, overwrite: bool) -> None:
    """Raises OutputExistsError when something exists at ``path`` and ``overwrite`` is not set."""
    if not overwrite and os.path.lexists(path):
        raise OutputExistsError(f"{path} is already there: pass --overwrite to replace it, or choose another name")


@contextmanager
def write_errors(path: Path | str) -> Iterator[None]:
    """Turns OSError into OutputWriteError naming ``path``; OutputError passes unchanged."""
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
        # Some network file systems cannot fsync a folder; there is nothing better to do on them.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, syncing the entry of each before anything goes into it.

    Raises NotADirectoryError when something other than a folder is at that path or above it.
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
    """Syncs a finished temporary file and renames it to ``path``, in the same folder, replacing what was there."""
    sync_file(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to ``path`` when the block succeeds and removed when it fails.

    Parent folders are created. The temporary name is always the same, so that leftovers of killed runs are replaced
    and do not pile up. Raises OutputBusyError while another thread or process writes the same file.
    """
    make_folder(path.parent)
    temporary = partial_path(path)
    claim = claimed_file(temporary, str(path))
    try:
        yield temporary
        publish_file(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    finally:
        claim.release()


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """``atomic_path``, opened for writing."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def publish_bytes(path: Path, *pieces: bytes) -> int:
    """Writes the pieces one after another as one file, atomically. Returns the file's size in bytes."""
    with atomic_file(path) as file:
        file.writelines(pieces)
    return sum(len(piece) for piece in pieces)


def write_pieces(file: FileIO, pieces: Iterable[bytes | memoryview]) -> int:
    """Writes the pieces in order with as few system calls as possible. Returns their size in bytes.

    A system call for each piece would have to reacquire the GIL each time, and in a fast run many threads compete for
    it.
    """
    waiting = deque(memoryview(piece).cast("B") for piece in pieces)
    nbytes = sum(map(len, waiting))
    while waiting:
        written = os.writev(file.fileno(), list(islice(waiting, MOST_PIECES)))
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.popleft())
        if written:  # the last piece in part
            waiting[0] = waiting[0][written:]
    return nbytes


def write_unfinished(contents: Mapping[Path, Iterable[bytes | memoryview]], output: Path | str | None = None) -> int:
    """Writes files that belong together under their ``.partial`` names, and syncs them; on an error all are removed.

    ``contents``: pieces by final path, see ``give_names``. ``output``: what an error names as not written; None: the
    file. Parent folders are created. Returns the number of bytes written.
    """
    written, nbytes = [], 0
    try:
        for path, pieces in contents.items():
            with write_errors(output or path):
                make_folder(path.parent)
                temporary = partial_path(path)
                remove_leftover(temporary)
                written.append(path)
                with open(temporary, "wb", buffering=0) as file:
                    nbytes += write_pieces(file, pieces)
                sync_file(temporary)
    except BaseException:
        drop_unfinished(written)
        raise
    return nbytes


def drop_unfinished(paths: Iterable[Path]) -> None:
    """Removes what ``write_unfinished`` wrote, given the final paths. Folders of those names are not ours and stay."""
    for path in paths:
        with suppress(OSError):
            remove_leftover(partial_path(path))


def give_names(paths: Iterable[Path]) -> None:
    """Renames finished files from their ``.partial`` names, in this order, without syncing their folders."""
    for path in paths:
        with write_errors(path):
            os.replace(partial_path(path), path)


def give_name(path: Path) -> None:
    """Renames a finished file from its ``.partial`` name, and syncs the folder."""
    os.replace(partial_path(path), path)
    sync_folder(path.parent)


def publish_first(path: Path, *pieces: bytes) -> bool:
    """Like ``publish_bytes``, for a file that several threads or processes may write at once: the first one wins.

    Returns False when the file already existed, which leaves it unchanged. The contents are synced; the name is not
    until the caller calls ``sync_folder``.
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
        except OSError:  # a file system without hard links: the last one wins, and each is whole
            if path.exists():
                return False
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def publish_folder(temporary: Path, path: Path) -> None:
    """Renames a finished folder to ``path``, replacing an old one. Its files must be synced already.

    A folder cannot be renamed over one that is not empty, so the old one is renamed first and deleted last. At every
    moment at least one of the two is whole; ``settle_replaced`` cleans up when the process dies in between.
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
        remove(aside, ignore_errors=True)  # the new one is published; the next run removes a leftover


def require_replaceable(path: Path) -> None:
    """Raises OSError if a folder at ``path`` could not step aside because its name is too long for that."""
    if os.path.lexists(path):
        with suppress(FileNotFoundError):
            os.lstat(replaced_path(path))


def replaced(path: Path) -> Iterator[Path]:
    """The old folders left by processes killed inside ``publish_folder``."""
    return path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 16}.replaced")


def settle_replaced(path: Path) -> None:
    """Cleans up after a process killed inside ``publish_folder``: puts the old folder back, or deletes it."""
    for aside in replaced(path):
        if os.path.lexists(path):
            remove(aside)
        else:
            os.rename(aside, path)
            sync_folder(path.parent)


def claimed_file(path: Path, output: str) -> Claim:
    """Creates an empty, locked file under an unfinished name, in place of any leftover.

    Raises OutputBusyError while another run holds it, IsADirectoryError when a folder has that name.
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
    """Removes what is left under an unfinished name, so that opening it follows no link and blocks on no pipe.

    A folder stays: opening a file of that name then fails.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Deletes a file, a link or a whole folder, if it exists. Another process may be deleting it at the same time."""
    while path.is_dir() and not path.is_symlink():
        if ignore_errors:
            return shutil.rmtree(path, ignore_errors=True)
        with suppress(FileNotFoundError):  # deleted by another process
            shutil.rmtree(path)
    with suppress(OSError if ignore_errors else FileNotFoundError):
        path.unlink()
