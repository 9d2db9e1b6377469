"""Output formats by the ending of a name. One format = one module in this folder and one line in ``OUTPUTS``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING

from flowreel.engine.config import SinkConfig
from flowreel.engine.errors import UnknownOutputError
from flowreel.engine.files import PathLike

if TYPE_CHECKING:
    from flowreel.engine.protocols import Sink


@dataclass(frozen=True)
class Output:
    """One line of the table. The module is imported when the first such output is opened."""

    suffix: str  # how the output's name ends, lower case; the first line that fits wins
    form: str  # how a user writes it
    meaning: str  # one phrase for --help
    module: str
    factory: str  # called as factory(path, config)
    reads: tuple[str, ...] = ()  # SinkConfig fields that affect it, besides those that affect every output
    prefix: tuple[str, ...] = ("",)  # how the file name may begin, where the suffix alone is ambiguous

    def fits(self, name: str) -> bool:
        return name.lower().endswith(self.suffix) and name.rpartition("/")[2].startswith(self.prefix)


_PAIRS = "two-stream pairs: x and y as 8-bit grey pictures"
_STORE = ("max_error", "codec")
_VIDEO = ("max_flow", "encoder")

OUTPUTS = (
    Output(".zarr", "X.zarr", "compressed flow store, Zarr v3", "flowreel.sinks.zarr_store", "ZarrSink", _STORE),
    Output(".mp4", "X.mp4", "colour video, H.264", "flowreel.sinks.video", "ColorVideoSink", _VIDEO),
    Output(".mkv", "X.mkv", "colour video, H.264", "flowreel.sinks.video", "ColorVideoSink", _VIDEO),
    Output(".flo", "DIR/%06d.flo", "one Middlebury .flo a flow", "flowreel.sinks.flo", "FloSink"),
    Output(".kitti.png", "DIR/%06d.kitti.png", "one 16-bit KITTI picture a flow", "flowreel.sinks.kitti", "KittiSink"),
    Output(".npz", "DIR/%06d.npz", "one NumPy .npz a flow", "flowreel.sinks.npz", "NpzSink"),
    Output(".jpg", "DIR/flow_x_%05d.jpg", f"{_PAIRS}, JPEG", "flowreel.sinks.two_stream", "TwoStreamSink", ("bound",)),
    Output(
        ".png",
        "DIR/flow_x_%05d.png",
        f"{_PAIRS}, PNG",
        "flowreel.sinks.two_stream",
        "TwoStreamSink",
        ("bound",),
        prefix=("flow_x_", "flow_y_"),  # the second is refused: it comes beside the first
    ),
    Output(
        ".png",
        "DIR/%06d.png",
        "one colour picture a flow",
        "flowreel.sinks.color_png",
        "ColorPngSink",
        ("max_flow",),
    ),
)


def find_output(name: str) -> Output:
    """The format an output's name asks for. Raises UnknownOutputError listing the known forms."""
    for output in OUTPUTS:
        if output.fits(name.rstrip("/")):
            return output
    known = ", ".join(output.form for output in OUTPUTS)
    raise UnknownOutputError(f"no output format goes by the name {name!r}: expected one of {known}")


def open_sink(name: PathLike, config: SinkConfig) -> Sink:
    """A sink for the output ``name``, whose ending selects the format. Nothing is written before its ``open``.

    Raises:
        UnknownOutputError: no format has that name.
    """
    path = os.fspath(name)
    output = find_output(path)
    sink: Sink = getattr(import_module(output.module), output.factory)(path, config)
    return sink


def known_outputs() -> tuple[tuple[str, str], ...]:
    """Every form an output's name may take, with what it means: for ``--help``."""
    return tuple((output.form, output.meaning) for output in OUTPUTS)


def options_read(name: PathLike) -> tuple[str, ...]:
    """The SinkConfig fields that affect this output, besides those that affect every output."""
    return find_output(os.fspath(name)).reads


def without_effect(names: Iterable[PathLike], config: SinkConfig) -> list[str]:
    """A sentence for each option that is not at its default and that none of these outputs reads."""
    read = {option for name in names for option in options_read(name)}
    told = []
    for option in fields(config):
        forms = [output.form for output in OUTPUTS if option.name in output.reads]
        if forms and option.name not in read and getattr(config, option.name) != option.default:
            told.append(f"{option.name.replace('_', '-')} has no effect here: it is for {', '.join(forms)}")
    return told
