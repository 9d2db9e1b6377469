"""The model stage: batches of pairs through one network, in one precision, settled before the first batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flowreel.engine.compiled import Packed, Program, pack, plain_modes, quarter_upsampling
from flowreel.engine.config import ModelConfig, Precision
from flowreel.engine.data import JSON, FlowBatch, FramePair, NativeGrid, PairBatch
from flowreel.engine.device import Lane, free_bytes, ran_out_of_memory, resolve_devices, resolve_precision, to_device
from flowreel.engine.errors import DeviceError, StageError, UsageError, first_line
from flowreel.engine.forked import limit_threads_of_fork
from flowreel.engine.models import model_name
from flowreel.engine.models.layers import Upsampling, upsample
from flowreel.engine.models.weights import Weights, instantiate, read_weights
from flowreel.engine.pipeline import in_own_thread
from flowreel.engine.restore import Fit
from flowreel.engine.several_gpus import in_turn
from flowreel.kernels.operation import recording

_BATCH_PIXELS = {"cpu": 1 << 20, "cuda": 16 << 20}  # so many per batch keep the device busy; more only add latency
_MOST = 8  # pairs per batch
_SHARE = 0.7  # of a GPU's free memory for the model: the rest is for frames, flow in flight, and cuDNN itself
# FlowNet2 needs about 800 bytes a pixel for one pair in half precision and 1500 in float32, the other networks less
# than half of that. The allocator's rounding, cuDNN's workspaces and the feature maps that SD holds beside the stack's
# come on top: batches of 8 pairs of 1024x448 took 1370 (half), 3050 (TF32) and 4270 (fp32) bytes a pixel on an H200.
_BYTES_A_PIXEL: dict[Precision, int] = {"fp16": 1500, "bf16": 1500, "tf32": 3300, "fp32": 4500}


@dataclass
class Made:
    """What a network has prepared for frames of one size, shared by all sources of that size."""

    programs: dict[int, Program] = field(default_factory=dict)  # pairs -> program, for full batches and short ones
    kernels: dict[str, str] = field(default_factory=dict)  # operation -> what ran it so far, as in ``RunReport``
    batch: int | None = None  # pairs, as chosen when no batch was given


@dataclass(frozen=True)
class Inference:
    """A network ready to run: its settings are resolved once, recorded in the store, and reused by a resumed run."""

    packed: Packed  # the network in the form that ``device`` runs, in ``precision``
    upsampling: Upsampling | None  # how its quarter-resolution prediction is enlarged; None: it has none
    model: str
    weights: Weights  # what is known of them; the tensors themselves are in ``packed``
    device: torch.device
    precision: Precision
    batch: int  # pairs
    fit: Fit
    native: bool = False  # also pass on the network's own quarter-resolution prediction
    others: tuple[Inference, ...] = ()  # the same on other GPUs, which share the batches in turn with this one
    notes: list[str] = field(default_factory=list, repr=False)  # what the user should know at the end of the run
    made: Made = field(default_factory=Made, repr=False)

    @property
    def kernels(self) -> dict[str, str]:
        """Operation -> what ran it so far, for frames of this size: as in ``RunReport``."""
        return self.made.kernels

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that compute, ``device`` first."""
        return (self.device, *(other.device for other in self.others))

    @property
    def grid(self) -> NativeGrid | None:
        """How the native prediction maps to the flow; None when it is not passed on."""
        return self.fit.grid(self.upsampling) if self.native and self.upsampling is not None else None

    def made_by(self) -> dict[str, JSON]:
        """What a store records about how its flow was made."""
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

        Computed without gradients, but the result is an ordinary tensor that can take part in training.
        """
        with plain_modes(self.device):
            return self.of_fitted(self._fitted(first), self._fitted(second))

    def of_fitted(self, first: Tensor, second: Tensor) -> Tensor:
        """``flow`` for frames that are already on the device, float32 and of the network's size."""
        program = self._program(len(first))
        with plain_modes(self.device), recording(self.kernels):
            return program.flow(first, second)

    def _fitted(self, frames: Tensor) -> Tensor:
        return self.fit.apply(to_device(frames, self.device).float())

    def _program(self, pairs: int) -> Program:
        """Made once for full batches and once for each length of a short one, so that equal batches run equally."""
        program = self.made.programs.get(pairs)
        if program is None:
            with plain_modes(self.device), recording(self.kernels):  # a graph captured here is only replayed later
                program = self.made.programs.setdefault(pairs, self.packed.program((pairs, *self.fit.network_size)))
        return program

    def _length(self, pairs: int) -> int:
        """Batch size of the program that runs ``pairs`` pairs: on a CPU, where each pair costs time, exactly that.

        On a GPU a full batch, or a half, a quarter ... of one. Capturing a graph for each length would take longer than
        computing a few pairs in vain, and would hold more memory.
        """
        length = self.batch
        while self.device.type == "cuda" and length // 2 >= pairs:
            length //= 2
        return length if self.device.type == "cuda" else pairs

    def make_ready(self, shard: int, count: int | None, first: int = 0) -> None:
        """Makes the programs for flows ``first`` to ``count`` in shards of ``shard``: for full batches and short ones.

        When memory runs out here, ``stage`` is left to make do with smaller batches. Any other failure is raised as the
        model stage would raise it, as a StageError.
        """
        runs = {shard} if count is None else {min(shard, count - first), (count - first) % shard}
        sizes = {min(self.batch, run) for run in runs} | {run % self.batch for run in runs}
        try:
            for pairs in sorted({self._length(size) for size in sizes if size}, reverse=True):
                for inference in (self, *self.others):
                    inference._program(pairs)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise StageError("model", None, error) from error

    def _enlarged(self, native: Tensor) -> Tensor:
        assert self.upsampling is not None  # ``fitted`` refuses native otherwise
        return upsample(native, self.upsampling)

    def stage(self, batches: Iterator[PairBatch]) -> Iterator[FlowBatch]:
        """Batches of pairs to batches of flow at the network's size; ``restore`` brings them to the frame's size.

        A batch that does not fit in a device's memory is computed in halves, as are all later ones there; no pair is
        lost. Raises DeviceError when not even one pair fits.
        """
        shares = [_Share(inference) for inference in (self, *self.others)]
        if self.others:
            yield from in_turn(batches, [(Lane(s.inference.device, self.device), s.whole) for s in shares])
            return
        for batch in batches:
            yield from shares[0].flows(batch)

    def flows_that_fit(self, batch: PairBatch) -> FlowBatch | None:
        """The batch's flow, or None if memory ran out.

        When None is returned, everything allocated on the way is free again, also what the error and its traceback
        kept alive. Raises DeviceError when not even one pair fits.
        """
        try:
            return self._flows(batch)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            if self._length(len(batch)) > 1:
                return None
            height, width = self.fit.network_size
            raise DeviceError(
                f"{self.device} has too little free memory for one pair of {width}x{height} with {self.model}: end "
                "what else runs there, take --precision fp16 or a smaller --model, or --device cpu "
                f"({first_line(error)})"
            ) from error

    def fewer(self, batch: PairBatch) -> int:
        """Half as many pairs. Programs made for more pairs are dropped, since they hold memory too."""
        length = self._length(len(batch))
        most = length // 2
        for pairs in [pairs for pairs in self.made.programs if pairs > most]:
            self.made.programs.pop(pairs, None)
        self.notes.append(
            f"{length} pairs a batch did not fit in the memory of {self.device}: {most} from flow {batch.index} on"
        )
        return most

    def _flows(self, batch: PairBatch) -> FlowBatch:
        pairs = len(batch)
        filled = (*batch.pairs, *[batch.pairs[-1]] * (self._length(pairs) - pairs))
        first, second = self._both(filled)
        native = self._quarter(first, second)[:pairs] if self.native else None
        return FlowBatch(
            flow=self.of_fitted(first, second)[:pairs] if native is None else self._enlarged(native),
            index=batch.index,
            frame=np.array([pair.first.index for pair in batch.pairs], np.int64),
            frame_to=np.array([pair.second.index for pair in batch.pairs], np.int64),
            timestamp_s=np.array([pair.first.timestamp_s for pair in batch.pairs], np.float64),
            timestamp_to_s=np.array([pair.second.timestamp_s for pair in batch.pairs], np.float64),
            native=native,
        )

    def _quarter(self, first: Tensor, second: Tensor) -> Tensor:
        """``of_fitted`` before upsampling: (N, 2, h, w) at a quarter of the network's size, vectors in its pixels."""
        program = self._program(len(first))
        with plain_modes(self.device), recording(self.kernels):
            return program.quarter(first, second)

    def _both(self, pairs: Sequence[FramePair]) -> tuple[Tensor, Tensor]:
        """First and second frames, (N, 3, *fit.network_size) each; a frame in two pairs is fitted only once."""
        frames = sorted({frame for pair in pairs for frame in (pair.first, pair.second)}, key=lambda frame: frame.index)
        fitted = self._fitted(torch.stack([frame.rgb for frame in frames]))
        places = {frame: place for place, frame in enumerate(frames)}
        return (
            _rows(fitted, [places[pair.first] for pair in pairs]),
            _rows(fitted, [places[pair.second] for pair in pairs]),
        )


