"""The file layout of a flow store, and its metadata, with every number in it checked.

Metadata is accepted only where it describes a store that flowreel writes: a changed scale would give wrong pixels, a
changed shape other frames, and an absurd shape would ask for more memory than there is. Additions (a user's
attributes, other arrays, another compression level) are accepted.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import NativeGrid
from flowreel.engine.errors import DamagedStoreError
from flowreel.sinks.codecs import FlowCodec, flow_codec
from flowreel.sinks.compressors import BYTES, CHECKSUM, codec_of, zarr_codecs

FORMAT_VERSION = 1
FIRST_LOSS = "first_loss"  # attribute: number of the first frame that the source could not give, or gave damaged

# Arrays beside ``flow``, one value per flow. Times and frame numbers: dtype, and the value for "not written yet".
COORDINATES: dict[str, tuple[str, float]] = {
    "timestamp_s": ("<f8", math.nan),
    "timestamp_to_s": ("<f8", math.nan),
    "frame": ("<i8", -1),
    "frame_to": ("<i8", -1),
}
# Checksums that tell whether a flow and its times are in their place (``store_checksums.py``): a cache has none.
CHECKSUMS: dict[str, tuple[str, float]] = {"flow_crc32c": ("<u4", 0), "time_crc32c": ("<u4", 0)}
BESIDE_FLOW = COORDINATES | CHECKSUMS

MOST_FLOWS = 1 << 26  # a month of video; four arrays of times and frames are made as long as the store claims
MOST_PIXELS = 1 << 27  # of one flow, 1 GiB as float32: a small file can claim any size, and video is below this
MOST_METADATA = 64 << 20  # bytes of one zarr.json

SETTINGS_MATTER = ("bytes", "transpose", "numcodecs.delta")  # the bytes of the others are self-describing

_RATE = r"[1-9]\d{0,18}(/[1-9]\d{0,18})?"
_MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)  # of parsing metadata


@dataclass(frozen=True)
class StoreLayout:
    """What a reader must know about the array ``flow``."""

    count: int  # flows the array holds, or will hold when finished
    shard_length: int  # flows in one shard; 1 in a cache, which has no shards
    codec: FlowCodec  # its height and width are those of the stored field
    native: NativeGrid | None  # how that lies in the frame, if it is the network's own coarser prediction
    height: int  # pixels of a flow as it is read
    width: int
    cache: bool = False  # each flow is a separate file, written in any order: ``flow_cache.py``

    @property
    def arrays(self) -> tuple[str, ...]:
        """The arrays beside ``flow``, one value per flow."""
        return tuple(COORDINATES if self.cache else BESIDE_FLOW)

    @property
    def chunk_length(self) -> int:
        """Values in one chunk of each array beside ``flow``."""
        return max(self.count, 1) if self.cache else self.shard_length

    @property
    def flow_shape(self) -> tuple[int, int, int]:
        return (2, self.height, self.width)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        return (2, self.codec.height, self.codec.width)

    @property
    def stored_bytes(self) -> int:
        """Bytes of one flow as it is stored, before compression."""
        return self.codec.flow_bytes


def flow_shard(folder: Path, number: int) -> Path:
    """The file of one shard of ``flow``."""
    return folder / f"flow/c/{number}/0/0/0"


def coordinate_chunk(folder: Path, name: str, number: int) -> Path:
    """The file of one chunk of an array beside ``flow``: the values of one shard's flows."""
    return folder / f"{name}/c/{number}"


def published_shards(folder: Path) -> list[int]:
    """Numbers of the flow shards present, ascending. Each is whole: it gets its name only when it is."""
    return [number for number in numbers_in(folder / "flow" / "c") if os.path.isfile(flow_shard(folder, number))]


