"""What torch's profiler saw of a whole run: when the card worked and at what, and what each thread asked of CUDA."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch.autograd import DeviceType

Interval = tuple[int, int]  # ns, its start and its end

CALL = re.compile(r"cu(da)?[A-Z]")  # as functions of CUDA's runtime and driver are called
KINDS = (  # what a name on the card begins with or holds, in the order in which it is asked
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
REMARKS = ("gpu_user_annotation", "overhead", "cuda_sync", "cuda_event")  # of the profiler's kinds
EDGES = 0.2  # of the time from the first event to the last, at either end: filling and emptying the pipeline
A_PAUSE_NS = 200_000  # longer than what lies between the kernels of one batch


class Event(NamedTuple):
    """One thing that took time, on the card or in a call from the host."""

    name: str
    start_ns: int
    end_ns: int
    lane: int  # number of the stream, or of the thread, whichever of its numbers that is
    on_card: bool
    correlation: int  # the same for a call and for what it started; 0: none


def events_of(profiler: Any, calls: re.Pattern[str] = CALL) -> list[Event]:
    """Everything on the card, and the calls from the host: raw, since averages no longer know whose a call was.

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
    """Whether something that is told of the card was done there, and is no remark."""
    asked = (
        getattr(event, name, lambda: None)() for name in ("is_user_annotation", "activity_type")
    )  # newer ones know
    annotation, kind = asked
    return not annotation and kind not in REMARKS


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time without overlaps, in order."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> int:
    """Of intervals that do not overlap."""
    return sum(end - start for start, end in intervals)


def gaps(busy: Sequence[Interval], within: Interval) -> list[Interval]:
    """What of ``within`` lies in none of the intervals, which are in order and do not overlap."""
    free, at = [], within[0]
    for start, end in busy:
        if start > at:
            free.append((at, min(start, within[1])))
        at = max(at, end)
    return [*free, *([(at, within[1])] if at < within[1] else [])]


def shared(one: Sequence[Interval], other: Sequence[Interval]) -> int:
    """Time that lies in both, each in order and without overlaps."""
    total, i, j = 0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total


def middle(events: Sequence[Event]) -> Interval:
    """Where the pipeline is full. Of no events: nothing."""
    first = min((event.start_ns for event in events), default=0)
    last = max((event.end_ns for event in events), default=0)
    edge = int(EDGES * (last - first))
    return first + edge, last - edge


def clipped(events: Iterable[Event], within: Interval) -> Iterator[Event]:
    """Those that reach into that time, and of each what lies there."""
    for event in events:
        start, end = max(event.start_ns, within[0]), min(event.end_ns, within[1])
        if start < end:
            yield event._replace(start_ns=start, end_ns=end)


def kind_of(name: str) -> str:
    """What something on the card is for."""
    low = name.lower()
    return next((kind for kind, words in KINDS if any(word in low for word in words)), NETWORK)


def threads_of(lanes: Iterable[int], known: Mapping[int, str]) -> dict[int, str]:
    """Names of threads, by the numbers that the profiler has for them.

    known: names by the system's number and by pthread's, of which the profiler keeps 32 bits, with a sign or without.
    """
    short = {number & 0xFFFFFFFF: name for number, name in known.items()}
    return {
        lane: short.get(lane & 0xFFFFFFFF) or short.get(-lane & 0xFFFFFFFF) or f"another thread, {lane}"
        for lane in lanes
    }


class Card(NamedTuple):
    """What the card did in a stretch of time."""

    shares: dict[str, float]  # of the time: any kernel, the network's, any copy, nothing at all
    rows: list[dict[str, Any]]  # a line for each kind of work on each stream, longest first
    pauses: list[Interval]  # no kernel of the network runs, for longer than between the kernels of one batch


def card(events: Sequence[Event], within: Interval, known: Mapping[int, str]) -> Card:
    """Of all events those on the card, in that time; who started them is told by the calls among the events."""
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
    """A line on the times when the network waits."""
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
    """A line for each of the calls that took a thread longest, and how much of it fell into ``pauses``."""
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