def _rows(frames: Tensor, places: list[int]) -> Tensor:
    """The frames at these places; a view if the places are consecutive."""
    if places == list(range(places[0], places[0] + len(places))):
        return frames[places[0] : places[0] + len(places)]
    return torch.stack([frames[place] for place in places])


class _Share:
    """One device's share of the batches, and how many pairs it currently computes at once."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self._most = inference.batch

    def flows(self, batch: PairBatch) -> Iterator[FlowBatch]:
        """The batch's flow in one piece, or in several where that does not fit in memory."""
        done = 0
        while done < len(batch):
            part = PairBatch(batch.pairs[done : done + self._most], batch.index + done)
            flows = self.inference.flows_that_fit(part)
            if flows is None:
                self._most = self.inference.fewer(part)
            else:
                done += len(part)
                yield flows
            del flows

    def whole(self, batch: PairBatch) -> list[FlowBatch]:
        return list(self.flows(batch))


@dataclass(frozen=True)
class Network:
    """A loaded network on its device, before the frame size is known: serves any number of sources."""

    config: ModelConfig
    packed: Packed  # as in ``Inference``
    upsampling: Upsampling | None
    weights: Weights
    device: torch.device
    precision: Precision
    others: tuple[Network, ...] = ()  # the same on other GPUs
    # (height, width) of its input -> what was made for it; only the last size is kept
    _made: dict[tuple[int, int], Made] = field(default_factory=dict, repr=False)

    def fitted(self, height: int, width: int, *, native: bool = False, recorded_batch: int | None = None) -> Inference:
        """Settles fit and batch for frames of one size.

        native: pass on the network's own prediction as well. recorded_batch: the batch of the earlier run that this one
        resumes. Raises UsageError when frames cannot be made to fit, or when the network has no such prediction.
        """
        fit = Fit(self.config.fit, height, width)
        model = self.weights.model if self.config.model is None else model_name(self.config.model)
        if native and self.upsampling is None:
            raise UsageError("FlowNet2 ends at full resolution, so it has no native one: use resolution full")
        made = self._made_for(fit.network_size)
        inference = Inference(
            packed=self.packed,
            upsampling=self.upsampling,
            model=model,
            weights=self.weights,
            device=self.device,
            precision=self.precision,
            batch=self.config.batch or recorded_batch or made.batch or self._auto_batch(*fit.network_size),
            fit=fit,
            native=native,
            made=made,
        )
        if self.config.batch is None and recorded_batch is None:
            made.batch = inference.batch  # else the next source's batch would depend on the memory this one leaves free
        others = [
            replace(inference, packed=other.packed, device=other.device, made=other._made_for(fit.network_size))
            for other in self.others
        ]
        return replace(inference, others=tuple(others))

    def _made_for(self, size: tuple[int, int]) -> Made:
        """Kept for the last size only: memory held for other sizes would be missing for this one's batches."""
        made = self._made.get(size) or Made()
        self._made.clear()
        self._made[size] = made
        return made

    def _auto_batch(self, height: int, width: int) -> int:
        if self.device.type != "cuda":
            return auto_batch(height, width)
        free = min(free_bytes(network.device) for network in (self, *self.others))
        return auto_batch(height, width, self.precision, free)


