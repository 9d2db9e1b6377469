"""From the decoder's picture to RGB as shown: the rotation, colour matrix and value range of a stored picture.

What a stream states about them is read here for all decoders; ``Converter`` applies them to PyAV's frames on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from flowreel.engine.errors import FrameSizeError

if TYPE_CHECKING:
    import numpy.typing as npt
    from av.filter import Graph
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    Rgb = npt.NDArray[np.uint8]

_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
# AVColorSpace -> the scale filter's name for that matrix
_MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
_UNSTATED = 2  # AVCOL_SPC_UNSPECIFIED


@dataclass(frozen=True)
class Turn:
    """How a stored picture becomes the one shown: transpose first, then flip."""

    transpose: bool = False
    flip_x: bool = False  # swap left and right
    flip_y: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> tuple[Turn, list[str]]:
        """From the display matrix, which maps (x, y) to (a x + c y, b x + d y), y down; and notes about it."""
        side_data: Any = frame.side_data.get("DISPLAYMATRIX")
        if side_data is None:
            return cls(), []
        matrix = np.frombuffer(bytes(side_data), np.int32)
        a, b, c, d = (int(matrix[place]) for place in (0, 1, 3, 4))
        if a and d and not b and not c:
            return cls(False, a < 0, d < 0), []
        if b and c and not a and not d:
            return cls(True, c < 0, b < 0), []
        return cls(), ["the container asks for a rotation by less than a quarter turn: ignored"]

    def __call__(self, picture: Rgb) -> Rgb:
        """(H, W, 3) as stored -> (H', W', 3) as shown, contiguous."""
        if self.transpose:
            picture = picture.transpose(1, 0, 2)
        if self.flip_x:
            picture = picture[:, ::-1]
        if self.flip_y:
            picture = picture[::-1]
        return np.ascontiguousarray(picture)


class Converter:
    """Pictures in the decoder's own format -> (H, W, 3) uint8 full-range RGB, as shown.

    FFmpeg's scale filter does it, with matrix and range given explicitly; its shortcuts are off (full chroma
    interpolation, accurate rounding), which keeps flat colours within one level instead of three.
    """

    def __init__(self, name: str, stored_size: tuple[int, int], turn: Turn) -> None:
        """``name``: of the source, for messages; ``stored_size``: (width, height) in pixels before ``turn``."""
        self._name = name
        self._stored_size = stored_size
        self._turn = turn
        self._graph: Graph | None = None
        self._made_for: tuple[str, str, str] | None = None

    def __call__(self, frame: VideoFrame, number: int) -> Rgb:
        """Convert frame ``number``. Raises FrameSizeError if it does not have the stored size."""
        width, height = self._stored_size
        if (frame.width, frame.height) != (width, height):
            raise FrameSizeError(
                f"frame {number} of {self._name} is {frame.width}x{frame.height}, "
                f"but the first is {width}x{height}; the size must not change within a source: take what comes before "
                f"(--stop {number}), cut the file there (ffmpeg -ss TIME -i {self._name} -c copy PART), or have it "
                f"scaled (ffmpeg -i {self._name} -vf scale={width}:{height} "
                "-f yuv4mpegpipe - | flowreel run -)"
            )
        look = (frame.format.name, matrix_of(frame), "full" if is_full_range(frame) else "limited")
        if self._graph is None or look != self._made_for:
            self._graph, self._made_for = _scale_graph(frame, *look[1:]), look
        self._graph.push(frame)
        rgb = self._graph.pull()
        assert isinstance(rgb, av.VideoFrame)
        return self._turn(np.asarray(rgb.to_ndarray(), dtype=np.uint8))


def _scale_graph(frame: VideoFrame, matrix: str, value_range: str) -> Graph:
    graph = av.filter.Graph()
    # One thread, here and for the filter: the decoder has its own, and the model needs the rest. A graph with threads
    # would also hang a forked process whose garbage collection frees it: it waits for threads that only the parent has.
    if hasattr(graph, "threads"):  # from PyAV 18 on
        graph.threads = 1
    any_base = Fraction(1, 1000)  # time stamps do not matter here
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=any_base)
    options = f"in_color_matrix={matrix}:in_range={value_range}:out_range=full"
    scale = graph.add("scale", f"{options}:flags=bilinear+full_chroma_int+accurate_rnd:threads=1")
    graph.link_nodes(source, scale, graph.add("format", "rgb24"), graph.add("buffersink"))
    graph.configure()
    return graph


def matrix_of(frame: VideoFrame) -> str:
    """Name of the YUV matrix; if none is stated, the customary one: BT.601 below 720 rows, else BT.709."""
    return _MATRICES.get(frame.colorspace) or ("bt601" if frame.height < 720 else "bt709")


def is_full_range(frame: VideoFrame) -> bool:
    """Whether values span 0..255 (at 8 bits) rather than, as in most YUV, 16..235 (chroma: 16..240)."""
    return frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj") or not _is_yuv(frame)


def _is_yuv(frame: VideoFrame) -> bool:
    """False for RGB, palettes, plain grey and cinema's XYZ, which have no matrix and use the full range."""
    return not frame.format.is_rgb and not frame.format.name.startswith(("pal8", "gray", "ya", "mono", "xyz"))


def colour_notes(frame: VideoFrame) -> list[str]:
    """The note about a colour matrix that had to be assumed, if it had."""
    if not _is_yuv(frame) or frame.colorspace in _MATRICES:
        return []
    said = "no colour matrix is stated" if frame.colorspace == _UNSTATED else "the colour matrix is an unusual one"
    return [f"{said}: {matrix_of(frame).upper()} is assumed, as players do at {frame.height} rows"]


def field_notes(interlaced: bool) -> list[str]:
    """The note about frames that each hold two fields of different times, if they do."""
    if not interlaced:
        return []
    return ["the video is interlaced: frames are taken as they are, two moments in each; ffmpeg -vf bwdif undoes it"]


def shape_notes(stream: VideoStream) -> list[str]:
    """The note about pixels that are not square, if they are not."""
    aspect = stream.sample_aspect_ratio
    if not aspect or aspect == 1:
        return []
    return [f"pixels are not square ({aspect.numerator}:{aspect.denominator}): flow is in stored pixels"]
