"""``flowreel run``: the main job."""

from __future__ import annotations

from inspect import cleandoc
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.markup import escape

from flowreel.engine.cli import loading
from flowreel.engine.cli.options import (
    BOUND,
    CODECS,
    DEVICE,
    MAX_ERROR,
    QUEUE_MB,
    STDOUT,
    WEIGHTS,
    Debug,
    Quiet,
    number_or_auto,
    require_report_free,
    write_stats,
)
from flowreel.engine.cli.table import Live, print_many, print_summary
from flowreel.engine.config import DEFAULT_OUTPUT, DEFAULT_QUEUE_MB, ModelConfig, SelectConfig, SinkConfig
from flowreel.engine.errors import UsageError
from flowreel.engine.options import RunOptions
from flowreel.sinks import known_outputs

FRAMES, NETWORK, OUTPUT, RUN = "Frames", "Network", "Outputs", "Run"


def run(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Video files, folders or quoted globs of images, synthetic:NAME, or - for stdin.",
            show_default=False,
        ),
    ],
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            help="Output; its name determines the format (see above). May be repeated: all are written in one pass. "
            "\\[default: {stem}.flow.zarr in the working folder]",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="FlowNet2, FlowNet2C, FlowNet2S, FlowNet2SD, FlowNet2CS or FlowNet2CSS. "
            "\\[default: the network of the weights]",
            show_default=False,
            rich_help_panel=NETWORK,
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help=WEIGHTS, rich_help_panel=NETWORK)] = ModelConfig.weights,
    device: Annotated[str, typer.Option(help=DEVICE, rich_help_panel=NETWORK)] = "auto",
    decoder: Annotated[
        str,
        typer.Option(
            help="auto (NVDEC where the GPU can decode the file, else PyAV), nvdec or pyav.", rich_help_panel=FRAMES
        ),
    ] = "auto",
    batch: Annotated[str, typer.Option(help="Frame pairs per batch, or auto.", rich_help_panel=NETWORK)] = "auto",
    precision: Annotated[
        str,
        typer.Option(help="auto (fp32 on a CPU, fp16 on a GPU), fp32, tf32, fp16 or bf16.", rich_help_panel=NETWORK),
    ] = "auto",
    fit: Annotated[
        str,
        typer.Option(
            help="How frames are fitted to multiples of 64: pad (undone exactly), crop or resize.",
            rich_help_panel=NETWORK,
        ),
    ] = ModelConfig.fit,
    direction: Annotated[
        str, typer.Option(help="forward (t to t+1) or backward (t+1 to t).", rich_help_panel=NETWORK)
    ] = ModelConfig.direction,
    start: Annotated[
        str,
        typer.Option(
            help="First frame, as a number or a time from the first frame: 120, 10s, 1:02.5.", rich_help_panel=FRAMES
        ),
    ] = "0",
    stop: Annotated[
        str | None,
        typer.Option(
            help="End (exclusive), as a number or time. \\[default: end of the source]",
            show_default=False,
            rich_help_panel=FRAMES,
        ),
    ] = None,
    step: Annotated[int, typer.Option(help="Use every STEP-th frame.", rich_help_panel=FRAMES)] = SelectConfig.step,
    stream: Annotated[
        int | None,
        typer.Option(
            help="Video stream of the container, from 0. \\[default: FFmpeg's choice]",
            show_default=False,
            rich_help_panel=FRAMES,
        ),
    ] = None,
    max_error: Annotated[float, typer.Option(help=MAX_ERROR, rich_help_panel=OUTPUT)] = SinkConfig.max_error,
    codec: Annotated[str, typer.Option(help=CODECS, rich_help_panel=OUTPUT)] = SinkConfig.codec,
    max_flow: Annotated[
        str,
        typer.Option(
            help="Flow magnitude in pixels at full saturation; auto: for a video, the 95th percentile of the first 32 "
            "flows; for an image, its largest vector.",
            rich_help_panel=OUTPUT,
        ),
    ] = "auto",
    encoder: Annotated[
        str,
        typer.Option(
            help="Encoder of colour video: auto (NVENC if the flow is computed on a GPU that has it, else the CPU), "
            "nvenc or cpu.",
            rich_help_panel=OUTPUT,
        ),
    ] = "auto",
    bound: Annotated[float, typer.Option(help=BOUND, rich_help_panel=OUTPUT)] = SinkConfig.bound,
    resolution: Annotated[
        str,
        typer.Option(
            help="full, or native: store the network's quarter-resolution prediction (16 times fewer values); it is "
            "upsampled when read. Not for FlowNet2.",
            rich_help_panel=OUTPUT,
        ),
    ] = SinkConfig.resolution,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue an unfinished store, or extend one whose source has grown.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing outputs.", rich_help_panel=OUTPUT)
    ] = False,
    tolerate_truncation: Annotated[
        bool,
        typer.Option(
            "--tolerate-truncation",
            help="Accept a truncated source and finish with the frames that decode.",
            rich_help_panel=RUN,
        ),
    ] = False,
    queue_mb: Annotated[float, typer.Option(help=QUEUE_MB, rich_help_panel=RUN)] = DEFAULT_QUEUE_MB,
    stats: Annotated[
        Path | None,
        typer.Option(
            help="Write a report of the run as JSON to this file; - is stdout.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="With several sources: write the outcome of each as JSON to this file. "
            "\\[default: flowreel-manifest.json beside the outputs]",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compute the optical flow of SOURCE and write it.

    \b
    [bold]Sources[/bold]
      clip.mp4           a video file, anything FFmpeg reads
      frames/            a folder of images, in natural order
      'frames/*.png'     images matching a quoted glob
      synthetic:objects  a procedural scene (synthetic:objects?size=640x360)
      -                  YUV4MPEG2 on stdin, as ffmpeg -f yuv4mpegpipe - writes

    With several SOURCEs, output names must contain {stem}, the name of the
    source. The network is loaded once, sources that are already done are
    skipped, and a failing source does not stop the others. A manifest records
    the outcome of each; running the same command again does what is left.

    \b
    [bold]Outputs[/bold]
    OUTPUTS

    Missing folders are created. The name of an output ends in .partial until
    it is complete. The output of a truncated SOURCE stays .partial unless
    --tolerate-truncation is given.

    \b
    [bold]Examples[/bold]
      flowreel run dance.mp4
      flowreel run dance.mp4 -o dance.zarr -o dance-flow.mp4
      flowreel run dance.mp4 --start 10s --stop 1:02.5 --step 2 --max-error 0
      flowreel run 'frames/*.png' --weights FlowNet2.pth.tar -o flows/%06d.flo
      flowreel run synthetic:objects --direction backward -o objects.mkv
      flowreel run *.mp4 -o 'out/{stem}.zarr' -o 'out/{stem}.mp4'
      ffmpeg -i dance.mp4 -f yuv4mpegpipe - | flowreel run - -o dance.zarr

    Exit codes: 0 success, 1 failure (of at least one source), 2 wrong usage,
    130 interrupted (143 by SIGTERM).
    """
    given = {
        "model": model,
        "weights": weights,
        "device": device,
        "decoder": decoder,
        "batch": number_or_auto("batch", batch, int),
        "precision": precision,
        "fit": fit,
        "direction": direction,
        "start": start,
        "stop": stop,
        "step": step,
        "stream": stream,
        "max_error": max_error,
        "codec": codec,
        "max_flow": number_or_auto("max-flow", max_flow, float),
        "encoder": encoder,
        "bound": bound,
        "resolution": resolution,
        "resume": resume,
        "overwrite": overwrite,
        "tolerate_truncation": tolerate_truncation,
        "queue_mb": queue_mb,
    }
    options = cast(RunOptions, given)  # their values are checked where they are used
    require_report_free(stats, output or [DEFAULT_OUTPUT], sources)
    if len(sources) == 1 and manifest is None:
        _run_one(sources[0], output or None, options, stats, quiet)
    else:
        _run_many(sources, output or None, options, stats, quiet, manifest)


def _output_lines() -> str:
    forms = known_outputs()
    width = max(len(form) for form, _ in forms)
    return "\n".join(escape(f"  {form:{width}}  {meaning}") for form, meaning in forms)


# Every format that is registered. Python 3.13 removes a docstring's indentation itself, older versions leave it.
run.__doc__ = cleandoc(run.__doc__ or "").replace("OUTPUTS", _output_lines())


def _run_one(source: str, outputs: list[str] | None, options: RunOptions, stats: Path | None, quiet: bool) -> None:
    with loading():
        from flowreel.engine import api

    with Live(quiet) as live:
        report = api.run(source, outputs, progress=live.show, **options)
    if stats is not None:
        write_stats(stats, report.as_json())
    if not quiet:
        print_summary(report)


def _run_many(
    sources: list[str],
    outputs: list[str] | None,
    options: RunOptions,
    stats: Path | None,
    quiet: bool,
    manifest: Path | None,
) -> None:
    with loading():
        from flowreel.engine.many import manifest_path, run_many

    if manifest == STDOUT:
        raise UsageError("the manifest is read again by the next run, so it needs a file; --stats - goes to stdout")
    templates = outputs or [DEFAULT_OUTPUT]
    require_report_free(manifest, templates, sources)
    require_report_free(stats, [manifest_path(manifest, templates)], sources)
    with Live(quiet) as live:
        report = run_many(sources, outputs, progress=live.show_many, manifest=manifest, **options)
    if stats is not None:
        write_stats(stats, report.as_json())
    if not quiet:
        print_many(report)
    report.raise_if_failed()
