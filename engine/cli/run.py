"""``flowreel run``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.markup import escape

from flowreel.engine.cli.options import (
    CODECS,
    STDOUT,
    Debug,
    Device,
    Quiet,
    Weights,
    number_or_auto,
    require_report_free,
    write_stats,
)
from flowreel.engine.cli.table import Live, print_many, print_summary
from flowreel.engine.errors import UsageError
from flowreel.engine.options import RunOptions
from flowreel.sinks import known_outputs

FRAMES, NETWORK, OUTPUT, STREAM = "Which frames", "Which network, where, how", "Outputs", "The run"


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
            help="Where to; the name decides the kind (see above). May be given several times, all in one pass. "
            "\\[default: {stem}.flow.zarr here]",
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
        str,
        typer.Option(
            help="First frame, as a number or a time since the first: 120, 10s, 1:02.5.", rich_help_panel=FRAMES
        ),
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
    codec: Annotated[str, typer.Option(help=CODECS, rich_help_panel=OUTPUT)] = "blosc",
    max_flow: Annotated[
        str,
        typer.Option(
            help="Motion in pixels at full colour; auto: of a video from its first flows, of a picture its own.",
            rich_help_panel=OUTPUT,
        ),
    ] = "auto",
    encoder: Annotated[
        str,
        typer.Option(
            help="Of colour video: auto (the GPU's own where it computes the flow and has one), nvenc or cpu.",
            rich_help_panel=OUTPUT,
        ),
    ] = "auto",
    bound: Annotated[
        float, typer.Option(help="Pixels at either end of two-stream pictures' scale.", rich_help_panel=OUTPUT)
    ] = 20.0,
    resolution: Annotated[
        str,
        typer.Option(
            help="full, or native: the store keeps the network's own quarter-resolution flow, 16 times less, and "
            "gives back the full one. Not with FlowNet2.",
            rich_help_panel=OUTPUT,
        ),
    ] = "full",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the store an earlier run left, or whose source has grown.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
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
        typer.Option(
            help="Write what the run did as JSON to this file; -: to stdout.",
            show_default=False,
            rich_help_panel=STREAM,
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="Of many sources: write what became of each as JSON to this file. "
            "\\[default: flowreel-manifest.json beside the outputs]",
            show_default=False,
            rich_help_panel=STREAM,
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
      'frames/*.png'     the images that a glob matches, likewise
      synthetic:objects  a procedural scene (synthetic:objects?size=640x360)
      -                  YUV4MPEG2 on stdin, as ffmpeg -f yuv4mpegpipe - writes

    With several SOURCEs every output's name must hold {stem}, which stands for
    the source's name. The network is loaded once; a source whose outputs are
    all there is skipped; one that fails does not stop the others. A manifest
    tells what became of each, and the same command again does what is left.

    \b
    [bold]Outputs[/bold]
    OUTPUTS

    Missing folders are created. Until an output is complete its name ends in
    .partial, and so does for good what a cut SOURCE gave, unless
    --tolerate-truncation takes it as the whole.

    \b
    [bold]Examples[/bold]
      flowreel run dance.mp4
      flowreel run dance.mp4 -o dance.zarr -o dance-flow.mp4
      flowreel run dance.mp4 --start 10s --stop 1:02.5 --step 2 --max-error 0
      flowreel run 'frames/*.png' --weights FlowNet2.pth.tar -o flows/%06d.flo
      flowreel run synthetic:objects --direction backward -o objects.mkv
      flowreel run *.mp4 -o 'out/{stem}.zarr' -o 'out/{stem}.mp4'
      ffmpeg -i dance.mp4 -f yuv4mpegpipe - | flowreel run - -o dance.zarr

    Exit codes: 0 done, 1 failed (of many: at least one), 2 wrong usage,
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
    require_report_free(stats, output or [], sources)
    if len(sources) == 1 and manifest is None:
        _run_one(sources[0], output or None, options, stats, quiet)
    else:
        _run_many(sources, output or None, options, stats, quiet, manifest)


def _output_lines() -> str:
    forms = known_outputs()
    width = max(len(form) for form, _ in forms)
    return "\n".join(escape(f"      {form:{width}}  {meaning}") for form, meaning in forms)


run.__doc__ = (run.__doc__ or "").replace("    OUTPUTS", _output_lines())  # every format that is registered


def _run_one(source: str, outputs: list[str] | None, options: RunOptions, stats: Path | None, quiet: bool) -> None:
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
    from flowreel.engine.many import run_many

    if manifest == STDOUT:
        raise UsageError("the manifest is read again by the next run, so it needs a file; --stats - goes to stdout")
    others = [] if stats is None or stats == STDOUT else [stats]
    require_report_free(manifest, [*(outputs or []), *others], sources)
    with Live(quiet) as live:
        report = run_many(sources, outputs, progress=live.show_many, manifest=manifest, **options)
    if stats is not None:
        write_stats(stats, report.as_json())
    if not quiet:
        print_many(report)
    report.raise_if_failed()
