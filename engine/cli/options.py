"""Options that several commands share, each with its words for ``--help`` in one place."""

from __future__ import annotations

from typing import Annotated

import typer

Weights = Annotated[
    str, typer.Option(help="'baseline' (shipped), a .safetensors, NVIDIA's .pth.tar, or a downloaded one's name.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N. auto takes CUDA when it is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
