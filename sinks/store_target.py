"""Where a store's files go: all that the writer needs of a storage location, so that other kinds can be added.

So far there is the local disk. A file appears whole or not at all, in the order requested; ``X.zarr.partial`` becomes
``X.zarr`` in one step at the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from flowreel.engine import publish
from flowreel.engine.claims import Claim, still_named
from flowreel.engine.errors import OutputExistsError, OutputWriteError


class StoreTarget(Protocol):
    """A location for one store. Keys are relative paths, with ``/`` between their parts."""

    name: str  # of the finished store

    def put(self, key: str, *pieces: bytes) -> int:
        """Publishes the pieces as one file, durable when this returns. Returns its size in bytes."""
        ...

    def prepare(self, files: Mapping[str, Iterable[bytes]]) -> int:
        """Writes files, given by key, durably but under temporary names.

        Returns their size in bytes. On an error nothing is left. Threads may prepare different files at once.
        """
        ...

    def publish(self, keys: Iterable[str]) -> None:
        """Gives prepared files their names, one after another, durably."""
        ...

    def withdraw(self, keys: Iterable[str]) -> None:
        """Removes prepared files."""
        ...

    def delete(self, key: str) -> None: ...
    def keys(self) -> Iterator[str]:
        """Keys of the unfinished store's files."""
        ...

    def tidy(self) -> None:
        """Removes folders left empty because their files were deleted or never created."""
        ...

    def finish(self) -> None:
        """Gives the store its final name, replacing an older store."""
        ...

    def discard(self) -> None:
        """Removes the unfinished store."""
        ...


