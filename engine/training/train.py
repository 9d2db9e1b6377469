"""Trains a network on procedural scenes: how the baseline weights were made.

Everything follows from ``TrainConfig``: sample *i* of a run is the scene of seed (run seed, i), augmentation of step
*s* is drawn from (run seed, s), so a run can be stopped at any step, resumed, and end with the same weights.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from math import cos, pi
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset

from flowreel.engine.device import resolve_devices, to_device
from flowreel.engine.errors import CheckpointError, UsageError
from flowreel.engine.models import build_model, model_name
from flowreel.engine.models.flownetc import DISPLACEMENTS, FlowNetC
from flowreel.engine.models.layers import STRIDE, folded_state, normalise, scaled, to_pixels
from flowreel.engine.models.stacks import FlowNet2, FlowNet2CS, FlowNet2CSS, refining_input
from flowreel.engine.models.weights import instantiate, read_weights, save_weights
from flowreel.engine.places import make_folder
from flowreel.engine.textures import texture_bank
from flowreel.engine.training.drawing import SceneConfig, draw_pair
from flowreel.engine.training.identity import start_as_identity
from flowreel.engine.training.loss import end_point_error, matching_loss, multi_scale_loss, zero_flow_error
from flowreel.engine.training.painting import Packed, Painter, pack
from flowreel.engine.training.pairs import sample_pair
from flowreel.engine.training.widen import widen

LICENCE = "Apache-2.0"
CORRELATION_GAIN = 5.0
WIDEST = 4  # as of weights that are read
LARGEST_SIDE = 8192  # pixels
LARGEST_BATCH = 4096
MOST_STEPS = 1 << 31  # of a run whose minutes are set
MOST_SEEDS = 1 << 20  # a run's samples are numbered behind its seed, in 64 bits together
HELD_OUT_SEED = 1 << 40  # no training run reaches scenes this far
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # first, second (B,3,H,W) uint8; flow (B,2,H,W) px; visible (B,H,W)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Two runs of the same values end with the same weights on the same kind of machine."""

    model: str = "FlowNet2C"
    width: float = 0.25  # factor on channels; 0.25: 2.7 M parameters for FlowNet2C, 0.125: 0.73 M
    steps: int = 20_000
    minutes: float | None = None  # of training, however many steps that makes; what comes of it depends on the machine
    batch: int = 8  # small batches learn most per sample while samples are what is scarce
    height: int = 192  # pixels the network sees; multiple of 64
    width_px: int = 256
    reuse: int = 3  # times each rendered scene is used, each time flipped and cropped anew: rendering is slow
    learning_rate: float = 8e-4  # that a cosine to zero begins with, after the warm-up
    warm_up: int = 500  # steps
    weight_decay: float = 1e-4
    clip: float = 1.0  # largest gradient norm
    visible_only: float = 0.33  # share of the run in which occluded pixels are left out of the loss
    last_only: bool = False  # of FlowNet2CS and CSS, train only the last network, on the flow it is given as it is
    matching: float = 0.5  # weight of FlowNetC's matching loss beside the flow's
    seed: int = 0
    init: str | None = None  # weights to go on from, instead of random ones
    batch_norm: bool = True  # while training; folded into the convolutions at the end
    precision: str = "bf16"  # of the convolutions; the loss and the weights stay float32

    def __post_init__(self) -> None:
        if self.height % STRIDE or self.width_px % STRIDE or self.height < STRIDE or self.width_px < STRIDE:
            raise UsageError(f"training size must be multiples of {STRIDE}, got {self.width_px}x{self.height}")
        for name in ("steps", "batch", "reuse"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise UsageError(f"minutes must be positive, got {self.minutes:g}")
        if not 0 < self.width <= WIDEST:
            raise UsageError(f"width must be positive and at most {WIDEST}, got {self.width:g}")
        if not 0 <= self.learning_rate < float("inf"):
            raise UsageError(f"learning-rate must be a number that is not negative, got {self.learning_rate:g}")
        if max(self.height, self.width_px) > LARGEST_SIDE:
            raise UsageError(f"training size must be at most {LARGEST_SIDE} a side, got {self.width_px}x{self.height}")
        if not 0 <= self.seed < MOST_SEEDS:
            raise UsageError(f"seed must lie between 0 and {MOST_SEEDS - 1}, got {self.seed}")
        if self.batch > LARGEST_BATCH:
            raise UsageError(f"batch must be at most {LARGEST_BATCH}, got {self.batch}")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"precision must be fp32 or bf16, got {self.precision!r}")
        if self.batch_norm and self.batch * self.height * self.width_px < 2 * STRIDE**2:
            raise UsageError(
                f"one {self.width_px}x{self.height} sample a step is too little for BatchNorm: raise batch"
            )
        model_name(self.model)


