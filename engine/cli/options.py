"""Options that several commands share, their texts for ``--help`` in one place, and how their values are handled."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from flowreel.engine.errors import OutputWriteError, UsageError
from flowreel.engine.options import Auto
from flowreel.engine.publish import publish_bytes

Number = TypeVar("Number", int, float)

WEIGHTS = (
    "'baseline' (shipped; small, for trying things out), a .safetensors or NVIDIA .pth.tar file, or the name of a "
    "downloaded checkpoint."
)
DEVICE = "auto (CUDA if available), cpu, cuda, cuda:N, or cuda:0,1 to spread the run over several GPUs."
Weights = Annotated[str, typer.Option(help=WEIGHTS)]
Device = Annotated[str, typer.Option(help=DEVICE)]
OneDevice = Annotated[str, typer.Option(help="auto (CUDA if available), cpu, cuda or cuda:N.")]
STDOUT = Path("-")  # as the value of ``--stats``
CODECS = (
    "blosc (readable by every Zarr v3 reader), zstd, pcodec (smaller for FlowNet2), pcodec2d (smallest, few readers)."
)
BOUND = "Two-stream images map -BOUND..BOUND pixels to 0..255."
MAX_FLOW = "Flow magnitude in pixels at full saturation; auto: measured per image, once for a video."
QUEUE_MB = "Memory limit, in megabytes, for frames and flow queued between stages."
MAX_ERROR = "Largest error of stored flow, in pixels; 0 is lossless."
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def number_or_auto(name: str, value: str, kind: type[Number]) -> Number | Auto:
    """The value of an option that is ``auto`` or a number. Raises UsageError for anything else."""
    if value == "auto":
        return "auto"
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{name} must be auto or a number, got {value!r}") from None


def require_report_free(path: Path | None, outputs: Sequence[str | Path], sources: Sequence[str]) -> None:
    """Checks the path of ``--stats`` or ``--manifest`` before the work begins. Raises as ``require_report`` does."""
    from flowreel.engine.places import require_report
    from flowreel.engine.sources import source_stem

    if path is not None and path != STDOUT:
        named = [os.fspath(output).replace("{stem}", source_stem(one)) for output in outputs for one in sources]
        require_report(path, named, sources)


def write_stats(path: Path, report: dict[str, object]) -> None:
    """Writes the report of ``--stats`` as JSON. Raises OutputWriteError, which says that the outputs are done."""
    if path == STDOUT:
        if sys.stdout is None:
            raise OutputWriteError("stdout is closed, so the report is lost; the outputs are done")
        typer.echo(json.dumps(report, indent=2))
        return
    text = json.dumps(report, indent=2).encode() + b"\n"
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/fd/3, which has no neighbours
            path.write_bytes(text)
            return
        try:
            publish_bytes(path, text)
        except OSError as error:  # its folder takes no other files, or it is mounted by itself
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EBUSY):
                raise
            path.write_bytes(text)
    except OSError as error:
        raise OutputWriteError(f"cannot write {path}: {error.strerror or error}; the outputs are done") from error
