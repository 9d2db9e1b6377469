"""Frame numbers and times: parses what the user wrote, and finds the number of a frame from its time stamp."""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from flowreel.engine.config import SelectConfig
from flowreel.engine.errors import TooFewFramesError, UsageError, counted

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from flowreel.engine.data import Float64Array, Int64Array

NO_STAMP = -(1 << 63)  # stands for a missing time stamp, as in FFmpeg
MOST_REORDERED = 32  # frames; codecs reorder by at most 16, so stamps that are farther out of order are invalid
LONGEST_S = 1e12  # thirty thousand years; much longer times would overflow as frame numbers

_TIME = re.compile(r"(?:(?:(\d{1,12}):)?(\d{1,12}):)?(\d+(?:\.\d*)?|\.\d+)s?", re.ASCII)


def parse_seconds(text: str) -> float:
    """Seconds from ``"10s"``, ``"1.5s"``, ``"1:02.5"`` or ``"1:00:02.5"``. Raises UsageError for anything else."""
    text = text.strip()
    match = _TIME.fullmatch(text)
    if match is None or not (":" in text or text.endswith("s")):
        raise UsageError(f"a frame is a whole number, and a time is written as 10s, 1:02.5 or 1:00:02.5, got {text!r}")
    hours, minutes, seconds = match.groups()
    if (minutes and float(seconds) >= 60) or (hours and int(minutes) >= 60):
        raise UsageError(f"{text!r} is not a time: after a colon, minutes and seconds are below 60")
    whole = 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds)
    if whole > LONGEST_S:
        raise UsageError(f"a time of more than {LONGEST_S:.0e} seconds: {text[:40]!r}")
    return whole


def frame_number(where: int | str, times_s: Float64Array) -> int:
    """Number of the first frame at or after ``where``: a frame number, or a time since the first frame.

    Args:
        where: frame number, or a time as :func:`parse_seconds` reads it.
        times_s: (T,) seconds, presentation time of every frame of the source, ascending.
    """
    if isinstance(where, int):
        return where
    elapsed_s = times_s - times_s[0] if len(times_s) else times_s
    # A microsecond of tolerance: 0.04 written by hand must match the frame whose stamp is 0.04 minus a rounding error.
    return int(np.searchsorted(elapsed_s, parse_seconds(where) - 1e-6))


def require_order(select: SelectConfig) -> None:
    """Raises UsageError if both ends are times and the stop is not after the start."""
    if isinstance(select.start, str) and isinstance(select.stop, str):
        start_s, stop_s = parse_seconds(select.start), parse_seconds(select.stop)
        if stop_s <= start_s:
            raise UsageError(f"stop ({select.stop}) must be later than start ({select.start})")


def require_no_video_file(select: SelectConfig, what: str) -> None:
    """Raises UsageError for choices that only video files leave. ``what``: what the source is instead."""
    if select.stream not in (None, 0):
        raise UsageError(f"{what}, so there is no video stream {select.stream}")
    if select.decoder == "nvdec":
        raise UsageError(f"{what}, and NVDEC decodes only video files: use --decoder auto")


def select_frames(select: SelectConfig, times_s: Float64Array, name: str) -> range:
    """Numbers of the frames that ``select`` takes from a source whose frames are shown at ``times_s``.

    Raises TooFewFramesError, naming the source by ``name``, when fewer than two are left, and UsageError for a time
    that cannot be read or a stop time that is not after the start time.
    """
    require_order(select)
    count = len(times_s)
    start = frame_number(select.start, times_s)
    stop = count if select.stop is None else min(frame_number(select.stop, times_s), count)
    chosen = range(start, stop, select.step)
    if len(chosen) < 2:
        left = "" if len(chosen) == count else f", of which start, stop and step leave {len(chosen)}"
        raise TooFewFramesError(f"{name} has {counted(count, 'frame')}{left}: flow needs at least two")
    return chosen


