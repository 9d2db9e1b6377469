"""Two-stream pictures: x and y of each flow as two 8-bit grey pictures, as action recognition trains on them.

The convention of two-stream networks (Simonyan, Zisserman, "Two-Stream Convolutional Networks for Action Recognition
in Videos", NeurIPS 2014; Wang et al., "Temporal Segment Networks", ECCV 2016, and its tools): -bound to bound pixels
become 0 to 255, longer displacements are clipped, and ``flow_x_00000.jpg`` goes with ``flow_y_00000.jpg``.
"""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from flowreel.engine.data import UNKNOWN_ABOVE, UNKNOWN_WORDS
from flowreel.engine.errors import FlowFileError, OutputError, UnknownOutputError, UsageError
from flowreel.engine.files import PathLike
from flowreel.sinks.color_png import png_pieces
from flowreel.sinks.numbered import (
    FlowFiles,
    NumberedFilesSink,
    Piece,
    SingleFlow,
    known_vectors,
    read_errors,
    require_size,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from flowreel.engine.config import SinkConfig
    from flowreel.engine.data import Float32Array, FlowInfo

    UInt8Array = npt.NDArray[np.uint8]

X_PREFIX, Y_PREFIX = "flow_x_", "flow_y_"
JPEG_QUALITY = 95  # an error of about one level; at 75, common in such data sets, of several
JPEG_LONGEST_SIDE = 65_500  # pixels; libjpeg's limit
MIDDLE = 127.5  # the level, before rounding, of no motion; also how far levels go to either side


def read_two_stream(path: PathLike, bound: float = 20.0) -> Float32Array:
    """Read a pair of two-stream pictures.

    Args:
        path: of the x picture, ``flow_x_....jpg`` or ``.png``; the y picture lies beside it.
        bound: in pixels, as the pictures were written with; they do not record it.

    Returns:
        (H, W, 2) float32, pixels, x (right) then y (down), in steps of 2 x bound / 255: no motion reads as half a
        step, and a clipped vector as ``bound``.

    Raises:
        SourceNotFoundError: one of the two is missing.
        FlowFileError: another name, not a grey picture of 8 bits, damaged, or two of different size.
        UsageError: ``bound`` is not a positive number.
    """
    if not 0 < bound < math.inf:
        raise UsageError(f"bound must be a positive number of pixels, got {bound}")
    x_path = Path(path)
    if not x_path.name.startswith(X_PREFIX):
        raise FlowFileError(f"{x_path}: expected the x picture of a pair, such as {X_PREFIX}00000.jpg")
    y_path = _beside(x_path)
    x, y = _read_grey(x_path), _read_grey(y_path)
    if x.shape != y.shape:
        raise FlowFileError(f"{x_path} is {x.shape[1]}x{x.shape[0]}, but {y_path.name} is {y.shape[1]}x{y.shape[0]}")
    levels = np.stack([x, y], axis=-1).astype(np.float32)
    return (levels - np.float32(MIDDLE)) * np.float32(bound / MIDDLE)


class TwoStreamSink(NumberedFilesSink):
    """Two grey pictures per flow: ``DIR/flow_x_%05d.jpg`` and ``flow_y_`` beside it. See ``NumberedFilesSink``.

    Each component becomes round(255 (v + bound) / (2 bound)), clipped to 0..255, with ``config.bound``. An unknown
    vector becomes the level of no motion. ``notes`` counts the unknown and the clipped. ``.png`` keeps the levels
    exactly, ``.jpg`` nearly.

    Raises:
        UnknownOutputError: the file name does not begin with ``flow_x_`` or has no number.
    """

    example = f"flows/{X_PREFIX}%05d.jpg"

    def __init__(self, path: str, config: SinkConfig) -> None:
        if not Path(path).name.startswith(X_PREFIX):
            raise UnknownOutputError(
                f"expected the x pictures of two-stream pairs, such as {self.example} ({Y_PREFIX}... comes beside "
                f"them), got {path!r}; for colour pictures write colors/%06d.png"
            )
        super().__init__(path, config, str(_beside(Path(path))))
        self._bound = config.bound
        self._is_jpeg = Path(path).suffix.lower() == ".jpg"

    def open(self, info: FlowInfo) -> None:
        """Creates the folder. Raises OutputExistsError, and OutputError for flow larger than a JPEG can be."""
        if self._is_jpeg and max(info.height, info.width) > JPEG_LONGEST_SIDE:
            raise OutputError(
                f"{self.path}: a JPEG has sides of at most {JPEG_LONGEST_SIDE} pixels, the flow is "
                f"{info.width}x{info.height}: write .png instead"
            )
        super().open(info)

    def encode(self, flow: SingleFlow) -> FlowFiles:
        known = known_vectors(flow.flow)
        reach = min(self._bound, UNKNOWN_ABOVE)  # finite in float32
        short = (np.abs(flow.flow[..., 0]) <= reach) & (np.abs(flow.flow[..., 1]) <= reach)
        lost = {
            f"{UNKNOWN_WORDS} and stored as no motion": int(np.count_nonzero(~known)),
            f"beyond the bound of {self._bound:g} px and clipped": int(np.count_nonzero(known & ~short)),
        }
        levels = (_to_levels(np.where(known, flow.flow[..., axis], 0), self._bound) for axis in (0, 1))
        pieces = [_jpeg(plane) if self._is_jpeg else png_pieces(plane) for plane in levels]
        return FlowFiles(tuple(pieces), lost)


def _beside(x_path: Path) -> Path:
    """Name, or pattern, of the y picture."""
    return x_path.with_name(Y_PREFIX + x_path.name.removeprefix(X_PREFIX))


def _to_levels(component: Float32Array, bound: float) -> UInt8Array:
    """(H, W) known pixels -> uint8. No motion is exactly ``MIDDLE`` before rounding, whatever the bound."""
    scale = np.float32(min(MIDDLE / bound, UNKNOWN_ABOVE))  # finite even for the tiniest bound
    levels: UInt8Array = np.clip(np.rint(component * scale + np.float32(MIDDLE)), 0, 255).astype(np.uint8)
    return levels


def _jpeg(levels: UInt8Array) -> tuple[Piece, ...]:
    """The file's contents. Pillow holds the GIL here: only ``_to_levels`` gains from a second core."""
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=JPEG_QUALITY)
    # Not getbuffer(): as garbage collection frees both, Python 3.13 complains of a buffer that is still in use.
    return (file.getvalue(),)


def _read_grey(path: Path) -> UInt8Array:
    """(H, W) levels of a grey picture of 8 bits."""
    with read_errors(path, "two-stream picture"), open(path, "rb") as file:
        try:
            with Image.open(file, formats=("JPEG", "PNG")) as picture:
                if picture.mode != "L":
                    raise FlowFileError(f"{path}: expected grey of 8 bits, found a picture of mode {picture.mode}")
                require_size(str(path), picture.height, picture.width)
                return np.array(picture)
        except FlowFileError:
            raise
        except (Image.DecompressionBombError, SyntaxError, EOFError, ValueError, struct.error) as error:
            raise FlowFileError(f"{path}: cannot be read as a two-stream picture ({error})") from error
