"""Where a network's time goes, by kind of kernel and by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.network import DRY, SIZES, TIMED, Timed, inputs, made, network
from benchmarks.measure import ONCE, Effort, device_sync, timed
from flowreel.engine.compiled import cuda

CONVOLUTIONS = ("convolution_3_", "convolution_7_", "flow_head_")
INPUTS = ("normalise_frames_", "refining_input_", "fusing_input_", "enlarge_flow_")
KINDS = (  # by parts of a kernel's name; the first match counts
    ("ours", ("correlation_", "warp_", "channel_norm_", "bias_leaky_relu_", "yuv_to_rgb_", *CONVOLUTIONS, *INPUTS)),
    ("layout", ("nchwtonhwc", "nhwctonchw", "transpose", "permute", "reorder")),
    ("convolution", ("conv", "xmma", "cutlass", "gemm", "wgrad", "dgrad", "fprop", "winograd", "cudnn", "implicit")),
    ("copy", ("memcpy", "memset", "copy")),
    ("elementwise", ("elementwise", "reduce", "cat", "upsample", "index", "gather", "mul", "add", "fill")),
)
CALLS = 5
LAYERS = 160  # operations, each of one shape, that are reported, the slowest first


def run(findings: Findings, settings: Settings) -> None:
    """The first network of ``TIMED`` under torch's profiler."""
    one = DRY[-1] if settings.dry else TIMED[0]
    findings.attempt("kernel by kernel", partial(_kernels, findings, settings, one))
    findings.attempt("layer by layer", partial(_layers, findings, settings, one))


def _kernels(findings: Findings, settings: Settings, one: Timed) -> None:
    """As it runs; the whole table is saved in a file of its own."""
    fast, frames = made(one, settings), inputs(one, settings, 2)
    sync = device_sync(settings.device)
    fast(*frames)
    sync()
    effort = ONCE if settings.dry else Effort(least=3, most=5, cap_s=1.0)
    wall_s = timed(lambda: fast(*frames), effort, sync).median
    on_gpu = settings.device == "cuda"
    with profiled(on_gpu) as profiler:
        for _ in range(CALLS):
            fast(*frames)
        sync()
    averages = profiler.key_averages()
    # By kernel: on a GPU their callers report the same time again.
    spent = {event.key: (us, event.count) for event in averages if (us := _own_us(event, on_gpu, DeviceType.CUDA)) > 0}
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    path = settings.kept("profile.txt")
    path.write_text(averages.table(sort_by=key, row_limit=60, max_name_column_width=90))
    findings.note(f"{one.model} {one.precision} {one.size}, batch {one.batch}: the whole profile is {path.name}")
    total_us = sum(us for us, _ in spent.values())
    shares = by_kind({name: us for name, (us, _) in spent.items()})
    for kind, share in shares.items():
        findings.row(kind=kind, **{"ms/pair": share * total_us / 1e3 / CALLS / one.batch}, share=share)
    for name, (us, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:25]:
        findings.row(kernel=name[:120], us_a_call=us / CALLS, calls=count / CALLS, share=us / total_us)
    findings.add(headline=bound(shares, total_us / CALLS, wall_s * 1e6))


def _layers(findings: Findings, settings: Settings, one: Timed) -> None:
    """The same work without its CUDA graph, which hides what launched a kernel: time by operation and input shapes."""
    sync, on_gpu = device_sync(settings.device), settings.device == "cuda"
    frames = inputs(one, settings, 2)
    with torch.no_grad():
        packed = cuda.pack(network(one.model, settings), one.precision, capture=lambda work, _device: work)
        plain = packed.program((one.batch, *SIZES[one.size]))
        for _ in range(2):
            plain.flow(*frames)
        sync()
        with profiled(on_gpu, shapes=True) as profiler:
            plain.flow(*frames)
            sync()
    averages = profiler.key_averages(group_by_input_shape=True)
    spent = [(_own_us(event, on_gpu, DeviceType.CPU), event) for event in averages]  # by what launched the kernels
    for us, event in sorted(spent, key=lambda item: -item[0])[:LAYERS]:
        if us > 0:
            shapes = " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)
            findings.row(op=event.key, shapes=shapes, us_a_call=us, calls=event.count)


def profiled(on_gpu: bool, shapes: bool = False) -> torch.profiler.profile:
    """torch's profiler for the host, and for the GPU if used."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, *([activity.CUDA] if on_gpu else [])]
    return torch.profiler.profile(activities=activities, record_shapes=shapes)


def _own_us(event: Any, on_gpu: bool, of: DeviceType) -> float:
    """An event's own time; on a GPU that of its kernels. of: the kind that counts there, kernels or their callers."""
    if not on_gpu:
        return float(event.self_cpu_time_total)
    return float(event.self_device_time_total) if event.device_type == of else 0.0


def by_kind(spent: Mapping[str, float]) -> dict[str, float]:
    """Fractions of the time by kind of kernel (``KINDS``), largest first."""
    totals: Counter[str] = Counter()
    for name, us in spent.items():
        low = name.lower()
        totals[next((kind for kind, words in KINDS if any(word in low for word in words)), "other")] += us
    whole = sum(totals.values())
    return {kind: us / whole for kind, us in totals.most_common()}


def bound(shares: Mapping[str, float], busy_us: float, wall_us: float) -> str:
    """A line about how busy the GPU is, and with what."""
    told = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share >= 0.01)
    return f"busy {min(busy_us / wall_us, 1):.0%} of {wall_us / 1e3:.2f} ms a call: {told}"
