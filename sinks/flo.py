"""Middlebury ``.flo`` files: a bit-exact reader, an atomic writer, and an output of one file per flow.

The format (Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011): the float32 202021.25,
whose bytes spell PIEH; width and height as int32; then u and v of each pixel in turn, row by row from the top, as
float32 pixels. All little-endian. A component beyond 1e9 marks an unknown vector.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowreel.engine.data import UNKNOWN
from flowreel.engine.errors import FlowFileError, OutputWriteError
from flowreel.engine.files import PathLike
from flowreel.engine.publish import atomic_file, write_errors
from flowreel.sinks.numbered import (
    LONGEST_SIDE,
    FlowFiles,
    NumberedFilesSink,
    SingleFlow,
    read_errors,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

TAG = b"PIEH"
HEADER_BYTES = 12
MAPPED_FROM_BYTES = 32 << 20  # larger files are memory-mapped: a slice of a huge field then reads only its pages


def read_flo(path: PathLike) -> npt.NDArray[np.float32]:
    """Read a ``.flo`` file.

    Returns:
        (H, W, 2) float32, pixels, x (right) then y (down); unknown vectors as stored. The array is
        writable. A file above 32 MiB is mapped copy-on-write: pages are read when touched, and changes to the array
        stay in memory and never reach the file.

    Raises:
        SourceNotFoundError: no such file.
        FlowFileError: a wrong tag, an impossible size, or fewer or more bytes than the size requires.
    """
    with read_errors(path, ".flo file"), open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        file_bytes = os.fstat(file.fileno()).st_size
        height, width = _read_size(path, header, file_bytes)
        if file_bytes < MAPPED_FROM_BYTES:
            flow = np.fromfile(file, "<f4", count=2 * height * width)
        else:
            flow = np.memmap(file, "<f4", mode="c", offset=HEADER_BYTES, shape=(2 * height * width,))
    return np.asarray(flow, dtype=np.float32).reshape(height, width, 2)


def _read_size(path: PathLike, header: bytes, file_bytes: int) -> tuple[int, int]:
    """Height and width in pixels, after checking that tag, size and file length agree."""
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


def write_flo(path: PathLike, flow: npt.ArrayLike | Tensor) -> None:
    """Write flow as a ``.flo`` file, atomically; a file of that name is replaced.

    Args:
        path: missing parent folders are created.
        flow: (H, W, 2) of any float dtype, an array or a tensor, pixels, x (right) then y (down); stored as float32.
            Masked elements of a masked array become 1e10, which marks them as unknown.

    Raises:
        ValueError: another shape, or a dtype that is not a float.
        OutputWriteError: the file cannot be written.
    """
    if hasattr(flow, "detach"):  # a tensor, recognised without importing torch
        flow = flow.detach().cpu()
        flow = flow.float() if flow.element_size() == 2 else flow  # NumPy has no bfloat16
    vectors = np.asarray(flow)
    if vectors.ndim != 3 or vectors.shape[2] != 2 or not all(1 <= side <= LONGEST_SIDE for side in vectors.shape[:2]):
        raise ValueError(f"flow is (H, W, 2) with sides of 1 to {LONGEST_SIDE}, got {vectors.shape}")
    if not np.issubdtype(vectors.dtype, np.floating):
        raise ValueError(f"flow is of a float dtype, got {vectors.dtype}")
    if isinstance(flow, np.ma.MaskedArray):
        vectors = np.where(np.ma.getmaskarray(flow), UNKNOWN, vectors.astype(np.float64))  # float16 cannot hold 1e10
    if not Path(path).name:
        raise OutputWriteError(f"cannot write {path!r}: it is a folder")
    with write_errors(Path(path)), atomic_file(Path(path)) as file:
        file.writelines(_pieces(vectors))


def _pieces(flow: npt.NDArray[np.floating[Any]]) -> tuple[bytes, memoryview]:
    """The file's header and its vectors."""
    height, width = flow.shape[:2]
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, and so stay unknown
        vectors = np.ascontiguousarray(flow, dtype="<f4")
    return TAG + struct.pack("<ii", width, height), vectors.data


class FloSink(NumberedFilesSink):
    """One ``.flo`` file per flow: ``DIR/%06d.flo``. See ``NumberedFilesSink``.

    Bit-exact, except that a vector with a NaN or infinite component becomes 1e10 in both, since not all readers of
    ``.flo`` check for NaN.
    """

    example = "flows/%06d.flo"

    def encode(self, flow: SingleFlow) -> FlowFiles:
        finite = np.isfinite(flow.flow).all(axis=-1, keepdims=True)
        return FlowFiles((_pieces(flow.flow if finite.all() else np.where(finite, flow.flow, UNKNOWN)),))
