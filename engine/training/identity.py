"""Initialises a refining FlowNetS to pass its input flow through, so that it only has to learn corrections.

With random weights, such a network must first unlearn the noise that it adds to a flow that is good already. Here four
channels of every encoder layer carry the flow's components and their negatives (a LeakyReLU distorts a signed value,
but the two together recover it), averaged where the layer halves the size, and every flow head reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowreel.engine.models.flownets import FlowNetS
from flowreel.engine.models.layers import SLOPE

_ENCODER = ("conv1", "conv2", "conv3", "conv3_1", "conv4", "conv4_1", "conv5", "conv5_1", "conv6", "conv6_1")
_HEAD_READS = {"predict_flow2": "conv2", "predict_flow3": "conv3_1", "predict_flow4": "conv4_1"}
_HEAD_READS |= {"predict_flow5": "conv5_1", "predict_flow6": "conv6_1"}
_FLOW_INPUT = 9  # frames 6, warped second frame 3, then the flow's x and y
CARRIED = 4  # x, -x, y, -y
_BOTH_HALVES = 1 / (1 + SLOPE)  # LeakyReLU(f) - LeakyReLU(-f) = (1 + slope) f


@torch.no_grad()
def start_as_identity(net: FlowNetS) -> None:
    """Changes ``net``, of 12 input channels, so that every scale predicts the input flow, averaged to that scale."""
    for name in _ENCODER:
        convolution = net.get_submodule(name)[0]  # type: ignore[index]
        assert isinstance(convolution, nn.Conv2d)
        weight, bias = convolution.weight, convolution.bias
        weight[:CARRIED] = 0
        if bias is not None:
            bias[:CARRIED] = 0
        taps = _taps(weight.shape[-1], convolution.stride[0])
        for out in range(CARRIED):
            axis, sign = out // 2, 1 - 2 * (out % 2)
            if name == "conv1":
                weight[out, _FLOW_INPUT + axis] = sign * taps
            else:
                weight[out, 2 * axis] = sign * _BOTH_HALVES * taps
                weight[out, 2 * axis + 1] = -sign * _BOTH_HALVES * taps
    for name in _HEAD_READS:  # the encoder's channels come first among a head's inputs
        weight = net.get_submodule(name).weight  # type: ignore[assignment]
        for axis in range(2):
            weight[axis, 2 * axis] = _BOTH_HALVES * _taps(3, 1)
            weight[axis, 2 * axis + 1] = -_BOTH_HALVES * _taps(3, 1)


def _taps(kernel: int, stride: int) -> Tensor:
    """(kernel, kernel): the middle pixel, or for a layer of stride 2 the mean of 2x2 pixels."""
    taps = torch.zeros(kernel, kernel)
    middle = kernel // 2
    taps[middle : middle + stride, middle : middle + stride] = 1 / stride**2
    return taps
