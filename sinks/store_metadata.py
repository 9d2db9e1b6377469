"""A flow store's metadata: its ``zarr.json`` files, and whether a run would write the same.

The metadata is zarr-python's own, generated in memory; the arrays' lengths are updated while a store grows.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from flowreel.engine.data import HEAD_BYTES
from flowreel.sinks.codecs import FlowCodec
from flowreel.sinks.compressors import zarr_arguments, zarr_codecs
from flowreel.sinks.native import vector_places
from flowreel.sinks.store_checksums import ATTRIBUTES_CHECKSUM, attributes_checksum
from flowreel.sinks.store_layout import BESIDE_FLOW, CHECKSUMS, COORDINATES, FIRST_LOSS, FORMAT_VERSION

if TYPE_CHECKING:
    from flowreel.engine.config import SinkConfig
    from flowreel.engine.data import FlowInfo, NativeGrid
    from flowreel.sinks.store_reader import FlowStore

# The group's attributes that may differ when a run resumes: a recording that grew, another version of flowreel.
# What a source failed to give is only known when it ends.
MAY_CHANGE = ("software_version", "frame_rate", "source", "source_losses", FIRST_LOSS)


def store_metadata(
    info: FlowInfo, config: SinkConfig, codec: FlowCodec, shard: int | None, length: int, **attributes: Any
) -> dict[str, dict[str, Any]]:
    """The ``zarr.json`` of the group (under "") and of each array, as zarr-python itself writes them.

    shard: flows in a shard; None: each flow is a file ``flow/c.NUMBER.0.0.0``, the arrays of times and frames are one
        chunk each, and there are no checksums of them.
    attributes: further entries of the group's attribute.
    """
    about = store_attributes(info, config) | attributes
    files: dict[str, Any] = {}
    zarr.create_group(
        MemoryStore(files), attributes={"flowreel": about, ATTRIBUTES_CHECKSUM: attributes_checksum(about)}
    )
    arrays = _array_metadata(codec, shard, length, info.native, info.height, info.width)
    return {name: json.loads(text) for name, text in (*arrays, ("", files["zarr.json"].to_bytes()))}


@lru_cache(maxsize=16)  # many stores of a run over many sources, or of tests, differ in the group's attributes alone
def _array_metadata(
    codec: FlowCodec, shard: int | None, length: int, native: NativeGrid | None, height: int, width: int
) -> tuple[tuple[str, bytes], ...]:
    """The name and ``zarr.json`` of each array. They are slow to make."""
    files: dict[str, Any] = {}
    layout: dict[str, Any] = {"shards": (shard, 2, codec.height, codec.width)}
    if shard is None:
        layout = {"chunk_key_encoding": {"name": "default", "separator": "."}}
    with warnings.catch_warnings():
        # zarr-python warns that pcodec is not in the core specification; users who choose pcodec have been told.
        warnings.simplefilter("ignore")
        group = zarr.create_group(MemoryStore(files))
        group.create_array(
            "flow",
            shape=(length, 2, codec.height, codec.width),
            dtype=codec.dtype,
            chunks=(1, 2, codec.height, codec.width),
            **layout,
            **zarr_arguments(codec.codec, codec.dtype),
            fill_value=codec.fill,
            dimension_names=("time", "component", "y", "x"),
            attributes=_flow_attributes(codec, native is not None, checksums=shard is not None),
        )
        for name, (dtype, fill) in (COORDINATES if shard is None else BESIDE_FLOW).items():
            group.create_array(
                name,
                shape=(length,),
                dtype=dtype,
                chunks=(shard or max(length, 1),),
                compressors=zarr_codecs("blosc", np.dtype(dtype))[1:],
                fill_value=fill,
                dimension_names=("time",),
                attributes={"units": "s"} if name.startswith("timestamp") else {},
            )
        for name, places in _places(native, height, width).items():
            group.create_array(
                name,
                shape=places.shape,
                dtype=places.dtype,
                chunks=places.shape,
                compressors=zarr_codecs("blosc", places.dtype)[1:],
                dimension_names=(name,),
                attributes={"units": "pixel", "long_name": f"{name} of each vector in the frame"},
            )
    del files["zarr.json"]  # the group's
    return tuple((key.removesuffix("/zarr.json"), files[key].to_bytes()) for key in sorted(files))


def places_in_frame(info: FlowInfo) -> dict[str, Any]:
    """For a coarse prediction, the arrays that say where its vectors lie in the frame; none for a full field."""
    return _places(info.native, info.height, info.width)


def _places(native: NativeGrid | None, height: int, width: int) -> dict[str, Any]:
    return {} if native is None else dict(zip(("y", "x"), vector_places(native, height, width), strict=True))


def store_attributes(info: FlowInfo, config: SinkConfig) -> dict[str, Any]:
    """The group's "flowreel" attribute: where the flow comes from and how it was made and stored."""
    native: dict[str, Any] = {}  # what a reader needs to turn the network's own prediction into the frame's flow
    if info.native is not None:
        native = {"native": asdict(info.native), "flow_height": info.height, "flow_width": info.width}
    return {
        **info.made_by,
        "format_version": FORMAT_VERSION,
        "software_version": _software_version(),
        "source": asdict(info.source),
        "frame_rate": None if info.frame_rate is None else str(info.frame_rate),
        "max_error": config.max_error,
        "codec": config.codec,
        "resolution": "full" if info.native is None else "native",
        **native,
    }


