"""Widens a trained FlowNetC so that it still computes the same, as the start for training a wider network.

Every channel is copied, and each weight that reads it is split at random between the copies (Chen et al., "Net2Net",
ICLR 2016). The copies are equal at first, but are weighted differently, so training drives them apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowreel.engine.models.flownetc import DISPLACEMENTS

# Layer -> its input channels, in order: another layer's output, or a number of channels that are not copied.
_READS: dict[str, tuple[str | int, ...]] = {
    "conv1.0": (3,),
    "conv2.0": ("conv1.0",),
    "conv3.0": ("conv2.0",),
    "conv_redir.0": ("conv3.0",),
    "conv3_1.0": ("conv_redir.0", DISPLACEMENTS),
    "conv4.0": ("conv3_1.0",),
    "conv4_1.0": ("conv4.0",),
    "conv5.0": ("conv4_1.0",),
    "conv5_1.0": ("conv5.0",),
    "conv6.0": ("conv5_1.0",),
    "conv6_1.0": ("conv6.0",),
    "predict_flow6": ("conv6_1.0",),
    "deconv5.0": ("conv6_1.0",),
    "predict_flow5": ("conv5_1.0", "deconv5.0", 2),
    "deconv4.0": ("conv5_1.0", "deconv5.0", 2),
    "predict_flow4": ("conv4_1.0", "deconv4.0", 2),
    "deconv3.0": ("conv4_1.0", "deconv4.0", 2),
    "predict_flow3": ("conv3_1.0", "deconv3.0", 2),
    "deconv2.0": ("conv3_1.0", "deconv3.0", 2),
    "predict_flow2": ("conv2.0", "deconv2.0", 2),
}


def widen(state: Mapping[str, Tensor], times: int, seed: int = 0, unlike: float = 0.05) -> dict[str, Tensor]:
    """FlowNetC's tensors with ``times`` as many channels, which compute the same except for ``unlike``.

    Args:
        state: a FlowNetC without BatchNorm, keys as in its state_dict.
        times: copies of each channel; the correlation averages over channels, so all are copied equally often.
        unlike: standard deviation of the noise by which copies differ, as a share of a layer's own; 0: none.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = {key: tensor.clone() for key, tensor in state.items()}
    for layer, reads in _READS.items():
        weight = state[f"{layer}.weight"].float()
        transposed = layer.startswith("deconv")  # input channels come first
        weight = weight.transpose(0, 1) if transposed else weight
        parts = []
        for part, source in zip(_parts(weight, state, reads), reads, strict=True):
            if isinstance(source, str):
                part = _shared(part, times, generator)
            parts.append(part)
        weight = torch.cat(parts, 1)
        if not layer.startswith("predict_flow"):
            weight = weight.repeat(times, *[1] * (weight.ndim - 1))
            weight = weight + unlike * weight.std() * torch.randn(weight.shape, generator=generator)
            wide[f"{layer}.bias"] = state[f"{layer}.bias"].float().repeat(times)
        wide[f"{layer}.weight"] = (weight.transpose(0, 1) if transposed else weight).contiguous()
    return wide


def _parts(weight: Tensor, state: Mapping[str, Tensor], reads: tuple[str | int, ...]) -> tuple[Tensor, ...]:
    """A layer's weight, split along its input channels by source."""
    return torch.split(weight, [_channels(state, source) for source in reads], 1)


def _channels(state: Mapping[str, Tensor], source: str | int) -> int:
    return source if isinstance(source, int) else len(state[f"{source}.bias"])


def _shared(weight: Tensor, times: int, generator: torch.Generator) -> Tensor:
    """(O, I, kh, kw) to (O, times * I, kh, kw): random shares of each weight that add up to it."""
    shares = torch.rand((times, *weight.shape), generator=generator)
    shares = shares / shares.sum(0)
    return torch.cat(list(weight * shares), 1)
