"""Chunks are small, and equal for equal flow.

That every vector stays within the error bound is tested in ``test_codecs_property.py``.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowreel.engine.config import SinkConfig
from flowreel.engine.errors import OutputError, UsageError
from flowreel.sinks import codecs
from flowreel.sinks.codecs import FlowCodec, flow_codec
from flowreel.sinks.compressors import COMPRESSORS, compress


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
    [
        (1023, 1 / 64, "int16"),
        (1024, 1 / 64, "int32"),
        (1920, 1 / 32, "int16"),
        (32767, 1 / 2, "int16"),
        (32768, 1 / 2, "int32"),
        (9, 1e-9, "int32"),
        (99, 0, "float32"),
    ],
)
def test_integers_reach_across_the_longer_side(width: int, max_error: float, dtype: str) -> None:
    if max_error == 1e-9:
        with pytest.raises(UsageError, match="lossless"):
            flow_codec(5, width, SinkConfig(max_error=max_error))
        return
    assert flow_codec(5, width, SinkConfig(max_error=max_error)).dtype == dtype
    assert flow_codec(width, 5, SinkConfig(max_error=max_error)).dtype == dtype
    assert flow_codec(5, 9, SinkConfig(max_error=max_error), side=width).dtype == dtype  # stored smaller than the frame


def test_row_blocks_and_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    padded = rng.normal(0, 9, (2, 50, 80)).astype(np.float32)
    padded[:, 7, 9] = np.nan
    padded[0, 49, 79] = 5000  # out of range, in the last, short block
    flow = padded[:, 1:, 2:]
    codec = flow_codec(49, 78, SinkConfig())
    whole = codec.encode(np.ascontiguousarray(flow))
    assert (whole.unknown, whole.beyond_range) == (1, 1)
    for block in (1, 1000, 78 * 2 * 5):
        monkeypatch.setattr(codecs, "BLOCK_VALUES", block)
        assert codec.encode(flow) == whole
    lossless = flow_codec(49, 78, SinkConfig(max_error=0))
    assert lossless.encode(flow) == lossless.encode(np.ascontiguousarray(flow))


def test_a_broken_bound_is_noticed() -> None:
    codec = replace(flow_codec(8, 8, SinkConfig()), step=1 / 16)
    for rounded_up_or_down in (0.04, 0.02):
        with pytest.raises(OutputError, match="promised"):
            codec.encode(np.full((2, 8, 8), rounded_up_or_down, np.float32))
    with pytest.raises(OutputError, match="off by nan px"):
        codec.require_bound(math.nan)


def test_size_is_checked() -> None:
    for wrong in ((2, 8, 9), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"\(2, 8, 8\)"):
            flow_codec(8, 8, SinkConfig()).encode(np.zeros(wrong, np.float32))


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_threads_give_the_same_bytes(kind: Any) -> None:
    rng = np.random.default_rng(1)
    flows = [rng.normal(0, 4, (2, 60, 70)).astype(np.float32).cumsum(axis=2) / 9 for _ in range(12)]
    codec = replace(flow_codec(60, 70, SinkConfig()), codec=kind)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(codec.encode, flows)) == [codec.encode(flow) for flow in flows]


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
        assert math.isclose(error, 1 / 64, rel_tol=0.01)  # the allowed error is used up: a finer step would waste space


@pytest.mark.parametrize("kind", ["pcodec", "pcodec2d"])
def test_floats_that_are_multiples_are_stored_as_such(kind: Any) -> None:
    """As KITTI's are. 13 random bits take 0.41 of a float32."""
    multiples = np.random.default_rng(0).integers(-4096, 4096, (2, 40, 50)) / np.float32(64)
    assert len(compress(multiples.astype("<f4"), kind)) < 0.46 * multiples.size * 4