@dataclass(frozen=True)
class Progress:
    """What one report of a run tells."""

    step: int  # steps done
    seconds: float  # of training so far, in this process and the ones resumed from
    loss: float  # mean since the last report
    held_out_epe: float  # px on procedural scenes that are never trained on
    zero_epe: float  # px of zero flow on the same scenes
    learning_rate: float


class _CentredCorrelation(nn.Module):
    """conv3_1's weights as the optimiser should see them.

    Matching costs are small (they are divided by the channel count) and share one large mean, so at first all 441
    displacements look alike and the network learns to predict no motion. Removing the mean over displacements and
    scaling makes them speak from the first step. Both are linear in the input, so they can act on the
    weights instead, and fold away when training ends: the saved network is a plain FlowNetC.
    """

    def forward(self, weight: Tensor) -> Tensor:
        redirected, matched = weight[:, :-DISPLACEMENTS], weight[:, -DISPLACEMENTS:]
        centred = matched - matched.mean(1, keepdim=True)
        return torch.cat((redirected, CORRELATION_GAIN * centred), 1)


class _Scenes(Dataset["Batch | list[Packed]"]):
    """The batches numbered ``first`` to ``last`` of a run, somewhat larger than the network sees, so that crops differ.

    Painted, or as the numbers that a painter on the network's device takes.
    """

    def __init__(self, config: TrainConfig, first: int, last: int, *, painted: bool) -> None:
        self.config, self.first, self.last, self.painted = config, first, last, painted

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Batch | list[Packed]:
        torch.set_num_threads(1)
        config = self.config
        make = render if self.painted else draw
        number = (self.first + index) * config.batch
        return make(config.seed, number, config.batch, config.height + STRIDE, config.width_px + STRIDE)


def render(seed: int, number: int, count: int, height: int, width: int) -> Batch:
    """Scenes ``number`` to ``number + count`` of a seed, stacked."""
    pairs = [sample_pair((seed << 42) + number + i, height, width) for i in range(count)]
    return (
        torch.stack([pair.first for pair in pairs]),
        torch.stack([pair.second for pair in pairs]),
        torch.stack([pair.flow for pair in pairs]),
        torch.stack([pair.visible for pair in pairs]),
    )


def draw(seed: int, number: int, count: int, height: int, width: int) -> list[Packed]:
    """The same scenes, not painted yet."""
    return pack([draw_pair((seed << 42) + number + i, height, width) for i in range(count)])


