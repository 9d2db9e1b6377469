"""NumPy's ``.npz``: one compressed archive per flow, with its frames and times, and a reader that trusts no header.

An ``.npz`` is a zip of ``.npy`` files: the magic bytes, a version, the length of a header, the header as a Python
dict (``descr``, ``fortran_order``, ``shape``), then the values.
"""

from __future__ import annotations

import ast
import io
import math
import os
import re
import struct
import zipfile
import zlib
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flowreel.engine.config import MOST_FRAMES
from flowreel.engine.errors import FlowFileError
from flowreel.engine.files import PathLike
from flowreel.sinks.numbered import (
    FlowFiles,
    NumberedFilesSink,
    SingleFlow,
    read_errors,
    require_size,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from flowreel.engine.data import Array, Float32Array

BESIDE = ("frame", "frame_to", "timestamp_s", "timestamp_to_s")  # entries of the archive next to the flow
NPY_MAGIC = b"\x93NUMPY"
HEADER_BYTES = 1024  # of an .npy, at most; NumPy's own for three dimensions take 128
FLOAT = re.compile(r"[<>=|]?f[248]")
READ_BYTES = 1 << 20  # at a time
SHOWN = 200  # characters quoted from the file in a message: an entry's name may have 65535
DEFLATE_MOST = 1032  # bytes that one compressed byte can expand to
ENCRYPTED = 0x1  # flag of a zip's entry

# What zipfile and zlib raise for a damaged archive, or for one of a kind they do not support.
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError, RuntimeError)


def read_flow_npz(path: PathLike) -> Float32Array:
    """Read the flow in an ``.npz``: the array ``flow``, or else the only one of its kind, whatever its name.

    The header is checked before memory is allocated for what it claims, and nothing in the file is unpickled.

    Returns:
        (H, W, 2) float32, pixels, x (right) then y (down); unknown vectors as stored. An array stored as
        (2, H, W), or as float16 or float64, is converted.

    Raises:
        SourceNotFoundError: no such file.
        FlowFileError: not an ``.npz``, no array that can be flow or several, an impossible size, or damaged.
    """
    name = os.fspath(path)
    with read_errors(path, ".npz file"), open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entry, array = _find_flow(name, archive, os.fstat(file.fileno()).st_size)
                values = _read_values(archive, entry, array)
        except FlowFileError:
            raise
        except _BROKEN as error:
            reason = str(error)[:SHOWN]
            raise FlowFileError(f"{name}: expected an .npz file, found a damaged one or none ({reason})") from error
    flow = values.reshape(array.shape, order="F" if array.fortran_order else "C")
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, and so stay unknown
        return np.ascontiguousarray(flow if array.is_interleaved else flow.transpose(1, 2, 0), np.float32)


def read_npz_times(path: PathLike) -> tuple[int, int, float, float] | None:
    """The pair's frame numbers and times in seconds that an ``.npz`` of ours holds; None unless all four are there, and
    the numbers are whole.

    Raises SourceNotFoundError or FlowFileError, as ``read_flow_npz`` does.
    """
    name = os.fspath(path)
    with read_errors(path, ".npz file"), open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                frame, frame_to, timestamp_s, timestamp_to_s = (_scalar(archive, field) for field in BESIDE)
        except _BROKEN as error:
            raise FlowFileError(f"{name}: its times are damaged ({str(error)[:SHOWN]})") from error
    if frame is None or frame_to is None or timestamp_s is None or timestamp_to_s is None:
        return None
    if not all(0 <= number <= MOST_FRAMES and number.is_integer() for number in (frame, frame_to)):
        return None
    return int(frame), int(frame_to), timestamp_s, timestamp_to_s


class NpzSink(NumberedFilesSink):
    """One ``.npz`` per flow: ``DIR/%06d.npz`` with ``flow`` and the pair's frames and times. See ``NumberedFilesSink``.

    Unknown vectors are stored as they are.
    """

    example = "flows/%06d.npz"

    def encode(self, flow: SingleFlow) -> FlowFiles:
        beside = {name: getattr(flow, name) for name in BESIDE}
        return FlowFiles(((_archive(flow.flow, beside),),))


def _archive(flow: npt.NDArray[np.floating[Any]], beside: dict[str, float]) -> bytes:
    """The bytes of the ``.npz``: equal for equal flow, as NumPy dates every entry 1980."""
    scalars = {name: np.array(value, np.float64 if "time" in name else np.int64) for name, value in beside.items()}
    file = io.BytesIO()
    with np.errstate(over="ignore"):
        np.savez_compressed(file, flow=np.ascontiguousarray(flow, np.float32), **scalars)  # type: ignore[arg-type]
    return file.getvalue()  # not getbuffer(): see two_stream.py


