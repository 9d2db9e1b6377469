"""What all outputs of one numbered file per flow share. A format only says how one flow becomes bytes.

    batch -> its flows -> encode and write, in parallel -> at the end, give all files their names, in order

Until the last file is written each is named like ``000012.flo.partial``, so that a folder never holds part of a run, or
parts of two. What the readers of such files share is at the end of this module.
"""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from flowreel.engine.claims import Claim
from flowreel.engine.data import is_known
from flowreel.engine.errors import (
    FlowFileError,
    OutputExistsError,
    SourceNotFoundError,
    UnknownOutputError,
    concerning,
    counted,
)
from flowreel.engine.files import PathLike
from flowreel.engine.publish import (
    claimed_file,
    drop_unfinished,
    give_names,
    make_folder,
    partial_path,
    sync_folder,
    write_errors,
    write_unfinished,
)
from flowreel.sinks.parallel import OrderedPool, file_workers

if TYPE_CHECKING:
    import numpy.typing as npt

    from flowreel.engine.config import SinkConfig
    from flowreel.engine.data import BoolArray, Float32Array, FlowBatch, FlowInfo


Piece = bytes | memoryview  # of a file's contents; a view spares a copy

LONGEST_SIDE = 99_999  # pixels; Middlebury's own reader has the same limit
MOST_PIXELS = 1 << 27  # of a compressed file, 1 GiB of flow: a small file can claim any size, and video is below this

_NUMBER = re.compile(r"%(0*)(\d{0,3})d")  # no file system takes names of a thousand digits


class NumberedName:
    """A pattern such as ``DIR/%06d.flo``: the name of each flow's file, and which files exist.

    Raises:
        UnknownOutputError: the file name does not have exactly one number such as ``%06d``; ``example`` has one.
    """

    def __init__(self, path: str, example: str) -> None:
        self.folder = Path(path).parent
        name = Path(path).name
        number = _NUMBER.search(name)
        if number is None or _NUMBER.search(name, number.end()):
            raise UnknownOutputError(f"expected a name with one number, such as {example}, got {path!r}")
        self._before, self._after = name[: number.start()], name[number.end() :]
        self._digits = int(number[2] or 1)
        self._fill = "0" if number[1] else " "

    def file(self, number: int) -> Path:
        return self.folder / f"{self._before}{str(number).rjust(self._digits, self._fill)}{self._after}"

    def files(self) -> list[Path]:
        """The files in ``present``, ordered by number."""
        return [file for _, file in sorted(self.present().items())]

    def present(self) -> dict[int, Path]:
        """The files of this pattern that are in the folder, by number."""
        pattern = re.compile(rf"{re.escape(self._before)}( *\d+){re.escape(self._after)}")
        matches = ((pattern.fullmatch(file.name), file) for file in self.folder.iterdir())
        numbered = ((int(match[1]), file) for match, file in matches if match)
        return {number: file for number, file in numbered if file == self.file(number)}


@dataclass(frozen=True)
class SingleFlow:
    """One flow of a batch, with the frames and times it belongs to."""

    flow: Float32Array  # (H, W, 2), pixels, x (right) then y (down); a view that is not contiguous
    frame: int  # number of the pair's first frame in the source
    frame_to: int  # of the second
    timestamp_s: float  # presentation time of the first frame, seconds
    timestamp_to_s: float


@dataclass(frozen=True)
class FlowFiles:
    """The bytes of one flow's file or files, and how many vectors could not be kept."""

    contents: tuple[Sequence[Piece], ...]  # of each file in turn
    lost: Mapping[str, int] = field(default_factory=dict)  # what became of them, as in "12 vectors are ..."


