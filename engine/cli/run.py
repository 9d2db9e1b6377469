"""``flowreel run``: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flowreel.engine.cli.options import Debug, Device, Quiet, Weights
from flowreel.engine.cli.table import Live, print_summary
from flowreel.engine.errors import OutputWriteError, UsageError

FRAMES, NETWORK, OUTPUT, STREAM = "Which frames", "Which network, where, how", "Outputs", "The run"


def run(
    source: Annotated[
        str,
        typer.Argument(help="A video file, a folder or quoted glob of images, or synthetic:NAME.", show_default=False),
    ],
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            help="X.zarr (flow store), X.mp4 or X.mkv (colour video), DIR/%06d.flo. May be given several times. "
            "\\[default: STEM.flow.zarr here]",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="FlowNet2, FlowNet2C, FlowNet2S, FlowNet2SD, FlowNet2CS or FlowNet2CSS. "
            "\\[default: what the weights hold]",
            show_default=False,
            rich_help_panel=NETWORK,
        ),
    ] = None,
    weights: Weights = "baseline",
    device: Device = "auto",
    decoder: Annotated[str, typer.Option(help="auto, nvdec or pyav.", rich_help_panel=FRAMES)] = "auto",
    batch: Annotated[str, typer.Option(help="Pairs computed together, or auto.", rich_help_panel=NETWORK)] = "auto",
    precision: Annotated[
        str,
        typer.Option(help="auto (fp32 on a CPU, fp16 on a GPU), fp32, tf32, fp16 or bf16.", rich_help_panel=NETWORK),
    ] = "auto",
    fit: Annotated[
        str,
        typer.Option(
            help="How frames are made a multiple of 64: pad (undone exactly), crop, resize.", rich_help_panel=NETWORK
        ),
    ] = "pad",
    direction: Annotated[str, typer.Option(help="forward or backward.", rich_help_panel=NETWORK)] = "forward",
    start: Annotated[
        str, typer.Option(help="First frame, as a number or a time: 120, 10s, 1:02.5.", rich_help_panel=FRAMES)
    ] = "0",
    stop: Annotated[
        str | None,
        typer.Option(
            help="First frame not used, likewise. \\[default: the end]", show_default=False, rich_help_panel=FRAMES
        ),
    ] = None,
    step: Annotated[int, typer.Option(help="Use every N-th frame.", rich_help_panel=FRAMES)] = 1,
    stream: Annotated[
        int | None,
        typer.Option(
            help="Which video stream, from 0. \\[default: the best]", show_default=False, rich_help_panel=FRAMES
        ),
    ] = None,
    max_error: Annotated[
        float, typer.Option(help="Largest error of stored flow, in pixels; 0 is lossless.", rich_help_panel=OUTPUT)
    ] = 1 / 64,
    codec: Annotated[
        str, typer.Option(help="blosc (every reader opens it), pcodec (smaller) or zstd.", rich_help_panel=OUTPUT)
    ] = "blosc",
    max_flow: Annotated[
        str,
        typer.Option(help="Motion in pixels at full colour; auto measures the first flows.", rich_help_panel=OUTPUT),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs that are there.", rich_help_panel=OUTPUT)
    ] = False,
    tolerate_truncation: Annotated[
        bool,
        typer.Option("--tolerate-truncation", help="Take what a cut file gives as the whole.", rich_help_panel=STREAM),
    ] = False,
    queue_mb: Annotated[
        float, typer.Option(help="Most megabytes that may wait between the stages.", rich_help_panel=STREAM)
    ] = 512,
    stats: Annotated[
        Path | None,
        typer.Option(help="Write what the run did as JSON to this file.", show_default=False, rich_help_panel=STREAM),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compute the optical flow of SOURCE and write it.

    [bold]Examples[/bold]

      flowreel run dance.mp4

      flowreel run dance.mp4 -o dance.zarr -o dance-flow.mp4

      flowreel run 'frames/*.png' --weights FlowNet2_checkpoint.pth.tar -o flows/%06d.flo

      flowreel run dance.mp4 --start 10s --stop 20s --max-error 0
    """
    from flowreel.engine import api

    with Live(quiet) as live:
        report = api.run(
            source,
            output or None,
            progress=live.show,
            model=model,
            weights=weights,
            device=device,
            decoder=decoder,
            batch=_number("batch", batch, int),
            precision=precision,
            fit=fit,
            direction=direction,
            start=_frame_or_time(start),
            stop=None if stop is None else _frame_or_time(stop),
            step=step,
            stream=stream,
            max_error=max_error,
            codec=codec,
            max_flow=_number("max-flow", max_flow, float),
            overwrite=overwrite,
            tolerate_truncation=tolerate_truncation,
            queue_mb=queue_mb,
        )
    if stats is not None:
        _write_stats(stats, report.as_json())
    if not quiet:
        print_summary(report)


def _number(name: str, value: str, kind: type[int] | type[float]) -> int | float | str:
    if value == "auto":
        return value
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{name} must be auto or a number, got {value!r}") from None


def _frame_or_time(value: str) -> int | str:
    try:
        return int(value)
    except ValueError:
        return value


def _write_stats(path: Path, report: dict[str, object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise OutputWriteError(f"cannot write {path}: {error.strerror or error}; the outputs are done") from error
