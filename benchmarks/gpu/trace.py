"""Analyses what torch's profiler recorded of a whole run: what the GPU did when, and each thread's CUDA calls."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch.autograd import DeviceType

Interval = tuple[int, int]  # start and end, ns

CALL = re.compile(r"cu(da)?[A-Z]")  # names of functions of CUDA's runtime and driver
KINDS = (  # by a part of the name of a kernel or copy; the first match counts
    ("copy to the card", ("memcpy htod",)),
    ("copy to the host", ("memcpy dtoh",)),
    ("copy on the card", ("memcpy",)),
    ("memset", ("memset",)),
    ("colours", ("yuv_to_rgb_",)),
    ("quantise", ("quantise_",)),
)
NETWORK = "network"  # all other kernels
NETWORK_RUNS = "a kernel of the network runs"
COPIES = ("copy to the card", "copy to the host", "copy on the card", "memset")
REMARKS = ("gpu_user_annotation", "overhead", "cuda_sync", "cuda_event")  # activity types that are no work
EDGES = 0.2  # of the time from first to last event, cut off at either end, where the pipeline fills and drains
A_PAUSE_NS = 200_000  # longer than any gap between kernels of one batch


class Event(NamedTuple):
    """Work on the GPU, or a call on the host."""

    name: str
    start_ns: int
    end_ns: int
    lane: int  # number of the stream, or of the thread in any of its numberings (see ``threads_of``)
    on_card: bool
    correlation: int  # equal for a call and the work it launched; 0: none


def events_of(profiler: Any, calls: re.Pattern[str] = CALL) -> list[Event]:
    """The work on the GPU and the calls on the host: raw events, since averages no longer know the calling thread.

    profiler: a ``torch.profiler.profile`` that has ended.
    """
    found = []
    for event in profiler.profiler.kineto_results.events():
        on_card = event.device_type() == DeviceType.CUDA
        if event.duration_ns() > 0 and _is_work(event) if on_card else calls.match(event.name()):
            start_ns = event.start_ns()
            lane, end_ns = event.device_resource_id(), start_ns + event.duration_ns()
            found.append(Event(event.name(), start_ns, end_ns, lane, on_card, event.correlation_id()))
    return found


def _is_work(event: Any) -> bool:
    """Whether a GPU event is work done there, not an annotation or overhead."""
    asked = (
        getattr(event, name, lambda: None)() for name in ("is_user_annotation", "activity_type")
    )  # newer torch versions have these
    annotation, kind = asked
    return not annotation and kind not in REMARKS


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of the intervals, as ordered intervals without overlaps."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> int:
    """Total length of intervals that do not overlap."""
    return sum(end - start for start, end in intervals)


def gaps(busy: Sequence[Interval], within: Interval) -> list[Interval]:
    """The parts of ``within`` outside all intervals, which are ordered and do not overlap."""
    free, at = [], within[0]
    for start, end in busy:
        if start > at:
            free.append((at, min(start, within[1])))
        at = max(at, end)
    return [*free, *([(at, within[1])] if at < within[1] else [])]


def shared(one: Sequence[Interval], other: Sequence[Interval]) -> int:
    """Total time in both lists of intervals, each ordered and without overlaps."""
    total, i, j = 0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total


def middle(events: Sequence[Event]) -> Interval:
    """The time when the pipeline is full; empty if there are no events."""
    first = min((event.start_ns for event in events), default=0)
    last = max((event.end_ns for event in events), default=0)
    edge = int(EDGES * (last - first))
    return first + edge, last - edge


def clipped(events: Iterable[Event], within: Interval) -> Iterator[Event]:
    """The events that overlap ``within``, cut to it."""
    for event in events:
        start, end = max(event.start_ns, within[0]), min(event.end_ns, within[1])
        if start < end:
            yield event._replace(start_ns=start, end_ns=end)


def kind_of(name: str) -> str:
    """The kind of work of a kernel or copy, by its name."""
    low = name.lower()
    return next((kind for kind, words in KINDS if any(word in low for word in words)), NETWORK)


def threads_of(lanes: Iterable[int], known: Mapping[int, str]) -> dict[int, str]:
    """The threads' names, by the numbers that the profiler uses for them.

    known: names by the system's thread ID and by pthread's, of which the profiler keeps 32 bits, signed or unsigned.
    """
    short = {number & 0xFFFFFFFF: name for number, name in known.items()}
    return {
        lane: short.get(lane & 0xFFFFFFFF) or short.get(-lane & 0xFFFFFFFF) or f"another thread, {lane}"
        for lane in lanes
    }


class Card(NamedTuple):
    """What the GPU did during an interval."""

    shares: dict[str, float]  # fractions of the time: any kernel runs, the network's, any copy, nothing
    rows: list[dict[str, Any]]  # one for each kind of work and stream, longest first
    pauses: list[Interval]  # longer than ``A_PAUSE_NS`` without a kernel of the network


def card(events: Sequence[Event], within: Interval, known: Mapping[int, str]) -> Card:
    """Summarises the GPU's events within an interval. The calls among ``events`` tell which thread launched them."""
    whole = max(within[1] - within[0], 1)
    callers = {event.correlation: event.lane for event in events if not event.on_card and event.correlation}
    names = threads_of(set(callers.values()), known)
    groups: dict[tuple[str, int], list[Event]] = defaultdict(list)
    for event in clipped((event for event in events if event.on_card), within):
        groups[kind_of(event.name), event.lane].append(event)

    def busy(*kinds: str) -> list[Interval]:
        return union((e.start_ns, e.end_ns) for (kind, _), some in groups.items() if kind in kinds for e in some)

    kernels = (NETWORK, "colours", "quantise")
    network = busy(NETWORK)
    shares = {
        "a kernel runs": length(busy(*kernels)) / whole,
        NETWORK_RUNS: length(network) / whole,
        "a copy runs": length(busy(*COPIES)) / whole,
        "nothing runs": 1 - length(busy(*kernels, *COPIES)) / whole,
    }
    rows: list[dict[str, Any]] = []
    for (kind, stream), some in groups.items():
        took = length(union((event.start_ns, event.end_ns) for event in some))
        started_by = Counter(names[callers[event.correlation]] for event in some if event.correlation in callers)
        slowest = Counter[str]()
        for event in some:
            slowest[event.name] += event.end_ns - event.start_ns
        rows.append(
            {
                "on the card": kind,
                "stream": stream,
                "started by": [name for name, _ in started_by.most_common(2)],
                "count": len(some),
                "ms": took / 1e6,
                "share": took / whole,
                "mostly": [name[:60] for name, _ in slowest.most_common(3)],
            }
        )
    long = [(start, end) for start, end in gaps(network, within) if end - start >= A_PAUSE_NS]
    return Card(shares, sorted(rows, key=lambda row: -row["ms"]), long)


