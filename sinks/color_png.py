"""Colour pictures of flow, one PNG per flow, and the small PNG encoder that all PNG formats share.

The encoder writes what PNG (W3C Recommendation, third edition) requires and no more: one filter for all rows, one zlib
stream. On flow it is twice as fast as Pillow, which tries every filter on every row, at the same file size; it lets
other threads run; and it also writes 16-bit RGB, which Pillow cannot.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowreel.engine.data import UNKNOWN_WORDS, ColorBatch
from flowreel.engine.errors import concerning
from flowreel.engine.publish import publish_bytes, write_errors
from flowreel.kernels.flow_color import flow_to_color
from flowreel.sinks.numbered import FlowFiles, NumberedFilesSink, SingleFlow, known_vectors
from flowreel.sinks.painting import painted
from flowreel.sinks.parallel import OrderedPool, file_workers

if TYPE_CHECKING:
    import numpy.typing as npt

    from flowreel.engine.config import SinkConfig
    from flowreel.engine.data import FlowBatch, Prepared

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_GREY, PNG_RGB = 0, 2  # PNG's colour types

# Measured on the colours of FlowNet2 output, 960x540: level 1 307 kB in 11 ms, 3 269 kB in 22 ms, 6 223 kB in 57 ms.
PNG_LEVEL = 1
_FILTER_UP = 2  # each byte minus the one above it: flow is smooth, and NumPy does a whole picture at once


class ColorPngSink(NumberedFilesSink):
    """One colour picture per flow: ``DIR/%06d.png``, 8-bit RGB, the Middlebury wheel. See ``NumberedFilesSink``.

    Full colour stands for ``config.max_flow`` pixels, or else for each picture's own longest vector. Unknown vectors
    are black.
    """

    example = "colors/%06d.png"

    def __init__(self, path: str, config: SinkConfig) -> None:
        super().__init__(path, config)
        self._max_flow = config.max_flow

    def encode(self, flow: SingleFlow) -> FlowFiles:
        unknown = int(np.count_nonzero(~known_vectors(flow.flow)))
        return _picture_file(flow_to_color(flow.flow, self._max_flow), unknown)

    prepares = True  # see ``DeviceSink``

    def prepare(self, batches: Iterator[FlowBatch]) -> Iterator[ColorBatch]:
        """See ``DeviceSink``."""
        for batch in batches:
            yield painted(
                batch.flow, self._max_flow, index=batch.index, frame=batch.frame, timestamp_s=batch.timestamp_s
            )

    def take(self, prepared: Prepared) -> None:
        """See ``DeviceSink``. Raises the error of an earlier one, too."""
        assert isinstance(prepared, ColorBatch)
        for place, (rgb, unknown) in enumerate(
            zip(prepared.pictures.numpy(), prepared.unknown.tolist(), strict=True)  # views that keep the batch alive
        ):
            number, frame = prepared.index + place, int(prepared.frame[place])
            self.submit(number, frame, _picture_file, rgb, unknown, nbytes=rgb.nbytes)


def _picture_file(rgb: npt.NDArray[np.uint8], unknown: int) -> FlowFiles:
    return FlowFiles((png_pieces(rgb),), {f"{UNKNOWN_WORDS} and black": unknown})


class ColorPictures:
    """Writes colour pictures under any names, several at a time, each published by itself.

    Raises OutputWriteError, also for an earlier picture. Pictures already published stay.
    """

    def __init__(self, paths: Iterable[Path], max_flow: float | None) -> None:
        """paths: one per flow, in order. max_flow: pixels that get full colour; None: each flow's own longest."""
        self.count = 0  # pictures published
        self.bytes_written = 0
        self._paths = iter(paths)
        self._max_flow = max_flow
        self._pool = OrderedPool(self._keep, file_workers(None))

    def write(self, flows: FlowBatch) -> None:
        """Submits the next flows, (N, 2, H, W) on the CPU, to be painted."""
        for frame, flow in zip(flows.frame.tolist(), flows.flow.detach().numpy(), strict=True):
            self._pool.submit(self._publish, next(self._paths), flow, frame, nbytes=flow.nbytes)

    def finish(self) -> None:
        """Waits until all pictures are published."""
        self._pool.drain()

    def close(self) -> None:
        self._pool.close()

    def _publish(self, path: Path, flow: npt.NDArray[np.float32], frame: int) -> int:
        with concerning(frame):
            return write_png(path, flow_to_color(flow.transpose(1, 2, 0), self._max_flow))

    def _keep(self, nbytes: int) -> None:
        self.bytes_written += nbytes
        self.count += 1


def write_png(path: Path, samples: npt.NDArray[Any]) -> int:
    """Writes grey (H, W) or RGB (H, W, 3) samples, uint8 or uint16, atomically. Returns the file's size in bytes.

    Raises OutputWriteError.
    """
    with write_errors(path):
        return publish_bytes(path, *png_pieces(samples))


def png_pieces(samples: npt.NDArray[Any]) -> tuple[bytes, ...]:
    """A PNG file of grey (H, W) or RGB (H, W, 3) samples, uint8 or uint16, as the pieces of its contents."""
    height, width = samples.shape[:2]
    kind = PNG_GREY if samples.ndim == 2 else PNG_RGB
    header = struct.pack(">IIBBBBB", width, height, 8 * samples.itemsize, kind, 0, 0, 0)
    rows = np.ascontiguousarray(samples, samples.dtype.newbyteorder(">")).view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = _FILTER_UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256, as the format requires
    body = zlib.compress(filtered.data, PNG_LEVEL)
    return (PNG_SIGNATURE, *_chunk(b"IHDR", header), *_chunk(b"IDAT", body), *_chunk(b"IEND", b""))


def _chunk(kind: bytes, body: bytes) -> tuple[bytes, ...]:
    return struct.pack(">I", len(body)) + kind, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
