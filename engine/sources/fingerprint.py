"""Recognises an input again, so that a resumed run goes on with the same one, or with the same one grown."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from flowreel.engine.data import SourceId

HEAD_BYTES = 1 << 20  # enough to tell videos apart, little enough to read from a slow disk at once


def source_id(name: str, files: Sequence[Path], duration_s: float | None = None) -> SourceId:
    """What is recorded of an input: ``name``, the bytes of all its files, and what the first one begins with."""
    with files[0].open("rb") as file:
        head = hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()
    return SourceId(name, sum(path.stat().st_size for path in files), duration_s, head)
