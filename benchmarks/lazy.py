"""Lazy flow: what indexing costs over streaming, and what a cache saves over computing.

Bars: reading forward takes at most 5 % longer than ``stream`` takes for the same flows, and reading from a cache is at
least 20 times faster than computing. In the comparison with ``stream`` every way of reading starts cold, as ``stream``
does: it loads the network and opens the decoder. Reading from a cache is compared with computing on flow that is open
already, with the cache's files in the system's page cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flowreel
from benchmarks.data import found
from benchmarks.measure import Effort, Sample, alternated, ratio

CLIP = "person_asl_walk_640x480.mkv"
SLICE_BATCHES = 4  # whole batches per slice, so that decoding and computing overlap
MODELS = ("FlowNet2C", "FlowNet2CSS")  # the lightest, which shows overhead best, and the default

Flow = flowreel.LazyFlow
Reading = Callable[[Flow], Iterable[object]]


def in_order(flow: Flow) -> Iterator[object]:
    yield from flow


def by_slices(flow: Flow) -> Iterator[object]:
    step = SLICE_BATCHES * flow.batch
    for first in range(0, len(flow), step):
        yield flow[first : first + step]


def one_by_one(flow: Flow) -> Iterator[object]:
    for number in range(len(flow)):
        yield flow[number]


def by_zarr(flow: Flow) -> Iterator[object]:
    import zarr

    array: Any = zarr.open_group(flow.store())["flow"]
    step = SLICE_BATCHES * flow.batch
    for first in range(0, len(flow), step):
        yield array[first : first + step]


WAYS: dict[str, Reading] = {
    "for flow in flows": in_order,
    f"flows[a:b], {SLICE_BATCHES} batches": by_slices,
    "flows[n], one by one": one_by_one,
    f"store(), {SLICE_BATCHES} batches": by_zarr,
}


def run(short: bool = False) -> dict[str, object]:
    """For each model: ``stream``, then each way to read the same flows forward, computed and from a full cache."""
    clip = found("videos", CLIP)
    flows = 24 if short else 72
    effort = Effort(least=2, most=5, cap_s=12) if short else Effort(least=7, most=15, settled=0.005, cap_s=240)
    rows: list[dict[str, Any]] = []
    for model in MODELS[:1] if short else MODELS:
        options = {"model": model, "stop": flows + 1}
        rows += model_rows(clip, options, flows, effort)
    return {"clip": CLIP, "flows": flows, "rows": rows}


def model_rows(clip: Path, options: dict[str, Any], flows: int, effort: Effort) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        with flowreel.open(clip, cache=cache, **options) as flow:
            flow[:]
        computed: dict[str, Callable[[], object]] = {"stream": lambda: use(flowreel.stream(clip, **options))}
        computed |= {name: partial(opened, clip, options, way) for name, way in WAYS.items()}
        took = alternated(computed, effort)
        with flowreel.open(clip, **options) as flow, flowreel.open(clip, cache=cache, **options) as kept:
            cached = {name: partial(use_all, way, kept) for name, way in WAYS.items()}
            read = alternated({"computing": partial(use_all, in_order, flow), **cached}, effort)
            assert kept.statistics.computed == 0
    rows = [
        {
            "model": options["model"],
            "read": name,
            "from": "model",
            "flows/s": Sample.of(seconds).rate(flows).cell(),
            "seconds / stream's": ratio(seconds, took["stream"]),
        }
        for name, seconds in took.items()
    ]
    return rows + [
        {
            "model": options["model"],
            "read": name,
            "from": "cache",
            "flows/s": Sample.of(read[name]).rate(flows).cell(),
            "throughput / computing's": ratio(read["computing"], read[name]),
        }
        for name in cached
    ]


def opened(clip: Path, options: dict[str, Any], way: Reading) -> None:
    with flowreel.open(clip, **options) as flow:
        use_all(way, flow)


def use_all(way: Reading, flow: Flow) -> None:
    use(way(flow))


def use(items: Iterable[object]) -> None:
    """Consumes all items, and frees each one before taking the next."""
    for _ in items:
        pass