@dataclass(frozen=True, eq=False)
class Timeline:
    """When each frame of a video is shown, in presentation order, known without decoding."""

    times_s: Float64Array  # (T,) seconds, ascending, as in the container, unshifted
    stamps: Int64Array | None  # (T,) the same in units of the stream's time base; None: cannot serve to number frames
    notes: tuple[str, ...]  # what had to be made up

    @classmethod
    def from_packets(
        cls,
        stamps: ArrayLike,
        time_base: Fraction,
        rate: Fraction,
        *,
        decoded: ArrayLike = (),
        keys: ArrayLike = (),
        trusted: bool = True,
    ) -> Timeline:
        """Order the stamps of a stream's packets.

        Args:
            stamps: presentation stamp of each packet that will be shown, in file order, in units of ``time_base``
                seconds; NO_STAMP where the container has none.
            rate: average frames per second, with which missing stamps are filled in.
            decoded: decoding stamp of each packet, likewise. keys: indices of the key frames' packets. Both serve to
                tell a jump back from mere reordering.
            trusted: False if the file stores no presentation stamps, only something like them (AVI). The stamps
                then give times in the right order, but a frame's own stamp does not tell its number.
        """
        raw = np.asarray(stamps, dtype=np.int64)
        period = float(1 / (rate * time_base))  # ticks per frame
        missing = int(np.count_nonzero(raw == NO_STAMP))
        if missing:
            ticks = _filled(raw, period)
            note = f"{missing} of {len(raw)} frames carry no time stamp: filled in at {_per_second(rate)}"
            return cls(_seconds(ticks, time_base), None, (note,))
        order = np.argsort(raw, kind="stable")
        far = bool(len(raw)) and np.abs(order - np.arange(len(raw))).max() > MOST_REORDERED
        if far or _jumps_back(raw, np.asarray(decoded, np.int64), np.asarray(keys, np.int64), period):
            ticks = raw[0] + period * np.arange(len(raw))
            note = f"the time stamps jump back: all replaced by an even {_per_second(rate)}"
            return cls(_seconds(ticks, time_base), None, (note,))
        ordered = raw[order]
        repeated = int(np.count_nonzero(np.diff(ordered) == 0))
        frames = "1 frame carries" if repeated == 1 else f"{repeated} frames carry"
        notes = (f"{frames} the same time stamp as the one before",) if repeated else ()
        return cls(_seconds(ordered, time_base), ordered if trusted and not repeated else None, notes)

    def __len__(self) -> int:
        return len(self.times_s)

    def number_of(self, stamp: int | None) -> int | None:
        """Number of the frame with this stamp; None if the stamp does not tell it."""
        if self.stamps is None or stamp is None:
            return None
        place = bisect_left(self.stamps, stamp)  # NumPy's search would release the GIL, once for each frame
        return place if place < len(self.stamps) and self.stamps[place] == stamp else None


def _jumps_back(shown: Int64Array, decoded: Int64Array, keys: Int64Array, period: float) -> bool:
    """Whether the stamps jump back, as in concatenated recordings or one that was restarted.

    Then a key frame is shown before a frame that comes earlier in the file, or some frame is shown before an earlier
    one is decoded. Reordering alone causes neither, however far it goes.
    """
    latest = np.maximum.accumulate(shown)  # over this packet and all before it
    if (shown[keys] < latest[keys]).any():
        return True
    if len(decoded) != len(shown):
        return False
    earliest = np.minimum.accumulate(shown[::-1])[::-1]  # over this packet and all after it
    known = decoded[:-1] != NO_STAMP
    return bool((decoded[:-1][known] - earliest[1:][known] > period).any())


def _filled(raw: Int64Array, period: float) -> Float64Array:
    """Each missing stamp becomes the one before it plus a period; those before the first known one count back from it.

    In a file with B-frames, the frame before may be shown later. So there the missing ones take the places that the
    known stamps leave free, unless more are free than are missing. If none is known, the first frame is shown at 0.
    """
    known = np.flatnonzero(raw != NO_STAMP)
    stamps = raw[known]
    if not len(known):
        known, stamps = np.zeros(1, np.int64), np.zeros(1, np.int64)
    elif (np.diff(stamps) < 0).any():
        shown = np.sort(stamps)
        places = known[0] + np.cumsum([0, *np.maximum(np.rint(np.diff(shown) / period), 1)]).astype(np.int64)
        if places[-1] < len(raw):
            known, stamps = places, shown
    every = np.arange(len(raw))
    last = np.maximum(np.searchsorted(known, every, "right") - 1, 0)  # the known one before each
    return np.sort(stamps[last] + period * (every - known[last]))


def _seconds(ticks: Int64Array | Float64Array, time_base: Fraction) -> Float64Array:
    return ticks.astype(np.float64) * time_base.numerator / time_base.denominator


def _per_second(rate: Fraction) -> str:
    return f"{float(rate):g} frames per second"
