"""Opens stored flow by name, whatever its form: a store or a slice of one, a folder, glob or list of flow files.

Each kind of file is one line in ``FLOW_FILES``; its reader is imported when the first such file is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowreel.engine.config import SinkConfig
from flowreel.engine.errors import FlowFileError, SourceNotFoundError, StoreError, UsageError
from flowreel.engine.files import PathLike, as_glob, as_names, leads_nowhere, matches, natural_order
from flowreel.engine.protocols import FlowReader
from flowreel.sinks.flow_readers import FileFlows, StoreFlows
from flowreel.sinks.store_reader import open_store

if TYPE_CHECKING:
    import numpy.typing as npt

SLOWEST, FASTEST = Fraction(1, 100_000), Fraction(1_000_000)  # frames per second: one a day, a burst


@dataclass(frozen=True)
class FlowFile:
    """One kind of flow file: the names it has, and the function that reads it."""

    form: str  # how a user writes it
    name: str  # regular expression of the lower-case file name; the first line that fits wins
    module: str
    function: str  # function(path) -> (H, W, 2) float32 pixels, or a tuple that begins with it; unknown: NaN or > 1e9
    takes_bound: bool = False  # function(path, bound), bound in pixels
    times: str | None = None  # function(path) -> (frame, frame_to, timestamp_s, timestamp_to_s), or None


FLOW_FILES = (
    FlowFile("X.flo", r".*\.flo", "flowreel.sinks.flo", "read_flo"),
    FlowFile("X.kitti.png", r".*\.kitti\.png", "flowreel.sinks.kitti", "read_kitti"),
    FlowFile("X.npz", r".*\.npz", "flowreel.sinks.npz", "read_flow_npz", times="read_npz_times"),
    FlowFile("flow_x_N.jpg", r"flow_x_[^.]*\.(jpe?g|png)", "flowreel.sinks.two_stream", "read_two_stream", True),
)
# KITTI's own files are named 000000_10.png, like any picture: read as flow only where no other kind is found.
PLAIN_PNG = FlowFile("X.png as KITTI writes it", r".*\.png", "flowreel.sinks.kitti", "read_kitti")

_SECOND_HALF = re.compile(r"flow_y_[^.]*\.(jpe?g|png)")  # read along with the x picture
_SLICE = re.compile(r"(?P<store>.+?)/?@(?P<part>-?\d+|(-?\d+)?:(-?\d+)?)", re.DOTALL)


def open_flows(
    name_or_names: PathLike | Iterable[PathLike],
    *,
    frame_rate: Fraction | float | str | None = None,
    bound: float = SinkConfig.bound,
    start: int | None = None,
    stop: int | None = None,
    one_size: bool = True,
) -> FlowReader:
    """Opens stored flow for reading in order, a few fields at a time.

    Args:
        name_or_names: a store ``X.zarr`` or an unfinished ``X.zarr.partial`` (the flows it has so far, with a
            note); a part of a store, ``X.zarr@a:b`` (flows a to b-1, as Python slices) or ``X.zarr@a`` (one flow),
            unless a file has exactly that name; a folder, a glob, a single file or a list of flow files, all of one
            kind, read in natural order: frame2 before frame10.
        frame_rate: frames per second of files without times; None: 25, with a note. Stores keep theirs, as do ``.npz``
            files that hold any.
        bound: displacement in pixels that the darkest and lightest grey of two-stream pictures stand for.
        start, stop: flow numbers within what the name gives, as a Python slice.
        one_size: whether files of different sizes raise FrameSizeError. If not, a batch never mixes sizes.

    Raises:
        SourceNotFoundError, StoreNotFoundError: nothing by that name, or no flow file in the folder.
        FlowFileError: a file that is not what its name says, or files of several kinds or of an unknown kind.
        DamagedStoreError, StoreError: a store that cannot be read, or that holds no flow yet.
        UsageError: an empty slice, or an invalid frame rate.
    """
    rate = None if frame_rate is None else frame_rate_of(frame_rate)
    names = as_names(name_or_names)
    name = names[0] if len(names) == 1 else f"the {len(names)} files given"
    if len(names) == 1:
        store_name, part = _store_and_part(name)
        if store_name is not None:
            store = open_store(store_name)
            if store.layout.cache and not store.complete:
                raise StoreError(
                    f"{store.path} is a cache with {store.stored} of {len(store)} flows in it: only a full one can be "
                    "exported; reading flowreel.open(SOURCE, cache=...) through fills it"
                )
            return StoreFlows(store, _numbers(store.available, name, part, slice(start, stop)))
        found, strict = _find(name)
    else:
        found, strict = _listed(names), True
    kind, paths = _of_one_kind(name, found, strict)
    numbers = _numbers(len(paths), name, slice(start, stop))
    times = None if kind.times is None else getattr(import_module(kind.module), kind.times)
    flows = FileFlows(paths, numbers, _reader(kind, bound), times, frame_rate=rate, one_size=one_size)
    if not strict and (unfinished := _unfinished({path.parent for path in paths}, kind)):
        files = "a file" if unfinished == 1 else f"{unfinished} files"
        flows.notes.append(f"{name} also holds {files} named .partial, of a run that was not finished")
    return flows


def _store_and_part(name: str) -> tuple[str | None, slice | int]:
    """The store that ``name`` refers to, None if it refers to files, and which of its flows."""
    if is_store(name):
        return name, slice(None)
    match = None if os.path.lexists(name) else _SLICE.fullmatch(name)
    if match is None or not is_store(match["store"]):
        return None, slice(None)
    if ":" not in match["part"]:
        return match["store"], int(match["part"])
    start, stop = (int(number) if number else None for number in match["part"].split(":"))
    return match["store"], slice(start, stop)


def flow_file_kind(name: PathLike) -> FlowFile | None:
    """The kind of flow file that has such a name, None for other names. Both pictures of a flow are of one kind."""
    if _SECOND_HALF.fullmatch(Path(name).name.lower()):
        return _kind(Path(name).with_name("flow_x_0.png"))
    return _kind(Path(name))


def is_store(name: str) -> bool:
    """Whether a path refers to a flow store, existing or not, rather than to a file or a folder of files."""
    named_so = name.rstrip("/").lower().endswith((".zarr", ".zarr.partial"))
    return named_so or Path(name, "zarr.json").is_file()


def _numbers(count: int, name: str, *parts: slice | int) -> range:
    """The selected flows out of ``count``; each part is relative to the selection before it. Never empty."""
    if count == 0:
        raise StoreError(f"{name} holds no flow yet")
    numbers = range(count)
    for part in parts:
        if isinstance(part, int):
            if not -len(numbers) <= part < len(numbers):
                raise UsageError(f"{name}: there is no flow {part}, only {_counted(count)}")
            part = slice(part % len(numbers), part % len(numbers) + 1)
        numbers = numbers[part]
        if not numbers:
            ends = ("" if end is None else end for end in (part.start, part.stop))
            raise UsageError(f"{name}: no flow lies in {':'.join(map(str, ends))}, there are only {_counted(count)}")
    return numbers


def _counted(count: int) -> str:
    return "one, number 0" if count == 1 else f"{count}, numbered 0 to {count - 1}"


def frame_rate_of(value: Fraction | float | str) -> Fraction:
    """Frames per second as a user gives them. Raises UsageError unless they are from ``SLOWEST`` to ``FASTEST``."""
    try:
        rate = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not SLOWEST <= rate <= FASTEST:
        raise UsageError(
            f"frame-rate must be a number such as 25, 29.97 or 30000/1001, from {SLOWEST} to {FASTEST}, got {value!r}"
        )
    return rate.limit_denominator(1_000_000_000)  # stores keep no more digits


def _find(name: str) -> tuple[list[Path], bool]:
    """The files of a folder or glob, or the single file; and whether it was named explicitly."""
    place = Path(name)
    if place.is_dir():
        found = list(place.iterdir())
    elif os.path.lexists(place):
        return [place], True
    else:
        found = list(map(Path, matches(name)))
        if not found:
            missing = "nothing matches" if as_glob(name) else "nothing is at"
            store = name.rpartition("@")[0]
            hint = f"; of {store} a part is {store}@10:20, or one flow {store}@10" if os.path.isdir(store) else ""
            raise SourceNotFoundError(
                f"{missing} {name}: expected a flow store, or files such as {_known_forms()}{hint}"
            )
    shown = [path for path in found if not path.name.startswith(".")]
    lost = [path for path in shown if _kind(path) in FLOW_FILES and leads_nowhere(path)]
    if lost:  # leaving it out would renumber the others
        raise SourceNotFoundError(f"{min(lost, key=natural_order)} is a link to a file that is not there")
    return [path for path in shown if path.is_file()], False


def _listed(names: list[str]) -> list[Path]:
    """The files of a list. A store, a folder or a glob cannot be among them: the place of its flow would be unclear."""
    if not names:
        raise UsageError("name at least one store, folder or flow file")
    for name in names:
        if Path(name).is_dir():
            raise UsageError(f"{name} is a folder or store: several inputs at once must all be flow files")
        if not Path(name).is_file():
            raise SourceNotFoundError(f"nothing is at {name}: expected a file such as {_known_forms()}")
    return [Path(name) for name in names]


def _of_one_kind(name: str, found: list[Path], strict: bool) -> tuple[FlowFile, list[Path]]:
    """The kind of the files, and the files in natural order. Others are skipped or, if ``strict``, an error."""
    by_kind: dict[FlowFile, list[Path]] = {}
    for path in found:
        kind = None if _SECOND_HALF.fullmatch(path.name.lower()) else _kind(path)
        if kind is not None:
            by_kind.setdefault(kind, []).append(path)
        elif strict and not _SECOND_HALF.fullmatch(path.name.lower()):
            raise FlowFileError(
                f"{path} is not a known kind of flow file: expected {_known_forms()}; "
                "flowreel run computes the flow of a video or of images"
            )
    if not strict and len(by_kind) > 1:
        by_kind.pop(PLAIN_PNG, None)  # pictures beside the flow
    if not by_kind:
        unfinished = _unfinished([Path(name)] if Path(name).is_dir() else [], *FLOW_FILES)
        hint = f"; {unfinished} named .partial are of a run that was not finished" if unfinished else ""
        raise SourceNotFoundError(f"{name}: no flow files there; expected {_known_forms()}{hint}")
    if len(by_kind) > 1:
        kinds = ", ".join(f"{len(paths)} {kind.form}" for kind, paths in by_kind.items())
        raise FlowFileError(f"{name}: files of one kind are expected, found {kinds}: name those that are meant")
    ((kind, paths),) = by_kind.items()
    return kind, sorted(paths, key=natural_order)


def _unfinished(folders: Iterable[Path], *kinds: FlowFile) -> int:
    """How many files of these kinds still have their unfinished names, ``*.partial``."""
    names = (path.name.lower() for folder in folders for path in folder.glob("*.partial") if path.name[0] != ".")
    return sum(any(_fits(kind, name.removesuffix(".partial")) for kind in kinds) for name in names)


def _kind(path: Path) -> FlowFile | None:
    return next((kind for kind in (*FLOW_FILES, PLAIN_PNG) if _fits(kind, path.name.lower())), None)


def _fits(kind: FlowFile, name: str) -> bool:
    return re.fullmatch(kind.name, name, re.DOTALL) is not None  # a file's name may contain a newline


def _reader(kind: FlowFile, bound: float) -> Callable[[Path], npt.NDArray[Any]]:
    function = getattr(import_module(kind.module), kind.function)

    def read(path: Path) -> Any:
        result = function(path, bound) if kind.takes_bound else function(path)
        return result[0] if isinstance(result, tuple) else result

    return read


def _known_forms() -> str:
    return ", ".join(kind.form for kind in FLOW_FILES)
