"""Identifies the network that weights belong to from tensor names and shapes alone, so that users need not name it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flowreel.engine.errors import WeightsMismatchError
from flowreel.engine.models import MODELS
from flowreel.engine.models.layers import scaled
from flowreel.engine.models.weight_files import MOST_SHOWN

# Which sub-network's prefix marks which stack, longest stack first.
STACKS = (("flownetfusion.", "FlowNet2"), ("flownets_2.", "FlowNet2CSS"), ("flownets_1.", "FlowNet2CS"))
# The parts of a stack that form each smaller model: (prefix in the stack, prefix in the model).
PARTS = {
    "FlowNet2C": (("flownetc.", ""),),
    "FlowNet2CS": (("flownetc.", "flownetc."), ("flownets_1.", "flownets_1.")),
    "FlowNet2CSS": (("flownetc.", "flownetc."), ("flownets_1.", "flownets_1."), ("flownets_2.", "flownets_2.")),
}
SERVES = {
    "FlowNet2": ("FlowNet2C", "FlowNet2CS", "FlowNet2CSS"),
    "FlowNet2CSS": ("FlowNet2C", "FlowNet2CS"),
    "FlowNet2CS": ("FlowNet2C",),
}


def identify(state: Mapping[str, Tensor], name: str) -> tuple[str, bool, float]:
    """(model, BatchNorm, width), derived from tensor names and shapes.

    Raises:
        WeightsMismatchError: the names fit no FlowNet2 network, or a refining part of a stack without the rest.
    """
    model = next((stack for prefix, stack in STACKS if any(key.startswith(prefix) for key in state)), None)
    prefix = "" if model is None else "flownetc."
    if model is None and f"{prefix}predict_flow6.weight" in state:
        if "conv_redir.0.weight" in state:
            model = "FlowNet2C"
        elif "conv0.0.weight" in state:
            model = "FlowNet2SD"
        elif "conv1.0.weight" in state and state["conv1.0.weight"].ndim == 4:
            inputs = state["conv1.0.weight"].shape[1]
            if inputs != 6:
                raise WeightsMismatchError(f"{name} holds a refining FlowNetS ({inputs} inputs): it cannot run alone")
            model = "FlowNet2S"
    widest = state.get(f"{prefix}predict_flow6.weight")
    if model is None or widest is None or widest.ndim != 4:
        some = ", ".join(key[:MOST_SHOWN] for key in sorted(state)[:3]) or "nothing"
        raise WeightsMismatchError(f"{name} holds none of {', '.join(MODELS)}: its tensors are {some}, ...")
    width = _width(state, prefix, widest.shape[1])
    if width is None:
        raise WeightsMismatchError(f"{name}: no FlowNet2 network has {widest.shape[1]} channels")
    return model, any(key.endswith("running_mean") for key in state), width


def _width(state: Mapping[str, Tensor], prefix: str, channels: int) -> float | None:
    """The width factor of a network whose widest layer has so many channels; None: of none of ours.

    In the middle of the range that this number allows lies the factor at which a narrower layer's number is rounded up
    instead of down. Those layers tell on which side the factor is.
    """
    possible = [width for width in ((channels + part) / 1024 for part in (0, -0.25, 0.25)) if 0.01 <= width <= 4]
    narrower = {f"{prefix}deconv{level}.0.bias": 16 << level for level in (5, 4, 3, 2)}
    narrower |= {f"{prefix}conv_redir.0.weight": 32, "flownetfusion.deconv0.0.bias": 16}
    fitting = (
        width
        for width in possible
        if all(state[key].shape[:1] == (scaled(at_1, width),) for key, at_1 in narrower.items() if key in state)
    )
    return next(fitting, possible[0] if possible else None)
