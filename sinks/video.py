"""Colour video: every flow painted with the Middlebury wheel, one scale for the whole clip, as H.264.

The scale comes first: given in pixels, or derived from the first flows, which wait in memory until it is known. From
then on every flow is painted, encoded and released. Flow on a GPU waits and is painted on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from flowreel.engine.claims import Claim
from flowreel.engine.data import ColorBatch, is_known
from flowreel.engine.errors import (
    DeviceError,
    OutputError,
    OutputExistsError,
    OutputWriteError,
    UnknownOutputError,
    counted,
)
from flowreel.engine.publish import (
    claimed_file,
    make_folder,
    partial_path,
    publish_file,
    remove,
    require_absent,
    sync_file,
)
from flowreel.kernels.flow_color import flow_to_color, percentile_magnitude
from flowreel.sinks.painting import packed, painted
from flowreel.sinks.parallel import encode_workers
from flowreel.sinks.video_writer import CONTAINERS, VideoWriter, video_write_errors, why_no_nvenc

if TYPE_CHECKING:
    import numpy.typing as npt

    from flowreel.engine.config import SinkConfig
    from flowreel.engine.data import FlowBatch, FlowInfo, Prepared

SCALE_FLOWS = 32  # flows that the automatic scale is derived from: about a second of motion
SCALE_PERCENTILE = 95.0
MOST_PIXELS = 1 << 25  # of a frame: H.264 has no level for more, and its encoder would take gigabytes
HELD_BYTES = 256 << 20  # of flow waiting for its scale; as float16, 32 flows of 1920x1080 just fit


class ColorVideoSink:
    """A colour video, ``X.mp4`` or ``X.mkv``: H.264, yuv420p, BT.709 limited range, constant quality.

    Each frame is shown at its flow's ``timestamp_s`` minus the first one's, so variable frame rates stay in step with
    the source. 4:2:0 needs even sides: for an odd one the last row or column is repeated.

    The colour scale is ``config.max_flow`` pixels, or else the 95th percentile of vector lengths in the first 32 flows
    (in all of a shorter clip), then fixed, so that colours do not flicker. Those flows wait as float16, which changes
    no colour by more than a level, in at most 256 MiB (but always at least one flow): above 1920x1080 the scale is
    taken from as many flows as that holds. ``notes`` reports the scale.

    ``config.encoder`` chooses the encoder. auto: that of the GPU that computes the flow (NVENC) if it has one, else the
    CPU. nvenc: that of the same GPU, or of GPU 0 where no GPU computes flow. cpu: the CPU, which uses one thread if
    the model runs on it, else several.

    It is written to ``X.mp4.partial``, synced, and renamed by ``commit``.
    """

    def __init__(self, path: str, config: SinkConfig) -> None:
        self._destination = Path(path)
        self.path = str(self._destination)
        if self._destination.suffix.lower() not in CONTAINERS:
            raise UnknownOutputError(f"a colour video's name ends in {' or '.join(CONTAINERS)}, got {path!r}")
        self._partial = partial_path(self._destination)
        self._overwrite = config.overwrite
        self._max_flow = config.max_flow
        self._asked_encoder = config.encoder
        self._held: list[_Held] = []
        self._size = (0, 0)
        self._encoder: VideoWriter | None = None
        self._claim: Claim | None = None  # of the unfinished file
        self._whole = False  # all of the video is in the unfinished file
        self._unknown = 0  # vectors
        self.notes: list[str] = []

    def open(self, info: FlowInfo) -> None:
        """Starts the file under its unfinished name.

        Raises OutputExistsError when the output is there and is not to be replaced, or is a folder, OutputBusyError
        while another run writes it, OutputWriteError when nothing can be written there, OutputError for flow larger
        than a video's frame can be, and DeviceError when NVENC is asked for by name and cannot encode it.
        """
        self._size = (info.height, info.width)
        if info.height * info.width > MOST_PIXELS:
            raise OutputError(
                f"{self.path}: a frame of an H.264 video has at most {MOST_PIXELS} pixels, the flow is "
                f"{info.width}x{info.height}: write colour pictures instead, such as colors/%06d.png"
            )
        self._require_possible()
        gpu = self._encoding_gpu(info)
        with video_write_errors(self._destination):
            make_folder(self._destination.parent)
            self._claim = claimed_file(self._partial, self.path)
            try:
                self._require_possible()  # again, now that nobody else can publish it
                # One thread beside a model on the CPU, which needs the other cores more.
                threads = 1 if info.device == "cpu" else encode_workers(info.device)
                self._encoder = VideoWriter(
                    self._partial,
                    self._destination.suffix.lower(),
                    info.height,
                    info.width,
                    info.frame_rate,
                    gpu=gpu,
                    threads=threads,
                )
            except BaseException:
                self._claim.withdraw()
                raise
        if info.height % 2 or info.width % 2:
            even = f"{info.width + info.width % 2}x{info.height + info.height % 2}"
            self.notes.append(f"{self.path}: {even}, as 4:2:0 has even sides: the last row or column comes twice")
        if self._encoder.fallback is not None:
            self.notes.append(f"{self.path}: {self._encoder.fallback}")
        if self._max_flow is not None:
            self.notes.append(f"{self.path}: full colour at {self._max_flow:.4g} px")

    def write(self, batch: FlowBatch) -> None:
        """Paints and encodes, or holds flows back while there is no scale yet."""
        self._require_size(batch)
        for place, planes in enumerate(batch.flow.numpy()):
            known = is_known(planes).all(axis=0)
            self._unknown += known.size - int(np.count_nonzero(known))
            flow = planes.transpose(1, 2, 0)  # (H, W, 2), a view
            if self._max_flow is not None:
                self._encode(flow_to_color(flow, self._max_flow), float(batch.timestamp_s[place]))
            elif self._hold(_pack(flow), batch, place):
                self._encode_held()

    prepares = True  # see ``DeviceSink``

    def prepare(self, batches: Iterator[FlowBatch]) -> Iterator[ColorBatch]:
        """See ``DeviceSink``."""
        for batch in batches:
            self._require_size(batch)
            if self._max_flow is not None:
                yield painted(
                    batch.flow,
                    self._max_flow,
                    index=batch.index,
                    frame=batch.frame,
                    timestamp_s=batch.timestamp_s,
                    for_video=True,
                )
                continue
            for place, flow in enumerate(batch.flow):
                if self._hold(packed(flow), batch, place) and self._max_flow is None:
                    self._settle_scale()
            if self._max_flow is not None:
                yield from self._paint_held()
        if self._held:
            self._settle_scale()
            yield from self._paint_held()

    def take(self, prepared: Prepared) -> None:
        """See ``DeviceSink``."""
        assert isinstance(prepared, ColorBatch)
        self._unknown += int(prepared.unknown.sum())
        for picture, time_s in zip(prepared.pictures.numpy(), prepared.timestamp_s.tolist(), strict=True):
            self._encode(picture, time_s)

    def commit(self, complete: bool = True) -> None:
        """Ends the file and publishes it; incomplete, it stays playable under its unfinished name."""
        assert self._encoder is not None, "open comes before commit"
        if self._held:
            self._encode_held()
        with video_write_errors(self._destination):
            if self._encoder.frames == 0:
                raise OutputWriteError(f"{self.path}: not one flow came, and a video needs a frame")
            self._encoder.finish()
            if complete:
                sync_file(self._partial)  # a disk may turn out to be full as late as here
                self._whole = True
                self._require_possible()  # something may have appeared during the run
                publish_file(self._partial, self._destination)
        assert self._claim is not None
        self._claim.release()
        if not complete:
            self.notes.append(f"{self.path}: incomplete, left as {self._partial.name}")
        if self._unknown:
            self.notes.append(f"{self.path}: {counted(self._unknown, 'unknown vector')} painted black")

    def abort(self) -> str | None:
        """Removes the unfinished file, unless it only could not get its name. What was there before is untouched."""
        self._held.clear()
        if self._encoder is None or self._claim is None or not self._claim.held:
            return None
        if not self._whole:
            self._encoder.discard()
            remove(self._partial, ignore_errors=True)
        self._claim.release()
        return f"{self._partial} is the whole video" if self._whole else None

    @property
    def bytes_written(self) -> int:
        """Size of the file, the finished one or the one being written."""
        if self._encoder is None:
            return 0
        for file in (self._partial, self._destination):
            with suppress(FileNotFoundError):
                return file.stat().st_size
        return 0

    def _require_possible(self) -> None:
        if self._destination.is_dir():
            raise OutputExistsError(f"{self.path} is a folder: choose another name, or remove it yourself if it can go")
        require_absent(self._destination, self._overwrite)

    def _encoding_gpu(self, info: FlowInfo) -> int | None:
        """The number of the GPU that is to encode; None: the CPU encodes."""
        kind, _, number = (info.device or "").partition(":")
        if self._asked_encoder == "cpu" or (self._asked_encoder == "auto" and kind != "cuda"):
            return None
        gpu = int(number or 0) if kind == "cuda" else 0
        why = why_no_nvenc(gpu, info.height, info.width)
        if why is None:
            self.notes.append(f"{self.path}: encoded by the GPU (NVENC)")
            return gpu
        if self._asked_encoder == "nvenc":
            raise DeviceError(f"{self.path}: NVENC cannot encode {info.width}x{info.height} here: {why}")
        self.notes.append(f"{self.path}: encoded on the CPU, as NVENC cannot: {why}")
        return None

    def _require_size(self, batch: FlowBatch) -> None:
        if tuple(batch.flow.shape[2:]) != self._size:
            raise ValueError(f"opened for flow of (H, W) {self._size}, got {tuple(batch.flow.shape[2:])}")

    def _hold(self, flow: npt.NDArray[np.float16] | Tensor, batch: FlowBatch, place: int) -> bool:
        """Holds a flow back. True when there are now enough for the scale, or no more fit."""
        number, frame = batch.index + place, int(batch.frame[place])
        self._held.append(_Held(flow, number, frame, float(batch.timestamp_s[place])))
        return len(self._held) == SCALE_FLOWS or (len(self._held) + 1) * flow.nbytes > HELD_BYTES

    def _settle_scale(self) -> None:
        """Fixes the clip's scale from the flows that are held."""
        count, nbytes = len(self._held), self._held[0].flow.nbytes
        self._max_flow = percentile_magnitude((held.flow for held in self._held), SCALE_PERCENTILE)
        limit = "" if count == SCALE_FLOWS or nbytes * (count + 1) <= HELD_BYTES else ", all that fit"
        self.notes.append(
            f"{self.path}: full colour at {self._max_flow:.4g} px, "
            f"the {SCALE_PERCENTILE:g}th percentile of the first {counted(count, 'flow')}{limit}"
        )

    def _encode_held(self) -> None:
        """Settles the scale, then encodes the held flows, in order, and releases them."""
        self._settle_scale()
        for held in self._held:
            assert isinstance(held.flow, np.ndarray)
            self._encode(flow_to_color(held.flow, self._max_flow), held.time_s)
        self._held.clear()

    def _paint_held(self) -> Iterator[ColorBatch]:
        while self._held:
            held = self._held.pop(0)
            assert isinstance(held.flow, Tensor)
            yield painted(
                held.flow[None],
                self._max_flow,
                index=held.index,
                frame=np.array([held.frame]),
                timestamp_s=np.array([held.time_s]),
                for_video=True,
            )

    def _encode(self, picture: npt.NDArray[np.uint8], time_s: float) -> None:
        assert self._encoder is not None, "open comes before write"
        with video_write_errors(self._destination):
            self._encoder.encode(picture, time_s)


@dataclass(frozen=True)
class _Held:
    """A flow that waits for its scale."""

    flow: npt.NDArray[np.float16] | Tensor  # (H, W, 2) on the host, (2, H, W) on a GPU
    index: int
    frame: int
    time_s: float


def _pack(flow: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """(H, W, 2) float32 pixels as float16 at half the memory: NaN where unknown, clipped to ±65504 px."""
    longest = float(np.finfo(np.float16).max)
    packed = np.clip(flow, -longest, longest).astype(np.float16)
    packed[~is_known(flow)] = np.nan
    return packed
