"""The user's files: their natural order, globs, links and JSON, and the cache folder."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


def as_names(paths: PathLike | Iterable[PathLike]) -> list[str]:
    """The names of one path or of several."""
    return [os.fspath(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]


def natural_order(path: Path) -> tuple[list[int | str], str]:
    """Sort key that compares digits inside names as numbers, in every part of the path. Spaces before digits do not
    count: names such as ``%4d.flo`` pad numbers with them."""
    parts = re.split(r" *([0-9]+)", str(path).casefold())  # text, digits, text, digits, ...
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], str(path)


def as_glob(name: str) -> str | None:
    """The name as a pattern for ``glob.glob``; None if it holds no wildcards.

    Leading folders that exist by that exact name are taken literally: ``clip[1]/*.png`` are the images in ``clip[1]``.
    """
    folder, rest = name, ""
    while folder and not os.path.isdir(folder):
        above, last = os.path.split(folder)
        rest, folder = os.path.join(last, rest) if rest else last, above
    return os.path.join(glob.escape(folder), rest) if glob.has_magic(rest) else None


def matches(name: str) -> list[str]:
    """The path of that name if it exists, else those that the name matches as a glob."""
    return [name] if os.path.exists(name) else glob.glob(as_glob(name) or name, recursive=True)


def leads_nowhere(path: Path) -> bool:
    """Whether the path is a symbolic link whose target does not exist."""
    return path.is_symlink() and not path.exists()


def folder_name(path: PathLike) -> str:
    """The name of a folder, also of ``.`` and ``..``; ``flow`` for the root folder, which has none."""
    return Path(os.path.abspath(path)).name or "flow"


def json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None for any other content, of whatever size. Raises OSError."""
    with path.open("rb") as file, suppress(ValueError, RecursionError):
        if file.peek(1).startswith(b"{"):
            held: dict[str, Any] = json.load(file)
            return held
    return None


def cache_folder(kind: str) -> Path:
    """Where cached files of a kind go: ``$FLOWREEL_CACHE/KIND``, else ``flowreel/KIND`` in the user's cache folder.

    That is ``$XDG_CACHE_HOME`` if it is an absolute path, as its specification demands, else ``~/.cache``. The folder
    need not exist. For a user whose home folder the system does not know, the path is not absolute.
    """
    own, users = os.environ.get("FLOWREEL_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own).absolute() / kind
    return Path(users if os.path.isabs(users) else os.path.expanduser("~/.cache")) / "flowreel" / kind