class LocalTarget:
    """A folder on the local disk. Errors: OutputExistsError, OutputWriteError.

    From ``hold`` to ``let_go`` no other run can write the unfinished store: it gets an OutputBusyError.
    """

    def __init__(self, path: str) -> None:
        self.name = str(Path(path))
        self.final = Path(path)
        self.folder = publish.partial_path(self.final)
        self._reopened = self.folder.with_name(self.folder.name + ".new")  # covered by the lock as well
        self._claim: Claim | None = None

    @property
    def left_over(self) -> bool:
        """Whether an unfinished store is there, or what a run left that was killed as it gave one its name."""
        return self.folder.is_dir() or any(publish.replaced(self.final))

    def hold(self) -> None:
        """Locks the unfinished store, whose contents stay. Called before looking at what another run might change.

        What killed runs left beside it is removed, or gets its name back.
        """
        publish.make_folder(self.folder.parent)
        self._claim = Claim.of_folder(self.folder, self.name)
        publish.settle_replaced(self.final)
        if os.path.lexists(self._reopened):
            publish.remove(self._reopened)

    @property
    def held(self) -> tuple[int, ...]:
        """The file descriptors by which a process that inherits them shares the lock."""
        return () if self._claim is None else (self._claim.descriptor,)

    def let_go(self) -> None:
        """Releases the lock. The contents of the unfinished store stay, to be resumed."""
        if self._claim is not None:
            self._claim.withdraw()

    def start(self, overwrite: bool, afresh: bool = False) -> None:
        """Begins an empty unfinished store. A finished one stays until ``finish``; it is an error unless ``overwrite``.

        afresh: an unfinished store is removed even without ``overwrite``; one that holds no flow always is.
        """
        if self.final.exists() and not (self.final / "zarr.json").is_file():
            raise OutputExistsError(f"{self.final} exists and is not a Zarr store: remove it yourself if it can go")
        publish.require_absent(self.final, overwrite)
        publish.require_replaceable(self.final)
        assert self._claim is not None, "hold comes before start"
        if not self._claim.made and not (overwrite or afresh or self._is_bare()):
            raise OutputExistsError(
                f"{self.folder} is an unfinished store of an earlier run: --resume continues what flowreel run began, "
                "--overwrite starts afresh"
            )
        self._empty()

    def reopen(self, finished: bool) -> None:
        """Continues the unfinished store; if ``finished``, the finished one's files, linked under the unfinished name.

        The finished store itself stays as it is: the two share their files, and none is ever changed in place.
        """
        if finished:
            publish.require_replaceable(self.final)
            self._empty()
            claim = Claim.of_folder(self._reopened, self.name)
            try:
                _link_folder(self.final, self._reopened)
                os.rename(self._reopened, self.folder)  # replaces the empty folder
            except BaseException:
                publish.remove(self._reopened, ignore_errors=True)
                raise
            self._hold_instead(claim)
        for key in list(self.keys()):
            if key.endswith(".partial"):
                self.delete(key)

    def copy(self, finished: Path) -> int:
        """Makes the store a copy of a finished one, durably. Returns its size in bytes."""
        nbytes = 0
        try:
            for path in (path for path in finished.rglob("*") if path.is_file()):
                self._require_ours()
                with publish.atomic_path(self.folder / path.relative_to(finished)) as temporary:
                    shutil.copyfile(path, temporary)
                nbytes += path.stat().st_size
            self.finish()
        except BaseException:
            self.discard()
            raise
        return nbytes

    def put(self, key: str, *pieces: bytes) -> int:
        self._require_ours()
        return publish.publish_bytes(self.folder / key, *pieces)

    def prepare(self, files: Mapping[str, Iterable[bytes]]) -> int:
        self._require_ours()
        return publish.write_unfinished({self.folder / key: pieces for key, pieces in files.items()}, self.name)

    def publish(self, keys: Iterable[str]) -> None:
        self._require_ours()
        for key in keys:
            publish.give_name(self.folder / key)

    def withdraw(self, keys: Iterable[str]) -> None:
        publish.drop_unfinished(self.folder / key for key in keys)

    def delete(self, key: str) -> None:
        (self.folder / key).unlink(missing_ok=True)

    def keys(self) -> Iterator[str]:
        for path in self.folder.rglob("*"):
            if not path.is_dir():
                yield path.relative_to(self.folder).as_posix()

    def tidy(self) -> None:
        for path in sorted(self.folder.rglob("*"), reverse=True):  # the contents of a folder come before it
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # usually it is not empty
                    path.rmdir()

    def finish(self) -> None:
        self._require_ours()
        publish.publish_folder(self.folder, self.final)

    def discard(self) -> None:
        with suppress(OSError):  # as where the disk is gone
            if self._is_ours():
                publish.remove(self.folder, ignore_errors=True)

    def _is_bare(self) -> bool:
        """Whether the unfinished store holds at most metadata, the vectors' places and the first shard's times."""
        return self.folder.is_dir() and all(key.endswith(("zarr.json", "/c/0", ".partial")) for key in self.keys())

    def _is_ours(self) -> bool:
        """Whether the folder of the unfinished name is still the one that was locked."""
        return self._claim is None or still_named(self._claim.descriptor, self.folder)

    def _require_ours(self) -> None:
        """Otherwise what is written from now on would be called a whole store, without what was written before."""
        if not self._is_ours():
            raise OutputWriteError(
                f"cannot write {self.name}: {self.folder} was moved or removed meanwhile, or the working folder changed"
            )

    def _empty(self) -> None:
        """Removes what lies under the unfinished name.

        A folder is emptied and kept, as the lock is on it: no other run can slip in between.
        """
        assert self._claim is not None, "hold comes before anything else"
        if self._claim.made:
            return
        if self.folder.is_symlink() or not self.folder.is_dir():
            publish.remove(self.folder)
            self._hold_instead(Claim.of_folder(self.folder, self.name))
            return
        for path in list(self.folder.iterdir()):
            publish.remove(path)
        self._claim.made = True  # so that ``let_go`` removes it if nothing comes into it

    def _hold_instead(self, claim: Claim) -> None:
        assert self._claim is not None
        self._claim.release()
        self._claim = claim


def _link_folder(source: Path, destination: Path) -> None:
    """Links all files of a folder, and of those in it, into another one, durably."""
    destination.mkdir(exist_ok=True)
    for path in source.iterdir():
        (_link_folder if path.is_dir() else _link)(path, destination / path.name)
    publish.sync_folder(destination)


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # across mount points, or without support for links
        shutil.copy2(source, destination)
        publish.sync_file(destination)
