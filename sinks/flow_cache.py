"""Keeps flow that ``flowreel.open`` has computed: a flow store filled in any order, by any number of processes.

    CACHE/
      zarr.json                            like a store's, marked as a cache
      flow/c.NUMBER.0.0.0                  one flow, compressed, with its checksum
      timestamp_s/c/0  timestamp_to_s/...  frame/...  frame_to/...      of all flows, from the beginning

A flow's file is written and synced under a temporary name of its own and then given its final name, which only the
first writer gets: others that compute the same flow at the same time use the file that is there. So nothing is locked,
a killed process loses only what it had not finished, and every reader sees the same value for ever. Only a file's name
says which flow it is: a store's checksums of places are arrays, which would have to be rewritten for each flow.

Other Zarr readers open a cache, too, but see fill values where no flow has been computed yet.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowreel.engine import publish
from flowreel.engine.errors import CacheMismatchError, DamagedStoreError, StoreError
from flowreel.engine.files import PathLike
from flowreel.sinks.codecs import flow_codec
from flowreel.sinks.compressors import compress
from flowreel.sinks.indexed_flow import Placed, coordinates
from flowreel.sinks.parallel import OrderedPool, encode_workers
from flowreel.sinks.store_files import SPARE_BYTES, StoreFiles
from flowreel.sinks.store_layout import open_file
from flowreel.sinks.store_metadata import MAY_CHANGE, other_settings, store_metadata
from flowreel.sinks.store_reader import FlowStore

if TYPE_CHECKING:
    from flowreel.engine.config import SinkConfig
    from flowreel.engine.data import Array, Float32Array, FlowInfo


# What may differ from one use to the next: how flows are batched depends on what is requested, and the selection is
# compared by the frames it takes.
_MAY_DIFFER = (*MAY_CHANGE, "batch", "cache")
_SELECTION = ("start", "stop", "step", "stream")
_FLOW = re.compile(r"c\.(\d+)\.0\.0\.0")
_STALE_S = 3600.0  # what is left unfinished for so long belongs to a killed process


def open_cache(path: PathLike, info: FlowInfo, config: SinkConfig, flows: Placed) -> FlowCache:
    """Opens a cache, or creates an empty one where there is nothing.

    Args:
        info: header of the flow that will be kept.
        config: how it is encoded.
        flows: gives frames and times of all the flows the cache will hold.

    Raises:
        CacheMismatchError: something else is there, or a cache that was filled in another way: says what differs.
        DamagedStoreError: its metadata cannot be read.
        OutputWriteError: it cannot be created.
    """
    folder = Path(path)
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        _create(folder, info, config, flows)
    if not folder.is_dir():
        raise CacheMismatchError(f"{folder} is a file: a cache is a folder")
    if not (folder / "zarr.json").is_file():
        raise CacheMismatchError(f"{folder} is not a cache and not empty: choose another folder")
    cache = FlowCache(folder)
    if differing := _differences(cache, info, config, flows):
        raise CacheMismatchError(
            f"the flow in the cache {folder} is not what this would compute: {'; '.join(differing)}. Open it as "
            "before, or choose another cache"
        )
    cache.remove_stale()
    return cache


class FlowCache(FlowStore):
    """A cache, read as a flow store as far as it has been filled; ``keep`` fills it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if not self.layout.cache:
            raise CacheMismatchError(f"{folder} is a flow store, not a cache: flowreel.open_store reads it")
        self.files = _CacheFiles(self.folder, self.layout, complete=True)

    def __repr__(self) -> str:
        return f"<FlowCache {self.path!r} {self.shape} {self.stored} flows computed>"

    @property
    def complete(self) -> bool:
        """Whether every flow has been computed."""
        return self.stored == len(self)

    @property
    def stored(self) -> int:
        """How many flows have been computed. Looks at the disk, as others may be filling it."""
        try:
            names = map(_FLOW.fullmatch, os.listdir(self.folder / "flow"))
        except FileNotFoundError:  # somebody has removed it
            return 0
        return sum(1 for name in names if name is not None and int(name[1]) < len(self))

    def has(self, number: int) -> bool:
        """Whether a flow has been computed."""
        return os.path.exists(_file_of(self.folder, number))

    def find(self, number: int, out: Float32Array) -> bool:
        """Reads a flow into out: (2, H, W) float32 pixels. False: it has not been computed, or must be computed again
        because it is damaged."""
        try:
            return self.files.flow(number, out)
        except DamagedStoreError:
            return False

    def keep(self, numbers: Sequence[int], flows: Float32Array) -> Float32Array:
        """Keeps flows, (N, 2, H, W) float32 pixels, and returns them as every reader will see them from now on.

        Several are encoded in parallel where there are cores for it. They are durable when this returns. Raises
        OutputWriteError.
        """
        kept = np.empty_like(flows)
        workers = encode_workers() if len(numbers) > 1 else 0
        with closing(OrderedPool[None](lambda _: None, workers if workers > 1 else 0)) as pool:
            for number, flow, out in zip(numbers, flows, kept, strict=True):
                pool.submit(self._keep_one, number, flow, out, nbytes=flow.nbytes)
            pool.drain()
        with publish.write_errors(self.path):
            publish.sync_folder(self.folder / "flow")
        return kept

    def _keep_one(self, number: int, flow: Float32Array, out: Float32Array) -> None:
        """Publishes one flow, and sets ``out`` to what is stored under its name from now on."""
        chunk = self.layout.codec.encode(flow).chunk
        path = _file_of(self.folder, number)
        with publish.write_errors(path):
            while not publish.publish_first(path, chunk):
                if self.find(number, out):
                    return  # somebody else was faster
                path.unlink(missing_ok=True)  # it is damaged
        self.layout.codec.decode(chunk, out)

    def remove_stale(self) -> None:
        """Removes unfinished flows and caches of killed processes; a process that is writing now loses nothing."""
        oldest_s = time.time() - _STALE_S
        caches = self.folder.parent.glob(f"{glob.escape(self.folder.name)}.{'[0-9a-f]' * 16}.partial")
        flows = (self.folder / "flow").glob("*.partial")
        for path, delete in (*((cache, publish.remove) for cache in caches), *((flow, Path.unlink) for flow in flows)):
            try:
                if path.stat().st_mtime < oldest_s:
                    delete(path)
            except OSError:  # its own process removed it first, or it is not ours to remove
                continue

    def _missing(self, number: int) -> StoreError:
        return StoreError(
            f"{self.path} is a cache, and {self.name_of(number)} has not been computed yet: "
            "flowreel.open(SOURCE, cache=...) does it"
        )


