"""The fallback for any device: a copy of the module, its convolutions in the requested precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowreel.engine.compiled import Shape
from flowreel.engine.config import Precision
from flowreel.engine.models.layers import FlowHead
from flowreel.engine.pipeline import OneAtATime

_DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_setting_cudnn = OneAtATime()


def pack(net: nn.Module, precision: Precision) -> PlainNetwork:
    """A copy of the module in evaluation mode, channels last."""
    # Under torch's hooks for pruning and normed weights, layers also hold tensors computed from their parameters, which
    # deepcopy refuses to copy.
    attributes = (value for module in net.modules() for value in vars(module).values())
    computed = {id(x): x.detach().clone() for x in attributes if isinstance(x, Tensor) and not x.is_leaf}
    copy = deepcopy(net, computed).eval().requires_grad_(False).float()
    if precision in _DTYPES:
        cast_convolutions(copy, _DTYPES[precision])
    return PlainNetwork(copy.to(memory_format=torch.channels_last), precision)  # type: ignore[call-overload, unused-ignore]


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
    """Casts convolutions to half precision, in place. Norms stay float32; so do flow heads, which disable autocast."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not isinstance(module, FlowHead):
            module.to(dtype)


@contextmanager
def _math(device: torch.device, precision: Precision) -> Iterator[None]:
    """The arithmetic modes of one call; on a GPU cuDNN chooses algorithms as in ``padded.convolve``."""
    # TF32 is off in half precision too: flow heads are float32 there.
    with (
        torch.autocast(device.type, _DTYPES.get(precision), enabled=precision in _DTYPES),
        cudnn_settings(device, tf32=precision == "tf32", deterministic=True),
    ):
        yield


@contextmanager
def cudnn_settings(device: torch.device, *, tf32: bool, deterministic: bool) -> Iterator[None]:
    """Convolutions with TF32 or without, their algorithms not chosen by timing them. On a CPU nothing is set.

    The settings belong to the process: if two calls that set them overlapped, each would restore what the other had
    set. So they take turns. Other threads' own convolutions see the settings meanwhile.

    Not by ``torch.backends.cudnn.flags``: it raises where the caller has chosen a precision by torch's newer
    ``fp32_precision``, and does not turn off a TF32 chosen that way. What it shares with this: torch cannot take back
    that convolutions have a precision, so in 2.13 a later ``torch.backends.cudnn.fp32_precision`` does not reach them.
    """
    if device.type == "cpu":
        yield
        return
    cudnn = torch.backends.cudnn
    wanted: list[tuple[Any, str, object]] = [(cudnn, "enabled", True), (cudnn, "benchmark", False)]
    wanted.append((cudnn, "deterministic", deterministic))
    with _setting_cudnn:
        with suppress(RuntimeError):  # which torch raises where a caller has mixed it with ``fp32_precision``
            _ = cudnn.allow_tf32
            wanted.append((cudnn, "allow_tf32", tf32))  # or it could not be read meanwhile
        if hasattr(cudnn, "conv"):  # since torch 2.9
            wanted.append((cudnn.conv, "fp32_precision", "tf32" if tf32 else "ieee"))
        before = [getattr(place, name) for place, name, _ in wanted]
        try:
            for place, name, value in wanted:
                setattr(place, name, value)
            yield
        finally:
            for (place, name, _), value in zip(wanted, before, strict=True):
                setattr(place, name, value)
