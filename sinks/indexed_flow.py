"""What can be indexed like a flow store: the store itself, a cache, or flow that is yet to be computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from flowreel.sinks.store_layout import COORDINATES

if TYPE_CHECKING:
    import numpy.typing as npt

    from flowreel.engine.data import Float64Array, Int64Array


class Placed(Protocol):
    """Where each of N flows lies in its source."""

    @property
    def timestamps_s(self) -> Float64Array:
        """(N,) seconds, of the first frame of each pair."""
        ...

    @property
    def timestamps_to_s(self) -> Float64Array:
        """(N,) seconds, of the second frame of each pair."""
        ...

    @property
    def frame(self) -> Int64Array:
        """(N,) number of the first frame in the source."""
        ...

    @property
    def frame_to(self) -> Int64Array: ...


class IndexedFlow(Placed, Protocol):
    """The flow fields themselves, too, indexed like a store."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    @property
    def available(self) -> int:
        """How many flows can be read, counted from the first without a gap."""
        ...

    def __getitem__(self, key: Any) -> npt.NDArray[np.float32]: ...


def coordinates(flows: Placed) -> dict[str, npt.NDArray[Any]]:
    """Times and frame numbers, (N,) each, keyed by the names of their arrays in a store."""
    values = (flows.timestamps_s, flows.timestamps_to_s, flows.frame, flows.frame_to)
    named = zip(COORDINATES.items(), values, strict=True)
    return {name: np.asarray(value, dtype) for (name, (dtype, _)), value in named}
