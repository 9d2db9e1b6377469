"""The fallback for any device: a copy of the module, its convolutions in the requested precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowreel.engine.compiled import Shape
from flowreel.engine.config import Precision
from flowreel.engine.models.layers import FlowHead

_DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


def pack(net: nn.Module, precision: Precision) -> PlainNetwork:
    """A copy of the module in evaluation mode, channels last."""
    copy = deepcopy(net).eval().requires_grad_(False).float()
    if precision in _DTYPES:
        cast_convolutions(copy, _DTYPES[precision])
    return PlainNetwork(copy.to(memory_format=torch.channels_last), precision)  # type: ignore[call-overload]


@dataclass(frozen=True)
class PlainNetwork:
    """Both the packed network and its only program, since a module runs at any shape."""

    net: nn.Module
    precision: Precision

    def program(self, shape: Shape) -> PlainNetwork:
        return self

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        with _math(first.device, self.precision):
            flow: Tensor = self.net(first, second)
        return flow.float().contiguous()

    def quarter(self, first: Tensor, second: Tensor) -> Tensor:
        with _math(first.device, self.precision):
            flow: Tensor = self.net.quarter(first, second)  # type: ignore[operator]
        return flow.float().contiguous()


def cast_convolutions(net: nn.Module, dtype: torch.dtype) -> None:
    """Casts convolutions and their norms to half precision, in place. Flow heads stay float32 and disable autocast."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not isinstance(module, FlowHead):
            module.to(dtype)


def _math(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The arithmetic modes of one call, entered and left within it: modes are per thread, generators are not."""
    if precision in _DTYPES:
        return torch.autocast(device.type, _DTYPES[precision])
    if device.type == "cpu":
        return nullcontext()
    modes = ExitStack()
    modes.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=precision == "tf32"))
    return modes
