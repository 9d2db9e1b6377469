"""Identifies an input, so that a resumed run continues with the same one, or with the same one grown longer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowreel.engine.data import HEAD_BYTES, SourceId

_HEADS = tuple(1 << bits for bits in (10, 12, 14, 16, 18))  # bytes
_SAMPLES = 32  # per input, spread over its bytes; of several files at least two each
_SAMPLE_BYTES = 1 << 14


def source_id(name: str, files: Sequence[Path], duration_s: float | None = None) -> SourceId:
    """Identity of an input: ``name``, total size, a hash of the first file's head, a hash of samples of all files."""
    with files[0].open("rb") as file:
        head = file.read(HEAD_BYTES)
    heads = tuple(_sha256(head[:count]) for count in _HEADS if count <= len(head))
    size = sum(path.stat().st_size for path in files)
    return SourceId(name, size, duration_s, _sha256(head), heads, _sampled(files))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def last_change(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in ns: enough to see that a file in use was replaced."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _sampled(files: Sequence[Path]) -> str:
    """A hash of samples spread over the files.

    The last sample of a file is its end, which in compressed data depends on all that comes before it.
    """
    count = max(_SAMPLES // len(files), 2)
    samples = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            samples.update(size.to_bytes(8, "little"))
            last = max(size - _SAMPLE_BYTES, 0)
            for start in np.unique(np.linspace(0, last, count + 1, dtype=np.int64)[1:]).tolist():
                file.seek(start)
                samples.update(file.read(_SAMPLE_BYTES))
    return samples.hexdigest()