class _CacheFiles(StoreFiles):
    """Presents a cache's files as those of a store in which every shard is one flow without an index."""

    def index(self, shard: int) -> Array | None:
        try:
            return np.array([[0, os.stat(_file_of(self._folder, shard)).st_size]], "<u8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedStoreError(f"cannot be read ({error.strerror or error})") from error

    def chunk(self, shard: int, offset: int, length: int) -> bytes:
        most = 2 * self._layout.stored_bytes + SPARE_BYTES
        with open_file(_file_of(self._folder, shard)) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise DamagedStoreError(f"its file is longer than {most} bytes")
        return data


def _file_of(folder: Path, number: int) -> Path:
    return folder / "flow" / f"c.{number}.0.0.0"


def _create(folder: Path, info: FlowInfo, config: SinkConfig, flows: Placed) -> None:
    """Creates an empty cache beside its place, then gives it its name, unless another process was faster."""
    assert info.flow_count is not None
    if folder.exists() and folder.samefile("."):
        raise CacheMismatchError(f"{folder} is the working folder, whose place a cache cannot take: choose another")
    codec = flow_codec(info.height, info.width, config)
    metadata = store_metadata(info, config, codec, None, info.flow_count, cache=True)
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.partial")
    with publish.write_errors(folder):
        try:
            for name, content in metadata.items():
                publish.publish_bytes(temporary / name / "zarr.json", json.dumps(content, indent=2).encode())
            for name, values in coordinates(flows).items():
                publish.publish_bytes(temporary / name / "c" / "0", compress(values, "blosc"))
            try:
                os.rename(temporary, folder)
            except OSError:
                if not (folder / "zarr.json").exists():
                    raise
            publish.sync_folder(folder.parent)
        finally:
            publish.remove(temporary, ignore_errors=True)


def _differences(cache: FlowCache, info: FlowInfo, config: SinkConfig, flows: Placed) -> list[str]:
    """Why the cache holds other flow than would be computed now, each difference in words."""
    now = coordinates(flows)
    same_frames = all(np.array_equal(values, now[name]) for name, values in coordinates(cache).items())
    differing = other_settings(cache, info, config, (*_MAY_DIFFER, *(_SELECTION if same_frames else ())))
    was = cache.attrs.get("source") or {}
    if not differing and was.get("size_bytes") != info.source.size_bytes:
        differing.append(f"{info.source.name} had {was.get('size_bytes')} bytes, has {info.source.size_bytes}")
    return differing or ([] if same_frames else ["its frames or their times were others"])
