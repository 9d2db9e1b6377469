"""Video files as a source: chooses the decoder, selects frames, and reports those that were expected but missing.

``probe_video`` reads the packets first and knows every frame's number and time; a ``VideoDecoder`` then decodes in a
second pass: ``pyav.py`` on the CPU, ``nvdec.py`` on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flowreel.engine.config import SelectConfig
from flowreel.engine.data import JSON, FlowInfo, Frame, SourceId
from flowreel.engine.errors import DeviceError, SourceChangedError, SourceNotFoundError, TooFewFramesError, concerning
from flowreel.engine.protocols import Picture
from flowreel.engine.sources.fingerprint import last_change, source_id
from flowreel.engine.sources.picture import field_notes
from flowreel.engine.sources.probe import VideoProbe, probe_video
from flowreel.engine.sources.pyav import Decoded, PyAVDecoder, key_frame_before
from flowreel.engine.sources.timecode import parse_seconds, select_frames

if TYPE_CHECKING:
    from torch import Tensor


MOST_NAMED = 8  # frame numbers listed in a message
REOPENING_FRAMES = 32  # decoding and dropping this many frames is quicker than reopening the file and seeking


class VideoDecoder(Protocol):
    """Decodes the chosen stream of one file, once."""

    @property
    def name(self) -> str:
        """For the summary, e.g. ``"PyAV (h264)"``; after decoding, what really decoded."""
        ...

    def pictures(self, first: int) -> Generator[tuple[int, Any], None, None]:
        """Pictures with their numbers, in rising order, from ``first`` or somewhat before it on.

        One that cannot be decoded is left out. A picture is valid until the next one is requested.
        """
        ...

    def patched(self, picture: Any) -> bool:
        """Whether the picture is damaged, and was patched up; False where the decoder does not tell."""
        ...

    def interlaced(self, picture: Any) -> bool:
        """Whether the picture holds two fields; False where the decoder does not tell."""
        ...

    def rgb(self, picture: Any, number: int) -> Tensor:
        """The picture as shown, (3, H, W) uint8 full-range RGB, in its own memory.

        Raises FrameSizeError when its size differs from the first one's.
        """
        ...


def open_video(name: str, select: SelectConfig, device: str = "cpu") -> VideoSource:
    """Open a video file, with NVDEC if frames are wanted on a GPU and it can decode them.

    Raises what :func:`probe_video` and :class:`VideoSource` raise, and DeviceError or MissingDependencyError if NVDEC
    was asked for by name and cannot decode the file. ``auto`` then takes PyAV, and the source's notes say why.
    """
    probe = probe_video(name, select.stream)
    on_gpu = device.startswith("cuda")
    if select.decoder == "nvdec" and not on_gpu:
        raise DeviceError(f"NVDEC decodes on a GPU, but this run is on {device}: use --decoder auto or pyav")
    decoder = PyAVDecoder(probe, fast=on_gpu)
    if select.decoder == "pyav" or not on_gpu:
        return VideoSource(probe, select, decoder)
    from flowreel.engine.sources.nvdec import NvdecDecoder, why_not

    refusal = why_not(probe, device)
    if refusal is None:
        notes: list[str] = []
        instead = decoder if select.decoder == "auto" else None
        nvdec = NvdecDecoder(probe, device, instead, notes.append)
        return VideoSource(probe, select, nvdec, notes, made_by={"decoder": "nvdec"}, on_device=True)
    if select.decoder == "nvdec":
        raise refusal
    return VideoSource(probe, select, decoder, notes=[f"decoded on the CPU, not with NVDEC: {refusal}"])


def identify(name: str) -> SourceId:
    """See ``Kind``: covers the file."""
    path = Path(name)
    return source_id(path.name, [path])


class VideoSource:
    """Selected frames of one video stream, in presentation order.

    A frame that cannot be decoded is left out; the others keep their numbers and times. ``losses`` then tells how many
    are missing, in how many the decoder has concealed damage, and whether the file is cut short.
    """

    reopening_frames = REOPENING_FRAMES

    def __init__(
        self,
        probe: VideoProbe,
        select: SelectConfig,
        decoder: VideoDecoder | None = None,
        notes: list[str] | None = None,
        made_by: dict[str, JSON] | None = None,
        on_device: bool = False,
    ) -> None:
        """Raises TooFewFramesError or UsageError when ``select`` leaves nothing to pair or makes no sense.

        decoder: None: PyAV. notes: a list the decoder may append to while it works. made_by: what a store records
        about the decoder. on_device: see ``protocols.OnDevice``.
        """
        self.on_device = on_device
        self.times_s = probe.timeline.times_s
        self._probe = probe
        self._stat = last_change(probe.path)
        self.wanted = select_frames(select, self.times_s, probe.path.name)
        self._to_the_end = _reaches_beyond(select.stop, probe)
        self.losses: list[str] = []
        self.first_loss: int | None = None  # see ``protocols.MayLose``
        self._patched: set[int] = set()  # numbers of frames whose damage the decoder has concealed
        self._interlaced = False  # whether any frame so far held two fields; the probe has seen only the first
        self._decoder: VideoDecoder = decoder or PyAVDecoder(probe)
        self._decoder_notes = [] if notes is None else notes
        self._iteration: Generator[Frame, None, None] | None = None
        self._pictures: Generator[tuple[int, Any], None, None] | None = None  # of that iteration
        self._closed = False
        width, height = probe.shown_size
        self.info = FlowInfo(
            height=height,
            width=width,
            frame_rate=probe.frame_rate / select.step,
            frame_count=len(self.wanted),
            source=source_id(probe.path.name, [probe.path], probe.duration_s),
            made_by=made_by or {},
        )

    @property
    def decoder(self) -> str:
        return self._decoder.name

    @property
    def notes(self) -> list[str]:
        patched = [] if not self._patched or self.losses else [_patched_words(self._patched)]
        told = dict.fromkeys((*self._probe.notes, *field_notes(self._interlaced)))  # perhaps by both
        return [*told, *self._decoder_notes, *patched]

    def standing_before(self, number: int) -> int:
        return key_frame_before(self._probe, number)

    def pictures_from(self, number: int) -> Generator[Picture, None, None]:
        """Decoded by PyAV, whose pictures may be kept.

        Raises SourceNotFoundError and SourceChangedError when the file is no longer the one that was opened.
        """
        name = self._probe.path.name
        try:
            changed = last_change(self._probe.path) != self._stat
        except OSError as error:
            raise SourceNotFoundError(f"{self._probe.path} is gone since it was opened") from error
        if changed:
            raise SourceChangedError(f"{name} is another file than the one that was opened: open it again")
        return self._pictures_from(number, PyAVDecoder(self._probe))

    def _pictures_from(self, first: int, decoder: PyAVDecoder) -> Generator[Picture, None, None]:
        def developed(number: int, picture: Decoded) -> Callable[[], Frame]:
            return lambda: self._frame(number, decoder.rgb(picture, number))

        with closing(decoder.pictures(first)) as numbered:
            for number, picture in numbered:
                if decoder.patched(picture):
                    self._patched.add(number)
                self._interlaced |= decoder.interlaced(picture)
                size = sum(plane.buffer_size for plane in picture.frame.planes)
                yield Picture(number, size, developed(number, picture))

    def _frame(self, number: int, rgb: Tensor) -> Frame:
        return Frame(rgb, number, float(self.times_s[number]))

    def __iter__(self) -> Iterator[Frame]:
        """Decode. Raises TooFewFramesError at the end if fewer than two came; FrameSizeError when the size changes."""
        if self._iteration is not None:
            raise RuntimeError(f"{self.info.source.name} is already being read; open it again to read it twice")
        self._iteration = self._frames()
        return self._iteration

    def _frames(self) -> Generator[Frame, None, None]:
        given = 0
        self._pictures = pictures = self._decoder.pictures(self.wanted[0])
        try:
            for number, picture in pictures:
                if self._closed:
                    return
                if number in self.wanted:
                    if self._decoder.patched(picture):
                        self._patched.add(number)
                    self._interlaced |= self._decoder.interlaced(picture)
                    if self.first_loss is None and self._is_lossy(number, self.wanted[given]):
                        self.first_loss = self.wanted[given]
                    with concerning(number):
                        rgb = self._decoder.rgb(picture, number)
                    yield self._frame(number, rgb)
                    del rgb  # or it would stay alive while the next one is made
                    given += 1
                if number >= self.wanted[-1]:
                    break
        finally:
            # Freeing an NVDEC decoder takes long and blocks all threads, even those of the last flows: left to close().
            if self._closed or not self.on_device:
                self._end_decoding()
        self._account(given)

    def _is_lossy(self, number: int, expected: int) -> bool:
        """Whether a frame is missing before this one, or this one is damaged, as the last one of a file that is cut
        short may be though its decoder does not tell."""
        is_cut = self._probe.cut_short and number == len(self.times_s) - 1
        return number != expected or number in self._patched or is_cut

    def _account(self, given: int) -> None:
        """Report at the end what is missing."""
        asked, probe = len(self.wanted), self._probe
        if given < asked:
            self.losses.append(f"{asked - given} of {asked} frames could not be decoded")
        if self._patched:
            self.losses.append(_patched_words(self._patched))
        if probe.cut_short and self._to_the_end:
            self.losses.append(probe.loss)
        if given < 2:
            raise TooFewFramesError(
                f"only {given} of {asked} frames of {probe.path.name} could be decoded: flow needs at least two"
            )

    def close(self) -> None:
        """Release the file. If another thread is inside the iteration, the iteration ends itself at its next frame."""
        self._closed = True
        try:
            if self._iteration is not None:
                self._iteration.close()
        except ValueError:  # "generator already executing"
            return
        self._end_decoding()

    def _end_decoding(self) -> None:
        """Close the decoder. Errors are ignored: a failed device is reported already, and no frame depends on this."""
        if self._pictures is not None:
            with suppress(Exception):
                self._pictures.close()


def _patched_words(numbers: set[int]) -> str:
    """E.g. "3 frames are damaged, and patched up by the decoder: 8, 9, 12"."""
    named = ", ".join(map(str, sorted(numbers)[:MOST_NAMED])) + (", ..." if len(numbers) > MOST_NAMED else "")
    frames = "1 frame is" if len(numbers) == 1 else f"{len(numbers)} frames are"
    return f"{frames} damaged, and patched up by the decoder: {named}"


def _reaches_beyond(stop: int | str | None, probe: VideoProbe) -> bool:
    """Whether ``stop`` asks for frames after the last one found."""
    times_s = probe.timeline.times_s
    if isinstance(stop, str):
        return parse_seconds(stop) > float(times_s[-1] - times_s[0] + 1 / probe.frame_rate)
    return stop is None or stop > len(times_s)