@cache  # the package's metadata are read from a file and parsed
def _software_version() -> str:
    try:
        return version("flowreel")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def _flow_attributes(codec: FlowCodec, native: bool, checksums: bool) -> dict[str, Any]:
    """What CF-aware readers such as xarray need to give pixels, and which arrays are coordinates."""
    what = "the network's own coarse prediction of optical flow" if native else "optical flow"
    attributes: dict[str, Any] = {
        "units": "pixel",
        "long_name": f"{what} from one frame to the next: component 0 right, component 1 down",
        "coordinates": " ".join(COORDINATES),
    }
    if checksums:
        attributes["ancillary_variables"] = " ".join(CHECKSUMS)
    if not codec.lossless:  # a NaN _FillValue attribute makes xarray fail on floats
        attributes |= {"scale_factor": codec.step, "add_offset": 0.0, "_FillValue": codec.fill}
    return attributes


def other_settings(
    store: FlowStore, info: FlowInfo, config: SinkConfig, may_change: Sequence[str] = MAY_CHANGE
) -> list[str]:
    """Why a run with this header and these settings would not have written this store, each difference in words."""
    size = ("flow_height", "flow_width")
    now = store_attributes(info, config) | dict(zip(size, (info.height, info.width), strict=True))
    was = store.attrs | dict(zip(size, store.shape[2:], strict=True))
    names = {*now, *was} - {*may_change, "notes"}
    return differing_settings(was, {name: now.get(name) for name in names} | {"source": now["source"]})


def differing_settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in ``now`` that differ from those an output ``was`` made with, in words. ``now`` has its source."""
    ignored = {"source"}
    if was.get("weights_sha256") == now.get("weights_sha256"):
        ignored |= {"weights", "weights_licence"}  # the same file by another name
    differing = [
        f"{name.replace('_', ' ')} was {was.get(name)}, is {now[name]}"
        for name in sorted(set(now) - ignored)
        if was.get(name) != now[name]
    ]
    return differing + other_source(was.get("source") or {}, now["source"])


def _same_head(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if None in (was.get("head_sha256"), now["head_sha256"]) or was["head_sha256"] == now["head_sha256"]:
        return True
    was_bytes, now_bytes = was.get("size_bytes") or 0, now["size_bytes"] or 0
    heads = was.get("heads_sha256")  # None: recorded before there were any
    if heads is None or not was_bytes < min(now_bytes, HEAD_BYTES):
        return False
    return list(heads) == list(now["heads_sha256"][: len(heads)])  # the input was short, and has grown


def other_source(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why the source is not the one recorded, which may have grown since, in words; empty if it may be."""
    if was.get("name") != now["name"]:
        return [f"source was {was.get('name')}, is {now['name']}"]
    if not _same_head(was, now):
        return [f"{now['name']} is another file than it was"]
    samples = was.get("sampled_sha256"), now["sampled_sha256"]
    if was.get("size_bytes") == now["size_bytes"] and None not in samples and samples[0] != samples[1]:
        return [f"{now['name']} holds something else than it did"]
    if (now["size_bytes"] or 0) < (was.get("size_bytes") or 0):
        return [f"{now['name']} had {was['size_bytes']} bytes, has {now['size_bytes']}"]
    return []
