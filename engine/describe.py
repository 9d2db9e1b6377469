"""What a file is, in plain values: a video, a ``.flo``, a flow store, or weights."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from flowreel.engine.config import SelectConfig
from flowreel.engine.data import JSON, UNKNOWN_ABOVE
from flowreel.engine.errors import SourceNotFoundError
from flowreel.sinks import open_store, read_flo


def describe(name: str) -> dict[str, JSON]:
    """What ``name`` holds; its ``kind`` is ``video``, ``images``, ``flo``, ``store`` or ``weights``.

    Raises:
        SourceNotFoundError: nothing goes by that name.
        FlowreelError: it is there, but cannot be read as what its name says.
    """
    path = Path(name)
    suffixes = path.name.removesuffix(".partial").lower()
    if suffixes.endswith(".zarr"):
        return _store(path)
    if not path.exists() and not any(mark in name for mark in "*?[:"):
        raise SourceNotFoundError(f"nothing is at {name}")
    if suffixes.endswith(".flo"):
        return _flo(path)
    if suffixes.endswith((".safetensors", ".pth.tar", ".pth", ".pt", ".ckpt")):
        return _weights(path)
    return _source(name)


def _store(path: Path) -> dict[str, JSON]:
    return {"kind": "store", **open_store(path).summary()}


def _flo(path: Path) -> dict[str, JSON]:
    flow = read_flo(path)
    height, width = flow.shape[:2]
    known = (np.abs(flow) <= UNKNOWN_ABOVE).all(-1)
    vectors = flow[known]
    return {
        "kind": "flo",
        "tag": "PIEH (202021.25)",
        "width": width,
        "height": height,
        "first_vector": [float(part) for part in flow[0, 0]],
        "min": [float(part) for part in vectors.min(0)] if len(vectors) else None,
        "max": [float(part) for part in vectors.max(0)] if len(vectors) else None,
        "unknown": int(known.size - known.sum()),
    }


def _weights(path: Path) -> dict[str, JSON]:
    from flowreel.engine.models.weights import read_weights

    weights = read_weights(path)
    return {
        "kind": "weights",
        "model": weights.model,
        "also_runs": list(weights.serves()[1:]),
        "batch_norm": weights.batch_norm,
        "width": weights.width,
        "parameters": sum(tensor.numel() for tensor in weights.state.values()),
        "licence": weights.licence,
        "sha256": weights.sha256,
        "made_by": dict(weights.made_by),
    }


def _source(name: str) -> dict[str, JSON]:
    from flowreel.engine.sources import open_source

    with closing(open_source(name, SelectConfig())) as source:
        info = source.info
        return {
            "kind": "video" if source.decoder.startswith("PyAV") else source.decoder,
            "decoder": source.decoder,
            "width": info.width,
            "height": info.height,
            "frames": info.frame_count,
            "flows": info.flow_count,
            "frame_rate": None if info.frame_rate is None else float(info.frame_rate),
            "duration_s": info.source.duration_s,
            "size_bytes": info.source.size_bytes,
            "notes": list(source.notes),
        }
