"""What can be indexed as a flow store is, stored or not: the store itself, a cache, flow that is yet to be computed."""

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
        """(N,) seconds, of the second."""
        ...

    @property
    def frame(self) -> Int64Array:
        """(N,) number of the first frame in the source."""
        ...

    @property
    def frame_to(self) -> Int64Array: ...


class Flows(Placed, Protocol):
    """The flows with it."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...
    @property
    def available(self) -> int:
        """How many flows from the first on can be read."""
        ...

    def __getitem__(self, key: Any) -> npt.NDArray[np.float32]: ...


def coordinates(flows: Placed) -> dict[str, npt.NDArray[Any]]:
    """The times and frame numbers by the names of their arrays in a store, (N,) each."""
    values = (flows.timestamps_s, flows.timestamps_to_s, flows.frame, flows.frame_to)
    named = zip(COORDINATES.items(), values, strict=True)
    return {name: np.asarray(value, dtype) for (name, (dtype, _)), value in named}
