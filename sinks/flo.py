"""Middlebury ``.flo`` files: read to the bit, written whole, and one file a flow as an output of a run.

The format (Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011): the float32 202021.25,
whose bytes spell PIEH; width and height as int32; then u and v of each pixel in turn, row by row from the top, as
float32 pixels. All little-endian. A component beyond 1e9 marks an unknown vector.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowreel.engine.errors import FlowFileError, OutputExistsError, SourceNotFoundError, UnknownOutputError
from flowreel.sinks.publish import atomic_file, make_folder, sync_folder, write_errors

if TYPE_CHECKING:
    import numpy.typing as npt

    from flowreel.engine.config import SinkConfig
    from flowreel.engine.data import FlowBatch, FlowInfo

TAG = b"PIEH"
HEADER_BYTES = 12
LONGEST_SIDE = 99_999  # pixels; Middlebury's own reader draws the line here too
MAPPED_FROM_BYTES = 32 << 20  # larger files are mapped: a slice of a huge field then reads only its own pages

_NUMBER = re.compile(r"%(0?)(\d*)d")


def read_flo(path: str | os.PathLike[str]) -> npt.NDArray[np.float32]:
    """Read a ``.flo`` file.

    Returns:
        (H, W, 2) float32, pixels, x (right) then y (down); unknown vectors as they stand in the file. The array may
        be written to. A file above 32 MiB is mapped copy-on-write: pages are read when touched, and what is written
        to the array stays in memory and never reaches the file.

    Raises:
        SourceNotFoundError: no such file.
        FlowFileError: a wrong tag, an impossible size, or fewer or more bytes than the size asks for.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
            file_bytes = os.fstat(file.fileno()).st_size
            height, width = _read_size(path, header, file_bytes)
            if file_bytes < MAPPED_FROM_BYTES:
                flow = np.fromfile(file, "<f4", count=2 * height * width)
            else:
                flow = np.memmap(file, "<f4", mode="c", offset=HEADER_BYTES, shape=(2 * height * width,))
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"no .flo file at {os.fspath(path)}") from error
    except IsADirectoryError as error:
        raise FlowFileError(f"{os.fspath(path)}: expected a .flo file, found a folder") from error
    return np.asarray(flow, dtype=np.float32).reshape(height, width, 2)


def _read_size(path: str | os.PathLike[str], header: bytes, file_bytes: int) -> tuple[int, int]:
    """Height and width in pixels, once tag, size and length have been found to agree."""
    name = os.fspath(path)
    if len(header) < HEADER_BYTES:
        raise FlowFileError(f"{name}: expected a .flo header of {HEADER_BYTES} bytes, found {len(header)} bytes")
    if header[:4] != TAG:
        hint = " (written on a big-endian machine?)" if header[:4] == TAG[::-1] else ""
        raise FlowFileError(f"{name}: expected a .flo file with the tag {TAG!r}, found {header[:4]!r}{hint}")
    width, height = struct.unpack("<ii", header[4:])
    if not (1 <= width <= LONGEST_SIDE and 1 <= height <= LONGEST_SIDE):
        raise FlowFileError(f"{name}: expected sides of 1 to {LONGEST_SIDE} pixels, found {width}x{height}")
    expected = flo_bytes(height, width)
    if file_bytes != expected:
        trouble = "cut short" if file_bytes < expected else "followed by bytes that do not belong to it"
        raise FlowFileError(
            f"{name}: expected {expected} bytes for {width}x{height} pixels, found {file_bytes}: it is {trouble}"
        )
    return height, width


def flo_bytes(height: int, width: int) -> int:
    """Bytes of the ``.flo`` file of a flow field of this size."""
    return HEADER_BYTES + 8 * height * width


