"""The inference form of a network: weights packed for one device, then programs for inputs of one shape each.

``compile``, the library's entry point, turns a network and a shape into a callable. The engine takes the same two
steps separately, since one network serves frames of many sizes: ``pack`` once, then ``Packed.program`` for each shape.

A device is supported by a file here with a function ``pack(net, precision) -> Packed``, named in ``_BACKENDS``. The
contract of that file:

- ``net`` is one of ``WRITTEN_OUT``, its parameters on the device. ``pack`` neither changes it nor keeps a reference;
  the caller may drop it, so that its weights are not in memory twice. BatchNorm is taken in its evaluation form.
- ``Packed.program((B, H, W))`` prepares everything that depends on the shape: buffers, layouts, a captured graph. H and
  W are multiples of 64. Programs of one packed network share its weights.
- ``Program.flow`` and ``Program.quarter`` are called in ``plain_modes``, on any thread and any current stream, with two
  (B, 3, H, W) float32 tensors on the device, of any strides, whose shape has been checked. They return a new tensor:
  ordinary, contiguous, never memory that a later call writes to. Two threads may call one program at once.
- Other modes (cuDNN flags, streams) are entered and left within a call.
- Accuracy: fp32 equals the module to 2e-4 px; the other precisions differ by at most .05 px on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn

from flowreel.engine.compiled.unchanged import Unchanged
from flowreel.engine.config import Precision, RunConfig, as_whole
from flowreel.engine.device import resolve_precision
from flowreel.engine.errors import UsageError
from flowreel.engine.models import MODELS
from flowreel.engine.models.flownetc import FlowNetC
from flowreel.engine.models.flownets import FlowNetS
from flowreel.engine.models.flownetsd import FlowNetSD
from flowreel.engine.models.layers import STRIDE, Refiner, Upsampling
from flowreel.engine.models.stacks import FlowNet2, FlowNet2CS, FlowNet2CSS
from flowreel.engine.models.unfilled import without_values

Shape = tuple[int, int, int]  # pairs, height, width


class Program(Protocol):
    """One network for inputs of one shape."""

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, 3, H, W) float32 RGB 0..255 twice to (B, 2, H, W) float32 pixels."""
        ...

    def quarter(self, first: Tensor, second: Tensor) -> Tensor:
        """The same before upsampling: (B, 2, H/4, W/4). Never called where ``quarter_upsampling`` returns None."""
        ...


class Packed(Protocol):
    """One network on one device in one precision, its weights in the form that is fastest there."""

    def program(self, shape: Shape) -> Program:
        """Prepares it for B pairs of H x W pixels, H and W multiples of 64."""
        ...


# Device type to module here; any other device runs the module as it is.
_BACKENDS: dict[str, str] = {"cpu": "cpu", "cuda": "cuda"}
WRITTEN_OUT = (FlowNetC, FlowNetS, FlowNetSD, FlowNet2, FlowNet2CS, FlowNet2CSS)  # which backends reimplement
_CONVOLUTION = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode")
_SETTINGS = (*_CONVOLUTION, "negative_slope", "track_running_stats")  # of layers, as attributes


@contextmanager
def plain_modes(device: torch.device) -> Iterator[None]:
    """The torch modes a network is packed, captured and run in: no gradients, and none of the caller's modes.

    In inference mode, buffers would become inference tensors, which later calls may not write to outside that mode.
    """
    cpu, there = torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), cpu, there:  # the first also turns gradients on
        yield


def pack(net: nn.Module, precision: Precision) -> Packed:
    """A network's weights in the form its device runs. ``net`` is left unchanged and may be dropped."""
    name = _BACKENDS.get(_device_of(net).type, "plain") if _is_as_written(net) else "plain"
    backend = import_module(f"flowreel.engine.compiled.{name}")
    with plain_modes(_device_of(net)):
        packed: Packed = backend.pack(net, precision)
        return packed


def _is_as_written(net: nn.Module) -> bool:
    """Whether the network computes exactly what its class defines: no other layer, setting or method, and no hook."""
    if type(net) not in WRITTEN_OUT:
        return False
    network: Callable[..., nn.Module] = type(net)
    written = _written(network, any(isinstance(module, nn.BatchNorm2d) for module in net.modules()))
    return _layers(net) == written and not any(
        module._forward_hooks or module._forward_pre_hooks or _replaced_methods(module) for module in net.modules()
    )


@cache
def _written(network: Callable[..., nn.Module], batch_norm: bool) -> dict[str, list[object]]:
    """The layers as the class defines them. Building a network takes longer than packing a small one."""
    with without_values():
        return _layers(network(batch_norm=batch_norm))


def _layers(net: nn.Module) -> dict[str, list[object]]:
    """By name, each layer's type and the settings that decide what it computes; channels follow from the weights."""
    return {
        name: [
            type(module),
            getattr(module, "bias", None) is None,
            *(getattr(module, setting, None) for setting in _SETTINGS),
        ]
        for name, module in net.named_modules()
    }


