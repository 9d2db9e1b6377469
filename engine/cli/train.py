"""``flowreel train``: how the baseline weights were made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowreel.engine.cli import printable
from flowreel.engine.cli.options import Debug, OneDevice, Quiet
from flowreel.engine.cli.table import line_console


def train(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for weights, checkpoint and log.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Network to train.")] = "FlowNet2C",
    width: Annotated[float, typer.Option(help="Channel multiplier; 1 is the published network.")] = 0.25,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 20_000,
    minutes: Annotated[
        float | None, typer.Option(help="Training time, instead of --steps.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Pairs per step.")] = 8,
    height: Annotated[int, typer.Option(help="Height of training crops, a multiple of 64.")] = 192,
    width_px: Annotated[int, typer.Option(help="Width of training crops, a multiple of 64.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 8e-4,
    precision: Annotated[str, typer.Option(help="Precision of the convolutions: bf16 or fp32.")] = "bf16",
    init: Annotated[
        str | None,
        typer.Option(
            help="Initial weights. A FlowNet2C can be widened or extended to FlowNet2CS, and that to FlowNet2CSS.",
            show_default=False,
        ),
    ] = None,
    last_only: Annotated[
        bool, typer.Option("--last-only", help="Train only the last network of FlowNet2CS or CSS.")
    ] = False,
    batch_norm: Annotated[
        bool, typer.Option(help="Train with BatchNorm when starting from random weights; it is folded at the end.")
    ] = True,
    reuse: Annotated[int, typer.Option(help="Times each scene is used, with new flips and crops each time.")] = 3,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    device: OneDevice = "auto",
    workers: Annotated[int, typer.Option(help="Processes that generate scenes; does not affect the result.")] = 1,
    report_every: Annotated[int, typer.Option(help="Steps between reports and checkpoints.")] = 250,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in OUT.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train weights on procedural scenes, the way the shipped ones were made.

    On the same kind of CPU the same settings give the same weights; on a GPU rounding varies from run to run. Scenes
    are described on the CPU and rendered on the device that trains. OUT gets weights.safetensors (for --weights),
    checkpoint.pt (for --resume) and log.csv.
    """
    from flowreel.engine.device import one_device
    from flowreel.engine.training import train as training
    from flowreel.engine.training.config import TrainConfig

    console = line_console(quiet)
    where = one_device(device)

    def report(progress: training.Progress) -> None:
        left_s = progress.seconds * (steps / progress.step - 1) if minutes is None else 60 * minutes - progress.seconds
        of = f" of {steps}" if minutes is None else ""
        console.print(
            f"step {progress.step}{of} on {where}  loss {progress.loss:.3f}  held-out error "
            f"{progress.held_out_epe:.2f} px (no motion: {progress.zero_epe:.2f})  {progress.seconds:.0f} s, "
            f"{max(left_s, 0):.0f} s to go"
        )

    config = TrainConfig(
        model=model,
        width=width,
        steps=steps,
        minutes=minutes,
        batch=batch,
        height=height,
        width_px=width_px,
        learning_rate=learning_rate,
        precision=precision,
        init=init,
        last_only=last_only,
        batch_norm=batch_norm and init is None,
        reuse=reuse,
        seed=seed,
    )
    path = training.train(
        config, out, resume=resume, workers=workers, report_every=report_every, report=report, device=device
    )
    console.print(f"weights: {printable(str(path))}")
