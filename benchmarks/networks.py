"""The published networks with random weights, also as files for ``--weights``, and their arithmetic work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from flowreel.engine.models import MODELS, build_model
from flowreel.engine.models.layers import initialise
from flowreel.engine.models.saving import save_weights

SEED = 0


def random_weights(model: str, folder: Path, width: float = 1.0) -> Path:
    """Writes random weights of a network. Speed and memory do not depend on the values if these are of ordinary size.

    The file is kept in ``folder`` and reused.
    """
    path = folder / f"{model}-{width:g}.safetensors"
    if not path.exists():
        torch.manual_seed(SEED)
        net = build_model(model, width=width)
        initialise(net)
        save_weights(path, net.state_dict(), licence="none: random numbers", made_by={"seed": SEED})
    return path


def filled(model: str, device: str, width: float) -> torch.nn.Module:
    """The network with random weights and biases that preserve the magnitude of activations: flow of tens of pixels.

    Ready for inference. The numbers depend on the device.
    """
    with torch.device(device):
        net = build_model(model, width=width).eval()
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for module in net.modules():
            if not isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                continue
            weight = module.weight
            taps = math.prod(weight.shape[2:])
            fan_in = weight.shape[0] * taps / 4 if isinstance(module, torch.nn.ConvTranspose2d) else weight[0].numel()
            weight.normal_(0, math.sqrt(2 / (1.01 * fan_in)), generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.01, generator=generator)
    return net


def flops(model: str, height: int, width: int, channels: float) -> float:
    """Multiplications and additions for one pair, in convolutions and correlations. Sides are multiples of 64.

    Counted on tensors without data, so even large sizes cost nothing. channels: width factor of the network.
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.flowreel.correlation: _correlation_flops})
    with FakeTensorMode(), counter, torch.no_grad():
        net = MODELS[model](width=channels).eval()
        frame = torch.empty(1, 3, height, width)
        net(frame, frame)
    return float(counter.get_total_flops())


def _correlation_flops(a: Any, b: Any, radius: int, stride: int, *, out_shape: Any = None, **_: Any) -> int:
    """``a``: the shape of the first map. One multiplication and addition per displacement, channel and pixel."""
    return int(2 * (2 * radius + 1) ** 2 * math.prod(a))
