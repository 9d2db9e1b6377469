"""Files of the user's: the order in which they come, and where what is kept for next time lies."""

from __future__ import annotations

import os
import re
from pathlib import Path


def natural_order(path: Path) -> tuple[list[int | str], str]:
    """Sort key under which numbers inside names count as numbers, in every part of the path."""
    parts = re.split(r"([0-9]+)", str(path).casefold())  # text, digits, text, digits, ...
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], str(path)


def cache_folder(kind: str) -> Path:
    """Where such things are kept: ``$FLOWREEL_CACHE/KIND``, else ``flowreel/KIND`` in the user's cache folder.

    That is ``$XDG_CACHE_HOME`` where it is a whole path, as its specification demands, else ``~/.cache``. It need not
    be there. Of a user whom the system does not know the path is none that starts at the root.
    """
    own, users = os.environ.get("FLOWREEL_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own).absolute() / kind
    return Path(users if os.path.isabs(users) else os.path.expanduser("~/.cache")) / "flowreel" / kind
