"""``flowreel demo``: everything once, on a scene whose flow is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowreel.engine.cli import loading, printable
from flowreel.engine.cli.options import Debug, Device, Quiet, Weights
from flowreel.engine.cli.table import Live, print_summary, size


def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to put the clip and its flow.")] = Path(
        "demo"
    ),
    weights: Weights = "baseline",
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a clip and its flow that are there.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Render a moving scene to an H.264 file, compute its flow, and compare it with the truth."""
    with loading():
        from flowreel.engine import demo as demonstration

    with Live(quiet) as live:
        report = demonstration.demo(
            folder, weights=weights, device=device, overwrite=overwrite, progress=live.show, say=live.say
        )
    if quiet:
        return
    print_summary(report.run)
    store, video = report.run.outputs
    typer.echo(f"error against the truth: {report.epe:.2f} px; predicting no motion: {report.mean_motion:.2f} px")
    typer.echo(
        f"sizes: the clip {size(report.clip_bytes)}, its flow {size(store.bytes_written)} "
        f"(as .flo files {size(report.run.flo_bytes)}), the colour video {size(video.bytes_written)}"
    )
    picture = printable(str(report.comparison))
    typer.echo(f"look at {picture}: a frame, its true flow, the computed flow; {printable(video.path)} plays it all")
    typer.echo(f"open {printable(store.path)} with flowreel.open_store or xarray")
