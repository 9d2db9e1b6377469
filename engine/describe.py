"""What a file is, in plain values: a video, images, a synthetic scene, a flow file, a flow store, or weights.

Every answer has ``path``, ``kind`` and the same further keys for every file of that kind, None where nothing is known.
The answer is strictly valid JSON: all numbers are finite, NaN is None, and an infinite number is the text inf or -inf.
"""

from __future__ import annotations

import math
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, nullcontext
from fractions import Fraction
from importlib.resources import as_file
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowreel import sinks
from flowreel.engine.data import JSON, is_known
from flowreel.engine.errors import SourceNotFoundError, UnsupportedSourceError
from flowreel.engine.files import as_glob
from flowreel.engine.sources.kinds import IMAGE_SUFFIXES, WEIGHTS_SUFFIXES, is_synthetic, require_no_address

if TYPE_CHECKING:
    from flowreel.engine.data import Float32Array

Facts = dict[str, JSON]

BLOCK_VECTORS = 1 << 20  # vectors of a .flo read at a time: 8 MiB, whatever the size of the file
KNOWN_KINDS = (
    "a video, images (file, folder or quoted glob), synthetic:NAME, flow (.flo, .kitti.png, .npz), "
    "a flow store (.zarr) or weights (.safetensors, .pth.tar)"
)
_VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".mpg", ".flv", ".wmv"})
_RGB_16_BIT = bytes((16, 2))  # bytes 24 and 25 of a PNG file: bits per sample, colour type (RGB)
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


def describe(name: str) -> Facts:
    """What ``name`` holds: ``kind`` is ``video``, ``images``, ``synthetic``, ``flo``, ``kitti``, ``npz``, ``store`` or
    ``weights``.

    Raises:
        SourceNotFoundError, StoreNotFoundError: nothing of that name exists.
        UsageError: it is the address of something on a network.
        FlowreelError: it exists, but cannot be read as the kind it claims to be, or is of no known kind.
    """
    kind, reader = _kind(name)
    return {"path": name, "kind": kind} | {key: _strict(value) for key, value in reader(name).items()}


def _kind(name: str) -> tuple[str, Callable[[str], Facts]]:
    """The kind of ``name`` and the function that describes it, by the name and, where needed, a file's first bytes."""
    path = Path(name)
    ending = path.name.lower()
    if is_synthetic(name):
        return "synthetic", _synthetic
    if ending.removesuffix(".partial").endswith(".zarr") or (path / "zarr.json").is_file():
        return "store", _store
    if not os.path.lexists(path):
        if name == "baseline":
            return "weights", _weights
        require_no_address(name)
        if as_glob(name) is not None:
            return "images", _images
        raise SourceNotFoundError(f"nothing is at {name}: expected {KNOWN_KINDS}")
    if path.is_dir():
        return "images", _images
    if not path.is_file():
        raise UnsupportedSourceError(f"{name} is neither a file nor a folder: expected {KNOWN_KINDS}")
    return _kind_of_file(path, ending)


def _kind_of_file(path: Path, ending: str) -> tuple[str, Callable[[str], Facts]]:
    with path.open("rb") as file:
        start = file.read(26)
    if ending.endswith(".flo") or start[:4] == b"PIEH":
        return "flo", _flo
    if ending.endswith(".kitti.png") or (start[1:4] == b"PNG" and start[24:] == _RGB_16_BIT and _is_kitti(path)):
        return "kitti", _kitti
    if ending.endswith(".npz"):
        return "npz", _npz
    if ending.endswith(WEIGHTS_SUFFIXES):
        return "weights", _weights
    return ("images", _images) if path.suffix.lower() in IMAGE_SUFFIXES else ("video", _video)


def _is_kitti(path: Path) -> bool:
    """Whether a 16-bit PNG is KITTI flow: KITTI names its own files like any picture (``000000_10.png``).

    The blue channel is the valid mask, 1 or 0, so its upper 8 bits, all that an 8-bit picture keeps, are zero.
    """
    from flowreel.engine.sources.images import read_rgb

    return not read_rgb(path)[..., 2].any()


