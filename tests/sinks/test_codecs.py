"""A chunk is small, the same for the same flow, read by zarr-python, and notices a flipped bit.

That it keeps every vector within the bound is shown in ``test_codecs_property.py``.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import zarr

from flowreel.engine.config import Codec, SinkConfig
from flowreel.engine.errors import DamagedStoreError, OutputError, UsageError
from flowreel.sinks import codecs
from flowreel.sinks.codecs import (
    FlowCodec,
    codec_of,
    compress,
    decompress,
    flow_codec,
    pack_shard,
    unpack_index,
    zarr_arguments,
)

CODECS = sorted({*get_args(Codec), "pcodec2d"})


def decoded(codec: FlowCodec, chunk: bytes) -> Any:
    out = np.empty((2, codec.height, codec.width), np.float32)
    codec.decode(chunk, out)
    return out


def read_flo(path: Path) -> Any:
    data = path.read_bytes()
    width, height = np.frombuffer(data, "<i4", 2, 4)
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("max_error", "step"), [(1 / 64, 1 / 32), (0.015, 1 / 64), (0.5, 1.0), (0.3, 0.5), (1, 2.0), (1000, 1024.0)]
)
def test_step_is_the_largest_power_of_two_within_twice_the_bound(max_error: float, step: float) -> None:
    assert flow_codec(8, 8, SinkConfig(max_error=max_error)).step == step


@pytest.mark.parametrize(
    ("width", "max_error", "dtype"),
    [(1023, 1 / 64, "int16"), (1024, 1 / 64, "int32"), (1920, 1 / 32, "int16"), (9, 1e-9, "int32"), (99, 0, "float32")],
)
def test_integers_reach_across_the_longer_side(width: int, max_error: float, dtype: str) -> None:
    if max_error == 1e-9:
        with pytest.raises(UsageError, match="lossless"):
            flow_codec(5, width, SinkConfig(max_error=max_error))
        return
    assert flow_codec(5, width, SinkConfig(max_error=max_error)).dtype == dtype
    assert flow_codec(width, 5, SinkConfig(max_error=max_error)).dtype == dtype


def test_row_blocks_and_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    padded = rng.normal(0, 9, (2, 50, 80)).astype(np.float32)
    padded[:, 7, 9] = np.nan
    padded[0, 49, 79] = 5000  # beyond range, in the last, short block
    flow = padded[:, 1:, 2:]
    codec = flow_codec(49, 78, SinkConfig())
    whole = codec.encode(np.ascontiguousarray(flow))
    assert (whole.unknown, whole.beyond_range) == (1, 1)
    for block in (1, 1000, 78 * 2 * 5):
        monkeypatch.setattr(codecs, "BLOCK_VALUES", block)
        assert codec.encode(flow) == whole


def test_a_broken_bound_is_noticed() -> None:
    flow = np.random.default_rng(0).normal(0, 5, (2, 8, 8)).astype(np.float32)
    codec = replace(flow_codec(8, 8, SinkConfig()), step=1 / 16)
    with pytest.raises(OutputError, match="promised"):
        codec.encode(flow)


def test_size_is_checked() -> None:
    with pytest.raises(ValueError, match=r"\(2, 8, 8\)"):
        flow_codec(8, 8, SinkConfig()).encode(np.zeros((2, 8, 9), np.float32))


@pytest.mark.parametrize("kind", CODECS)
def test_threads_give_the_same_bytes(kind: Any) -> None:
    rng = np.random.default_rng(1)
    flows = [rng.normal(0, 4, (2, 60, 70)).astype(np.float32).cumsum(axis=2) / 9 for _ in range(12)]
    codec = replace(flow_codec(60, 70, SinkConfig()), codec=kind)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(codec.encode, flows)) == [codec.encode(flow) for flow in flows]


@pytest.mark.parametrize("kind", CODECS)
def test_flipped_bits_are_noticed(kind: Any) -> None:
    values = np.arange(200, dtype="<i2").reshape(2, 20, 5)
    chunk = compress(values, kind)
    for place in range(0, len(chunk), 7):
        damaged = bytearray(chunk)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(DamagedStoreError, match="checksum"):
            decompress(bytes(damaged), kind, values.dtype, values.shape)
    for wrong in (b"", b"abc", chunk[:-1]):
        with pytest.raises(DamagedStoreError):
            decompress(wrong, kind, values.dtype, values.shape)


@pytest.mark.parametrize("kind", CODECS)
def test_a_sound_checksum_over_wrong_contents_is_noticed_too(kind: Any) -> None:
    values = np.arange(200, dtype="<i2").reshape(2, 20, 5)
    with pytest.raises(DamagedStoreError, match="200 values instead of 210"):
        decompress(compress(values, kind), kind, values.dtype, (2, 21, 5))
    with pytest.raises(DamagedStoreError, match="decompress"):
        decompress(b"".join(codecs._checked(b"\x05 no such stream \xff")), kind, values.dtype, values.shape)


@pytest.mark.parametrize("kind", CODECS)
def test_values_come_back_in_the_shape_asked_for(kind: Any) -> None:
    values = np.arange(30, dtype="<i4").reshape(2, 3, 5)
    assert np.array_equal(decompress(compress(values, kind), kind, values.dtype, (2, 3, 5)), values)
    if kind == "pcodec2d":
        with pytest.raises(TypeError, match="shape"):
            decompress(compress(values, kind), kind, values.dtype, 30)
    else:
        assert np.array_equal(decompress(compress(values, kind), kind, values.dtype, 30), values.reshape(-1))


def test_shard_places_chunks_in_order_and_marks_the_rest_missing() -> None:
    pieces = pack_shard([(b"a", b"aa"), (b"b",), (b"cc",)], 5)
    data = b"".join(pieces)
    assert data[:6] == b"aaabcc"
    index = unpack_index(data[-codecs.index_bytes(5) :])
    assert index[:3].tolist() == [[0, 3], [3, 1], [4, 2]]
    assert (index[3:] == codecs.INDEX_MISSING).all()
    with pytest.raises(DamagedStoreError, match="checksum"):
        unpack_index(data[-codecs.index_bytes(5) : -1] + bytes([data[-1] ^ 1]))


def test_foreign_codecs_are_refused() -> None:
    for kind in CODECS:
        chain = codecs.zarr_codecs(kind, np.dtype("<i2"))
        assert codec_of([step["name"] for step in chain]) == kind
    chain = codecs.zarr_codecs("pcodec2d", np.dtype("<f4"))  # floats are not predicted, and say so
    assert codec_of([step["name"] for step in chain]) == "pcodec"
    with pytest.raises(DamagedStoreError, match="gzip"):
        codec_of(["bytes", "gzip"])


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
@pytest.mark.parametrize("dtype", ["<i2", "<i4", "<f4"])
@pytest.mark.parametrize("kind", CODECS)
def test_zarr_python_reads_our_shards_and_writes_the_same(tmp_path: Path, kind: Any, dtype: str) -> None:
    values = np.random.default_rng(5).normal(0, 900, (3, 2, 13, 29)).cumsum(axis=3).astype(dtype)
    values[1, :, 4:6, 7:9] = -32768
    layout: dict[str, Any] = {"shape": values.shape, "chunks": (1, 2, 13, 29), "shards": (4, 2, 13, 29)}
    layout |= {"dtype": dtype, "fill_value": 0, **zarr_arguments(kind, np.dtype(dtype))}
    array = zarr.create_array(tmp_path / "ours", **layout)
    shard = tmp_path / "ours" / "c" / "0" / "0" / "0" / "0"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"".join(pack_shard([(compress(flow, kind),) for flow in values], 4)))
    assert np.array_equal(array[:], values)
    assert np.array_equal(array[1, 1, 3:7, 5:], values[1, 1, 3:7, 5:])

    if kind == "pcodec2d" and dtype != "<f4":
        return  # zarr-python's numcodecs.delta hands on a flat array, which its own transpose refuses
    theirs = zarr.create_array(tmp_path / "theirs", **layout)
    theirs[:] = values
    assert (tmp_path / "theirs" / "c" / "0" / "0" / "0" / "0").read_bytes() == shard.read_bytes()


@pytest.mark.parametrize(
    ("name", "bars"),
    [
        ("flownet2_caffe_result_960x540.flo", {"blosc": 4.9, "pcodec": 7.4, "pcodec2d": 9.7}),
        ("sintel_alley_1_0002_gt_1024x436.flo", {"blosc": 22.0, "pcodec": 29.0, "pcodec2d": 38.0}),
        ("sintel_alley_1_0003_gt_1024x436.flo", {"blosc": 22.0, "pcodec": 29.0, "pcodec2d": 38.0}),
    ],
)
def test_sizes_on_the_fixed_fields(data_dir: Path, name: str, bars: dict[Any, float]) -> None:
    path = data_dir / "flo" / name
    flow = read_flo(path)
    for kind, bar in bars.items():
        codec = replace(flow_codec(*flow.shape[1:], SinkConfig()), codec=kind)
        encoded = codec.encode(flow)
        assert path.stat().st_size / len(encoded.chunk) >= bar
        error = np.abs(decoded(codec, encoded.chunk).astype(np.float64) - flow).max()
        assert error <= 1 / 64
        assert math.isclose(error, 1 / 64, rel_tol=0.01)  # the whole budget is used: a finer step would be waste