def augment(batch: Batch, height: int, width: int, generator: torch.Generator) -> Batch:
    """One crop and channel order for the whole batch, flips for each sample, and the flow changed with them."""
    first, second, flow, visible = batch

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    top, left = draw(flow.shape[2] - height + 1), draw(flow.shape[3] - width + 1)
    rows, columns = slice(top, top + height), slice(left, left + width)
    channels = torch.randperm(3, generator=generator)
    first, second = first[:, channels, rows, columns], second[:, channels, rows, columns]
    flow, visible = flow[:, :, rows, columns], visible[:, rows, columns]
    for axis in (-1, -2):  # mirror left-right, then up-down; the motion along that axis turns round
        mirrored = to_device(torch.randint(2, (len(flow),), generator=generator).bool(), flow.device)
        picture = mirrored.view(-1, 1, 1, 1)
        sign = flow.new_tensor([-1.0, 1.0] if axis == -1 else [1.0, -1.0]).view(1, 2, 1, 1)
        first, second = (torch.where(picture, frames.flip(axis), frames) for frames in (first, second))
        flow = torch.where(picture, flow.flip(axis) * sign, flow)
        visible = torch.where(mirrored.view(-1, 1, 1), visible.flip(axis), visible)
    return first, second, flow, visible


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    workers: int = 1,
    report_every: int = 250,
    report: Callable[[Progress], None] = lambda progress: None,
    device: str = "cpu",
) -> Path:
    """Trains, and writes ``weights.safetensors``, ``checkpoint.pt`` and ``log.csv`` into ``out``.

    Args:
        resume: go on from ``out/checkpoint.pt`` if it is there.
        workers: processes that make scenes beside the training; 0 makes them in this one. Does not change the result.
        report_every: steps between held-out measurements, log lines and checkpoints.
        device: where the network is trained: cpu, cuda, cuda:N, or auto, which takes CUDA when it is there. A GPU also
            paints the scenes that workers have drawn as numbers; its pictures are a CPU's within a level. On a GPU sums
            are made in no fixed order, so two runs differ by roundings that grow.

    Returns:
        The path of the finished weights.

    Raises:
        UsageError: fewer than no workers, reports every 0 steps, no such kind of device, or several devices.
        DeviceError: CUDA was asked for and is not there.
        OutputWriteError: the folder cannot be made.
        CheckpointError: the folder holds a run that was not asked to be resumed, or one of other settings.
    """
    if workers < 0 or report_every < 1:
        raise UsageError(f"workers must be at least 0 and report-every at least 1, got {workers} and {report_every}")
    where, *others = resolve_devices(device)
    if others:
        raise UsageError(f"training takes one device, got {device}")
    make_folder(out)
    torch.manual_seed(config.seed)
    model = _fresh(config) if config.init is None else _from_weights(config)
    model = model.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    state = _Run(config, out, model, optimiser)
    state.load(resume)
    held_out = _on(where, render(0, HELD_OUT_SEED, 16, config.height, config.width_px))

    losses: list[Tensor] = []  # scalars where they were made: to read each would wait for the device each step
    started = time.monotonic() - state.seconds
    done = share_done(config, state.step, state.seconds)
    painter = None if where.type == "cpu" else Painter(where, texture_bank(*SceneConfig().bank))
    for batch in _batches(config, state.step, workers, painter):
        if done >= 1:
            break
        state.step += 1
        rate = learning_rate(config, state.step, done)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        losses.append(_gradients(config, model, batch, visible_alone=done < config.visible_only))
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        done = share_done(config, state.step, time.monotonic() - started)
        if state.step % report_every == 0 or done >= 1:
            epe, zero = _held_out(model, held_out)
            loss = float(torch.stack(losses).double().mean())
            state.seconds = time.monotonic() - started
            progress = Progress(state.step, state.seconds, loss, epe, zero, rate)
            losses.clear()
            state.save(progress)
            report(progress)
    return state.finish()


def _on(device: torch.device, batch: Batch) -> Batch:
    first, second, flow, visible = (to_device(part, device) for part in batch)
    return first, second, flow, visible


def _gradients(config: TrainConfig, model: nn.Module, batch: Batch, *, visible_alone: bool) -> Tensor:
    """Leaves the gradients of one step in the model's parameters. Gives the loss, a scalar on its device."""
    first, second, flow, visible = batch
    model.train()
    mask = visible if visible_alone else torch.ones_like(visible)
    half = torch.autocast(flow.device.type, torch.bfloat16, enabled=config.precision == "bf16")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 is float32, in the flow heads above all
        with half:
            loss = _loss(config, model, first, second, flow, visible, mask)
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def share_done(config: TrainConfig, step: int, seconds: float) -> float:
    """How far a run is after so many steps, or so many seconds where its minutes were set: 0..1."""
    return min(step / config.steps if config.minutes is None else seconds / (60 * config.minutes), 1.0)


