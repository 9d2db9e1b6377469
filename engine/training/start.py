"""The network that training starts from: random weights, or those of another network, made wider or longer."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flowreel.engine.errors import UsageError
from flowreel.engine.models import build_model
from flowreel.engine.models.flownetc import DISPLACEMENTS, FlowNetC
from flowreel.engine.models.layers import scaled
from flowreel.engine.models.stacks import FlowNet2CS, FlowNet2CSS
from flowreel.engine.models.weights import Weights, instantiate
from flowreel.engine.training.config import TrainConfig
from flowreel.engine.training.identity import CARRIED, start_as_identity
from flowreel.engine.training.widen import widen

CORRELATION_GAIN = 5.0

_CHANNELS = (32, 64, 128, 256, 512, 1024)  # of FlowNetC's layers at width 1


def network(config: TrainConfig, initial: Weights | None = None) -> nn.Module:
    """The network that a run trains, on the CPU.

    Args:
        initial: those of ``config.init``. None: random ones, which a resumed run replaces by those of its checkpoint.

    Raises UsageError for initial weights that cannot grow into it.
    """
    return _fresh(config) if initial is None else _from_weights(config, initial)


def plain(model: nn.Module) -> nn.Module:
    """A copy on the CPU in the form that is stored, without what only training needs."""
    copied = deepcopy(model).cpu()
    if isinstance(centred := _correlating(copied), FlowNetC) and parametrize.is_parametrized(centred.conv3_1[0]):
        parametrize.remove_parametrizations(centred.conv3_1[0], "weight", leave_parametrized=True)
    return copied


def _fresh(config: TrainConfig) -> nn.Module:
    model = build_model(config.model, batch_norm=config.batch_norm, width=config.width)
    if config.init is None and isinstance(net := _correlating(model), FlowNetC):
        parametrize.register_parametrization(net.conv3_1[0], "weight", _CentredCorrelation())
    return model


def _from_weights(config: TrainConfig, held: Weights) -> nn.Module:
    """The network that the weights are of, made wider or longer as the run's network demands."""
    times = round(config.width / held.width)
    fits = times >= 1 and all(scaled(n, config.width) == times * scaled(n, held.width) for n in _CHANNELS)
    if config.batch_norm or held.batch_norm or not fits:
        raise UsageError(f"{held.name} continues without BatchNorm, at width {held.width:g} or a multiple of it")
    if times == 1 and config.model in held.serves():
        return instantiate(held, config.model)
    grows = (held.model, config.model)
    model = build_model(config.model, width=config.width)
    if held.model == "FlowNet2C" and isinstance(model, FlowNetC | FlowNet2CS) and not isinstance(model, FlowNet2CSS):
        state = held.state_for("FlowNet2C")
        _correlating(model).load_state_dict(widen(state, times, config.seed) if times > 1 else state)
        if isinstance(model, FlowNet2CS):
            if scaled(64, config.width) < CARRIED:
                raise UsageError(
                    f"{config.model} starts with a network that passes the flow on, which takes a width of at least "
                    f"{CARRIED / 64:g}, got {config.width:g}"
                )
            start_as_identity(model.flownets_1)
    elif grows == ("FlowNet2CS", "FlowNet2CSS") and times == 1:
        first = {key: tensor for key, tensor in held.state.items() if key.startswith("flownets_1.")}
        again = {key.replace("flownets_1.", "flownets_2."): tensor for key, tensor in first.items()}
        model.load_state_dict(dict(held.state) | again)  # a refiner can also refine its own output
    else:
        raise UsageError(f"{held.name} ({held.model}, width {held.width:g}) cannot grow into {config.model}")
    return model


def _correlating(model: nn.Module) -> nn.Module:
    return getattr(model, "flownetc", model)


class _CentredCorrelation(nn.Module):
    """Reparametrises conv3_1's weights for the optimiser.

    Matching costs are small (they are divided by the channel count) and share one large mean, so at first all 441
    displacements look alike and the network learns to predict no motion. Removing the mean over displacements and
    scaling makes them distinguishable from the first step. Both are linear in the input, so they can act on the weights
    instead, and are folded into them when training ends: the saved network is a plain FlowNetC.
    """

    def forward(self, weight: Tensor) -> Tensor:
        redirected, matched = weight[:, :-DISPLACEMENTS], weight[:, -DISPLACEMENTS:]
        centred = matched - matched.mean(1, keepdim=True)
        return torch.cat((redirected, CORRELATION_GAIN * centred), 1)
