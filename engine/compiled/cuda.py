"""The networks on a GPU: half or TF32 tensor-core convolutions, float32 flow, one CUDA graph for each shape.

``pack`` prepares the weights (``padded.py``). A program allocates all memory for one shape and repeats the same work
in it. Maps are written directly to their places in a concatenation, so that no separate step concatenates them. On a
GPU that work is a captured graph; on a CPU, where the tests run it, plain calls.

In every precision these are float32: the frames and their warping, flow and its upsampling, norms, biases, all sums.
Half precision is for the maps between convolutions and the weights applied to them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from flowreel.engine.compiled import Shape, quarter_upsampling
from flowreel.engine.compiled.graphs import Turns, beside, captured
from flowreel.engine.compiled.heads import Layers, pack_part
from flowreel.engine.compiled.padded import DTYPES, Watch, padded
from flowreel.engine.compiled.parts import MatchingPart, Part
from flowreel.engine.config import Precision
from flowreel.engine.errors import PrecisionWarning
from flowreel.engine.models.flownetc import FlowNetC
from flowreel.engine.models.fusion import FUSING_CHANNELS, FlowNetFusion
from flowreel.engine.models.layers import FLOW_SCALE, Refiner, Upsampling, upsample
from flowreel.engine.models.stacks import REFINING_CHANNELS, SD_SCALE_IN_FLOWNET2, FlowNet2, FlowNet2CS, FlowNet2CSS
from flowreel.kernels.fusing_input import fusing_input
from flowreel.kernels.normalise_frames import normalise_frames
from flowreel.kernels.refining_input import refining_input

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]

NEAR_OVERFLOW = torch.finfo(torch.float16).max / 4  # a factor of 4 below it, for scenes with larger activations


def pack(net: nn.Module, precision: Precision, capture: Capture = captured) -> PackedNetwork:
    """The network's layers, padded and cast. ``capture`` makes a program's work repeatable: see ``graphs.captured``."""
    parts = {
        name: pack_part(module, precision)
        for name, module in net.named_modules()
        if isinstance(module, Refiner | FlowNetFusion)
    }
    device = next(net.parameters()).device
    return PackedNetwork(type(net), parts, quarter_upsampling(net), precision, device, capture)


@dataclass
class PackedNetwork:
    """The weights, and everything else that does not depend on the shape."""

    kind: type[nn.Module]
    parts: dict[str, Layers]  # by the name of C, S, SD or fusion within the network; "" is the network itself
    upsampling: Upsampling | None  # of the quarter-resolution flow; None for FlowNet2, which has none
    precision: Precision
    device: torch.device
    capture: Capture
    looked: bool = field(default=False, init=False)  # whether activations have been checked against float16's range

    def program(self, shape: Shape) -> CudaProgram:
        return CudaProgram(self, shape)


class CudaProgram:
    """The work for one shape, captured; calls take turns at it."""

    def __init__(self, network: PackedNetwork, shape: Shape) -> None:
        self._network = network
        self._works = Turns(network.device, Captured(network, shape))

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        with self._works.taken() as captured_work:
            flow = captured_work.run(first, second)
            mode = self._network.upsampling
            return flow.clone() if mode is None else upsample(flow, mode)  # a new tensor either way

    def quarter(self, first: Tensor, second: Tensor) -> Tensor:
        with self._works.taken() as captured_work:
            return captured_work.run(first, second).clone()


class Captured:
    """One program's memory, and its work in repeatable form."""

    def __init__(self, network: PackedNetwork, shape: Shape) -> None:
        self._network = network
        self.work = Work(network, shape)
        self._repeat = network.capture(self.work, network.device)

    def run(self, first: Tensor, second: Tensor) -> Tensor:
        """Two (B, 3, H, W) frames to the flow, in memory that the next run overwrites."""
        self.work.take(first, second)
        if self._network.precision == "fp16" and not self._network.looked:
            self._network.looked = True
            self._look()
        self._repeat()
        return self.work.flow

    def _look(self) -> None:
        """Runs once uncaptured, to see how close activations come to float16's limit. Waits for the device."""
        largest: list[Tensor] = []
        self.work.watched_by(lambda result: largest.append(result.detach().abs().amax()))
        most = float(torch.stack([value.float() for value in largest]).max())
        if not most < NEAR_OVERFLOW:  # NaN too
            warnings.warn(
                f"in fp16 a map of this network reaches {most:.4g}, and fp16 ends at {4 * NEAR_OVERFLOW:.0f}: its flow "
                "may be wrong; use precision bf16, which reaches as far as fp32",
                PrecisionWarning,
                stacklevel=2,
            )


