"""Writes flow into ``X.zarr``: a Zarr v3 group of whole, durable shards.

    X.zarr.partial/                    renamed to X.zarr by commit
      zarr.json                        group attribute "flowreel"; consolidated metadata from commit on
      flow/c/<shard>/0/0/0             S chunks, one a flow, and their index
      timestamp_s/c/<shard>  timestamp_to_s/...  frame/...  frame_to/...      S values

A flow is compressed as it arrives; only compressed bytes are held until the shard is full and published. The
times and frame numbers of a shard go before its flow, so a flow that is there can always be placed.
The metadata is zarr-python's own; the shards are assembled here, because zarr-python rewrites a shard for each
chunk that is added and never waits for the disk.
"""

from __future__ import annotations

import json
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from flowreel.engine.errors import OutputExistsError
from flowreel.sinks import publish
from flowreel.sinks.codecs import EncodedFlow, FlowCodec, compress, flow_codec, pack_shard, zarr_codecs
from flowreel.sinks.store_reader import COORDINATES, FORMAT_VERSION, flow_shard, published_shards

if TYPE_CHECKING:
    from flowreel.engine.config import SinkConfig
    from flowreel.engine.data import FlowBatch, FlowInfo


class ZarrSink:
    """The flow store as a Sink (see ``engine/data.py``). Flows arrive in order, in batches of any size.

    Errors: OutputExistsError, OutputWriteError; ValueError for flow out of order or of another size.
    """

    def __init__(self, path: str, config: SinkConfig) -> None:
        self._final = Path(path)
        self._folder = publish.partial_path(self._final)
        self._config = config
        self._state = "new"  # -> "open" -> "done"
        self._bytes_written = 0
        self._count = 0  # flows taken so far
        self._length = 0  # flows the arrays are declared to hold
        self._chunks: list[bytes] = []  # of the shard that is filling up
        self._coordinates: dict[str, list[Any]] = {name: [] for name in COORDINATES}  # of the same shard
        self._invalid: dict[str, tuple[int, int]] = {}  # what -> vectors, first frame

    @property
    def path(self) -> str:
        return str(self._final)

    @property
    def bytes_written(self) -> int:
        return self._bytes_written

    @property
    def notes(self) -> list[str]:
        if not self._invalid:
            return []
        total = self._count * self._codec.height * self._codec.width
        return [
            f"{vectors} of {total} vectors are {what}, first in frame {frame}: stored as missing"
            for what, (vectors, frame) in self._invalid.items()
        ]

    def open(self, info: FlowInfo) -> None:
        """Creates ``X.zarr.partial`` with empty arrays. What is at ``X.zarr`` stays until ``commit``."""
        if self._state != "new":
            raise ValueError(f"{self.path} was opened before: a sink is used once")
        self._codec = flow_codec(info.height, info.width, self._config)
        self._shard_length = info.shard_length(self._config.shard_bytes)
        with publish.write_errors(self._final):
            publish.settle_replaced(self._final)
            self._make_way()
            publish.make_folder(self._folder.parent)
            self._folder.mkdir()  # fails if another run made it meanwhile
            self._state = "open"
            try:
                self._length = info.flow_count or 0
                self._metadata = _metadata(info, self._config, self._codec, self._shard_length, self._length)
                for name in self._metadata:
                    self._publish_metadata(name)
            except BaseException:
                self.abort()
                raise

    def write(self, batch: FlowBatch) -> None:
        """Compresses each flow, and publishes each shard that is full. The batch's tensor is on the CPU."""
        self._require_open()
        if batch.index != self._count:
            raise ValueError(f"flows arrive in order: expected number {self._count}, got {batch.index}")
        if batch.flow.device.type != "cpu":
            raise ValueError(f"a sink takes flow on the CPU, got {batch.flow.device}")
        flows = batch.flow.detach().numpy()
        for place in range(len(batch)):
            encoded = self._codec.encode(flows[place])
            self._note_invalid(encoded, int(batch.frame[place]))
            self._chunks.append(encoded.chunk)
            for name, values in self._coordinates.items():
                values.append(getattr(batch, name)[place])
            self._count += 1
            if len(self._chunks) == self._shard_length:
                self._publish_shard()

    def commit(self, complete: bool = True) -> None:
        """Publishes the last, perhaps ragged shard; if complete, trims the arrays to what came and names the store."""
        self._require_open()
        with publish.write_errors(self._final):
            if self._chunks:
                self._publish_shard()
            if complete:
                self._set_length(self._count)
                self._consolidate()
                publish.publish_folder(self._folder, self._final)
        self._state = "done"

    def abort(self) -> None:
        """Removes the unfinished store, unless it holds a whole shard: that is worth resuming from, and stays."""
        if self._state == "open" and not published_shards(self._folder):
            publish.remove(self._folder, ignore_errors=True)
        self._state = "done" if self._state == "open" else self._state
        self._chunks.clear()

    def _require_open(self) -> None:
        if self._state != "open":
            raise ValueError(f"{self.path} is not open")

    def _make_way(self) -> None:
        """Refuses what is there already; with overwrite, removes an unfinished store and leaves a finished one."""
        final, overwrite = self._final, self._config.overwrite
        publish.require_absent(final, overwrite)
        if final.exists() and not (final / "zarr.json").is_file():
            raise OutputExistsError(f"{final} is there and is not a Zarr store: remove it yourself if it can go")
        if self._folder.exists() and not overwrite:
            shards = len(published_shards(self._folder))
            raise OutputExistsError(
                f"{self._folder} is an unfinished store of an earlier run ({shards} whole shards): "
                "pass --overwrite to start afresh"
            )
        publish.remove(self._folder)

    def _publish_shard(self) -> None:
        """Writes the waiting flows as the next shard: array lengths, then times and frames, then the flow."""
        number = (self._count - 1) // self._shard_length
        with publish.write_errors(self._final):
            self._set_length(max(self._length, self._count))
            for name, (dtype, fill) in COORDINATES.items():
                values = np.full(self._shard_length, fill, dtype)
                values[: len(self._chunks)] = self._coordinates[name]
                self._publish(self._folder / name / "c" / str(number), compress(values, "blosc"))
            self._publish(flow_shard(self._folder, number), *pack_shard(self._chunks, self._shard_length))
        self._chunks.clear()
        for waiting in self._coordinates.values():
            waiting.clear()

    def _set_length(self, length: int) -> None:
        """Declares every array this long, ``flow`` last: its length is the one that readers go by."""
        if length != self._length:
            for name in [*COORDINATES, "flow"]:
                self._metadata[name]["shape"][0] = length
                self._publish_metadata(name)
            self._length = length

    def _consolidate(self) -> None:
        """Puts the arrays' metadata into the group's too, so that a reader over a network needs one request.

        Not before the end: it goes stale with every change of length.
        """
        arrays = {name: self._metadata[name] for name in sorted(self._metadata) if name}
        self._metadata[""]["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": arrays}
        self._publish_metadata("")

    def _publish_metadata(self, name: str) -> None:
        self._publish(self._folder / name / "zarr.json", json.dumps(self._metadata[name], indent=2).encode())

    def _publish(self, path: Path, *pieces: bytes) -> None:
        self._bytes_written += publish.publish_bytes(path, *pieces)

    def _note_invalid(self, encoded: EncodedFlow, frame: int) -> None:
        reach = self._codec.limit * self._codec.step
        for what, vectors in (
            ("unknown (NaN, infinite or beyond 1e9 px)", encoded.unknown),
            (f"beyond the range of ±{reach:.6g} px", encoded.beyond_range),
        ):
            if vectors:
                before, first = self._invalid.get(what, (0, frame))
                self._invalid[what] = (before + vectors, first)


