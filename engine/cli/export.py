"""``flowreel export``: stored flow into another form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from flowreel.engine.cli import loading
from flowreel.engine.cli.options import (
    BOUND,
    CODECS,
    MAX_ERROR,
    MAX_FLOW,
    QUEUE_MB,
    Debug,
    Quiet,
    number_or_auto,
    require_report_free,
    write_stats,
)
from flowreel.engine.cli.table import Live, beside_flo, clock, size
from flowreel.engine.config import DEFAULT_QUEUE_MB, Codec, Encoder, SinkConfig
from flowreel.engine.errors import counted

if TYPE_CHECKING:
    from flowreel.engine.export import ExportReport


def export(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="A store, a slice of one (X.zarr@10:20), a complete lazy-flow cache, or a folder, quoted glob or list "
            "of flow files (.flo, .kitti.png, .npz, flow_x_N.jpg). Files are always taken in natural order: 2.flo "
            "before 10.flo.",
            show_default=False,
        ),
    ],
    output: Annotated[
        list[str],
        typer.Option(
            "--output",
            "-o",
            help="X.zarr, X.mp4, DIR/%06d.flo, ... as for run. May be repeated.",
            show_default=False,
        ),
    ],
    start: Annotated[
        int | None, typer.Option(help="Number of the first flow; negative counts from the end.", show_default=False)
    ] = None,
    stop: Annotated[int | None, typer.Option(help="End (exclusive), likewise.", show_default=False)] = None,
    max_error: Annotated[float, typer.Option(help=MAX_ERROR)] = SinkConfig.max_error,
    codec: Annotated[str, typer.Option(help=CODECS)] = SinkConfig.codec,
    max_flow: Annotated[str, typer.Option(help=MAX_FLOW)] = "auto",
    encoder: Annotated[str, typer.Option(help="Encoder of colour video: auto (the CPU), nvenc or cpu.")] = "auto",
    bound: Annotated[float, typer.Option(help=BOUND)] = SinkConfig.bound,
    frame_rate: Annotated[
        str | None,
        typer.Option(
            "--frame-rate",
            "-r",
            help="Frame rate of flow files, which carry no timestamps (.npz do). \\[default: 25]",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
    queue_mb: Annotated[float, typer.Option(help=QUEUE_MB)] = DEFAULT_QUEUE_MB,
    stats: Annotated[
        Path | None,
        typer.Option(help="Write a report of the export as JSON to this file; - is stdout.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert stored flow to other formats: a store to files, or files to a store.

    \b
    [bold]Examples[/bold]
      flowreel export dance.zarr -o flows/%06d.flo
      flowreel export dance.zarr@100:200 -o part.zarr -o part.mp4
      flowreel export flows -o dance.zarr --max-error 0 -r 29.97
      flowreel export dance.zarr -o smaller.zarr --codec pcodec
    """
    with loading():
        from flowreel.engine import export as exporting

    require_report_free(stats, output, source)
    with Live(quiet) as live:
        report = exporting.export(
            source,
            output,
            progress=live.show,
            start=start,
            stop=stop,
            max_error=max_error,
            codec=cast(Codec, codec),
            max_flow=number_or_auto("max-flow", max_flow, float),
            encoder=cast(Encoder, encoder),
            bound=bound,
            frame_rate=frame_rate,
            overwrite=overwrite,
            queue_mb=queue_mb,
        )
    if stats is not None:
        write_stats(stats, report.as_json())
    for line in summary(report):
        live.say(line)


def summary(report: ExportReport) -> list[str]:
    """What was exported, how large it is, and how that compares with ``.flo``."""
    lines = [
        f"{counted(report.flows, 'flow')} of {report.width}x{report.height} from {report.source} "
        f"in {clock(report.seconds)} ({report.flows_per_s:.1f} flows/s); as .flo {size(report.flo_bytes)}"
    ]
    for output in report.outputs:
        lines += [f"{output.path}  {size(output.bytes_written)}{beside_flo(report.flo_bytes, output.bytes_written)}"]
        lines += [f"  {note}" for note in output.notes]
    return [*lines, *(f"note: {note}" for note in report.notes)]