def learning_rate(config: TrainConfig, step: int, done: float) -> float:
    """Of a step before which so much was done: linear warm-up over some steps, times a cosine to zero."""
    return config.learning_rate * min(step / max(config.warm_up, 1), 1.0) * 0.5 * (1 + cos(pi * done))


def _batches(config: TrainConfig, step: int, workers: int, painter: Painter | None = None) -> Iterator[Batch]:
    """The batches of step ``step`` and those after it, each rendered one used ``reuse`` times in a row.

    With a ``painter`` they are painted and changed on its device, else on the host.
    """
    last = config.steps if config.minutes is None else MOST_STEPS
    scenes = _Scenes(config, step // config.reuse, -(-last // config.reuse), painted=painter is None)
    loader = DataLoader(
        scenes,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="spawn" if workers else None,  # a fork would copy torch's thread pools half alive
    )
    generator = torch.Generator()
    skip = step % config.reuse
    for scene in loader:
        batch = scene if painter is None else painter.paint(scene)
        for _ in range(skip, config.reuse):
            if step == last:
                return
            step += 1
            generator.manual_seed((config.seed << 42) + step)
            yield augment(batch, config.height, config.width_px, generator)
        skip = 0


def _fresh(config: TrainConfig) -> nn.Module:
    model = build_model(config.model, batch_norm=config.batch_norm, width=config.width)
    if isinstance(net := _correlating(model), FlowNetC):
        parametrize.register_parametrization(net.conv3_1[0], "weight", _CentredCorrelation())
    return model


def _from_weights(config: TrainConfig) -> nn.Module:
    """What other weights hold, made wider or longer where the run's network is."""
    assert config.init is not None
    held = read_weights(config.init)
    times = round(config.width / held.width)
    fits = times >= 1 and all(scaled(n, config.width) == times * scaled(n, held.width) for n in (32, 64, 128, 1024))
    if config.batch_norm or held.batch_norm or not fits:
        raise UsageError(f"{held.name} goes on without BatchNorm, at width {held.width:g} or a multiple of it")
    if times == 1 and config.model in held.serves():
        return instantiate(held, config.model)
    grows = (held.model, config.model)
    model = build_model(config.model, width=config.width)
    if held.model == "FlowNet2C" and isinstance(model, FlowNetC | FlowNet2CS) and not isinstance(model, FlowNet2CSS):
        state = held.state_for("FlowNet2C")
        _correlating(model).load_state_dict(widen(state, times, config.seed) if times > 1 else state)
        if isinstance(model, FlowNet2CS):
            start_as_identity(model.flownets_1)
    elif grows == ("FlowNet2CS", "FlowNet2CSS") and times == 1:
        first = {key: tensor for key, tensor in held.state.items() if key.startswith("flownets_1.")}
        again = {key.replace("flownets_1.", "flownets_2."): tensor for key, tensor in first.items()}
        model.load_state_dict(dict(held.state) | again)  # who refines once can refine twice
    else:
        raise UsageError(f"{held.name} ({held.model}, width {held.width:g}) cannot grow into {config.model}")
    return model


def _correlating(model: nn.Module) -> nn.Module:
    return getattr(model, "flownetc", model)


def _loss(
    config: TrainConfig, model: nn.Module, first: Tensor, second: Tensor, flow: Tensor, visible: Tensor, mask: Tensor
) -> Tensor:
    if isinstance(model, FlowNetC):
        conv2, conv3, costs = model.match(normalise(first.float(), second.float()))
        matching = matching_loss(costs, flow, visible)
        return multi_scale_loss(model.decode(conv2, conv3, costs), flow, mask) + config.matching * matching
    if isinstance(model, FlowNet2CS) and not isinstance(model, FlowNet2):
        return _refining_loss(config, model, normalise(first.float(), second.float()), flow, visible, mask)
    predicted = model(first.float(), second.float())
    if isinstance(predicted, tuple):
        return multi_scale_loss(predicted, flow, mask)
    return end_point_error(predicted.float(), flow, mask)


def _refining_loss(
    config: TrainConfig, model: FlowNet2CS, x: Tensor, flow: Tensor, visible: Tensor, mask: Tensor
) -> Tensor:
    """The loss of the last network and, unless they are held fixed, of those before it.

    Each learns from the flow it is given as it is, not through the network that gave it.
    """
    loss = flow.new_zeros(())
    with torch.set_grad_enabled(not config.last_only):
        conv2, conv3, costs = model.flownetc.match(x)
        flows = model.flownetc.decode(conv2, conv3, costs)
        if not config.last_only:
            loss = multi_scale_loss(flows, flow, mask) + config.matching * matching_loss(costs, flow, visible)
    refiners = [model.flownets_1, model.flownets_2] if isinstance(model, FlowNet2CSS) else [model.flownets_1]
    for refiner in refiners:
        with torch.set_grad_enabled(not config.last_only or refiner is refiners[-1]):
            given = to_pixels(flows[0].detach(), "bilinear")
            flows = refiner.predict(refining_input(x, given))
            if torch.is_grad_enabled():
                loss = loss + multi_scale_loss(flows, flow, mask)
    return loss


@torch.no_grad()
def _held_out(model: nn.Module, batch: Batch) -> tuple[float, float]:
    first, second, flow, _ = batch
    model.eval()
    predicted = model(first.float(), second.float())
    return float(end_point_error(predicted, flow)), float(zero_flow_error(flow))


class _Run:
    """What of a run survives in its folder."""

    def __init__(self, config: TrainConfig, out: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.config, self.out, self.model, self.optimiser = config, out, model, optimiser
        self.step, self.seconds = 0, 0.0
        self.checkpoint, self.log = out / "checkpoint.pt", out / "log.csv"

    def load(self, resume: bool) -> None:
        if not self.checkpoint.exists():
            self.log.unlink(missing_ok=True)
            return
        if not resume:
            raise CheckpointError(f"{self.out} holds a training run already: pass --resume, or another folder")
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)  # from whatever device
        except Exception as error:
            raise CheckpointError(f"{self.checkpoint} cannot be read: {str(error).splitlines()[0]}") from error
        differing = [f.name for f in fields(TrainConfig) if saved["config"].get(f.name) != getattr(self.config, f.name)]
        if differing:
            raise CheckpointError(f"{self.out} was trained with other settings ({', '.join(differing)})")
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.step, self.seconds = saved["step"], saved["seconds"]

    def save(self, progress: Progress) -> None:
        temporary = self.checkpoint.with_suffix(".partial")
        torch.save(
            {
                "config": asdict(self.config),
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
            },
            temporary,
        )
        temporary.replace(self.checkpoint)
        new = not self.log.exists()
        with self.log.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(progress)))
            if new:
                writer.writeheader()
            writer.writerow(asdict(progress))

    def finish(self) -> Path:
        plain = deepcopy(self.model).cpu()
        if isinstance(centred := _correlating(plain), FlowNetC) and parametrize.is_parametrized(centred.conv3_1[0]):
            parametrize.remove_parametrizations(centred.conv3_1[0], "weight", leave_parametrized=True)
        path = self.out / "weights.safetensors"
        made_by = asdict(self.config) | {
            "trained_on": "procedural scenes (flowreel.engine.training.pairs) alone",
            "seconds": round(self.seconds),
        }
        if self.config.init is not None:
            before = read_weights(self.config.init)
            made_by["init"] = {"sha256": before.sha256, "made_by": dict(before.made_by)}
        save_weights(path, folded_state(plain), licence=LICENCE, made_by=made_by, width=self.config.width, half=True)
        return path
