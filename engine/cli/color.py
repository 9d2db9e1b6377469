"""``flowreel color``: stored flow as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from flowreel.engine.cli import loading
from flowreel.engine.cli.options import BOUND, MAX_FLOW, QUEUE_MB, Debug, Quiet, number_or_auto
from flowreel.engine.cli.table import Live, clock, size
from flowreel.engine.config import DEFAULT_QUEUE_MB, Encoder, SinkConfig
from flowreel.engine.errors import counted

if TYPE_CHECKING:
    from flowreel.engine.color import ColorReport


def color(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="IN",
            help="Flow files (.flo, .kitti.png, .npz, flow_x_N.jpg), folders or quoted globs of them, stores, or "
            "slices of stores (X.zarr@10:20), one after the other. Files of one kind are taken in natural "
            "order: 2.flo before 10.flo.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="A folder for images; X.mp4 or X.mkv for a video only; X.png for a single flow.",
            show_default=False,
        ),
    ],
    video: Annotated[bool, typer.Option("--video", "-v", help="Also make a video in the folder.")] = False,
    frame_rate: Annotated[
        str | None,
        typer.Option(
            "--frame-rate",
            "-r",
            help="Frame rate of the video. \\[default: a store's own timestamps; 30 for files]",
            show_default=False,
        ),
    ] = None,
    max_flow: Annotated[str, typer.Option(help=MAX_FLOW)] = "auto",
    encoder: Annotated[str, typer.Option(help="Encoder of the video: auto (the CPU), nvenc or cpu.")] = "auto",
    bound: Annotated[float, typer.Option(help=BOUND)] = SinkConfig.bound,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing images and videos.")] = False,
    queue_mb: Annotated[float, typer.Option(help=QUEUE_MB)] = DEFAULT_QUEUE_MB,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Colour-code stored flow (Middlebury colour wheel): one PNG per flow, and a video.

    \b
    [bold]Examples[/bold]
      flowreel color *.flo -o colors -v -r 30
      flowreel color dance.zarr@100:200 -o colors --max-flow 20
      flowreel color dance.zarr -o dance-flow.mp4
      flowreel color 000835.flo -o 000835.png
    """
    with loading():
        from flowreel.engine import color as coloring

    with Live(quiet) as live:
        report = coloring.color(
            inputs,
            output,
            video=video,
            frame_rate=frame_rate,
            max_flow=number_or_auto("max-flow", max_flow, float),
            progress=live.show,
            encoder=cast(Encoder, encoder),
            bound=bound,
            overwrite=overwrite,
            queue_mb=queue_mb,
        )
    for line in summary(report):
        live.say(line)


def summary(report: ColorReport) -> list[str]:
    """What was painted and how large it is."""
    pictures = counted(report.pictures, "picture")
    lines = [f"{counted(report.flows, 'flow')} painted in {clock(report.seconds)} ({report.flows_per_s:.1f} flows/s)"]
    for number, output in enumerate(report.outputs):
        what = f"{pictures}, " if report.pictures and number == 0 else ""
        lines += [f"{output.path}  {what}{size(output.bytes_written)}", *(f"  {note}" for note in output.notes)]
    return [*lines, *(f"note: {note}" for note in report.notes)]
