"""The networks on a GPU: half or TF32 tensor-core convolutions, float32 flow, one CUDA graph for each shape.

``pack`` makes the weights (``padded.py``). A program holds, for one shape, the memory that everything is computed in,
and repeats the same work in it: the maps that are concatenated are written where the concatenation lies, so that it
never happens. On a GPU that work is a captured graph; on a CPU, where the tests run it, plain calls.

Float32 whatever the precision: the frames and what is warped, flow and its enlarging, norms, biases, all sums. A half
type holds the maps between the convolutions, and the weights that they meet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flowreel.engine.compiled import Shape, quarter_upsampling
from flowreel.engine.compiled.graphs import Turns, captured
from flowreel.engine.compiled.heads import Layers, pack_part
from flowreel.engine.compiled.padded import DTYPES, Watch, padded
from flowreel.engine.compiled.parts import MatchingPart, Part
from flowreel.engine.config import Precision
from flowreel.engine.errors import PrecisionWarning
from flowreel.engine.models.flownetc import FlowNetC
from flowreel.engine.models.fusion import FlowNetFusion
from flowreel.engine.models.layers import FLOW_SCALE, RGB_MAX, Refiner, Upsampling, to_pixels, upsample
from flowreel.engine.models.stacks import (
    REFINING_CHANNELS,
    SD_SCALE_IN_FLOWNET2,
    FlowNet2,
    FlowNet2CS,
    FlowNet2CSS,
    warped_and_error,
)
from flowreel.kernels import channel_norm

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]

NEAR_OVERFLOW = torch.finfo(torch.float16).max / 4  # two doublings below it: another scene may bring them
FUSION_CHANNELS = 11  # first frame 3, both flows 4, their magnitudes 2, both brightness errors 2


def pack(net: nn.Module, precision: Precision, capture: Capture = captured) -> PackedNetwork:
    """The network's layers, padded and cast. ``capture`` makes a program's work repeatable, as ``graphs.captured``."""
    parts = {
        name: pack_part(module, precision)
        for name, module in net.named_modules()
        if isinstance(module, Refiner | FlowNetFusion)
    }
    device = next(net.parameters()).device
    return PackedNetwork(type(net), parts, quarter_upsampling(net), precision, device, capture)


@dataclass
class PackedNetwork:
    """Weights, and what is the same at every shape."""

    kind: type[nn.Module]
    parts: dict[str, Layers]  # by the name of C, S, SD or fusion inside the network; "" is the network itself
    upsampling: Upsampling | None  # of the quarter-resolution flow; None: FlowNet2, which has none
    precision: Precision
    device: torch.device
    capture: Capture
    looked: bool = field(default=False, init=False)  # whether activations were compared with what float16 holds

    def program(self, shape: Shape) -> CudaProgram:
        return CudaProgram(self, shape)


class CudaProgram:
    """One shape: captured work, which calls take turns at."""

    def __init__(self, network: PackedNetwork, shape: Shape) -> None:
        self._network = network
        self._works = Turns(network.device, lambda: Captured(network, shape))

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        with self._works.taken() as captured_work:
            flow = captured_work.run(first, second)
            mode = self._network.upsampling
            return flow.clone() if mode is None else upsample(flow, mode)  # memory of its own either way

    def quarter(self, first: Tensor, second: Tensor) -> Tensor:
        with self._works.taken() as captured_work:
            return captured_work.run(first, second).clone()


class Captured:
    """One program's memory, and its work as one thing to start."""

    def __init__(self, network: PackedNetwork, shape: Shape) -> None:
        self._network = network
        self.work = Work(network, shape)
        self._repeat = network.capture(self.work, network.device)

    def run(self, first: Tensor, second: Tensor) -> Tensor:
        """Two (B, 3, H, W) frames to the flow: memory that the next run writes to."""
        self.work.take(first, second)
        if self._network.precision == "fp16" and not self._network.looked:
            self._network.looked = True
            self._look()
            self.work.take(first, second)
        self._repeat()
        return self.work.flow

    def _look(self) -> None:
        """One run step by step, to see how near the maps come to what float16 can hold. Waits for the device."""
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
    """Everything from the two frames to the flow. Each call does the same in the same memory, and waits for nothing."""

    def __init__(self, network: PackedNetwork, shape: Shape) -> None:
        self.network, self.shape = network, shape
        batch, height, width = shape
        self.frames = torch.zeros(batch, 6, height, width, device=network.device)  # normalised once the work is done
        shrink = 1 if network.upsampling is None else 4
        self.flow = torch.zeros(batch, 2, height // shrink, width // shrink, device=network.device)  # pixels
        self.parts = {name: self._part(layers) for name, layers in network.parts.items()}
        stacked = issubclass(network.kind, FlowNet2CS)
        self.refining = self._room(REFINING_CHANNELS) if stacked else None  # what S1, then S2 are given
        self.pair = None if network.kind in (FlowNetC, FlowNet2CS, FlowNet2CSS) else self._room(6)  # for S or SD
        self.fusing = self._room(FUSION_CHANNELS) if network.kind is FlowNet2 else None

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
        """Two (B, 3, H, W) frames, 0..255."""
        self.frames[:, :3].copy_(first)
        self.frames[:, 3:].copy_(second)

    def watched_by(self, watch: Watch) -> None:
        """The same once, while ``watch`` sees what every convolution gives."""
        try:
            for part in self.parts.values():
                part.watch = watch
            self()
        finally:
            for part in self.parts.values():
                part.watch = None

    def __call__(self) -> None:
        first, second = self.frames[:, :3], self.frames[:, 3:]
        mean = (first.mean((2, 3), keepdim=True) + second.mean((2, 3), keepdim=True)) / 2
        self.frames.sub_(torch.cat((mean, mean), 1)).div_(RGB_MAX)  # as ``layers.normalise``, in place
        if self.fusing is None:
            torch.mul(self._predicted(), FLOW_SCALE, out=self.flow)
        else:
            self._fused(self.fusing)

    def _predicted(self) -> Tensor:
        """(B, 2, H/4, W/4) pixels / 20, of whichever network is last."""
        if self.pair is not None and self.fusing is None:
            self.pair[:, :6].copy_(self.frames)
            return self.parts[""](self.pair)
        if self.refining is None:
            return self.parts[""](self.frames)
        self.refining[:, :6].copy_(self.frames)
        flow = self.parts["flownetc"](self.frames)
        for name in ("flownets_1", "flownets_2"):
            if name in self.parts:
                flow = self._refined(self.parts[name], self.refining, to_pixels(flow, "bilinear"))
        return flow

    def _refined(self, part: Part, room: Tensor, flow: Tensor) -> Tensor:
        """S, given the frames (in ``room`` already) and ``flow`` (B, 2, H, W) pixels."""
        warped, error = warped_and_error(self.frames, flow)
        for start, value in ((6, warped), (9, flow / FLOW_SCALE), (11, error)):
            room[:, start : start + value.shape[1]].copy_(value)
        return part(room)

    def _fused(self, room: Tensor) -> None:
        """FlowNet2: the stack's flow and SD's, joined at full resolution."""
        assert self.pair is not None
        css = to_pixels(self._predicted(), "nearest")
        self.pair[:, :6].copy_(self.frames)
        sd = upsample(self.parts["flownets_d"](self.pair) * SD_SCALE_IN_FLOWNET2, "nearest")
        _, error_css = warped_and_error(self.frames, css)
        _, error_sd = warped_and_error(self.frames, sd)
        start = 0
        for value in (self.frames[:, :3], sd, css, channel_norm(sd), channel_norm(css), error_sd, error_css):
            room[:, start : start + value.shape[1]].copy_(value)
            start += value.shape[1]
        self.flow.copy_(self.parts["flownetfusion"](room))
