"""Convolutions laid out for tensor cores: channels last, padded to multiples of 8 or 16, BatchNorm folded in.

Maps keep their padding from layer to layer. Padding channels are zero, because the weights that produce them are, and
the next layer's weights for them are zero too. So results are those of the unpadded network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowreel.engine.config import Precision
from flowreel.engine.models.layers import FlowHead
from flowreel.kernels.bias_leaky_relu import bias_leaky_relu, bias_leaky_relu_
from flowreel.kernels.convolution import convolution, pack, padding_of, tiling
from flowreel.kernels.launch import kernels_on, on_tensor_cores

MULTIPLE = 8  # 16 bytes of half precision: one load of tensor-core operands
# 32 bytes of half precision: a memory sector, the unit in which memory is written. With more channels than this, each
# pixel starts on a sector boundary, so that the parts of a concatenation, which are multiples of 16 channels, are
# written without reading what lies beside them.
SECTOR = 16

# Sees what each convolution stores: its sums before the bias, or the final result where our fused kernel runs.
Watch = Callable[[Tensor], None]

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def padded(channels: int) -> int:
    """Rounds up to a multiple of 8; beyond 16 channels, of 16."""
    multiple = MULTIPLE if channels <= SECTOR else SECTOR
    return -(-channels // multiple) * multiple


@dataclass(frozen=True)
class Convolution:
    """One convolution or deconvolution, and the activation that follows it.

    Computed by our own fused kernel if ``packed`` is given, else by cuDNN and an activation kernel after it; ``watch``
    sees what the kernel or cuDNN stores.
    """

    # (out, in, k, k), for a deconvolution (in, out, k, k). Channels last, and padded unless ``packed`` is given;
    # for the upsampling of flow, neither.
    weight: Tensor
    packed: Tensor | None  # the same weights in our own kernel's order
    bias: Tensor  # (out,) float32; zeros if the layer has none, and in padding channels
    outputs: int  # channels without padding
    stride: int
    padding: int
    transposed: bool
    slope: float  # of the LeakyReLU; 1: none
    tf32: bool

    def __call__(self, x: Tensor, also: Tensor | None = None, watch: Watch | None = None) -> Tensor:
        """A padded map to a new padded map; ``also`` (part of a concatenation) gets a copy of the unpadded channels."""
        if self.packed is not None:
            return self._at_once(x, self.packed, None, also, watch)
        return bias_leaky_relu_(self._convolved(x, watch), self.bias, self.slope, also)

    def into(self, x: Tensor, out: Tensor, watch: Watch | None = None) -> None:
        """A padded map to unpadded channels, written to ``out`` only."""
        if self.packed is not None:
            self._at_once(x, self.packed, out, None, watch)
        else:
            bias_leaky_relu(self._convolved(x, watch), self.bias, self.slope, out)

    def _at_once(
        self, x: Tensor, packed: Tensor, out: Tensor | None, also: Tensor | None, watch: Watch | None
    ) -> Tensor:
        result = convolution(
            x, self.weight, packed, self.bias, self.slope, self.stride, self.transposed, out=out, also=also
        )
        if watch is not None:
            watch(result)
        return result

    def _convolved(self, x: Tensor, watch: Watch | None) -> Tensor:
        result = convolve(x, self)
        if watch is not None:
            watch(result)
        return result


def convolve(x: Tensor, by: Convolution) -> Tensor:
    """The convolution without its bias.

    On a GPU cuDNN is called directly, so that its modes (TF32, choice of algorithm) are arguments of each call instead
    of process-wide settings that other threads see. Only deterministic algorithms are allowed, chosen by cuDNN's
    heuristics: benchmarking them gained nothing (H200), and another run could choose others and give other bits.
    """
    stride, padding = (by.stride, by.stride), (by.padding, by.padding)
    if x.device.type == "cuda":
        dilation, output_padding = (1, 1), (0, 0)
        if by.transposed:
            deconvolved: Tensor = torch.ops.aten.cudnn_convolution_transpose(
                x, by.weight, padding, output_padding, stride, dilation, 1, False, True, by.tf32
            )
            return deconvolved
        convolved: Tensor = torch.ops.aten.cudnn_convolution(
            x, by.weight, padding, stride, dilation, 1, False, True, by.tf32
        )
        return convolved
    return (F.conv_transpose2d if by.transposed else F.conv2d)(x, by.weight, None, stride, padding)


def pack_layer(module: nn.Module, precision: Precision, by_cudnn: bool = False) -> Convolution:
    """Packs a layer of ``engine.models.layers``, its BatchNorm folded; ``heads`` packs flow heads in half precision.

    Layers that take or give flow stay in float32, without TF32. ``by_cudnn``: use cuDNN even where our own kernel could
    compute the layer, for comparisons.
    """
    parts = list(module) if isinstance(module, nn.Sequential) else [module]
    layer = parts[0]
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    enlarging = isinstance(module, nn.ConvTranspose2d)  # flow itself: two channels in, two out
    about_flow = enlarging or isinstance(module, FlowHead)
    weight = layer.weight.detach().to(torch.float32 if about_flow else DTYPES[precision])
    stride, padding = layer.stride[0], int(layer.padding[0])
    fits = tiling(weight, stride, transposed) is not None and padding == padding_of(weight)
    ours = fits and not by_cudnn and _runs_ours(weight.device)
    if not ours:
        spread = weight.new_zeros(
            2 if about_flow else padded(weight.shape[0]), 2 if enlarging else padded(weight.shape[1]), *weight.shape[2:]
        )
        spread[: weight.shape[0], : weight.shape[1]] = weight
        weight = spread
    bias = torch.zeros(weight.shape[1 if transposed else 0], dtype=torch.float32, device=weight.device)
    if layer.bias is not None:
        bias[: layer.out_channels] = layer.bias.detach()
    activation = parts[-1]
    return Convolution(
        weight=weight.to(memory_format=torch.contiguous_format if enlarging else torch.channels_last),
        packed=pack(weight, stride, transposed) if ours else None,
        bias=bias,
        outputs=layer.out_channels,
        stride=stride,
        padding=padding,
        transposed=transposed,
        slope=activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 1.0,
        tf32=precision == "tf32" and not about_flow,
    )


def _runs_ours(device: torch.device) -> bool:
    """Whether our own kernel runs there. On a CPU its torch definition does, so that tests see what a GPU computes."""
    return device.type == "cpu" or (kernels_on(device) == "cuda" and on_tensor_cores(device))
