"""What the calls that a run makes for every item cost its threads: alone, beside a running network, beside encoders.

A run's stages share the driver, the GIL and the memory bandwidth. Where one stage delays the others, calls that take
microseconds alone take longer beside it. This shows which calls, and beside what.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.made_clips import written_clip
from benchmarks.gpu.network import DRY, TIMED, inputs, made
from benchmarks.gpu.nvdec import numbered
from benchmarks.measure import Sample
from flowreel.engine.compiled import graphs
from flowreel.engine.config import SelectConfig
from flowreel.engine.data import Frame
from flowreel.engine.device import Streams
from flowreel.engine.protocols import Source
from flowreel.engine.sources import open_source
from flowreel.kernels import channel_norm
from flowreel.sinks.compressors import compress
from flowreel.sinks.parallel import encode_workers

Call = Callable[[], object]
UNDER_WAY = 2  # batches that the network in the background may have in flight
CAP_S = 0.25  # for timing one call beside one kind of work


def run(findings: Findings, settings: Settings) -> None:
    """Microseconds per call: median with quartiles, and 90th percentile."""
    network, humble = _network(settings), _network(settings, priority=0)
    encoders = 2 if settings.dry else encode_workers("cuda:0")
    with closing(_decoded(settings)) as frames:
        calls = {"a frame decoded": lambda: next(frames), **_calls_of_the_host()}
        calls |= _calls_of_the_card(network) if settings.device == "cuda" else {}
        for beside, company in (
            ("nothing", {}),
            ("a network", {"network": _batches(network, settings)}),
            ("a network without priority", {"network": _batches(humble, settings)}),
            (f"{encoders} encoders", {f"encoder {number}": _encoding() for number in range(encoders)}),
        ):
            with ExitStack() as stack:
                for name, work in company.items():
                    stack.enter_context(_going_on(name, work))
                for name, call in calls.items():
                    findings.attempt(f"{name}, beside {beside}", partial(_file, findings, settings, name, call, beside))
    findings.note("host calls: microseconds a call, of one thread, while others do what stands under beside")


def _file(findings: Findings, settings: Settings, name: str, call: Call, beside: str) -> None:
    findings.row(call=name, beside=beside, **_microseconds(call, settings))


def _microseconds(call: Call, settings: Settings) -> dict[str, Any]:
    call()
    taken: list[float] = []
    end_s = time.perf_counter() + (0.005 if settings.dry else CAP_S)
    while len(taken) < 3 or (len(taken) < 500 and time.perf_counter() < end_s):
        began_s = time.perf_counter()
        call()
        taken.append(1e6 * (time.perf_counter() - began_s))
        time.sleep(1e-4)  # lets other threads run, as a stage does between items
    return {"us": Sample.of(taken).cell(), "us_nine_in_ten": float(np.quantile(taken, 0.9))}


def _calls_of_the_host() -> dict[str, Call]:
    some = bytes(8192)
    return {
        "the interpreter's lock let go and taken": lambda: zlib.crc32(some),
        "4 MB of new memory": lambda: np.ones(1 << 20, np.float32),
        "a thread begun and ended": _thread_begun,
    }


def _calls_of_the_card(network: Call) -> dict[str, Call]:
    device = torch.device("cuda", torch.cuda.current_device())
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    event = stream.record_event()
    tensor, flow = torch.zeros(1, 2, 8, 8, device=device), torch.zeros(8, 2, 436, 1024, device=device)
    pinned = {"28 MB": torch.empty_like(flow, device="cpu").pin_memory(), "512 B": tensor.cpu().pin_memory()}

    def current() -> None:
        with torch.cuda.stream(stream):
            pass

    def used_elsewhere() -> None:
        torch.empty(1 << 20, device=device).record_stream(stream)

    def brought(size: str, source: torch.Tensor) -> Call:
        def bring() -> None:
            pinned[size].copy_(source, non_blocking=True)
            asleep: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            asleep.record()
            asleep.synchronize()

        return bring

    items = Streams(device).on_stream(_passing)(_frames(device))
    return {
        "an event made and recorded": stream.record_event,
        "an event waited for by a stream": lambda: stream.wait_event(event),
        "a stream made current, and left": current,
        "memory of the card taken and given back": lambda: torch.empty(1 << 20, device=device),
        "the same, used on another stream": used_elsewhere,
        "a kernel of torch's begun": lambda: tensor.add_(1),
        "a kernel of ours begun": lambda: channel_norm(tensor),
        "an item handed on": lambda: next(items),
        "512 B brought to the host": brought("512 B", tensor),
        "28 MB brought to the host": brought("28 MB", flow),
        "a batch of the network begun": _begun(network),
    }


def _begun(network: Call) -> Call:
    """Launches a batch without waiting for it, except for every fourth, so that the GPU's queues never fill up."""
    count = 0

    def begin() -> None:
        nonlocal count
        network()
        count += 1
        if count % 4 == 0:
            torch.cuda.synchronize()  # one call in four takes as long as the work, which leaves the median unaffected

    return begin


def _passing(frames: Iterator[Frame]) -> Iterator[Frame]:
    yield from frames


def _frames(device: torch.device) -> Iterator[Frame]:
    rgb = torch.zeros(3, 436, 1024, dtype=torch.uint8, device=device)
    number = 0
    while True:
        yield Frame(rgb.view_as(rgb), number, 0.0)
        number += 1


def _thread_begun() -> None:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def _network(settings: Settings, priority: int = graphs.PRIORITY) -> Call:
    """priority: of its captured work; the stages' own streams have ``device.STAGE_PRIORITY``."""
    one = DRY[-1] if settings.dry else TIMED[0]
    before, graphs.PRIORITY = graphs.PRIORITY, priority
    try:
        fast, frames = made(one, settings), inputs(one, settings, 2)
        fast(*frames)
    finally:
        graphs.PRIORITY = before
    return lambda: fast(*frames)


def _decoded(settings: Settings) -> Generator[Frame, None, None]:
    """Frames of a clip, repeated endlessly, on a stage's stream, from the decoder that a run would choose."""
    width, height, count = (96, 64, 9) if settings.dry else (1024, 436, 1600)
    clip, device = written_clip(settings.folder, width, height, count), numbered(settings.device)
    while True:
        with closing(open_source(clip, SelectConfig(), device)) as source:

            def frames(_: Iterator[Frame], source: Source = source) -> Iterator[Frame]:
                return iter(source)

            yield from Streams(torch.device(device)).on_stream(frames)(iter(()))


def _batches(network: Call, settings: Settings) -> Call:
    """One batch after the other, a few under way at once, on a stream of its own."""
    events: list[Any] = []

    def batch() -> None:
        network()
        if settings.device == "cuda":
            events.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            events[-1].record()
            if len(events) > UNDER_WAY:
                events.pop(0).synchronize()

    return batch


def _encoding() -> Call:
    """Compresses a quantised flow of 1024x436 to about a third, as with random weights."""
    walk = np.random.default_rng(0).normal(0, 48, (2, 436, 1024)).cumsum(-1)
    steps = np.rint(walk).astype(np.int32)
    return lambda: compress(steps, "blosc")


@contextmanager
def _going_on(name: str, work: Call) -> Iterator[None]:
    """Repeats ``work`` in a thread of its own until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        # A current stream belongs to its thread: without this, what is measured would queue behind this work.
        own = torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext()
        with own, torch.no_grad():
            while not ended.is_set():
                work()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
