"""Trains a network on procedural scenes: how the baseline weights were made.

Everything follows from ``TrainConfig``: sample *i* of a run is the scene of seed (run seed, i), and the augmentation of
step *s* is drawn from (run seed, s). So a run can be stopped at any step and resumed, and ends with the same weights,
unless it is limited by minutes instead of steps.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from flowreel.engine.claims import Claim
from flowreel.engine.compiled.plain import cudnn_settings
from flowreel.engine.data import JSON
from flowreel.engine.device import one_device
from flowreel.engine.errors import CheckpointError, DivergedError, UsageError, first_line
from flowreel.engine.models.flownetc import FlowNetC
from flowreel.engine.models.layers import folded, normalise, to_pixels
from flowreel.engine.models.saving import save_weights
from flowreel.engine.models.stacks import FlowNet2, FlowNet2CS, FlowNet2CSS, refining_input
from flowreel.engine.models.weight_files import appearing
from flowreel.engine.models.weights import Weights, read_weights
from flowreel.engine.publish import make_folder, write_errors
from flowreel.engine.training.batches import batches, on, painter_on, render
from flowreel.engine.training.config import TrainConfig, learning_rate, share_done
from flowreel.engine.training.loss import end_point_error, matching_loss, multi_scale_loss, zero_flow_error
from flowreel.engine.training.painting import Batch
from flowreel.engine.training.start import network, plain

CHECKPOINT = "checkpoint.pt"  # in a run's folder
LICENCE = "Apache-2.0"
HELD_OUT_SEED = 1 << 40  # no training run gets this far


@dataclass(frozen=True)
class Progress:
    """One report of a run."""

    step: int  # steps done
    seconds: float  # of training so far, including earlier processes that were resumed
    loss: float  # mean since the last report
    held_out_epe: float  # px, end-point error on procedural scenes that are never trained on
    zero_epe: float  # px, end-point error of zero flow on the same scenes
    learning_rate: float


HEADING = ",".join(field.name for field in fields(Progress)).encode()  # of the log


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
        resume: continue from ``out/checkpoint.pt`` if it exists; the initial weights are then not read again.
        workers: processes that make scenes during training; 0: made in this process. Does not change the result, except
            for the number of steps if ``config`` sets minutes.
        report_every: steps between held-out measurements, log lines and checkpoints.
        device: where the network is trained: cpu, cuda, cuda:N, or auto, which takes CUDA when it is there. A GPU also
            paints the scenes, which workers then only draw as numbers; but for a few pixels its pictures equal a CPU's
            within one level. On a GPU the order of summation is not fixed, so two runs differ by rounding errors that
            grow.

    Returns:
        The path of the finished weights.

    Raises:
        UsageError: ``workers`` or ``report_every`` is too small, the kind of device is unknown, or there are several.
        DeviceError: CUDA was asked for and is not there.
        WeightsError: the initial weights cannot be read.
        OutputWriteError: the folder cannot be made, or one of the files not be written.
        OutputBusyError: another run is training in the folder.
        CheckpointError: the folder holds a run and ``resume`` is false, or one with other settings, or finished weights
            without a checkpoint, or another program's log.csv.
        DivergedError: the loss is no longer finite. The checkpoint before is kept; no weights are written.
    """
    if workers < 0 or report_every < 1:
        raise UsageError(f"workers must be at least 0 and report-every at least 1, got {workers} and {report_every}")
    where = one_device(device)
    if os.path.lexists(out):
        with write_errors(out):
            make_folder(out)  # a file of that name is refused at once
    begun = resume and (out / CHECKPOINT).exists()  # then the initial weights, which may be gone, are not needed
    initial = None if begun or config.init is None else read_weights(config.init)
    torch.manual_seed(config.seed)
    model = network(config, initial).to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = _Run(config, out, model, optimiser_of(config, model), initial)
    with write_errors(out):
        make_folder(out)  # not before the initial weights have been read
        claim = Claim.of_folder(out, str(out))
    try:
        state.load(begun)
        return _train(state, where, workers, report_every, report)
    finally:
        claim.release()


def _train(
    state: _Run, where: torch.device, workers: int, report_every: int, report: Callable[[Progress], None]
) -> Path:
    """``train``, once the folder is this run's alone and the state is that of its checkpoint."""
    config, model, optimiser = state.config, state.model, state.optimiser
    held_out = on(where, render(0, HELD_OUT_SEED, 16, config.height, config.width_px))

    losses: list[Tensor] = []  # scalars, kept on the device: reading one would synchronise with it every step
    done = share_done(config, state.step, state.seconds)
    if done >= 1:
        return state.finish()
    painter = None if where.type == "cpu" else painter_on(where)
    started: float | None = None
    with closing(batches(config, state.step, workers, painter)) as seen:  # or an error would leave workers running
        for batch in seen:
            if started is None:  # the time to start up does not count as training
                started = time.monotonic() - state.seconds
            state.step += 1
            rate = learning_rate(config, state.step, done)
            losses.append(make_step(config, model, optimiser, batch, rate, visible_alone=done < config.visible_only))
            done = share_done(config, state.step, time.monotonic() - started)
            if state.step % report_every == 0 or done >= 1:
                epe, zero = _held_out(model, held_out)
                loss = float(torch.stack(losses).double().mean())
                if not (math.isfinite(loss) and math.isfinite(epe)):  # before the last good checkpoint is replaced
                    raise DivergedError(
                        f"training diverged by step {state.step}: loss {loss:g}, held-out error {epe:g} px; train "
                        "in another folder with a smaller --learning-rate, or with --precision fp32"
                    )
                state.seconds = time.monotonic() - started
                progress = Progress(state.step, state.seconds, loss, epe, zero, rate)
                losses.clear()
                state.save(progress)
                report(progress)
            if done >= 1:
                break  # before another batch is made
    return state.finish()


