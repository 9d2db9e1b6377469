"""A Zarr store of flow that is not computed yet: a chunk is computed when it is read.

    zarr, xarray, dask ──> get "flow/c.7.0.0.0" ─┐
                           get "flow/c.3.0.0.0" ─┼─> gathered for 2 ms ─> flows 3, 7, 8 at once ─> their bytes
                           get "flow/c.8.0.0.0" ─┘

Zarr's readers request single chunks, about ten of them concurrently; a network is better fed several at once. So a
request made while nothing is being computed waits a moment for others, and requests made during a computation form the
next group.

A chunk is float32 without compression, as nobody keeps it. A flow that cannot be computed is an error for the request
that asked for it; the answer "no such key", which readers take for fill values, is given only for keys that the store
does not have.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import numpy as np
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from flowreel.engine.config import SinkConfig
from flowreel.sinks.codecs import flow_codec
from flowreel.sinks.compressors import BYTES, compress
from flowreel.sinks.indexed_flow import IndexedFlow, coordinates
from flowreel.sinks.store_checksums import ATTRIBUTES_CHECKSUM, attributes_checksum
from flowreel.sinks.store_layout import consolidate
from flowreel.sinks.store_metadata import store_metadata

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer, BufferPrototype

    from flowreel.engine.data import Float32Array, FlowInfo


GATHER_S = 0.002  # readers issue their requests within far less, and no flow is computed as fast
_FLOW = re.compile(r"flow/c\.(0|[1-9]\d*)\.0\.0\.0")


class ComputedStore(Store):
    """A read-only Zarr store, a group laid out like ``X.zarr`` except for shards, whose flow is computed as it is read.

    ``zarr.open_group(store)["flow"]``, ``xarray.open_zarr(store)`` and ``dask.array.from_zarr(store,
    component="flow")`` read it as it is. Errors are raised by the read that caused them. Pickling keeps what is
    needed to compute the flow again elsewhere.
    """

    def __init__(self, info: FlowInfo, flows: IndexedFlow) -> None:
        """
        Args:
            info: header of the flow.
            flows: computes it, in any thread; picklable if the store is to be.
        """
        # ``read_only`` says how a store was opened, and plain ``zarr.open_group(store)`` refuses one opened read-only.
        # That nothing can be written is said by ``supports_writes``.
        super().__init__(read_only=False)
        self._info = info
        self._flows = flows
        self._files = _files(info, flows)
        self._gathered: WeakKeyDictionary[asyncio.AbstractEventLoop, _Gathered] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[ComputedStore], tuple[FlowInfo, IndexedFlow]]:
        return ComputedStore, (self._info, self._flows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ComputedStore) and other._flows == self._flows

    def __hash__(self) -> int:
        return hash((ComputedStore, self._flows))

    def __repr__(self) -> str:
        return f"<ComputedStore of {self._flows!r}>"

    def with_read_only(self, read_only: bool = False) -> Store:
        """The same store with another flag, copied: Zarr's event loop calls this, and cannot make metadata anew."""
        other = ComputedStore.__new__(ComputedStore)
        other.__dict__ = self.__dict__ | {"_read_only": read_only, "_is_open": False}
        return other

    # -- Reading -------------------------------------------------------------------------------------------------

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        number = self._number(key)
        if number is not None:
            flow = await self._here().flow(number)
            data = np.ascontiguousarray(flow, "<f4").data.cast("B")
        elif key in self._files:
            data = memoryview(self._files[key])
        else:
            return None
        return prototype.buffer.from_bytes(data[_range(byte_range, len(data))])

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges))

    async def exists(self, key: str) -> bool:
        return key in self._files or self._number(key) is not None

    async def getsize(self, key: str) -> int:
        """Bytes, without computing them. Raises FileNotFoundError."""
        if self._number(key) is not None:
            return self._info.flow_bytes
        if key in self._files:
            return len(self._files[key])
        raise FileNotFoundError(key)

    def _number(self, key: str) -> int | None:
        """Number of the flow whose chunk has this key; None: it is not a chunk of flow."""
        match = _FLOW.fullmatch(key)
        return int(match[1]) if match and int(match[1]) < self._flows.shape[0] else None

    def _here(self) -> _Gathered:
        """The pending requests of the running event loop: Zarr's own, or that of a caller's coroutines."""
        return self._gathered.setdefault(asyncio.get_running_loop(), _Gathered(self._flows))

    # -- Listing -------------------------------------------------------------------------------------------------

    @property
    def supports_listing(self) -> bool:
        return True

    async def list(self) -> AsyncIterator[str]:
        for key in self._files:
            yield key
        for number in range(self._flows.shape[0]):
            yield f"flow/c.{number}.0.0.0"

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        names: dict[str, None] = {}
        async for key in self.list_prefix(folder):
            names[key.removeprefix(folder).split("/")[0]] = None
        for name in names:
            yield name

    # -- Never writing -------------------------------------------------------------------------------------------

    @property
    def supports_writes(self) -> bool:
        return False

    @property
    def supports_deletes(self) -> bool:
        return False

    @property
    def supports_partial_writes(self) -> Literal[False]:
        return False

    async def set(self, key: str, value: Buffer) -> None:
        raise ValueError(f"{key} cannot be written: what is computed as it is read is not kept")

    async def delete(self, key: str) -> None:
        raise ValueError(f"{key} cannot be deleted: it is computed as it is read")

    async def set_partial_values(self, key_start_values: Iterable[tuple[str, int, bytes]]) -> None:
        """Zarr 3.1.0 requires this method of every store."""
        for key, _, _ in key_start_values:
            await self.delete(key)

    async def delete_dir(self, prefix: str) -> None:
        await self.delete(prefix or "the group")

    async def clear(self) -> None:
        await self.delete("the group")