# --- the work at one shape --------------------------------------------------------------------------------------------


class Work:
    """All work from the two frames to the flow. Each call does the same in the same memory, without waiting for it."""

    def __init__(self, network: PackedNetwork, shape: Shape) -> None:
        self.network, self.shape = network, shape
        batch, height, width = shape
        shrink = 1 if network.upsampling is None else 4
        zeros = partial(torch.zeros, dtype=torch.float32, device=network.device)
        self.flow = zeros(batch, 2, height // shrink, width // shrink)  # pixels
        self.parts = {name: self._part(layers) for name, layers in network.parts.items()}
        stacked = issubclass(network.kind, FlowNet2CS)
        self.both = self._room(3, batch=2 * batch) if stacked or network.kind is FlowNetC else None  # for C
        self.pair = None if network.kind in (FlowNetC, FlowNet2CS, FlowNet2CSS) else self._room(6)  # for S or SD
        self.frames = zeros(batch, 6, height, width) if stacked else None  # for warps
        self.refining = self._room(REFINING_CHANNELS) if stacked else None  # the input of S1, then of S2
        self.fusing = self._room(FUSING_CHANNELS) if network.kind is FlowNet2 else None

    def _room(self, channels: int, level: int = 0, batch: int | None = None) -> Tensor:
        pairs, height, width = self.shape
        return torch.zeros(
            (pairs if batch is None else batch, padded(channels), height >> level, width >> level),
            dtype=DTYPES[self.network.precision],
            device=self.network.device,
        ).to(memory_format=torch.channels_last)

    def _part(self, layers: Layers) -> Part:
        return MatchingPart(layers, self._room, self.shape[0]) if "conv_redir" in layers else Part(layers, self._room)

    def take(self, first: Tensor, second: Tensor) -> None:
        """Writes two (B, 3, H, W) frames, 0..255, normalised to the networks' inputs, which the work only reads."""
        normalise_frames(first, second, planes=self.frames, pair=self.pair, both=self.both)

    def watched_by(self, watch: Watch) -> None:
        """Runs the work once, while ``watch`` sees what every convolution gives."""
        try:
            for part in self.parts.values():
                part.watch = watch
            self()
        finally:
            for part in self.parts.values():
                part.watch = None

    def __call__(self) -> None:
        if self.fusing is None:
            torch.mul(self._predicted(), FLOW_SCALE, out=self.flow)
            return
        assert self.frames is not None
        assert self.pair is not None
        pair = self.pair
        sd = beside(lambda: self.parts["flownets_d"](pair), self.network.device)
        css = self._predicted()
        fusing_input(self.frames, sd(), SD_SCALE_IN_FLOWNET2, css, FLOW_SCALE, self.fusing)
        self.flow.copy_(self.parts["flownetfusion"](self.fusing))

    def _predicted(self) -> Tensor:
        """(B, 2, H/4, W/4), pixels / 20, from C, S or SD alone, or from the last network of the stack."""
        if self.refining is None:
            return self.parts[""](self._input())
        assert self.frames is not None
        flow = self.parts["flownetc"](self._input())
        for name in ("flownets_1", "flownets_2"):
            if name in self.parts:
                refining_input(self.frames, flow, FLOW_SCALE, self.refining)
                flow = self.parts[name](self.refining)
        return flow

    def _input(self) -> Tensor:
        """The first network's input."""
        room = self.pair if self.both is None else self.both
        assert room is not None
        return room