class NumberedFilesSink(ABC):
    """One file per flow under a pattern such as ``DIR/%06d.flo``, numbered from 0 by the flow's place in the output.

    A format defines ``example``, ``encode`` and, where a flow becomes several files, their patterns ``beside`` the
    first. Of one flow's files the first one gets its name last: where it exists, the others do.

    Flows are encoded and written by a small thread pool, as a disk takes several files faster together than one after
    another: after ``write`` a few may still be in progress, after ``commit`` and ``abort`` none is. Files already
    written survive an abort, under their unfinished names. With ``overwrite`` existing files stay until ``commit``,
    which removes all files of that pattern: the folder then holds this run's and no others. From ``open`` on,
    ``.%06d.flo.partial`` is locked: one run at a time.

    Raises:
        UnknownOutputError: the file name does not have exactly one number such as ``%06d``.
    """

    example: ClassVar[str]  # a valid name, for messages

    def __init__(self, path: str, config: SinkConfig, *beside: str) -> None:
        self.path = path
        self.bytes_written = 0
        self._overwrite = config.overwrite
        self._folder = Path(path).parent
        self._names = [NumberedName(each, self.example) for each in (path, *beside)]
        self._unfinished = [NumberedName(each + ".partial", self.example) for each in (path, *beside)]
        self._claim: Claim | None = None
        self._pool = OrderedPool(self._keep, 0)  # until ``open``
        self._size = (0, 0)
        self._came: list[int] = []  # numbers of the flows received, in order
        self._written: list[int] = []  # the first of those: their files are whole
        self._lost: dict[str, tuple[int, int]] = {}  # what became of them -> (vectors, first frame)
        self._notes: list[str] = []

    @abstractmethod
    def encode(self, flow: SingleFlow) -> FlowFiles:
        """The bytes of one flow's files. May run in several threads at once: it must not change ``self``."""

    def open(self, info: FlowInfo) -> None:
        """Creates the folder.

        Raises OutputExistsError when files of this pattern exist already, or a folder of such a name, and
        OutputBusyError while another run writes such files.
        """
        self._size = (info.height, info.width)
        self._pool = OrderedPool(self._keep, file_workers(info.device))
        with write_errors(self._folder):
            make_folder(self._folder)
            self._claim = claimed_file(self._folder / f".{Path(self.path).name}.partial", self.path)
            try:
                self._require_possible()
            except BaseException:
                self._claim.withdraw()
                raise

    def _require_possible(self) -> None:
        present = self.files()
        for file in (*present, *(file for name in self._unfinished for file in name.files())):
            if file.is_dir():
                raise OutputExistsError(f"{file} is a folder: choose another place, or remove it yourself if it can go")
        if present and not self._overwrite:
            raise OutputExistsError(
                f"{self._folder} already holds {counted(len(present), 'file')} such as {present[0].name}: "
                "pass --overwrite to replace them, or choose another folder"
            )

    def files(self) -> list[Path]:
        """The finished files, of this run or another."""
        return [file for name in self._names for file in name.files()] if self._folder.is_dir() else []

    def holds(self, flows: int, *, or_unfinished: bool = False) -> bool:
        """See ``OneFileAFlow``. They are of one run, as two runs' never have their names at once."""
        if not self._folder.is_dir():
            return False
        kinds = (self._names, self._unfinished) if or_unfinished else (self._names,)
        each = (sorted(number for name in names for number in name.present()) for names in zip(*kinds, strict=True))
        return all(numbers == [*range(flows)] for numbers in each)

    def write(self, batch: FlowBatch) -> None:
        """Submits each flow to be encoded and written. Raises the error of an earlier one, too."""
        if tuple(batch.flow.shape[2:]) != self._size:
            raise ValueError(f"opened for flow of (H, W) {self._size}, got {tuple(batch.flow.shape[2:])}")
        if batch.flow.device.type != "cpu":
            raise ValueError(f"a sink takes flow on the CPU, got {batch.flow.device}")
        flows = batch.flow.detach().permute(0, 2, 3, 1).numpy()  # (N, H, W, 2), a view that keeps the batch alive
        for place, flow in enumerate(flows):
            single = SingleFlow(
                flow,
                int(batch.frame[place]),
                int(batch.frame_to[place]),
                float(batch.timestamp_s[place]),
                float(batch.timestamp_to_s[place]),
            )
            self.submit(batch.index + place, single.frame, self.encode, single, nbytes=flow.nbytes)

    def submit(
        self, number: int, frame: int, encode: Callable[..., FlowFiles], *arguments: object, nbytes: int
    ) -> None:
        """Submits one flow's files to be encoded and written. ``nbytes``: memory that is held until then."""
        self._came.append(number)
        self._pool.submit(self._write_one, number, frame, encode, *arguments, nbytes=nbytes)

    def commit(self, complete: bool = True) -> None:
        """Gives all files their names; those of an earlier run are removed. Incomplete, they stay unfinished."""
        self._pool.drain()
        self._pool.close()
        assert self._claim is not None, "open comes before commit"
        if complete:
            with write_errors(self._folder):
                self._publish()
        else:
            self._notes += [f"incomplete: {self._kept()}"] if self._written else []
        self._claim.withdraw()

    def abort(self) -> str | None:
        """Leaves the files written so far under their unfinished names: each is whole, and so are all before it."""
        self._pool.close()
        if self._claim is None or not self._claim.held:
            return None
        self._drop_others()
        self._claim.withdraw()
        return self._kept() if self._written else None

    def _drop_others(self) -> None:
        """Removes files of flows that overtook an earlier flow whose file will never be written."""
        others = self._came[len(self._written) :]
        drop_unfinished(name.file(number) for number in others for name in self._names)

    def _kept(self) -> str:
        count, first = len(self._written) * len(self._names), self._names[0].file(self._written[0])
        example = next((file.name for file in (partial_path(first), first) if file.exists()), first.name)
        return f"{self._folder} keeps {counted(count, 'whole file')} such as {example}"

    def _publish(self) -> None:
        self._require_possible()  # something may have appeared during the run
        former = self.files()
        written = set(self._written)
        left = [file for name in self._unfinished for number, file in name.present().items() if number not in written]
        sync_folder(self._folder)  # first make the written files durable
        for file in (*former, *left):  # so that files of two runs never have such names at once
            file.unlink()
        try:
            give_names(self._files())
        except KeyboardInterrupt:  # better to finish, which takes a moment, than to leave a part
            give_names(file for file in self._files() if partial_path(file).exists())
            raise
        sync_folder(self._folder)
        if gone := len(left) + max(0, len(former) - len(self._written) * len(self._names)):
            self._notes.append(f"{self._folder}: removed {counted(gone, 'file')} of a former, longer run")

    def _files(self) -> Iterator[Path]:
        """The files of this run, in the order in which they get their names."""
        return (name.file(number) for number in self._written for name in reversed(self._names))

    @property
    def notes(self) -> list[str]:
        vectors = len(self._written) * self._size[0] * self._size[1]
        return self._notes + [
            f"{self._folder}: {lost} of {vectors} vectors ({100 * lost / vectors:.2g} %) are {what}, "
            f"first in frame {frame}"
            for what, (lost, frame) in self._lost.items()
        ]

    def _write_one(
        self, number: int, frame: int, encode: Callable[..., FlowFiles], *arguments: object
    ) -> tuple[int, int, int, Mapping[str, int]]:
        """Runs in a worker. Returns number, frame, the files' size in bytes, and what could not be kept of the flow."""
        with concerning(frame):
            files = encode(*arguments)
            paths = [name.file(number) for name in self._names]
            return number, frame, write_unfinished(dict(zip(paths, files.contents, strict=True))), files.lost

    def _keep(self, written: tuple[int, int, int, Mapping[str, int]]) -> None:
        """Called in order, so that the first frame with lost vectors is known."""
        number, frame, nbytes, lost = written
        self.bytes_written += nbytes
        self._written.append(number)
        for what, vectors in lost.items():
            if vectors:
                before, first = self._lost.get(what, (0, frame))
                self._lost[what] = (before + vectors, first)


