"""The model stage: batches of pairs through one network, in one precision, decided once before the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from flowreel.engine.config import ModelConfig, Precision
from flowreel.engine.data import JSON, FlowBatch, NativeGrid, PairBatch
from flowreel.engine.device import resolve_device
from flowreel.engine.errors import UsageError
from flowreel.engine.models.layers import FlowHead, upsample
from flowreel.engine.models.weights import Weights, instantiate, read_weights
from flowreel.engine.restore import Fit

_DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_BATCH_PIXELS = 1 << 20  # a million pixels a batch keeps two cores or a small GPU busy; more only adds latency
_MOST = 8


@dataclass(frozen=True)
class Inference:
    """A network ready to run: resolved once, recorded in the store, the same after a resume."""

    net: nn.Module  # evaluation mode, on ``device``, convolutions already in ``precision``
    model: str
    weights: Weights
    device: torch.device
    precision: Precision
    batch: int  # pairs
    fit: Fit
    native: bool = False  # the network's own quarter-resolution prediction goes along with the flow

    @property
    def grid(self) -> NativeGrid | None:
        """How the prediction that goes along lies in the flow."""
        return self.fit.grid(self.net.final) if self.native else None  # type: ignore[arg-type]

    def made_by(self) -> dict[str, JSON]:
        """What a store records of how its flow was made."""
        return {
            "model": self.model,
            "weights": self.weights.name,
            "weights_sha256": self.weights.sha256,
            "weights_licence": self.weights.licence,
            "width": self.weights.width,
            "precision": self.precision,
            "batch": self.batch,
            "fit": self.fit.mode,
        }

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 or float frames on any device to (N, 2, *fit.network_size) float32 pixels.

        Gradients are off, but the result is an ordinary tensor: it can take part in training.
        """
        return self._computed(self.net, first, second)

    def quarter(self, first: Tensor, second: Tensor) -> Tensor:
        """The same before it is enlarged: (N, 2, h, w) at a quarter of the network's size, the network's pixels."""
        return self._computed(self.net.quarter, first, second)  # type: ignore[arg-type]

    def _computed(self, network: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
        with torch.no_grad(), _math(self.device, self.precision):
            frames = (self.fit.apply(frames.to(self.device).float()) for frames in (first, second))
            return network(*frames).float()

    def stage(self, batches: Iterator[PairBatch]) -> Iterator[FlowBatch]:
        """Batches of pairs to batches of flow at the network's size; ``restore`` brings it to the frame's."""
        for batch in batches:
            first = torch.stack([pair.first.rgb for pair in batch.pairs])
            second = torch.stack([pair.second.rgb for pair in batch.pairs])
            native = self.quarter(first, second) if self.native else None
            yield FlowBatch(
                flow=self.flow(first, second) if native is None else upsample(native, self.net.final),  # type: ignore[arg-type]
                index=batch.index,
                frame=np.array([pair.first.index for pair in batch.pairs], np.int64),
                frame_to=np.array([pair.second.index for pair in batch.pairs], np.int64),
                timestamp_s=np.array([pair.first.timestamp_s for pair in batch.pairs], np.float64),
                timestamp_to_s=np.array([pair.second.timestamp_s for pair in batch.pairs], np.float64),
                native=native,
            )


@dataclass(frozen=True)
class Network:
    """Loaded weights on their device, before the size of the frames is known: serves any number of sources."""

    config: ModelConfig
    net: nn.Module  # as in ``Inference``
    weights: Weights
    device: torch.device
    precision: Precision

    def fitted(self, height: int, width: int, *, native: bool = False) -> Inference:
        """Settles fit and batch for frames of one size.

        native: give the network's own prediction as well. Raises UsageError when frames cannot be made to fit, or
        when there is no such prediction.
        """
        fit = Fit(self.config.fit, height, width)
        model = self.weights.model if self.config.model is None else _name(self.config.model)
        if native and model == "FlowNet2":
            raise UsageError("FlowNet2 ends at full resolution, so it has no native one: use resolution full")
        return Inference(
            net=self.net,
            model=model,
            weights=self.weights,
            device=self.device,
            precision=self.precision,
            batch=self.config.batch or auto_batch(*fit.network_size),
            fit=fit,
            native=native,
        )


def load_network(config: ModelConfig) -> Network:
    """Loads the weights and settles device and precision.

    Raises:
        DeviceError, UsageError, WeightsError: as their names say, before any frame is decoded.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    weights = read_weights(config.weights)
    net = instantiate(weights, config.model).eval()
    if precision in _DTYPES:
        cast_convolutions(net, _DTYPES[precision])
    on_device: nn.Module = net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Network(config, on_device, weights, device, precision)


def prepare(config: ModelConfig, height: int, width: int) -> Inference:
    """Both at once, for frames of one size: ``load_network``, then ``Network.fitted``. Raises what they do."""
    return load_network(config).fitted(height, width)


def resolve_precision(precision: Precision | None, device: torch.device) -> Precision:
    """auto is fp32 on a CPU and fp16 on a GPU; a CPU also takes bf16.

    Raises:
        UsageError: the device has no such precision.
    """
    if precision is None:
        return "fp16" if device.type == "cuda" else "fp32"
    if device.type == "cpu" and precision not in ("fp32", "bf16"):
        raise UsageError(f"a CPU runs fp32 or bf16, not {precision}")
    return precision


def auto_batch(height: int, width: int) -> int:
    """Pairs a batch, from the frame size alone: free memory would make results depend on luck."""
    return max(1, min(_MOST, _BATCH_PIXELS // (height * width)))


def cast_convolutions(net: nn.Module, dtype: torch.dtype) -> None:
    """Convolutions and their norms to a half type, in place. Flow heads stay float32; autocast meets them there."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not isinstance(module, FlowHead):
            module.to(dtype)


def _math(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The arithmetic of one call, entered and left inside it: modes belong to threads, generators do not."""
    if precision in _DTYPES:
        return torch.autocast(device.type, _DTYPES[precision])
    if device.type == "cpu":
        return nullcontext()
    modes = ExitStack()
    modes.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=precision == "tf32"))
    return modes


def _name(model: str) -> str:
    from flowreel.engine.models import model_name

    return model_name(model)
