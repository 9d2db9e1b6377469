"""Recognises an input again, so that a resumed run goes on with the same one, or with the same one grown."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowreel.engine.data import SourceId

HEAD_BYTES = 1 << 20  # enough to tell videos apart, little enough to read from a slow disk at once
_SAMPLES = 32  # of an input's bytes, spread over it; of many files at least two each
_SAMPLE_BYTES = 1 << 14


def source_id(name: str, files: Sequence[Path], duration_s: float | None = None) -> SourceId:
    """What is recorded of an input: ``name``, the bytes of its files, what the first begins with, samples of all."""
    with files[0].open("rb") as file:
        head = hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()
    return SourceId(name, sum(path.stat().st_size for path in files), duration_s, head, _sampled(files))


def last_change(path: Path) -> tuple[int, int]:
    """Bytes, and when they last changed: enough to see that a file was replaced while it is being used."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _sampled(files: Sequence[Path]) -> str:
    """A hash of samples all over the files. A file's last one is its end: compressed, it follows from all before."""
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