def known_vectors(flow: npt.NDArray[np.floating[Any]]) -> BoolArray:
    """(H, W): which vectors of (H, W, 2) are known."""
    return is_known(flow[..., 0]) & is_known(flow[..., 1])


def require_size(name: str, height: int, width: int) -> None:
    """Raises FlowFileError for an impossible size in pixels; called before memory is allocated for it."""
    if not (1 <= height <= LONGEST_SIDE and 1 <= width <= LONGEST_SIDE and height * width <= MOST_PIXELS):
        raise FlowFileError(
            f"{name}: expected sides of 1 to {LONGEST_SIDE} and at most {MOST_PIXELS} pixels, found {width}x{height}"
        )


@contextmanager
def read_errors(path: PathLike, what: str) -> Iterator[None]:
    """Turns the operating system's errors on reading ``what`` into SourceNotFoundError and FlowFileError.

    Also raises FlowFileError, before anything is opened, for a pipe or device.
    """
    name = os.fspath(path)
    try:
        # Opening a pipe might block forever, and reading a device might never end.
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise FlowFileError(f"{name}: expected a {what}, found something that is not a file")
        yield
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"no {what} at {name}") from error
    except IsADirectoryError as error:
        raise FlowFileError(f"{name}: expected a {what}, found a folder") from error
    except OSError as error:
        raise FlowFileError(f"{name}: cannot be read as a {what} ({error.strerror or error})") from error
