"""Flow heads on any device: packed weights, shapes, registration with torch, how work is divided on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flowreel.kernels import flow_head as heads
from flowreel.kernels.flow_head import Borders, pack_flow_head
from flowreel.kernels.operation import recording


def borders_of(channels: int) -> Borders:
    shapes = (4, 5, 2, channels), (4, 2), (4, 2, channels), (4, 2)
    return Borders(*(torch.randn(shape) for shape in shapes))


def test_ops_are_registered_correctly() -> None:
    x = torch.randn(1, 24, 5, 6).half().contiguous(memory_format=torch.channels_last)
    packed, bias = pack_flow_head(torch.randn(2, 24, 5, 5), torch.float16), torch.randn(2)
    torch.library.opcheck(torch.ops.flowreel.flow_head.default, (x, packed, bias))
    out = heads.flow_head(x, packed, bias)
    torch.library.opcheck(torch.ops.flowreel.take_off_borders_.default, (out, x, *borders_of(24)))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("channels", [1, 8, 33, 64])
def test_packed_weights_are_the_same_weights(kernel: int, channels: int) -> None:
    weight = torch.randn(2, channels, kernel, kernel)
    packed = pack_flow_head(weight, torch.float32)
    assert torch.equal(heads.unpack_flow_head(packed, channels), weight)
    assert int((packed != 0).sum()) == weight.numel()
    x, bias = torch.randn(1, channels, 6, 7), torch.randn(2)
    with recording(ran := {}):
        found = heads.flow_head(x, packed, bias)
    assert ran == {"flow_head": "torch"}
    wide = F.conv2d(x.double(), weight.double(), bias.double(), padding=kernel // 2)
    torch.testing.assert_close(found, wide.float())


@pytest.mark.parametrize("shape", [(3, 8, 3, 3), (2, 8, 4, 4), (2, 8, 3, 5), (2, 8, 7, 7)])
def test_other_filters_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a flow head is"):
        pack_flow_head(torch.zeros(shape), torch.float16)


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed, bias = pack_flow_head(torch.zeros(2, 40, 3, 3), torch.float16), torch.zeros(2)
    for x, by in (
        (torch.zeros(1, 32, 3, 4), bias),
        (torch.zeros(40, 3, 4), bias),
        (torch.zeros(1, 40, 3, 4), bias[:1]),
    ):
        with pytest.raises(ValueError, match="packed weights for C channels"):
            heads.flow_head(x.half(), packed, by)
    x = torch.zeros(1, 40, 3, 4).half()
    for wrong in (packed[:, :2], packed.expand(2, 3, 8, 4, 8).repeat(1, 2, 1, 1, 1), packed[..., :4], packed[:, :, :4]):
        with pytest.raises(ValueError, match="packed weights for C channels"):
            heads.flow_head(x, wrong, bias)
    for other in (torch.bfloat16, torch.float32):
        with pytest.raises(ValueError, match="weights of their type"):
            heads.flow_head(x, packed.to(other), bias)
    with pytest.raises(ValueError, match="was not made of"):
        heads.take_off_borders_(torch.zeros(1, 2, 3, 4), torch.zeros(1, 8, 3, 5), borders_of(8))


def test_every_row_and_column_has_its_block() -> None:
    for batch, channels, height, width in ((8, 200, 112, 256), (1, 1024, 7, 16), (8, 88, 448, 1024), (3, 8, 1, 1)):
        for kernel in (3, 5):
            splits, rows, (across, down, deep) = heads._shares(batch, channels, height, width, kernel, 132)
            assert across * (4 // splits) * (33 - kernel) >= width
            assert rows * down >= height > rows * (down - 1)
            assert deep == batch
            assert splits <= -(-channels // heads.CHUNK)  # each warp has at least one chunk
