"""Other programs read exactly our values from a store: zarr-python, xarray, tensorstore, zarrs and zarrita.js.

The Python packages are part of the test extra and required; zarrita.js needs node and is optional.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import xarray as xr
import zarr
from zarrs.pipeline import UnsupportedMetadataError

from flowreel.engine.config import Codec, SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.sinks.store_layout import CHECKSUMS, COORDINATES, flow_shard
from flowreel.sinks.store_reader import FlowStore, open_store
from flowreel.sinks.zarr_store import ZarrSink

COUNT = 5  # flows, in shards of two: the last one is ragged
CODECS: tuple[Codec, ...] = ("blosc", "zstd", "pcodec", "pcodec2d")
EVERYWHERE: tuple[Codec, ...] = ("blosc", "zstd")  # codecs of the core specification
KINDS = {"int16": (1 / 64, 6, 9), "int32": (1 / 64, 2, 1040), "float32": (0, 6, 9)}  # max error in px, height, width
STORES = [(codec, kind) for codec in CODECS for kind in KINDS]
Open = Callable[[Codec, str], FlowStore]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Gives a store of any codec and dtype, with one invalid vector. Each is written once; tests must not change it."""
    folder = tmp_path_factory.mktemp("stores")

    @functools.cache
    def make(codec: Codec, kind: str) -> FlowStore:
        max_error, height, width = KINDS[kind]
        flows = torch.empty(COUNT, 2, height, width).uniform_(-20, 20, generator=torch.Generator().manual_seed(0))
        flows[1, :, 1, 2] = torch.nan
        settings = SinkConfig(max_error=max_error, codec=codec, shard_bytes=2 * 8 * height * width)
        sink = ZarrSink(str(folder / f"{codec}-{kind}.zarr"), settings)
        sink.open(FlowInfo(height, width, Fraction(25), COUNT + 1, SourceId("clip.mp4")))
        frame = np.arange(COUNT)
        sink.write(FlowBatch(flows, 0, frame, frame + 1, frame / 25, (frame + 1) / 25))
        sink.commit()
        store = open_store(sink.path)
        assert store.summary()["dtype"] == kind
        return store

    return make


def pixels(stored: Any, store: FlowStore) -> Any:
    """Another reader's raw numbers in pixels, computed as our reader does, so that equal integers give equal bits."""
    if stored.dtype.kind == "f":
        return stored
    fill = np.iinfo(stored.dtype).min
    return np.where(stored == fill, np.float32(np.nan), stored.astype(np.float32) * np.float32(store.summary()["step"]))


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other, equal_nan=True)


