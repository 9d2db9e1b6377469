"""The six FlowNet2 networks. A new one is a new file and a line in ``MODELS``.

Each is called as ``model(first, second)`` with (B, 3, H, W) float RGB 0..255, H and W multiples of 64, and gives
(B, 2, H, W) float32 pixels, x (right) then y (down). In training mode FlowNet2C, FlowNet2S and FlowNet2SD give their
five predictions (flow2, ..., flow6) in pixels / 20 instead.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from flowreel.engine.errors import UsageError
from flowreel.engine.models.flownetc import FlowNetC
from flowreel.engine.models.flownets import FlowNetS
from flowreel.engine.models.flownetsd import FlowNetSD
from flowreel.engine.models.stacks import FlowNet2, FlowNet2CS, FlowNet2CSS

MODELS: dict[str, Callable[..., nn.Module]] = {
    "FlowNet2": FlowNet2,
    "FlowNet2C": FlowNetC,
    "FlowNet2S": FlowNetS,
    "FlowNet2SD": FlowNetSD,
    "FlowNet2CS": FlowNet2CS,
    "FlowNet2CSS": FlowNet2CSS,
}


def model_name(name: str) -> str:
    """The canonical spelling of a model's name, whatever its case.

    Raises:
        UsageError: no model of that name.
    """
    for known in MODELS:
        if known.lower() == str(name).lower():  # whatever a caller gives
            return known
    raise UsageError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")


def build_model(name: str, *, batch_norm: bool = False, width: float = 1.0) -> nn.Module:
    """An initialised, untrained network.

    Args:
        name: one of ``MODELS``, in any case.
        batch_norm: normalise after every encoder convolution, as flownet2-pytorch's ``batchNorm=True`` does.
        width: factor on every layer's channels; 1.0 is the published network.

    Raises:
        UsageError: an unknown name, or a width outside 0.01 to 4.
    """
    if not 0.01 <= width <= 4:
        raise UsageError(f"width must lie between 0.01 and 4, got {width}")
    return MODELS[model_name(name)](batch_norm=batch_norm, width=width)