def load_network(config: ModelConfig) -> Network:
    """Loads the weights and settles device and precision.

    Raises:
        DeviceError, UsageError, WeightsError: before any frame is decoded.
    """
    limit_threads_of_fork()
    devices = resolve_devices(config.device)
    (precision,) = {resolve_precision(config.precision, device) for device in devices}
    loaded = partial(_loaded, config, devices, precision)
    try:
        return in_own_thread(loaded) if devices[0].type == "cpu" else loaded()
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        raise DeviceError(
            f"{' or '.join(map(str, devices))} has too little free memory for the weights: end what else runs there, "
            f"take a smaller --model, or --device cpu ({first_line(error)})"
        ) from error


def _loaded(config: ModelConfig, devices: Sequence[torch.device], precision: Precision) -> Network:
    weights = read_weights(config.weights)
    told = replace(weights, state={})

    def on(device: torch.device, others: tuple[Network, ...] = ()) -> Network:
        net = instantiate(weights, config.model, share=True).eval().to(device)  # shared: packing makes the only copy
        return Network(config, pack(net, precision), quarter_upsampling(net), told, device, precision, others)

    return on(devices[0], tuple(on(device) for device in devices[1:]))


def auto_batch(height: int, width: int, precision: Precision = "fp32", free: int | None = None) -> int:
    """Pairs per batch for frames of this size.

    On a CPU it follows from the frame size alone, so that results do not depend on free memory. On a GPU ``free``, the
    bytes free there, bounds it as well; the choice is recorded, and a resumed run reuses it.
    """
    pixels = height * width
    if free is None:
        return max(1, min(_MOST, _BATCH_PIXELS["cpu"] // pixels))
    fitting = int(_SHARE * free) // (_BYTES_A_PIXEL[precision] * pixels)
    return max(1, min(_MOST, _BATCH_PIXELS["cuda"] // pixels, fitting))