def numbers_in(folder: Path) -> list[int]:
    """The entries of a folder whose names are plain numbers, ascending; none when there is no such folder."""
    try:
        names = os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise DamagedStoreError(f"{folder} cannot be listed ({error.strerror or error})") from error
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and name == str(int(name)))


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading, and nothing else: opening a pipe might block forever.

    Raises FileNotFoundError, and DamagedStoreError when something else is there or it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedStoreError(f"{path.name} cannot be read ({error.strerror or error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedStoreError(f"{path.name} is not a file")
    return os.fdopen(descriptor, "rb")


def read_layout(folder: Path, complete: bool) -> tuple[dict[str, Any], StoreLayout]:
    """The group's "flowreel" attribute, and the layout of its array ``flow``.

    A finished store has its arrays' metadata twice, the second copy in the group for readers over a network. The copies
    must agree, or two readers would see two stores.

    Raises:
        DamagedStoreError: no flow store, one of another version, or metadata that does not describe what we write.
    """
    group = read_json(folder / "zarr.json")
    attributes = _flowreel_attributes(folder, group)
    try:
        array = read_json(folder / "flow" / "zarr.json")
        layout = _flow_layout(array, attributes)
        if complete and _flow_layout(_groups_copy(group, "flow", array), attributes) != layout:
            raise ValueError("its own metadata and the group's copy of it disagree")
    except _MALFORMED as error:
        if isinstance(error, DamagedStoreError):
            raise
        raise DamagedStoreError(
            f"{folder}: the array 'flow' is not laid out as flowreel does ({_told(error)})"
        ) from error
    return attributes, layout


def check_coordinate(folder: Path, name: str, layout: StoreLayout, complete: bool) -> None:
    """Raises DamagedStoreError unless the metadata of one array beside ``flow`` matches the layout."""
    try:
        array = read_json(folder / name / "zarr.json")
        length = _coordinate_length(array, name, layout)
        if complete:  # while a store grows or is trimmed, its arrays get their new length one after the other
            _expect("length", length, layout.count)
            copy = _groups_copy(read_json(folder / "zarr.json"), name, array)
            _expect("length in the group's copy", _coordinate_length(copy, name, layout), length)
    except _MALFORMED as error:
        if isinstance(error, DamagedStoreError):
            raise
        raise DamagedStoreError(f"the array '{name}' is not laid out as flowreel does ({_told(error)})") from error


def _told(error: Exception) -> str:
    """What is wrong with metadata, in words: an entry that is missing or of another kind, or what ``_expect`` says."""
    return f"no entry {error}" if isinstance(error, KeyError) else str(error)


def _flow_layout(array: dict[str, Any], attributes: dict[str, Any]) -> StoreLayout:
    """Layout from an array's metadata. Raises one of ``_MALFORMED``, saying what is wrong."""
    shape = array["shape"]
    _expect("number of dimensions", len(shape), 4)
    count, _, height, width = (_whole("shape", size, 0, MOST_FLOWS) for size in shape)
    _expect("shape", shape, [count, 2, height, width])
    _whole("pixels of a flow", height * width, 1, MOST_PIXELS)
    shard_length = _whole("flows in a shard", array["chunk_grid"]["configuration"]["chunk_shape"][0], 1, MOST_FLOWS)
    is_cache = attributes.get("cache") is True
    _expect_array(array, [1 if is_cache else shard_length, 2, height, width], "." if is_cache else "/")
    inner = array["codecs"] if is_cache else _inside_shards(array["codecs"], height, width)
    config = SinkConfig(max_error=_number("max_error", attributes["max_error"]))
    dtype = np.dtype(_one_of("data type", array["data_type"], ["int16", "int32"] if config.max_error else ["float32"]))
    native, full_height, full_width = _native_grid(attributes, height, width)
    codec = replace(
        flow_codec(height, width, config, max(full_height, full_width)),
        dtype=dtype.newbyteorder("<"),
        codec=codec_of([step["name"] for step in inner], dtype, attributes.get("codec")),
    )
    _expect_codecs("codecs", inner, zarr_codecs(codec.codec, codec.dtype))
    _expect("fill value", array["fill_value"], "NaN" if codec.lossless else codec.fill)
    scaling = {name: array["attributes"].get(name) for name in ("scale_factor", "add_offset", "_FillValue")}
    if codec.lossless:
        _expect("scaling", scaling, {"scale_factor": None, "add_offset": None, "_FillValue": None})
    else:
        _expect("scaling", scaling, {"scale_factor": codec.step, "add_offset": 0.0, "_FillValue": codec.fill})
    return StoreLayout(count, shard_length, codec, native, full_height, full_width, is_cache)


def _inside_shards(codecs: list[dict[str, Any]], height: int, width: int) -> list[dict[str, Any]]:
    """The codecs of each chunk in a shard. Raises as ``_flow_layout`` does."""
    sharding, *others = codecs
    _expect("codecs", [sharding["name"], *others], ["sharding_indexed"])
    inner: list[dict[str, Any]] = sharding["configuration"]["codecs"]
    _expect("chunk shape", sharding["configuration"]["chunk_shape"], [1, 2, height, width])
    _expect("place of the shard index", sharding["configuration"].get("index_location", "end"), "end")
    _expect_codecs("codecs of the shard index", sharding["configuration"]["index_codecs"], [BYTES, CHECKSUM])
    return inner


def _native_grid(attributes: dict[str, Any], height: int, width: int) -> tuple[NativeGrid | None, int, int]:
    """How stored fields of this size become flow, and the flow's height and width. Raises as ``_flow_layout`` does."""
    told = attributes.get("native")
    if told is None:
        return None, height, width
    grid = NativeGrid(**told)
    _expect("size of the prediction", [grid.height, grid.width], [height, width])
    _one_of("upsampling", grid.upsampling, ["bilinear", "nearest"])
    _one_of("fit", grid.fit, ["pad", "crop", "resize"])
    factor = _whole("factor", grid.factor, 1, 64)
    full_height, full_width = (_whole(side, attributes[side], 1, MOST_FLOWS) for side in ("flow_height", "flow_width"))
    _whole("pixels of a flow", full_height * full_width, 1, MOST_PIXELS)
    _whole("pixels of a network's flow", height * width * factor**2, 1, MOST_PIXELS)
    if grid.fit != "resize":
        _whole("rows above", grid.top, 0, factor * height - full_height)
        _whole("columns to the left", grid.left, 0, factor * width - full_width)
    return grid, full_height, full_width


def _coordinate_length(array: dict[str, Any], name: str, layout: StoreLayout) -> int:
    """How many values the array declares, once everything else about it has been checked."""
    dtype, fill = BESIDE_FLOW[name]
    (length,) = array["shape"]
    _expect_array(array, [layout.chunk_length])
    _expect("data type", array["data_type"], np.dtype(dtype).name)
    _expect("fill value", array["fill_value"], "NaN" if math.isnan(fill) else fill)
    _expect_codecs("codecs", array["codecs"], zarr_codecs("blosc", np.dtype(dtype)))
    return _whole("length", length, 0, MOST_FLOWS)


def _expect_array(array: dict[str, Any], chunk_shape: list[int], separator: str = "/") -> None:
    """Checks what holds for every array of a store."""
    _expect("kind", [array["zarr_format"], array["node_type"]], [3, "array"])
    _expect("chunk grid", array["chunk_grid"]["name"], "regular")
    _expect("chunk grid", array["chunk_grid"]["configuration"]["chunk_shape"], chunk_shape)
    naming = array["chunk_key_encoding"]
    _expect(
        "chunk names", [naming["name"], naming.get("configuration", {}).get("separator", "/")], ["default", separator]
    )
    _expect("storage transformers", array.get("storage_transformers") or [], [])


def _expect_codecs(what: str, found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Checks that the codecs are the same, with equal settings where these are needed to decode."""
    _expect(what, [step["name"] for step in found], [step["name"] for step in wanted])
    for step, other in zip(found, wanted, strict=True):
        if other["name"] in SETTINGS_MATTER:
            wanted_settings = other["configuration"]
            _expect(
                f"{what}: {other['name']}",
                {key: step["configuration"].get(key) for key in wanted_settings},
                wanted_settings,
            )


def _expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise ValueError(f"{what}: expected {wanted}, found {reprlib.repr(found)}")


def _whole(what: str, value: object, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{what}: expected a whole number from {least} to {most}, found {reprlib.repr(value)}")
    return value


def _one_of(what: str, value: object, allowed: list[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{what}: expected {' or '.join(allowed)}, found {reprlib.repr(value)}")
    return str(value)


def _number(what: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{what}: expected a number, found {reprlib.repr(value)}")
    return float(value)


def consolidate(metadata: dict[str, dict[str, Any]]) -> None:
    """Copies the arrays' metadata into the group's, which is "", so that a reader over a network needs one request.

    Only at the end, as every change of length makes the copies stale.
    """
    arrays = {name: metadata[name] for name in sorted(metadata) if name}
    metadata[""]["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": arrays}


def _groups_copy(group: dict[str, Any], name: str, array: dict[str, Any]) -> dict[str, Any]:
    """The group's copy of an array's metadata; the metadata itself when the group has no copies."""
    copies = group.get("consolidated_metadata")
    return array if copies is None else dict(copies["metadata"][name])


def _flowreel_attributes(folder: Path, group: dict[str, Any]) -> dict[str, Any]:
    """The group's "flowreel" attribute. Raises DamagedStoreError when it is missing or of another version."""
    everything = group.get("attributes")
    attributes = everything.get("flowreel") if isinstance(everything, dict) else None
    if not isinstance(attributes, dict) or group.get("zarr_format") != 3 or group.get("node_type") != "group":
        raise DamagedStoreError(
            f"{folder} is not a flow store: its zarr.json is not that of a Zarr v3 group with a 'flowreel' attribute"
        )
    version = attributes.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise DamagedStoreError(
            f"{folder} has store format {reprlib.repr(version)}, this version reads {FORMAT_VERSION}: a newer flowreel "
            "may have written it"
        )
    for name, is_right in (("source", _is_source), ("frame_rate", _is_rate), ("source_losses", _is_texts)):
        found = attributes.get(name)
        if found is not None and not is_right(found):
            raise DamagedStoreError(
                f"{folder}: its attribute {name} is not what flowreel writes: {reprlib.repr(found)}"
            )
    return attributes


_SOURCE_KINDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "size_bytes": int,
    "duration_s": (int, float),
    "head_sha256": str,
    "sampled_sha256": str,
}


def _is_source(value: object) -> bool:
    """The fields of a ``SourceId``, of the right kinds as far as they are there."""
    return (
        isinstance(value, dict)
        and _is_texts(value.get("heads_sha256", []))
        and all(value.get(name) is None or isinstance(value[name], kind) for name, kind in _SOURCE_KINDS.items())
    )


def _is_rate(value: object) -> bool:
    """Frames per second as a fraction: ``25``, ``30000/1001``."""
    return isinstance(value, str) and re.fullmatch(_RATE, value, re.ASCII) is not None


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def read_json(path: Path) -> dict[str, Any]:
    """One zarr.json. Raises DamagedStoreError when it is missing or not a JSON object."""
    try:
        with open_file(path) as file:
            data = file.read(MOST_METADATA + 1)
        if len(data) > MOST_METADATA:
            raise DamagedStoreError(f"more than {MOST_METADATA >> 20} MiB")
        content = json.loads(data)
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{path.parent} is not a Zarr v3 store: it has no zarr.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedStoreError(f"{path} is not readable metadata: {error}") from error
    if not isinstance(content, dict):
        raise DamagedStoreError(f"{path} is not readable metadata: expected an object")
    return content
