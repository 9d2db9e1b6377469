"""Networks' inputs and enlarged flow equal those of the networks' own modules; the operations follow torch's rules."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flowreel.engine.models.layers import UpsampledFlow, normalise, to_pixels, upsample
from flowreel.engine.models.stacks import refining_input as refining_module
from flowreel.engine.models.stacks import warped_and_error
from flowreel.kernels import channel_norm
from flowreel.kernels.enlarge_flow import enlarge_flow
from flowreel.kernels.fusing_input import fusing_input
from flowreel.kernels.normalise_frames import normalise_frames
from flowreel.kernels.refining_input import refining_input

BATCH, HEIGHT, WIDTH = 2, 64, 64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def room(channels: int, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output filled with NaN, so that values that are not written show."""
    made = torch.full((batch, channels, HEIGHT, WIDTH), torch.nan, dtype=dtype)
    return made.to(memory_format=torch.channels_last)


def frames() -> Tensor:
    return upsample(normal(BATCH, 6, HEIGHT // 4, WIDTH // 4), "bilinear").contiguous()


def prediction(seed: int) -> Tensor:
    return normal(BATCH, 2, HEIGHT // 4, WIDTH // 4, seed=seed)


def filled(out: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(out[:, : wanted.shape[1]], wanted, rtol=1e-5, atol=1e-5)
    assert bool((out[:, wanted.shape[1] :] == 0).all())


def test_refining_input_is_the_module_s() -> None:
    x, flow, out = frames(), prediction(1), room(16)
    refining_input(x, flow, 20.0, out)
    filled(out, refining_module(x, to_pixels(flow, "bilinear")))


def test_fusing_input_is_the_module_s() -> None:
    x, small, large, out = frames(), prediction(1), prediction(2), room(16)
    fusing_input(x, small, 1 / 20, large, 20.0, out)
    sd, css = upsample(small / 20, "nearest"), to_pixels(large, "nearest")
    errors = [warped_and_error(x, flow)[1] for flow in (sd, css)]
    filled(out, torch.cat((x[:, :3], sd, css, channel_norm(sd), channel_norm(css), *errors), 1))


def test_normalised_frames_are_the_module_s() -> None:
    first, second = (normal(BATCH, 3, HEIGHT, WIDTH, seed=seed) * 50 + 100 * seed for seed in (1, 2))
    wanted = normalise(first, second)
    planes, pair, both = torch.empty(BATCH, 6, HEIGHT, WIDTH), room(8), room(8, 2 * BATCH)
    normalise_frames(first, second, planes=planes, pair=pair, both=both)
    assert torch.equal(planes, wanted)
    filled(pair, wanted)
    filled(both, torch.cat((wanted[:, :3], wanted[:, 3:])))


@pytest.mark.parametrize("bias", [True, False])
def test_enlarged_flow_is_the_layer_s(bias: bool) -> None:
    layer, flow, out = UpsampledFlow(bias), normal(BATCH, 2, HEIGHT // 2, WIDTH // 2), room(5)
    with torch.no_grad():
        enlarge_flow(flow, layer.weight, torch.zeros(2) if layer.bias is None else layer.bias, out[:, 1:3])
        torch.testing.assert_close(out[:, 1:3], layer(flow))
    assert out.isnan().all(0).all(1).all(1).tolist() == [True, False, False, True, True]


def test_half_types_are_rounded_once() -> None:
    x, flow, wide, half = frames(), prediction(1), room(16), room(16, dtype=torch.float16)
    refining_input(x, flow, 20.0, wide)
    refining_input(x, flow, 20.0, half)
    assert torch.equal(half, wide.half())


def test_other_dtypes_are_refused() -> None:
    x, flow, weight, bias = frames(), prediction(1), normal(2, 2, 4, 4), normal(2)
    first, second, large = x[:, :3], x[:, 3:], torch.zeros(BATCH, 2, 32, 32)
    for dtype in (torch.float64, torch.uint8):
        wrong = partial(pytest.raises, TypeError, match=str(dtype))
        with wrong():
            refining_input(x, flow.to(dtype), 20.0, room(16))
        with wrong():
            refining_input(x, flow, 20.0, room(16).to(dtype))
        with wrong():
            fusing_input(x, flow, 0.05, flow.to(dtype), 20.0, room(16))
        with wrong():
            enlarge_flow(flow, weight.to(dtype), bias, large)
        with wrong():
            normalise_frames(first.to(dtype), second, pair=room(8))
        with wrong():
            normalise_frames(first, second, planes=torch.empty_like(x, dtype=dtype))
        with wrong():
            normalise_frames(first, second, pair=room(8).to(dtype))


def test_ops_are_registered_correctly() -> None:
    operations: Any = torch.ops.flowreel
    x, flow = frames(), prediction(1)
    first, second = x[:, :3], x[:, 3:]
    checks = ("test_schema", "test_faketensor")
    for op, arguments in (
        (operations.refining_input, (x, flow, 20.0, room(16).zero_())),
        (operations.fusing_input, (x, flow, 0.05, prediction(2), 20.0, room(16).zero_())),
        (operations.normalise_frames, (first, second, torch.zeros_like(x), room(8).zero_(), None)),
        (operations.enlarge_flow, (flow, normal(2, 2, 4, 4), normal(2), torch.zeros(BATCH, 2, 32, 32))),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=checks)


def test_they_compile_whole() -> None:
    torch._dynamo.reset()
    weight, bias = normal(2, 2, 4, 4), normal(2)

    def work(first: Tensor, second: Tensor, flow: Tensor) -> tuple[Tensor, ...]:
        planes, pair, both = torch.zeros(BATCH, 6, HEIGHT, WIDTH), room(8), room(8, 2 * BATCH)
        normalise_frames(first, second, planes=planes, pair=pair, both=both)
        refining, fusing, whole = room(16), room(16), torch.zeros(BATCH, 5, 32, 32)
        refining_input(planes, flow, 20.0, refining)
        fusing_input(planes, flow, 0.05, flow, 20.0, fusing)
        enlarge_flow(flow, weight, bias, whole[:, 2:4])
        return planes, pair, both, refining, fusing, whole

    inputs = (*(normal(BATCH, 3, HEIGHT, WIDTH, seed=seed) for seed in (3, 4)), prediction(1))
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")(*inputs)
    for found, wanted in zip(compiled, work(*inputs), strict=True):
        assert torch.equal(found, wanted)