def _metadata(
    info: FlowInfo, config: SinkConfig, codec: FlowCodec, shard: int, length: int
) -> dict[str, dict[str, Any]]:
    """The ``zarr.json`` of the group (under "") and of each array, as zarr-python itself writes them."""
    files: dict[str, Any] = {}
    with warnings.catch_warnings():
        # zarr-python warns that pcodec is not in the core specification; whoever asked for pcodec was told.
        warnings.simplefilter("ignore")
        group = zarr.create_group(MemoryStore(files), attributes={"flowreel": _attributes(info, config)})
        serializer, *compressors = zarr_codecs(codec.codec, codec.dtype)
        group.create_array(
            "flow",
            shape=(length, 2, info.height, info.width),
            dtype=codec.dtype,
            chunks=(1, 2, info.height, info.width),
            shards=(shard, 2, info.height, info.width),
            serializer=serializer,
            compressors=compressors,
            fill_value=codec.fill,
            dimension_names=("time", "component", "y", "x"),
            attributes=_flow_attributes(codec),
        )
        for name, (dtype, fill) in COORDINATES.items():
            group.create_array(
                name,
                shape=(length,),
                dtype=dtype,
                chunks=(shard,),
                compressors=zarr_codecs("blosc", np.dtype(dtype))[1:],
                fill_value=fill,
                dimension_names=("time",),
                attributes={"units": "s"} if name.startswith("timestamp") else {},
            )
    return {key.removesuffix("zarr.json").rstrip("/"): json.loads(files[key].to_bytes()) for key in sorted(files)}


def _attributes(info: FlowInfo, config: SinkConfig) -> dict[str, Any]:
    """The group's "flowreel" attribute: where the flow comes from and how it was made and stored."""
    try:
        software = version("flowreel")
    except PackageNotFoundError:  # run from a source tree that was never installed
        software = "unknown"
    source = info.source
    return {
        **info.made_by,
        "format_version": FORMAT_VERSION,
        "software_version": software,
        "source": {"name": source.name, "size_bytes": source.size_bytes, "duration_s": source.duration_s},
        "frame_rate": None if info.frame_rate is None else str(info.frame_rate),
        "max_error": config.max_error,
        "codec": config.codec,
    }


def _flow_attributes(codec: FlowCodec) -> dict[str, Any]:
    """What CF-aware readers such as xarray need to give pixels, and which arrays are coordinates."""
    attributes: dict[str, Any] = {
        "units": "pixel",
        "long_name": "optical flow from one frame to the next: component 0 right, component 1 down",
        "coordinates": " ".join(COORDINATES),
    }
    if not codec.lossless:  # a NaN _FillValue attribute makes xarray fail on floats
        attributes |= {"scale_factor": codec.step, "add_offset": 0.0, "_FillValue": codec.fill}
    return attributes
