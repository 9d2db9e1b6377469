"""The contract of every codec in the table: chunks are those of zarr-python, and a flipped bit is detected."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import zarr

from flowreel.engine.cli import options
from flowreel.engine.config import Codec
from flowreel.engine.errors import DamagedStoreError
from flowreel.sinks.chunk_pieces import crc32c
from flowreel.sinks.compressors import COMPRESSORS, codec_of, compress, decompress, zarr_arguments, zarr_codecs
from flowreel.sinks.shard_file import pack_shard

CODECS = sorted(COMPRESSORS)


def test_users_can_choose_each_and_are_told_of_it() -> None:
    assert sorted(get_args(Codec)) == CODECS
    for name in CODECS:
        assert name in options.CODECS.replace(",", " ").split()


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
    nonsense = b"\x05 no such stream \xff"
    with pytest.raises(DamagedStoreError, match="decompress"):
        decompress(nonsense + crc32c(nonsense), kind, values.dtype, values.shape)


@pytest.mark.parametrize("kind", CODECS)
def test_values_come_back_in_the_shape_asked_for(kind: Any) -> None:
    values = np.arange(2 * 33 * 33, dtype="<i2").reshape(2, 33, 33)  # sides a cache line and one value long
    got = decompress(compress(values, kind), kind, values.dtype, values.shape)
    assert got.dtype == values.dtype
    assert np.array_equal(got, values)
    if kind == "pcodec2d":
        with pytest.raises(TypeError, match="shape"):
            decompress(compress(values, kind), kind, values.dtype, values.size)
    else:
        flat = decompress(compress(values, kind), kind, values.dtype, values.size)
        assert np.array_equal(flat, values.reshape(-1))


def test_foreign_codecs_are_refused() -> None:
    with pytest.raises(ValueError, match="gzip"):
        codec_of(["bytes", "gzip"], np.dtype("<i2"))


@pytest.mark.parametrize("dtype", ["<i2", "<i4", "<f4"])
@pytest.mark.parametrize("kind", CODECS)
def test_a_codec_is_known_by_its_chain_and_else_by_what_is_recorded(kind: Any, dtype: str) -> None:
    names = [step["name"] for step in zarr_codecs(kind, np.dtype(dtype))]
    assert codec_of(names, np.dtype(dtype), kind) == kind
    wrong = codec_of(names, np.dtype(dtype), "zstd" if kind != "zstd" else "blosc")
    assert wrong == ("pcodec" if (kind, dtype) == ("pcodec2d", "<f4") else kind)


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
        return  # zarr-python cannot write it: its numcodecs.delta gives a flat array, which its transpose refuses
    theirs = zarr.create_array(tmp_path / "theirs", **layout)
    theirs[:] = values
    assert (tmp_path / "theirs" / "c" / "0" / "0" / "0" / "0").read_bytes() == shard.read_bytes()
