"""Files of the user's: the order in which they come, and where what is kept for next time lies."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

PathLike = str | os.PathLike[str]


def natural_order(path: Path) -> tuple[list[int | str], str]:
    """Sort key under which numbers inside names count as numbers, in every part of the path."""
    parts = re.split(r"([0-9]+)", str(path).casefold())  # text, digits, text, digits, ...
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], str(path)


def as_glob(name: str) -> str | None:
    """The glob that a name is, for ``glob.glob``; None where nothing in it stands for other characters.

    A folder that is there by that very name is meant by it: ``clip[1]/*.png`` are the images in ``clip[1]``.
    """
    folder, rest = name, ""
    while folder and not os.path.isdir(folder):
        above, last = os.path.split(folder)
        rest, folder = os.path.join(last, rest) if rest else last, above
    return os.path.join(glob.escape(folder), rest) if glob.has_magic(rest) else None


def leads_nowhere(path: Path) -> bool:
    """Whether it is a link whose file is not there."""
    return path.is_symlink() and not path.exists()


def cache_folder(kind: str) -> Path:
    """Where such things are kept: ``$FLOWREEL_CACHE/KIND``, else ``flowreel/KIND`` in the user's cache folder.

    That is ``$XDG_CACHE_HOME`` where it is a whole path, as its specification demands, else ``~/.cache``. It need not
    be there. Of a user whom the system does not know the path is none that starts at the root.
    """
    own, users = os.environ.get("FLOWREEL_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own).absolute() / kind
    return Path(users if os.path.isabs(users) else os.path.expanduser("~/.cache")) / "flowreel" / kind
