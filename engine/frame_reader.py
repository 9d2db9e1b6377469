"""Frames by number, in any order: decoding reads forward where it can, and decoded frames are kept for a while.

    wanted: 103          kept 96..101 | decoder stands at 102 ──▶ 102 103           reads on
    wanted: 98           kept 96..101                                               nothing is decoded
    wanted: 310          key frame 300 ──▶ 300 ... 310, all kept                    starts over there, once

Frames decoded on the way to the wanted one are kept as well, in the decoder's own format, and converted to RGB only on
request: reading backwards then costs one pass through each stretch between key frames.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from weakref import WeakSet

from flowreel.engine.data import Frame
from flowreel.engine.errors import TruncatedSourceError
from flowreel.engine.forked import ABANDONED
from flowreel.engine.protocols import Picture, RandomAccess


class FrameReader:
    """Gives frames of one source by number. For one thread at a time. A forked process reads with its own decoder.

    Args:
        source: is left open; several readers may share it.
        most_bytes: limit of the decoded frames that are kept, in bytes. The least recently used are dropped first; 0
            keeps none.
    """

    def __init__(self, source: RandomAccess, most_bytes: int) -> None:
        self.decoded = 0  # frames decoded, including those on the way to requested ones
        self.seeks = 0  # times decoding started over, or first started past the first frame; images: 0
        self.kept_bytes = 0
        self._source = source
        self._most_bytes = most_bytes
        self._kept: OrderedDict[int, Picture] = OrderedDict()  # least recently used first
        self._decoder: Generator[Picture, None, None] | None = None
        self._stands_at = 0  # number of the frame that the decoder yields next
        _READERS.add(self)

    def frame(self, number: int) -> Frame:
        """Raises TruncatedSourceError for a frame that the container lists but that does not decode; SourceError when
        the source is gone or has been replaced."""
        frame = (self._kept.get(number) or self._decode(number)).develop()
        self._keep(Picture(number, frame.rgb.nbytes, lambda: frame))
        return frame

    def stretches(self, stretches: Iterable[Sequence[int]]) -> Iterator[Frame]:
        """The frames of each stretch in turn; each stretch is a clip of its own, so no pair crosses two stretches."""
        for clip, numbers in enumerate(stretches):
            for number in numbers:
                yield replace(self.frame(number), clip=clip)

    def close(self) -> None:
        """Closes the decoder and drops the kept frames. A later read opens the decoder again."""
        self._leave()
        self._kept.clear()
        self.kept_bytes = 0

    def _decode(self, wanted: int) -> Picture:
        if self._decoder is None or not self._reads_on(wanted):
            self._start(wanted)
        assert self._decoder is not None
        found: Picture | None = None
        try:
            while found is None and self._stands_at <= wanted:
                picture = next(self._decoder, None)
                if picture is None:
                    break
                self.decoded += 1
                self._stands_at = picture.number + 1
                if picture.number == wanted:
                    found = picture
                else:
                    self._keep(picture)
        except BaseException:
            self._leave()
            raise
        if found is None:
            name = self._source.info.source.name
            raise TruncatedSourceError(
                f"frame {wanted} of {name} does not decode, although the file lists it: its flow cannot be computed. "
                "flowreel run --tolerate-truncation takes what is left as the whole"
            )
        return found

    def _reads_on(self, wanted: int) -> bool:
        """Whether decoding on costs less than starting over."""
        if wanted < self._stands_at:
            return False
        return self._source.standing_before(wanted) < self._stands_at + self._patience

    @property
    def _patience(self) -> int:
        """Frames that are decoded rather than skipped by a seek; at least the selection's step, so that reading forward
        at that step never seeks."""
        few = self._source.reopening_frames
        return max(few, self._source.wanted.step) if few else 1

    def _start(self, wanted: int) -> None:
        start = self._source.standing_before(wanted)
        if self._source.reopening_frames and (start > 0 or self._decoder is not None):
            self.seeks += 1
        self._leave()
        self._decoder = self._source.pictures_from(wanted)
        self._stands_at = start

    def _leave(self) -> None:
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.close()

    def _keep(self, picture: Picture) -> None:
        old = self._kept.pop(picture.number, None)
        self.kept_bytes += picture.size_bytes - (0 if old is None else old.size_bytes)
        self._kept[picture.number] = picture
        while self.kept_bytes > self._most_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.kept_bytes -= dropped.size_bytes

    def _abandon(self) -> None:
        """In a forked process: leaves alone what belongs to the parent."""
        ABANDONED.append((self._decoder, self._kept))
        self._decoder, self._kept, self.kept_bytes = None, OrderedDict(), 0


def _abandon_all() -> None:
    for reader in list(_READERS):
        reader._abandon()


_READERS: WeakSet[FrameReader] = WeakSet()
if hasattr(os, "register_at_fork"):  # where there are forks
    os.register_at_fork(after_in_child=_abandon_all)
