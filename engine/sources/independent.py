"""Sources whose frames do not depend on each other, such as images and rendered scenes: any can be read first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from flowreel.engine.data import FlowInfo, Frame
from flowreel.engine.errors import concerning
from flowreel.engine.protocols import Picture

if TYPE_CHECKING:
    from flowreel.engine.data import Float64Array


class IndependentFrames(ABC):
    """A ``RandomAccess`` source (``engine/protocols.py``) whose subclass provides ``frame``."""

    reopening_frames = 0

    def __init__(self, info: FlowInfo, wanted: range, times_s: Float64Array, decoder: str, notes: list[str]) -> None:
        self.info = info
        self.wanted = wanted
        self.times_s = times_s
        self.decoder = decoder
        self.notes = notes
        self.losses: list[str] = []
        self._closed = False

    @abstractmethod
    def frame(self, number: int) -> Frame:
        """The frame with this number in the source."""

    def standing_before(self, number: int) -> int:
        return number

    def pictures_from(self, number: int) -> Generator[Picture, None, None]:
        for place in range(number, self.wanted[-1] + 1):
            frame = self.frame(place)
            yield Picture(place, frame.rgb.nbytes, lambda frame=frame: frame)  # type: ignore[misc]

    def __iter__(self) -> Iterator[Frame]:
        for number in self.wanted:
            if self._closed:
                return
            with concerning(number):
                frame = self.frame(number)
            yield frame
            del frame  # not kept alive while the next one is made

    def close(self) -> None:
        self._closed = True