def _strict(value: Any) -> JSON:
    """The value in JSON's types, which have neither NaN nor infinite numbers."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None if math.isnan(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


# -- Flow that is stored -----------------------------------------------------------------------------------------


def _store(name: str) -> Facts:
    store = sinks.open_store(name)
    attributes = dict(store.attrs)
    source = attributes.pop("source", None)
    facts = {"folder": store.path} | {key: value for key, value in store.summary().items() if key != "path"}
    # In the summary already, or folded into its sizes.
    for key in ("cache", "format_version", "max_error", "codec", "resolution", "flow_height", "flow_width"):
        attributes.pop(key, None)
    for key in ("model", "weights", "software_version"):
        facts[key] = attributes.pop(key, None)
    rate = attributes.pop("frame_rate", None)
    notes = [f"what its source did not give was let pass: {loss}" for loss in attributes.get("source_losses") or ()]
    if not store.complete and not store.layout.cache:
        missing = "" if Path(name) == Path(store.path) else f"{Path(name).name} is not there yet; "
        notes.append(f"{missing}{Path(store.path).name} is {store.state}")
    return facts | {
        "frame_rate": None if rate is None else float(Fraction(rate)),
        "source": source,
        "made_by": attributes,
        "notes": notes,
    }


def _flo(name: str) -> Facts:
    height, width = sinks.read_flo(name).shape[:2]
    rows = max(1, BLOCK_VECTORS // width)
    # read_flo maps a large file into memory; mapping it anew for each block releases the pages already read.
    blocks = (sinks.read_flo(name)[top : top + rows] for top in range(0, height, rows))
    return {"tag": "PIEH (202021.25)"} | _flow_facts(name, height, width, blocks)


def _kitti(name: str) -> Facts:
    flow, valid = sinks.read_kitti(name)
    height, width = valid.shape
    return _flow_facts(name, height, width, [flow])


def _npz(name: str) -> Facts:
    flow = sinks.read_flow_npz(name)
    height, width = flow.shape[:2]
    return _flow_facts(name, height, width, [flow])


def _flow_facts(name: str, height: int, width: int, blocks: Iterable[Float32Array]) -> Facts:
    """Statistics of one field, from blocks of rows (R, W, 2) px, of which only one is held at a time."""
    first: JSON = None
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    known, longest, total = 0, 0.0, 0.0
    for block in blocks:
        first = first or block[0, 0].tolist()
        u, v = np.ascontiguousarray(block[..., 0]), np.ascontiguousarray(block[..., 1])
        sure = is_known(u) & is_known(v)
        if not sure.all():
            u, v = u[sure], v[sure]
        if u.size:
            lengths = np.sqrt(u * u + v * v)
            low, high = np.minimum(low, (u.min(), v.min())), np.maximum(high, (u.max(), v.max()))
            longest, total = max(longest, float(lengths.max())), total + float(lengths.sum(dtype=np.float64))
            known += u.size
    return {
        "width": width,
        "height": height,
        "first_vector": first,
        "min": low.tolist() if known else None,
        "max": high.tolist() if known else None,
        "mean_length": total / known if known else None,
        "max_length": longest if known else None,
        "unknown": height * width - known,
        "size_bytes": os.path.getsize(name),
    }


# -- Weights -----------------------------------------------------------------------------------------------------


def _weights(name: str) -> Facts:
    from flowreel.engine.models.weights import read_weights

    weights = read_weights(name)
    return weights.summary() | {"tensors": len(weights.state), "dtypes": _stored_dtypes(name)}


def _stored_dtypes(name: str) -> JSON:
    """Number of tensors of each dtype in the file, which loading converts to float32; None when it cannot be told.

    Expects a file that ``read_weights`` can read.
    """
    import torch
    from safetensors import safe_open

    from flowreel.engine.models.weights import SHIPPED

    with nullcontext(Path(name)) if os.path.lexists(name) else as_file(SHIPPED) as path:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="np") as file:
                kinds = [file.get_slice(key).get_dtype() for key in file.keys()]  # noqa: SIM118 (not a dict)
            return dict(Counter(_SAFETENSORS_DTYPES.get(kind, kind) for kind in kinds))
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError):  # an old format that cannot be mapped, or values beside tensors
            return None
        state = content.get("state_dict", content)
        return dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values()))


# -- Pictures ----------------------------------------------------------------------------------------------------


def _synthetic(name: str) -> Facts:
    from flowreel.engine.sources import open_source

    with closing(open_source(name)) as source:
        info = source.info
        return {
            "decoder": source.decoder,
            "width": info.width,
            "height": info.height,
            "frames": info.frame_count,
            "flows": info.flow_count,
            "frame_rate": None if info.frame_rate is None else float(info.frame_rate),
            "duration_s": info.source.duration_s,
            "notes": [*source.notes],
        }


def _images(name: str) -> Facts:
    from PIL import Image

    from flowreel.engine.sources import open_source
    from flowreel.engine.sources.images import FRAME_RATE, find_images, read_rgb

    paths = find_images(name)
    if len(paths) > 1:
        with closing(open_source(name)) as source:  # reads every header: all must be of one size
            height, width = source.info.height, source.info.width
            notes: list[JSON] = [*source.notes]
    else:
        height, width = read_rgb(paths[0]).shape[:2]
        notes = ["one image: flow needs at least two"]
    with Image.open(paths[0]) as image:
        kind, mode = image.format, image.mode
    return {
        "format": kind,
        "mode": mode,
        "suffixes": dict(Counter(path.suffix.lower() for path in paths)),
        "decoder": "Pillow",
        "width": width,
        "height": height,
        "frames": len(paths),
        "flows": len(paths) - 1,
        "first": paths[0].name,
        "last": paths[-1].name,
        "frame_rate": float(FRAME_RATE),
        "size_bytes": sum(path.stat().st_size for path in paths),
        "notes": notes,
    }


def _video(name: str) -> Facts:
    from flowreel.engine.describe_video import video_facts

    try:
        return video_facts(name)
    except UnsupportedSourceError as error:
        if Path(name).suffix.lower() in _VIDEO_SUFFIXES:
            raise
        raise UnsupportedSourceError(f"{error}; looked for {KNOWN_KINDS}") from error