class _Array(NamedTuple):
    """The header of an ``.npy``, once found to be of flow."""

    dtype: np.dtype[Any]
    shape: tuple[int, int, int]
    fortran_order: bool
    begins: int  # byte of the entry where the values begin

    @property
    def is_interleaved(self) -> bool:
        """(H, W, 2), which is preferred to (2, H, W) where both are possible."""
        return self.shape[2] == 2

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _find_flow(name: str, archive: zipfile.ZipFile, file_bytes: int) -> tuple[zipfile.ZipInfo, _Array]:
    """The entry that holds the flow, and its header, once its size has been checked against the archive."""
    entries = archive.infolist()
    entries = [entry for entry in entries if entry.filename == "flow.npy"] or entries
    read = [(entry, _read_header(archive, entry)) for entry in entries]
    arrays = [(entry, array) for entry, array in read if array is not None]
    if len(arrays) != 1:
        names = ", ".join(entry.filename[:SHOWN] for entry in entries[:5]) or "nothing"
        raise FlowFileError(
            f"{name}: expected one float array of (H, W, 2) or (2, H, W), found {len(arrays)} among {names}"
        )
    entry, array = arrays[0]
    height, width = array.shape[:2] if array.is_interleaved else array.shape[1:]
    require_size(name, height, width)
    packed = min(entry.compress_size, file_bytes)
    most = packed * (DEFLATE_MOST if entry.compress_type == zipfile.ZIP_DEFLATED else 1)
    if entry.file_size != array.begins + array.nbytes or entry.file_size > most:
        raise FlowFileError(
            f"{name}: {entry.filename[:SHOWN]} says that it holds {width}x{height} vectors, {array.nbytes} bytes, "
            f"but {packed} bytes are there, for {entry.file_size} in all"
        )
    return entry, array


def _read_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> _Array | None:
    """The header of an entry of the archive; None when that is not an array of flow."""
    # Other compression methods can expand without bound, and NumPy does not use them.
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & ENCRYPTED:
        return None
    with archive.open(entry) as file:
        start = _read_up_to(file, HEADER_BYTES)
    length_bytes = 2 if start[6:7] == b"\1" else 4
    begins = 8 + length_bytes + int.from_bytes(start[8 : 8 + length_bytes], "little")
    if not start.startswith(NPY_MAGIC) or begins > len(start):
        return None
    try:
        header = ast.literal_eval(start[8 + length_bytes : begins].decode("latin-1").strip())
        dtype, order, shape = header["descr"], header["fortran_order"], header["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        return None
    is_shape = isinstance(shape, tuple) and len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)
    if not FLOAT.fullmatch(str(dtype)) or not is_shape or 2 not in (shape[0], shape[2]):
        return None
    return _Array(np.dtype(dtype), shape, bool(order), begins)


def _scalar(archive: zipfile.ZipFile, name: str) -> float | None:
    """The single number under this name; None where there is none, or something else."""
    if f"{name}.npy" not in archive.namelist():
        return None
    entry = archive.getinfo(f"{name}.npy")
    if entry.file_size > HEADER_BYTES or entry.flag_bits & ENCRYPTED:
        return None
    file = io.BytesIO(archive.read(entry))
    if np.lib.format.read_magic(file) != (1, 0):
        return None
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if shape != () or dtype.kind not in "iuf":
        return None
    value = np.frombuffer(file.read(), dtype, 1)[0]
    return float(value) if np.isfinite(value) else None


def _read_values(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, array: _Array) -> Array:
    """The values of an entry, flat. Its size has been checked; reading to its end checks its checksum."""
    values = np.empty(math.prod(array.shape), array.dtype)
    room, filled = values.view(np.uint8), 0
    with archive.open(entry) as file:
        _read_up_to(file, array.begins)
        while block := file.read(READ_BYTES):
            room[filled : filled + len(block)] = np.frombuffer(block, np.uint8)
            filled += len(block)
    if filled != len(room):
        raise EOFError(f"{entry.filename} ends {len(room) - filled} bytes early")
    return values


def _read_up_to(file: IO[bytes], most_bytes: int) -> bytes:
    """The next bytes, fewer only where the file ends: one read of a zip's entry may give less."""
    pieces: list[bytes] = []
    while (left := most_bytes - sum(map(len, pieces))) and (piece := file.read(left)):
        pieces.append(piece)
    return b"".join(pieces)
