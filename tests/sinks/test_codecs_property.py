"""For any flow, bound and codec: valid vectors come back within the bound, all others as NaN, and are counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numcodecs.delta import Delta

from flowreel.engine.config import SinkConfig
from flowreel.engine.errors import UsageError
from flowreel.sinks import codecs
from flowreel.sinks.codecs import FlowCodec, flow_codec
from flowreel.sinks.compressors import COMPRESSORS
from flowreel.sinks.pcodec import differences, from_differences

KINDS = sorted(COMPRESSORS)
LARGEST = {"int16": 32767, "int32": 2**31 - 128}  # in steps; the latter is the largest float32 below 2^31
BOUNDS = st.one_of(
    st.sampled_from([1 / 128, 1 / 64, 1 / 32, 1 / 16, 0.01, 0.3, 0.75, 1, 1024]),
    st.floats(-20, 10).map(lambda power: 2.0**power),
)
SHAPES = st.one_of(
    st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 97), (97, 1), (3, 3), (63, 65)]),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
)


@st.composite
def codecs_and_flows(draw: st.DrawFn) -> tuple[FlowCodec, Any]:
    """A codec and a flow (2, H, W) with values that are hard for it."""
    height, width = draw(SHAPES)
    try:
        codec = flow_codec(height, width, SinkConfig(max_error=draw(BOUNDS)))
    except UsageError:
        assume(False)
    codec = replace(codec, codec=draw(st.sampled_from(KINDS)))
    if draw(st.booleans()) and codec.step <= 64:
        codec = replace(codec, dtype=np.dtype("<i4"))
    return codec, flow_for(codec, draw)


def flow_for(codec: FlowCodec, draw: st.DrawFn) -> Any:
    """Noise, a slope or a constant, from denormal to huge, with values at every limit scattered in it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (2, codec.height, codec.width)
    size = draw(st.sampled_from([0.0, 1e-45, 1e-39, 1e-6, 0.01, 1.0, 40.0, 1e3, 1e6, 1e9, 1e30]))
    kind = draw(st.sampled_from(["noise", "slope", "plain"]))
    noise = rng.normal(0, 1, shape) if kind == "noise" else np.full(shape, 0.7)
    with np.errstate(over="ignore", under="ignore"):
        flow = (size * (noise.cumsum(2) / 9 if kind == "slope" else noise)).astype(np.float32)
    edge = LARGEST[codec.dtype.name] * codec.step
    values = np.array(
        [0.0, 1e-45, codec.step / 2, codec.step * 1.5, edge, edge + 0.499 * codec.step, 1e9, 3e38, np.inf]
    )
    values = values.astype(np.float32)
    values = np.concatenate([values, np.nextafter(values, np.float32(0)), np.nextafter(values, np.float32(np.inf))])
    strewn = rng.random(shape) < draw(st.sampled_from([0, 0.01, 0.3, 1]))
    flow[strewn] = rng.choice([*values, *-values, np.nan], strewn.sum())
    gone = rng.random(shape[1:]) < draw(st.sampled_from([0, 0, 0.2, 1]))
    flow[0 if draw(st.booleans()) else slice(None), gone] = np.nan
    return flow


def decoded(codec: FlowCodec, chunk: bytes) -> Any:
    out = np.full((2, codec.height, codec.width), 7, np.float32)
    codec.decode(chunk, out)
    return out


@settings(max_examples=250, deadline=None)
@given(codecs_and_flows(), st.sampled_from([7, 1 << 17]))
def test_valid_vectors_keep_the_bound_and_the_others_are_nan(case: tuple[FlowCodec, Any], block: int) -> None:
    codec, flow = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "BLOCK_VALUES", block)
        encoded = codec.encode(flow)
    back = decoded(codec, encoded.chunk)

    exact = flow.astype(np.float64)
    with np.errstate(invalid="ignore"):
        known = (np.abs(exact) <= 1e9).all(axis=0)
        fits = known & (np.abs(np.rint(exact / codec.step)) <= LARGEST[codec.dtype.name]).all(axis=0)
    assert np.array_equal(np.isnan(back), np.broadcast_to(~fits, flow.shape))
    assert np.abs(back.astype(np.float64) - exact)[:, fits].max(initial=0) <= codec.max_error
    assert (encoded.unknown, encoded.beyond_range) == ((~known).sum(), (known & ~fits).sum())


@settings(max_examples=60, deadline=None)
@given(codecs_and_flows())
def test_equal_flow_gives_equal_bytes_however_it_lies_in_memory(case: tuple[FlowCodec, Any]) -> None:
    codec, flow = case
    given_flow = flow.copy()
    encoded = codec.encode(flow)
    assert np.array_equal(flow.view(np.uint32), given_flow.view(np.uint32))
    around = np.full((2, codec.height + 3, codec.width + 5), np.nan, np.float32)
    around[:, 2:-1, 1:-4] = flow
    assert codec.encode(around[:, 2:-1, 1:-4]) == encoded
    assert codec.encode(np.asfortranarray(flow)) == encoded


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_lossless_keeps_every_bit_of_every_codec(shape: tuple[int, int], seed: int, kind: Any) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (2, *shape), np.uint32)  # NaNs with payloads, infinities, denormals among them
    codec = replace(flow_codec(*shape, SinkConfig(max_error=0)), codec=kind)
    encoded = codec.encode(bits.view(np.float32))
    assert (encoded.unknown, encoded.beyond_range) == (0, 0)
    assert np.array_equal(decoded(codec, encoded.chunk).view(np.uint32), bits)


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1), st.sampled_from(["<i2", "<i4"]))
def test_differences_are_numcodecs_delta_and_turn_back(shape: tuple[int, int], seed: int, dtype: str) -> None:
    """For integers of the whole range, where differences wrap around."""
    info = np.iinfo(dtype)
    steps = np.random.default_rng(seed).integers(info.min, info.max + 1, (2, *shape), dtype)
    change = differences(steps)
    assert np.array_equal(from_differences(change, steps.shape), steps)
    assert np.array_equal(change, Delta(dtype).encode(steps).reshape(steps.shape).swapaxes(1, 2))
