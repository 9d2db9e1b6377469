"""A chunk keeps every vector within the bound, marks the rest, and notices a flipped bit."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flowreel.engine.config import Codec, SinkConfig
from flowreel.engine.errors import DamagedStoreError, OutputError, UsageError
from flowreel.sinks import codecs
from flowreel.sinks.codecs import FlowCodec, codec_of, compress, decompress, flow_codec, pack_shard, unpack_index

CODECS: tuple[Codec, ...] = get_args(Codec)
SHAPES = st.tuples(st.just(2), st.integers(1, 9), st.integers(1, 17))
VALUES = st.one_of(
    st.floats(-40, 40, width=32),
    st.floats(width=32),  # NaN, infinities, denormals, 3e38
    st.sampled_from([1023.96875, 1023.984, -1024.0, 1024.0, 1e9, 2e9, -1e10, 67108864.0, 67108860.0, -0.0]),
)


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


@settings(max_examples=150, deadline=None)
@given(
    flow=hnp.arrays(np.float32, SHAPES, elements=VALUES),
    max_error=st.sampled_from([1 / 64, 1 / 100, 0.001, 0.3, 4.0]),
    kind=st.sampled_from(CODECS),
    wide=st.booleans(),
)
def test_every_vector_is_within_the_bound_or_missing(flow: Any, max_error: float, kind: Codec, wide: bool) -> None:
    codec = flow_codec(*flow.shape[1:], SinkConfig(max_error=max_error, codec=kind))
    if wide:
        codec = replace(codec, dtype=np.dtype("<i4"))
    given_flow = flow.copy()
    encoded = codec.encode(flow)
    back = decoded(codec, encoded.chunk)

    exact = given_flow.astype(np.float64)
    with np.errstate(invalid="ignore"):
        known = (np.abs(exact) <= 1e9).all(axis=0)
        largest = 32767 if codec.dtype == "int16" else 2**31 - 128
        fits = known & (np.abs(np.rint(exact / codec.step)) <= largest).all(axis=0)
    assert np.array_equal(np.isnan(back), np.broadcast_to(~fits, flow.shape))
    assert np.abs(back.astype(np.float64) - exact)[:, fits].max(initial=0) <= max_error
    assert encoded.unknown == (~known).sum()
    assert encoded.beyond_range == (known & ~fits).sum()
    assert np.array_equal(flow, given_flow, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(flow=hnp.arrays(np.uint32, SHAPES), kind=st.sampled_from(CODECS))
def test_lossless_keeps_every_bit(flow: Any, kind: Codec) -> None:
    codec = flow_codec(*flow.shape[1:], SinkConfig(max_error=0, codec=kind))
    back = decoded(codec, codec.encode(flow.view(np.float32)).chunk)
    assert np.array_equal(back.view(np.uint32), flow)


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
def test_threads_give_the_same_bytes(kind: Codec) -> None:
    rng = np.random.default_rng(1)
    flows = [rng.normal(0, 4, (2, 60, 70)).astype(np.float32).cumsum(axis=2) / 9 for _ in range(12)]
    codec = flow_codec(60, 70, SinkConfig(codec=kind))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(codec.encode, flows)) == [codec.encode(flow) for flow in flows]


@pytest.mark.parametrize("kind", CODECS)
def test_flipped_bits_are_noticed(kind: Codec) -> None:
    values = np.arange(200, dtype="<i2")
    chunk = compress(values, kind)
    for place in range(0, len(chunk), 7):
        damaged = bytearray(chunk)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(DamagedStoreError, match="checksum"):
            decompress(bytes(damaged), kind, values.dtype, 200)
    for wrong in (b"", b"abc", chunk[:-1]):
        with pytest.raises(DamagedStoreError):
            decompress(wrong, kind, values.dtype, 200)


@pytest.mark.parametrize("kind", CODECS)
def test_a_sound_checksum_over_wrong_contents_is_noticed_too(kind: Codec) -> None:
    values = np.arange(200, dtype="<i2")
    with pytest.raises(DamagedStoreError, match="200 values instead of 201"):
        decompress(compress(values, kind), kind, values.dtype, 201)
    with pytest.raises(DamagedStoreError, match="decompress"):
        decompress(codecs.with_checksum(b"\x05 no such stream \xff"), kind, values.dtype, 200)


def test_shard_places_chunks_in_order_and_marks_the_rest_missing() -> None:
    pieces = pack_shard([b"aaa", b"b", b"cc"], 5)
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
    with pytest.raises(DamagedStoreError, match="gzip"):
        codec_of(["bytes", "gzip"])


@pytest.mark.parametrize(
    ("name", "bars"),
    [
        ("flownet2_caffe_result_960x540.flo", {"blosc": 4.5, "pcodec": 7.0}),
        ("sintel_alley_1_0002_gt_1024x436.flo", {"blosc": 20.0, "pcodec": 25.0}),
        ("sintel_alley_1_0003_gt_1024x436.flo", {"blosc": 20.0, "pcodec": 25.0}),
    ],
)
def test_sizes_on_the_fixed_fields(data_dir: Path, name: str, bars: dict[Codec, float]) -> None:
    path = data_dir / "flo" / name
    flow = read_flo(path)
    for kind, bar in bars.items():
        codec = flow_codec(*flow.shape[1:], SinkConfig(codec=kind))
        encoded = codec.encode(flow)
        assert path.stat().st_size / len(encoded.chunk) >= bar
        error = np.abs(decoded(codec, encoded.chunk).astype(np.float64) - flow).max()
        assert error <= 1 / 64
        assert math.isclose(error, 1 / 64, rel_tol=0.01)  # the whole budget is used: a finer step would be waste
