"""Training on a GPU: scenes, first loss and gradients equal a CPU's, our kernels compute them, and the loss falls."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import flowreel
from benchmarks.gpu.findings import Findings, Settings
from flowreel.engine.training import batches, start
from flowreel.engine.training import train as training
from flowreel.engine.training.config import TrainConfig
from flowreel.engine.training.drawing import SceneConfig
from flowreel.engine.training.painting import Batch
from flowreel.engine.training.train import Progress
from flowreel.kernels.operation import recording

SAME = 1e-3  # relative, for the loss and for all gradients as one vector, float32; two ways on a CPU: 1e-5
KERNELS = {  # those that must have run, forward and backward
    "FlowNet2C": {"correlation", "correlation_backward"},
    "FlowNet2": {
        "correlation",
        "correlation_backward",
        "warp",
        "warp_flow_gradient",
        "channel_norm",
        "channel_norm_backward",
    },
}
LEARNT = 0.85  # most loss in the last quarter of the steps, relative to the first; on a CPU .74
CONFIG = TrainConfig(
    width=0.125,
    steps=80,
    batch=4,
    height=128,
    width_px=192,
    reuse=80,  # one batch of scenes
    learning_rate=2e-3,
    warm_up=5,
    precision="fp32",
)
FEW_TEXTURES = SceneConfig(bank=(0, 16, 128))
PAINTED = 128  # pairs whose painting is compared
FEW = 0.001  # of the pixels may differ from a CPU's: on edges, rounding decides
DRY = replace(CONFIG, width=0.05, steps=4, batch=2, height=64, width_px=64, warm_up=1)


def check(findings: Findings, settings: Settings) -> None:
    """Uses small networks: the question is only whether training works."""
    make_small(settings)
    config = DRY if settings.dry else CONFIG
    findings.attempt("painting", partial(_paint, findings, settings, config))
    for model in KERNELS:
        findings.attempt(
            f"{model}: one step", partial(_compare, findings, settings, replace(config, model=model, batch_norm=False))
        )
    for precision in ("fp32", "bf16"):
        findings.attempt(
            f"{precision}: some steps", partial(_train, findings, settings, replace(config, precision=precision))
        )


def make_small(settings: Settings) -> None:
    """Draws scenes from few small textures in a dry run: those of a training take longer than all else."""
    if settings.dry:
        batches.SCENES = FEW_TEXTURES


def _paint(findings: Findings, settings: Settings, config: TrainConfig) -> None:
    """The same scenes, painted on both devices."""
    height, width, count = config.height, config.width_px, 4 if settings.dry else PAINTED
    painter = batches.painter_on(torch.device(settings.device))
    painted = painter.paint(batches.draw(config.seed, 0, count, height, width))
    wanted = batches.render(config.seed, 0, count, height, width)
    apart = [(one.float().cpu() - other.float()).abs() for one, other in zip(painted, wanted, strict=True)]
    shares = [float((part > most).float().mean()) for part, most in zip(apart, (1, 1, 2e-3, 0), strict=True)]
    names = ("first frames", "second frames", "flow", "visible")
    findings.check("painted scenes are the CPU's", max(shares) <= FEW, shares=dict(zip(names, shares, strict=True)))


def _compare(findings: Findings, settings: Settings, config: TrainConfig) -> None:
    """Loss and gradients of one step on both devices, from the same weights and scenes."""
    torch.manual_seed(config.seed)
    net = start.network(config).to(memory_format=torch.channels_last)
    batch = batches.render(config.seed, 0, config.batch, config.height, config.width_px)
    wanted, gradients = _step(config, net, batch)
    device = torch.device(settings.device)
    used: dict[str, str] = {}
    with recording(used), torch.autograd.set_multithreading_enabled(False):  # else backward would run in its own thread
        loss, ours = _step(config, net.to(device), batches.on(device, batch))
    apart = abs(loss - wanted) / abs(wanted)
    findings.check(f"{config.model}: the first loss is the CPU's", apart <= SAME, loss=loss, wanted=wanted)
    apart = float((ours - gradients).norm() / gradients.norm())
    findings.check(f"{config.model}: so are its gradients", apart <= SAME, apart=apart)
    by = "torch" if settings.dry else "cuda"
    good = {name for name, how in used.items() if how == by} >= KERNELS[config.model]
    findings.check(f"{config.model}: there and back by our kernels", good, ran=used)


def _step(config: TrainConfig, net: nn.Module, batch: Batch) -> tuple[float, Tensor]:
    """The loss, and all gradients in one vector on the host, float64."""
    net.zero_grad(set_to_none=True)
    loss = training.gradients(config, net, batch, visible_alone=True)
    found = [weight.grad.detach().double().cpu().flatten() for weight in net.parameters() if weight.grad is not None]
    return float(loss), torch.cat(found)


def _train(findings: Findings, settings: Settings, config: TrainConfig) -> None:
    """Trains as the command does, on one batch of scenes, flipped and cropped anew each step; loads the weights."""
    reports: list[Progress] = []
    out = Path(settings.folder) / f"training-{config.precision}"
    every = max(config.steps // 4, 1)
    weights = training.train(config, out, workers=0, report_every=every, report=reports.append, device=settings.device)
    losses = [progress.loss for progress in reports]
    findings.check(f"{config.precision}: every loss is finite", all(map(math.isfinite, losses)), losses=losses)
    learnt = settings.dry or losses[-1] <= LEARNT * losses[0]
    findings.check(f"{config.precision}: it learns", learnt, first=losses[0], last=losses[-1])
    net = flowreel.load_model("FlowNet2C", weights=weights, device=settings.device)
    frames = torch.zeros(2, 1, 3, config.height, config.width_px, device=settings.device)
    with torch.no_grad():
        findings.check(f"{config.precision}: its weights load", bool(net(*frames).isfinite().all()))
    seconds = reports[-1].seconds - reports[0].seconds
    findings.row(
        precision=config.precision,
        steps_s=(reports[-1].step - reports[0].step) / seconds if seconds > 0 else None,
        losses=losses,
        held_out_px=[progress.held_out_epe for progress in reports],
    )
    findings.add(headline=f"{config.precision}: loss {losses[0]:.2f} to {losses[-1]:.2f} in {config.steps} steps")
