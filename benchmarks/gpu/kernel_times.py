"""How fast the kernels are beside other implementations, and how close to the GPU's limits.

A kernel takes microseconds, and launching it from Python takes longer. So several calls are captured in one CUDA graph,
as in the engine, and its replays are timed: only the GPU's own time remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks import kernels as cases
from benchmarks.ceilings import Ceilings, best, rows_of, share_of_limit
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.kernels import make_small, relative
from benchmarks.gpu.original import OriginalCorrelation
from benchmarks.measure import ONCE, Action, Effort, Sample, Skipped, alternated, device_sync, ratio, seconds_of
from flowreel.engine.compiled.graphs import CaptureError, graph_of
from flowreel.kernels.correlation import correlation_definition

ORIGINAL = "flownet2-pytorch's kernel, its maps already zero"
A_REPLAY_S = 0.02  # target duration of a replay, as far as the number of calls allows
LEAST, MOST = 8, cases.MOST_INPUTS + 1  # calls in one graph: each has its own inputs, so that large ones are not cached


def run(findings: Findings, settings: Settings) -> None:
    """All implementations of every operation in turn. The GPU's limits are measured in the same run."""
    make_small(settings)
    limits = cache(partial(_limits, settings))
    for kernel in cases.kernels(settings.device):
        name = f"{kernel.name} {kernel.precision} {kernel.shape}"
        findings.attempt(name, partial(_time, findings, settings, kernel, limits))
    if settings.original is None:
        findings.skip("flownet2-pytorch's correlation kernel", "give its file with --original")


def _limits(settings: Settings) -> Ceilings:
    """The throughput that matrix products, convolutions and copies reach on this GPU."""
    return {} if settings.dry else best(rows_of("cuda", Effort(least=3, most=8, cap_s=0.5)))


def _time(findings: Findings, settings: Settings, kernel: cases.Kernel, limits: Callable[[], Ceilings]) -> None:
    ways = dict(kernel.ways)
    if settings.original is not None and kernel.name == "correlation" and settings.device == "cuda":
        try:
            ways[ORIGINAL] = _original(findings, Path(settings.original), kernel.precision)
        except Exception as error:  # of any kind, since the file is not ours
            findings.skip(f"{ORIGINAL}, {kernel.precision}", error)
    effort = ONCE if settings.dry else Effort(least=5, most=40, cap_s=1.0)
    sync = device_sync(settings.device)
    replays = {way: repeated(action, settings.device) for way, action in ways.items()}
    timed = alternated({way: action for way, (action, _, _) in replays.items()}, effort, sync)
    found = {way: [s / replays[way][1] for s in seconds] for way, seconds in timed.items()}
    for way, seconds in found.items():
        sample = Sample.of(seconds)
        findings.row(
            op=kernel.name,
            shape=kernel.shape,
            precision=kernel.precision,
            by=way,
            timed=replays[way][2],
            **{
                "us": sample.times(1e6).cell(),
                "GB/s": sample.rate(kernel.moved_bytes / 1e9).cell(),
                "of the limit": share_of_limit(
                    sample.median, kernel.flops, kernel.moved_bytes, limits(), settings.device, kernel.precision
                ),
                "its time / ours": None if way == cases.OURS else ratio(seconds, found[cases.OURS]),
            },
        )
    if kernel.name == "correlation":
        other = ORIGINAL if ORIGINAL in found else max(found, key=lambda way: Sample.of(found[way]).median)
        times_ours = Sample.of(found[other]).median / Sample.of(found[cases.OURS]).median
        findings.add(headline=f"correlation {kernel.precision}: {other} takes {times_ours:.1f} times ours")


def repeated(action: Action, device: str) -> tuple[Action, int, str]:
    """Several calls captured as one action, their number, and how they are launched, in words.

    An operation that cannot be captured, for instance because it waits for the device, is called once from Python.
    """
    action()
    once_s = seconds_of(action, device_sync(device))
    if device != "cuda":
        return action, 1, "calls"
    calls = min(max(math.ceil(A_REPLAY_S / once_s), LEAST), MOST)

    def work() -> None:
        for _ in range(calls):
            action()

    try:
        graph = graph_of(work, torch.device("cuda", torch.cuda.current_device()), torch.cuda.Stream(priority=-1))
    except CaptureError as error:
        return action, 1, f"calls, as a graph cannot hold them: {str(error).splitlines()[0]}"
    return graph.replay, calls, f"a graph of {calls} calls"


def _original(findings: Findings, path: Path, precision: str) -> Action:
    dtype = cases.DTYPES[precision]
    if precision not in ("fp32", "fp16"):
        raise Skipped("it has no such type")
    a, b = (torch.randn(cases.FEATURES, device="cuda").to(dtype) for _ in range(2))
    original = OriginalCorrelation(path, a)
    apart = relative(original(a, b), correlation_definition(a.double(), b.double()))
    findings.row(op="correlation", precision=precision, by=ORIGINAL, apart_from_the_definition=apart)
    return lambda: original(a, b)