def write_flo(path: str | os.PathLike[str], flow: npt.NDArray[np.floating[Any]]) -> None:
    """Write flow as a ``.flo`` file, which appears whole or not at all and replaces one of that name.

    Args:
        path: missing parent folders are created.
        flow: (H, W, 2) of any float dtype, pixels, x (right) then y (down); stored as float32.

    Raises:
        ValueError: another shape, or a dtype that is not a float.
        OutputWriteError: the file cannot be written.
    """
    if flow.ndim != 3 or flow.shape[2] != 2 or not all(1 <= side <= LONGEST_SIDE for side in flow.shape[:2]):
        raise ValueError(f"flow is (H, W, 2) with sides of 1 to {LONGEST_SIDE}, got {flow.shape}")
    if not np.issubdtype(flow.dtype, np.floating):
        raise ValueError(f"flow is of a float dtype, got {flow.dtype}")
    height, width = flow.shape[:2]
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and so stays unknown
        vectors = np.ascontiguousarray(flow, dtype="<f4")
    with write_errors(Path(path)), atomic_file(Path(path)) as file:
        file.write(TAG + struct.pack("<ii", width, height))
        file.write(vectors.data)


class FloSink:
    """One ``.flo`` file a flow: ``DIR/%06d.flo``, numbered from 0 by the flow's place in the output.

    Each file is published by itself as soon as it is written, so every file that is there is whole. Finished files
    therefore outlive an abort; ``notes`` says how many. With ``overwrite``, files of a former, longer run under the
    same pattern are removed at ``commit``: the folder then holds this run and nothing else of that pattern.

    Raises:
        UnknownOutputError: the file name does not have exactly one number such as ``%06d``.
    """

    def __init__(self, path: str, config: SinkConfig) -> None:
        self._path = path
        self._overwrite = config.overwrite
        self._folder = Path(path).parent
        name = Path(path).name
        number = _NUMBER.search(name)
        if number is None or _NUMBER.search(name, number.end()):
            raise UnknownOutputError(f"expected a name with one number, such as flows/%06d.flo, got {path!r}")
        self._before, self._after = name[: number.start()], name[number.end() :]
        self._digits = int(number[2] or 1)
        self._fill = "0" if number[1] else " "
        self._size = (0, 0)
        self._written = 0  # files
        self._bytes = 0
        self._notes: list[str] = []

    def open(self, info: FlowInfo) -> None:
        """Creates the folder. Raises OutputExistsError when files of this pattern are there already."""
        self._size = (info.height, info.width)
        with write_errors(self._folder):
            make_folder(self._folder)
            present = self._present()
        if present and not self._overwrite:
            raise OutputExistsError(
                f"{self._folder} already holds {len(present)} files such as {present[min(present)].name}: "
                "pass --overwrite to replace them, or choose another folder"
            )

    def write(self, batch: FlowBatch) -> None:
        """Publishes one file a flow."""
        if tuple(batch.flow.shape[2:]) != self._size:
            raise ValueError(f"opened for flow of (H, W) {self._size}, got {tuple(batch.flow.shape[2:])}")
        for place, flow in enumerate(batch.flow):
            write_flo(self._file(batch.index + place), flow.permute(1, 2, 0).numpy())
            self._written = max(self._written, batch.index + place + 1)
            self._bytes += flo_bytes(*self._size)

    def commit(self, complete: bool = True) -> None:
        """All files are published already. A complete run that overwrites removes what a longer one left behind."""
        if not complete:
            self._notes.append(f"{self._folder}: the run is incomplete; its {self._written} .flo files are whole")
            return
        with write_errors(self._folder):
            stale = [file for number, file in self._present().items() if number >= self._written]
            for file in stale:
                file.unlink()
            if stale:
                sync_folder(self._folder)
                self._notes.append(f"{self._folder}: removed {len(stale)} files of a former, longer run")

    def abort(self) -> None:
        """Leaves the finished files: each is of use by itself."""
        if self._written:
            self._notes.append(f"{self._folder}: {self._written} finished .flo files were kept")

    @property
    def path(self) -> str:
        return self._path

    @property
    def bytes_written(self) -> int:
        return self._bytes

    @property
    def notes(self) -> list[str]:
        return list(self._notes)

    def _file(self, number: int) -> Path:
        return self._folder / f"{self._before}{str(number).rjust(self._digits, self._fill)}{self._after}"

    def _present(self) -> dict[int, Path]:
        """The files of this pattern that are in the folder, by number."""
        pattern = re.compile(rf"{re.escape(self._before)}( *\d+){re.escape(self._after)}")
        matches = ((pattern.fullmatch(file.name), file) for file in self._folder.iterdir())
        numbered = {int(match[1]): file for match, file in matches if match}
        return {number: file for number, file in numbered.items() if file == self._file(number)}
