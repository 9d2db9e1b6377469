"""Where a store's files go: everything the writer needs of a place, so that another kind of place can come.

Today there is the local disk. A file appears whole or not at all, in the order asked for; ``X.zarr.partial`` becomes
``X.zarr`` in one step at the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from flowreel.engine.errors import OutputExistsError
from flowreel.sinks import publish


class StoreTarget(Protocol):
    """A place for one store. Keys are relative, with ``/`` between their parts."""

    name: str  # of the finished store

    def put(self, key: str, *pieces: bytes) -> int:
        """Makes the pieces one file that is there, durably, when this returns. Returns its bytes."""
        ...

    def delete(self, key: str) -> None: ...
    def keys(self) -> Iterator[str]:
        """What is there of the unfinished store."""
        ...

    def finish(self) -> None:
        """Gives the store its name, replacing one that was there."""
        ...

    def discard(self) -> None:
        """Removes the unfinished store."""
        ...


class LocalTarget:
    """A folder on a disk. OutputExistsError and OutputWriteError tell what is in the way."""

    def __init__(self, path: str) -> None:
        self.name = str(Path(path))
        self.final = Path(path)
        self.folder = publish.partial_path(self.final)

    def start(self, overwrite: bool, afresh: bool = False) -> None:
        """An empty unfinished store. A finished one stays until ``finish``, and only gives way if it may.

        afresh: an unfinished one is removed, although nothing may be overwritten.
        """
        publish.settle_replaced(self.final)
        publish.require_absent(self.final, overwrite)
        self._require_store()
        if self.folder.exists() and not (overwrite or afresh):
            raise OutputExistsError(
                f"{self.folder} is an unfinished store of an earlier run: pass --resume to go on with it, "
                "or --overwrite to start afresh"
            )
        publish.remove(self.folder)
        publish.make_folder(self.folder.parent)
        self.folder.mkdir()  # fails if another run made it meanwhile

    def reopen(self) -> None:
        """The unfinished store as it is, or a finished one's files under the unfinished name, to be gone on with.

        The finished store itself stays as it is: the two share their files, and none is ever changed in place.
        """
        publish.settle_replaced(self.final)
        if not self.folder.exists():
            self._require_store()
            aside = self.folder.with_name(self.folder.name + ".new")
            publish.remove(aside)
            shutil.copytree(self.final, aside, copy_function=_link)
            os.rename(aside, self.folder)
        for key in list(self.keys()):
            if key.endswith(".partial"):
                self.delete(key)

    def put(self, key: str, *pieces: bytes) -> int:
        return publish.publish_bytes(self.folder / key, *pieces)

    def delete(self, key: str) -> None:
        (self.folder / key).unlink(missing_ok=True)

    def keys(self) -> Iterator[str]:
        for path in self.folder.rglob("*"):
            if not path.is_dir():
                yield path.relative_to(self.folder).as_posix()

    def finish(self) -> None:
        publish.publish_folder(self.folder, self.final)

    def discard(self) -> None:
        publish.remove(self.folder, ignore_errors=True)

    def _require_store(self) -> None:
        if self.final.exists() and not (self.final / "zarr.json").is_file():
            raise OutputExistsError(f"{self.final} is there and is not a Zarr store: remove it yourself if it can go")


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system's mount, or one that knows no links
        shutil.copy2(source, destination)