def waits(pauses: Sequence[Interval], within: Interval) -> dict[str, object]:
    """A row about the times when the network waits."""
    return {
        "the network waits": f"longer than {A_PAUSE_NS / 1e6} ms",
        "count": len(pauses),
        "ms": length(pauses) / 1e6,
        "share": length(pauses) / max(within[1] - within[0], 1),
        "longest ms": max((end - start for start, end in pauses), default=0) / 1e6,
    }


def calls(
    events: Sequence[Event], within: Interval, known: Mapping[int, str], pauses: Sequence[Interval], most: int
) -> list[dict[str, object]]:
    """Rows for the ``most`` calls of each thread that took longest, with their time during ``pauses``."""
    groups: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in clipped((event for event in events if not event.on_card), within):
        groups[event.lane, event.name].append(event)
    names, whole = threads_of({lane for lane, _ in groups}, known), max(within[1] - within[0], 1)
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for (lane, name), some in groups.items():
        took = [event.end_ns - event.start_ns for event in some]
        meanwhile = shared(union((event.start_ns, event.end_ns) for event in some), pauses)
        rows[lane].append(
            {
                "thread": names[lane],
                "call": name,
                "count": len(some),
                "ms": sum(took) / 1e6,
                "share": sum(took) / whole,
                "mean us": sum(took) / len(took) / 1e3,
                "longest us": max(took) / 1e3,
                "ms in pauses": meanwhile / 1e6,
            }
        )
    told = (sorted(some, key=lambda row: -row["ms"])[:most] for some in rows.values())
    return sorted(itertools.chain(*told), key=lambda row: -row["ms"])