def with_zarr_python(store: FlowStore, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pcodec is not in the core specification
        return zarr.open_group(store.path, mode="r")[name][:]


def with_zarrs(store: FlowStore, name: str) -> Any:
    """Reads with the Rust library zarrs; strict: what it cannot do is an error, with no fallback to zarr-python."""
    pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    with zarr.config.set(pipeline), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        array = zarr.open_group(store.path, mode="r")[name]
        assert type(array._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
        return array[:]


def with_tensorstore(store: FlowStore, name: str) -> Any:
    place = {"driver": "file", "path": f"{store.path}/{name}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result().read().result()


READERS = {"zarr-python": with_zarr_python, "zarrs": with_zarrs, "tensorstore": with_tensorstore}
# The same as in the README's table. For lossless flow, pcodec2d makes no prediction and is the same as pcodec.
OPENS: dict[str, tuple[Codec, ...]] = {
    "zarr-python": CODECS,
    "zarrs": (*EVERYWHERE, "pcodec"),
    "tensorstore": EVERYWHERE,
}


@pytest.mark.parametrize(("codec", "kind"), STORES)
@pytest.mark.parametrize("reader", READERS)
def test_values_are_ours(made: Open, reader: str, codec: Codec, kind: str) -> None:
    store = made(codec, kind)
    chain: Codec = "pcodec" if (codec, kind) == ("pcodec2d", "float32") else codec
    if chain not in OPENS[reader]:
        with pytest.raises((ValueError, UnsupportedMetadataError)) as refused:
            READERS[reader](store, "flow")
        said = f"{refused.value} {refused.value.__context__}"
        assert re.search(r"numcodecs\.(pcodec|delta).* is not (registered|supported)", said)
        return
    flow = READERS[reader](store, "flow")
    assert flow.dtype == kind
    assert same(pixels(flow, store), store[:])
    assert np.isnan(store[1][:, 1, 2]).all()


@pytest.mark.parametrize("size", [(6, 9), (301, 901)])  # one uncompressed block; two blocks, one of each kind
@pytest.mark.parametrize("reader", READERS)
def test_chunks_whose_bits_a_device_has_shuffled(tmp_path: Path, reader: str, size: tuple[int, int]) -> None:
    flows = torch.empty(COUNT, 2, *size).uniform_(-20, 20, generator=torch.Generator().manual_seed(0))
    flows[1] = flows[1].cumsum(-1) / 50  # the others are noise
    sink = ZarrSink(str(tmp_path / "x.zarr"), SinkConfig(shard_bytes=2 * 8 * size[0] * size[1]))
    sink.open(FlowInfo(*size, Fraction(25), COUNT + 1, SourceId("clip.mp4"), device="cuda:0"))
    frame = np.arange(COUNT)
    for steps in sink.prepare(iter([FlowBatch(flows, 0, frame, frame + 1, frame / 25, (frame + 1) / 25)])):
        sink.take(steps)
    sink.commit()
    store = open_store(sink.path)
    assert np.abs(store[:] - flows.numpy()).max() <= 1 / 64
    assert same(pixels(READERS[reader](store, "flow"), store), store[:])


@pytest.mark.parametrize("reader", READERS)
def test_times_and_frames_are_ours(made: Open, reader: str) -> None:
    store = made("pcodec", "int16")  # the arrays beside the flow are always blosc
    ours = (store.timestamps_s, store.timestamps_to_s, store.frame, store.frame_to)
    for name, values in zip(COORDINATES, ours, strict=True):
        assert same(READERS[reader](store, name), values)
    for name in CHECKSUMS:
        chunks = [store.files.coordinate_chunk(name, shard) for shard in range(3)]
        assert same(READERS[reader](store, name), np.concatenate(chunks)[:COUNT])


@pytest.mark.parametrize(("codec", "kind"), STORES)
def test_xarray_decodes_pixels_and_coordinates(made: Open, codec: Codec, kind: str) -> None:
    store = made(codec, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with xr.open_zarr(store.path) as data:
            flow = data["flow"].load()
    assert same(flow.values.astype(np.float32), store[:])
    assert np.array_equal(flow.coords["timestamp_s"], store.timestamps_s)
    assert np.array_equal(flow.coords["frame_to"], store.frame_to)


@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_is_noticed_by_all(made: Open, tmp_path: Path, reader: str) -> None:
    sound = made("blosc", "int16")
    shutil.copytree(sound.path, tmp_path / "X.zarr")
    store = open_store(tmp_path / "X.zarr")
    shard = flow_shard(tmp_path / "X.zarr", 1)
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)checksum|crc32c|digest"):
        READERS[reader](store, "flow")


# zarrita.js

SCRIPT = """
import FileSystemStore from '@zarrita/storage/fs'
import * as zarr from 'zarrita'
const group = await zarr.open(new FileSystemStore(process.argv[1]), { kind: 'group' })
const { data } = await zarr.get(await zarr.open(group.resolve('flow'), { kind: 'array' }))
process.stdout.write(new Uint8Array(data.buffer, data.byteOffset, data.byteLength))
"""


def node(script: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a JavaScript module in the folder FLOWREEL_NODE, where its packages are installed."""
    folder = os.environ.get("FLOWREEL_NODE", ".")
    command = ["node", "--input-type=module", "--eval", script, "--", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def _zarrita() -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if node("import 'zarrita'; import '@zarrita/storage/fs'").returncode:
        pytest.skip("no zarrita.js: 'npm install zarrita' in some folder, and name that in FLOWREEL_NODE")


@pytest.mark.usefixtures("_zarrita")
@pytest.mark.parametrize(("codec", "kind"), STORES)
def test_zarrita_in_javascript(made: Open, codec: Codec, kind: str) -> None:
    store = made(codec, kind)
    done = node(SCRIPT, store.path)
    if codec not in EVERYWHERE:
        assert done.returncode
        assert b"Unknown codec: numcodecs.pcodec" in done.stderr
        return
    assert done.returncode == 0, done.stderr.decode()
    assert same(pixels(np.frombuffer(done.stdout, kind).reshape(store.shape), store), store[:])
