"""Flow as a lazy xarray.DataArray, which reads or computes what is accessed. Imported only by ``to_xarray``.

Raises, when imported, MissingDependencyError if xarray is not installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flowreel.engine.errors import MissingDependencyError
from flowreel.sinks.indexed_flow import IndexedFlow, coordinates

try:
    import xarray
    from xarray.backends import BackendArray
    from xarray.core import indexing
except ImportError as error:
    raise MissingDependencyError(f"to_xarray needs xarray: pip install xarray ({error})") from error

DIMENSIONS = ("time", "component", "y", "x")


def data_array(store: IndexedFlow) -> xarray.DataArray:
    """The available flows, (time, component, y, x) float32, with the names that other readers of the store see."""
    count = store.available
    coords = {name: ("time", values[:count]) for name, values in coordinates(store).items()}
    flow = indexing.LazilyIndexedArray(_LazyFlow(store, count))
    attributes = {"units": "pixel", "long_name": "optical flow: component 0 right, component 1 down"}
    return xarray.DataArray(xarray.Variable(DIMENSIONS, flow), coords=coords, name="flow", attrs=attributes)


class _LazyFlow(BackendArray):
    """What xarray asks of an array on disk: a shape, a dtype, and reading by numbers, slices and 1-D arrays."""

    def __init__(self, store: IndexedFlow, count: int) -> None:
        self._store = store
        self.shape = (count, *store.shape[1:])
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        outer = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, outer, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        """Indexes each axis by itself. The store takes arrays for the first only; the others are applied afterwards."""
        first, *inside = key
        if isinstance(first, slice):
            first = np.arange(self.shape[0])[first]  # of an unfinished store, only what is present
        flow = self._store[(first, *(slice(None) if isinstance(part, np.ndarray) else part for part in inside))]
        axis = flow.ndim
        for part in reversed(inside):
            axis -= 0 if isinstance(part, int | np.integer) else 1
            if isinstance(part, np.ndarray):
                flow = np.take(flow, part, axis=axis)
        return flow
