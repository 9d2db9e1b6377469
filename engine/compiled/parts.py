"""C, S, SD and the fusion network at one shape: padded layers, and the memory of their concatenations.

All four have an encoder that halves the size level by level, and a decoder that doubles it again. At each level the
decoder concatenates the encoder's features with the upsampled features and the upsampled flow of the next coarser
level. Each of the three is written directly to its place in the concatenation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from flowreel.engine.compiled.composed import HEAD, SMOOTHING
from flowreel.engine.compiled.heads import Layers
from flowreel.engine.compiled.padded import Convolution, Watch
from flowreel.engine.models.flownetc import DISPLACEMENTS
from flowreel.engine.models.layers import SLOPE
from flowreel.kernels import correlation
from flowreel.kernels.enlarge_flow import enlarge_flow


class Room(Protocol):
    """Allocates zeros: ``batch`` samples (None: one a pair), padded ``channels``, 1 / 2^level of the frame's size."""

    def __call__(self, channels: int, level: int = 0, batch: int | None = None) -> Tensor: ...


class Part:
    """S, SD or the fusion network: called with its padded input, it returns its finest flow, (B, 2, ...) float32."""

    def __init__(self, layers: Layers, room: Room) -> None:
        self.layers = {name: layer for name, layer in layers.items() if isinstance(layer, Convolution)}
        self.heads = {name: layer for name, layer in layers.items() if name.startswith(HEAD)}
        self.watch: Watch | None = None
        # conv0, conv1, conv1_1, ...
        self.encoder = sorted(name for name in layers if re.fullmatch(r"conv\d(_1)?", name))
        self.levels = sorted((int(name[-1]) for name in layers if name.startswith("deconv")), reverse=True)
        self.concatenations: dict[int, Tensor] = {}
        self.places: dict[str, Tensor] = {}  # by layer: the slice of a concatenation for its result
        for level in self.levels:
            names = [self._ends(level), f"deconv{level}", f"upsampled_flow{level + 1}_to_{level}"]
            self.concatenations[level] = self._concatenated(names, room, level)

    def __call__(self, x: Tensor) -> Tensor:
        return self.refined(self.through(x, self.encoder))

    def through(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Applies layers one after the other."""
        for name in names:
            x = self.layers[name](x, self.places.get(name), self.watch)
        return x

    def refined(self, features: Tensor) -> Tensor:
        """The encoder's coarsest features to the finest flow."""
        flow = self._flow(features, self.levels[0] + 1)
        for level in self.levels:
            deconv, upsampled = f"deconv{level}", f"upsampled_flow{level + 1}_to_{level}"
            self.layers[deconv].into(features, self.places[deconv], self.watch)
            enlarging = self.layers[upsampled]
            enlarge_flow(flow, enlarging.weight, enlarging.bias, self.places[upsampled])
            features = self.concatenations[level]
            smooth = [f"{SMOOTHING}{level}"] if f"{SMOOTHING}{level}" in self.layers else []
            flow = self._flow(self.through(features, smooth), level)
        return flow

    def _flow(self, features: Tensor, level: int) -> Tensor:
        flow = self.heads[f"{HEAD}{level}"](features)
        if self.watch is not None:  # float32, but from weights that may overflow half precision
            self.watch(flow)
        return flow

    def _ends(self, level: int) -> str:
        """The encoder's last layer at a level."""
        return f"conv{level}_1" if f"conv{level}_1" in self.layers else f"conv{level}"

    def _concatenated(self, names: Sequence[str], room: Room, level: int, more: int = 0) -> Tensor:
        """Memory for the layers' results side by side, and for ``more`` channels after them."""
        channels = [self.layers[name].outputs for name in names]
        whole = room(sum(channels) + more, level)
        start = 0
        for name, count in zip(names, channels, strict=True):
            self.places[name] = whole[:, start : start + count]
            start += count
        return whole


class MatchingPart(Part):
    """C: called with one padded batch, the first frames of all pairs followed by the second ones."""

    def __init__(self, layers: Layers, room: Room, pairs: int) -> None:
        super().__init__(layers, room)
        self.pairs = pairs
        self.matched = self._concatenated(["conv_redir"], room, 3, DISPLACEMENTS)
        self.skip = self.places.pop("conv2")  # for the first frames' features only

    def __call__(self, x: Tensor) -> Tensor:
        conv2 = self.through(x, ["conv1", "conv2"])
        self.skip.copy_(conv2[: self.pairs, : self.skip.shape[1]])
        conv3 = self.through(conv2, ["conv3"])
        first, second = conv3[: self.pairs], conv3[self.pairs :]
        self.layers["conv_redir"].into(first, self.places["conv_redir"], self.watch)
        start = self.places["conv_redir"].shape[1]
        costs = self.matched[:, start : start + DISPLACEMENTS]
        mean = 1 / self.layers["conv3"].outputs  # over the unpadded channels
        correlation(first, second, scale=mean, negative_slope=SLOPE, out=costs)
        return self.refined(self.through(self.matched, self.encoder[self.encoder.index("conv3") + 1 :]))