class _Gathered:
    """Pending requests for flows in one event loop. Used only by that loop's thread."""

    def __init__(self, flows: IndexedFlow) -> None:
        self._flows = flows
        self._waiting: dict[int, list[asyncio.Future[Float32Array]]] = {}
        self._serving: asyncio.Task[None] | None = None

    async def flow(self, number: int) -> Float32Array:
        """(2, H, W) pixels."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Float32Array] = loop.create_future()  # one each: cancelling one leaves the others
        self._waiting.setdefault(number, []).append(future)
        if self._serving is None:
            self._serving = loop.create_task(self._serve())
        return await future

    async def _serve(self) -> None:
        """Answers requests until none is pending."""
        taken: dict[int, list[asyncio.Future[Float32Array]]] = {}
        try:
            while self._waiting:
                await asyncio.sleep(GATHER_S)
                taken, self._waiting = self._waiting, {}
                await self._answer({number: taken[number] for number in sorted(taken)})
        finally:
            self._serving = None
            left, self._waiting = (*taken.values(), *self._waiting.values()), {}
            for future in chain.from_iterable(left):
                future.cancel()  # no effect, unless the loop itself is stopping

    async def _answer(self, asked: Mapping[int, Sequence[asyncio.Future[Float32Array]]]) -> None:
        wanted = [number for number, futures in asked.items() if not all(future.done() for future in futures)]
        if not wanted:
            return
        try:
            flows = await asyncio.to_thread(self._flows.__getitem__, wanted)
        except Exception as error:
            if len(wanted) > 1:  # which one failed? Compute each by itself, so that the others get their flow
                for number in wanted:
                    await self._answer({number: asked[number]})
                return
            _settle(asked[wanted[0]], error)
        else:
            for number, flow in zip(wanted, flows, strict=True):
                _settle(asked[number], flow)


def _settle(futures: Sequence[asyncio.Future[Float32Array]], result: Float32Array | Exception) -> None:
    for future in futures:
        if future.done():  # cancelled meanwhile
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def _files(info: FlowInfo, flows: IndexedFlow) -> dict[str, bytes]:
    """Everything but the flow, by key: metadata, times and frame numbers."""
    config = SinkConfig(max_error=0)
    metadata = store_metadata(info, config, flow_codec(info.height, info.width, config), None, flows.shape[0])
    attributes = metadata[""]["attributes"]
    del attributes["flowreel"]["codec"]
    attributes[ATTRIBUTES_CHECKSUM] = attributes_checksum(attributes["flowreel"])
    metadata["flow"]["codecs"] = [BYTES]
    consolidate(metadata)
    files = {f"{name}/zarr.json".lstrip("/"): json.dumps(content).encode() for name, content in metadata.items()}
    return files | {f"{name}/c/0": compress(values, "blosc") for name, values in coordinates(flows).items()}


def _range(request: ByteRequest | None, length: int) -> slice:
    """Which of ``length`` bytes are requested."""
    if request is None:
        return slice(None)
    if isinstance(request, RangeByteRequest):
        return slice(request.start, request.end)
    if isinstance(request, OffsetByteRequest):
        return slice(request.offset, None)
    if isinstance(request, SuffixByteRequest):
        return slice(max(0, length - request.suffix), None)
    raise TypeError(f"no request for bytes that is known: {request!r}")