def _replaced_methods(module: nn.Module) -> list[str]:
    """Methods of its class that an attribute of the module itself replaces, as after ``module.forward = ...``."""
    return [name for name in vars(module) if callable(getattr(type(module), name, None))]


def quarter_upsampling(net: nn.Module) -> Upsampling | None:
    """How a network's quarter-resolution prediction is upsampled; None for FlowNet2, which has no such prediction."""
    return None if isinstance(net, FlowNet2) else net.final  # type: ignore[return-value]


class CompiledModel:
    """The result of ``compile``: called like the network itself, for inputs of ``shape`` only."""

    def __init__(self, net: nn.Module, shape: Shape, precision: Precision) -> None:
        self.shape = shape  # pairs, height, width
        self.precision = precision
        self.device = _device_of(net)
        self._name = type(net).__name__
        self._weights = Unchanged(net)
        self._has_quarter = quarter_upsampling(net) is not None
        with plain_modes(self.device):
            self._program = pack(net, precision).program(shape)

    def __repr__(self) -> str:
        return f"<CompiledModel {self._name} {self.shape}, {self.precision}, on {self.device}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a compiled network cannot be pickled or copied: compile the network anew where it is used")

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, 3, H, W) floating point RGB 0..255 twice to (B, 2, H, W) float32 pixels, x (right) then y (down).

        The result is an ordinary tensor without gradients. Several threads may call at once.

        Raises:
            ValueError: an input of another shape, or on another device.
            TypeError: an input that is not floating point.
            StaleModelError: the network's weights have changed since it was compiled.
        """
        return self._run(self._program.flow, first, second)

    def quarter(self, first: Tensor, second: Tensor) -> Tensor:
        """The network's own prediction before upsampling: (B, 2, H/4, W/4) float32, pixels of the full frame.

        Raises:
            UsageError: the network is FlowNet2, which predicts at full resolution.
            ValueError, TypeError, StaleModelError: as when called.
        """
        if not self._has_quarter:
            raise UsageError("FlowNet2 ends at full resolution, so it has no quarter-resolution form")
        return self._run(self._program.quarter, first, second)

    def _run(self, form: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
        batch, height, width = self.shape
        for frames in (first, second):
            if frames.shape != (batch, 3, height, width):
                raise ValueError(
                    f"compiled for two ({batch}, 3, {height}, {width}) tensors, got {tuple(frames.shape)}: "
                    "compile again for inputs of another shape"
                )
            if not frames.is_floating_point():
                raise TypeError(f"frames are floating point, 0..255, got {frames.dtype}: convert them with .float()")
            if frames.device != self.device:
                raise ValueError(f"compiled for {self.device}, got a tensor on {frames.device}")
        self._weights.require()
        with plain_modes(self.device):
            return form(first.float(), second.float())


def compile(model: nn.Module, shape: Shape, precision: str = "auto") -> CompiledModel:
    """The inference form of a network for inputs of one shape: weights folded and packed, buffers allocated.

    Args:
        model: a network as ``load_model`` returns it, on the device it is to run on. It is neither changed nor kept
            alive. BatchNorm is taken in its evaluation form. Only the six unmodified networks have a faster form;
            of a subclass, or a network with your own layers, settings, methods or hooks, a copy is run instead.
        shape: (B, H, W): pairs in a batch, and their height and width in pixels, multiples of 64.
        precision: ``auto`` (fp32 on a CPU, fp16 on a GPU), ``fp32``, ``bf16``; on a GPU also ``tf32`` and ``fp16``.
            Half types differ from fp32 by at most .05 px on average; coordinates and flow are float32 in all of them.

    Returns:
        A callable like the network: two (B, 3, H, W) float tensors to (B, 2, H, W) float32 pixels, without gradients.
        Once the network's weights have changed, by training or by loading others, calling it raises StaleModelError.
        Changes that torch does not track go unnoticed: by an optimiser with ``fused=True``, through ``.data``, or in
        place in tensors made in ``torch.inference_mode``.

    Raises:
        UsageError: not one of the six networks, an impossible shape, or a precision the device does not support.
    """
    sizes = [as_whole(size) or 0 for size in shape] if isinstance(shape, Iterable) else []
    if len(sizes) != 3 or min(sizes) < 1 or sizes[1] % STRIDE or sizes[2] % STRIDE:
        raise UsageError(f"shape is (pairs, height, width), height and width multiples of {STRIDE}, got {shape}")
    if not isinstance(model, Refiner | FlowNet2CS):
        raise UsageError(f"only the networks {', '.join(MODELS)} can be compiled, not {type(model).__name__}")
    asked = RunConfig.of(precision=precision).model.precision
    return CompiledModel(model, (sizes[0], sizes[1], sizes[2]), resolve_precision(asked, _device_of(model)))


def _device_of(net: nn.Module) -> torch.device:
    return next(net.parameters()).device