def optimiser_of(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True)


def make_step(
    config: TrainConfig,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    rate: float,
    *,
    visible_alone: bool,
) -> Tensor:
    """Trains the model on one batch. Returns the loss before that, a scalar on its device."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss = gradients(config, model, batch, visible_alone=visible_alone)
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimiser.step()
    return loss


def gradients(config: TrainConfig, model: nn.Module, batch: Batch, *, visible_alone: bool) -> Tensor:
    """Leaves the gradients of one step in the model's parameters. Returns the loss, a scalar on its device."""
    first, second, flow, visible = batch
    model.train()
    mask = visible if visible_alone else torch.ones_like(visible)
    half = torch.autocast(flow.device.type, torch.bfloat16, enabled=config.precision == "bf16")
    # True float32, above all in the flow heads. Training sums in no fixed order anyway, so any algorithm will do.
    with cudnn_settings(flow.device, tf32=False, deterministic=False):
        with half:
            loss = _loss(config, model, first, second, flow, visible, mask)
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


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

    No gradient passes through the flow that a network is given to the network that predicted it.
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
    """The state of a run that is kept in its folder."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        initial: Weights | None,
    ) -> None:
        self.config, self.out, self.model, self.optimiser = config, out, model, optimiser
        self.step, self.seconds = 0, 0.0
        self.checkpoint, self.log = out / CHECKPOINT, out / "log.csv"
        self.weights = out / "weights.safetensors"
        self.lineage: dict[str, JSON] | None = None
        if initial is not None:
            made_by = dict(initial.made_by)
            self.lineage = {"sha256": initial.sha256, "licence": initial.licence, "made_by": made_by}

    def load(self, begun: bool) -> None:
        """Takes over the checkpoint of a run that has begun; for a new one, makes sure that the folder holds none."""
        if not begun:
            if self.checkpoint.exists():
                raise CheckpointError(f"{self.out} holds a training run already: pass --resume, or another folder")
            if self.weights.exists():
                raise CheckpointError(f"{self.weights} exists already, without a checkpoint: choose another folder")
            if self.log.exists():  # of a run that was killed before its first checkpoint, or none of ours
                with self.log.open("rb") as file:
                    if not HEADING.startswith(file.read(len(HEADING))):
                        raise CheckpointError(f"{self.log} is not of a training run: choose another folder")
                self.log.unlink()
            return
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)  # saved from any device
        except Exception as error:
            raise CheckpointError(f"{self.checkpoint} cannot be read: {first_line(error)}") from error
        if not (isinstance(saved, dict) and saved.keys() >= {"config", "model", "optimiser", "step", "seconds"}):
            raise CheckpointError(f"{self.checkpoint} is not a checkpoint of a training run: choose another folder")
        values = [(f.name, saved["config"].get(f.name), getattr(self.config, f.name)) for f in fields(TrainConfig)]
        differing = [f"{name} {before!r} instead of {now!r}" for name, before, now in values if before != now]
        if differing:
            raise CheckpointError(
                f"{self.out} was begun with other settings: {', '.join(differing)}; pass those, or another folder"
            )
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.lineage = saved["init"]
        self._shorten_log()

    def _shorten_log(self) -> None:
        """Cuts off reports that are later than the checkpoint: their steps are made, and reported, again."""
        if not self.log.exists():
            return
        kept_bytes = 0
        with write_errors(self.log), self.log.open("rb+") as file:
            for number, line in enumerate(file):
                step = line.partition(b",")[0]
                later = number > 0 and step.isdigit() and int(step) > self.step  # line 0 is the heading
                if later or not line.endswith(b"\n"):
                    break
                kept_bytes += len(line)
            file.truncate(kept_bytes)

    def save(self, progress: Progress) -> None:
        content = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "init": self.lineage,
        }
        # The log comes first: a process killed in between leaves a report too many, which a resumed run can cut off.
        with write_errors(self.log), self.log.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(progress)))
            if not file.tell():
                writer.writeheader()
            writer.writerow(asdict(progress))
            file.flush()
            os.fsync(file.fileno())
        with appearing(self.checkpoint) as temporary, temporary.open("wb") as file:
            torch.save(content, file)

    def finish(self) -> Path:
        made_by = asdict(self.config) | {
            "steps": self.step,
            "trained_on": "procedural scenes (flowreel.engine.training.drawing) alone",
            "seconds": round(self.seconds),
        }
        licence = LICENCE
        if self.lineage is not None:
            made_by["init"] = self.lineage
            licence = str(self.lineage["licence"])  # of weights for research only come weights for research only
        state = folded(plain(self.model)).state_dict()
        save_weights(self.weights, state, licence=licence, made_by=made_by, width=self.config.width, half=True)
        return self.weights
