"""The networks alone, as the engine runs them: how far each precision is off, how fast, and where the time goes."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import flowreel
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.measure import Effort, Sample, alternated, device_sync
from benchmarks.networks import filled

PRECISIONS = ("fp32", "fp16", "tf32", "bf16")
# Mean px from float32 that is allowed. bf16 keeps 8 bits: it is held to that on weights that were trained.
ALLOWED: dict[tuple[str, str], float] = {
    **{(weights, "fp32"): 2e-3 for weights in ("baseline", "filled, width 1")},
    **{(weights, "tf32"): 0.05 for weights in ("baseline", "filled, width 1")},
    **{(weights, "fp16"): 0.05 for weights in ("baseline", "filled, width 1")},
    ("baseline", "bf16"): 0.05,
}
INPUTS = 4  # different batches, in turn


class Timed(NamedTuple):
    """One line of the table of speeds. ``aim``: pairs a second that the design asks for, on an H200."""

    model: str
    precision: str
    size: str
    batch: int
    aim: float | None = None


SIZES = {"1024x448": (448, 1024), "1920x1088": (1088, 1920), "128x64": (64, 128)}
TIMED = (  # the most important first: what no time is left for is missing
    Timed("FlowNet2", "fp16", "1024x448", 8, 585),
    Timed("FlowNet2", "fp16", "1920x1088", 8, 130),
    Timed("FlowNet2", "fp16", "1024x448", 1),
    Timed("FlowNet2", "fp16", "1024x448", 4),
    Timed("FlowNet2", "tf32", "1024x448", 8),
    Timed("FlowNet2", "bf16", "1024x448", 8),
    Timed("FlowNet2C", "fp16", "1024x448", 8),
    Timed("FlowNet2", "fp32", "1024x448", 8),
    Timed("FlowNet2", "fp16", "1920x1088", 1),
    Timed("FlowNet2S", "fp16", "1024x448", 8),
    Timed("FlowNet2CSS", "fp16", "1024x448", 8),
    Timed("FlowNet2SD", "fp16", "1024x448", 8),
)
DRY = (Timed("FlowNet2", "fp32", "128x64", 1, 585), Timed("FlowNet2C", "bf16", "128x64", 2))


# --- right ------------------------------------------------------------------------------------------------------------


def check(findings: Findings, settings: Settings) -> None:
    """On two frames of a scene whose motion is known, at 1024x448."""
    size = SIZES["128x64" if settings.dry else "1024x448"]
    frames = scene_frames(*size, settings.device)
    precisions = ("fp32", "bf16") if settings.dry else PRECISIONS
    for weights in ("baseline", "filled, width 1"):
        net = _network(weights, settings)
        wanted = exact(net, *frames)
        length = float(wanted.norm(dim=1).mean())
        for precision in precisions:
            fast = flowreel.compile(net, (1, *size), precision)
            apart = mean_apart(fast(*frames), wanted)
            allowed = ALLOWED.get((weights, precision))
            findings.row(weights=weights, precision=precision, mean_px_apart=apart, mean_flow_px=length)
            if allowed is not None:
                findings.check(f"{precision}, {weights}", apart <= allowed, mean_px=apart, allowed_px=allowed)
            again = fast(*frames)
            findings.check(f"{precision}, {weights}: the same twice", torch.equal(fast(*frames), again))
            del fast
        del net
        gc.collect()


def _network(weights: str, settings: Settings) -> nn.Module:
    if weights == "baseline":
        return flowreel.load_model(weights=weights, device=settings.device).eval()
    return filled("FlowNet2", settings.device, 0.05 if settings.dry else 1.0)


def exact(net: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """The module itself, float32 throughout."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        flow: Tensor = net(first, second)
    return flow


def mean_apart(flow: Tensor, wanted: Tensor) -> float:
    """Mean end-point distance, px."""
    return float((flow - wanted).norm(dim=1).mean())


def scene_frames(height: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """Two neighbouring frames of moving objects, (1, 3, H, W) float32, 0..255."""
    from flowreel.engine.config import SelectConfig
    from flowreel.engine.sources.synthetic import SyntheticConfig, SyntheticSource

    source = SyntheticSource(SyntheticConfig("objects", width=width, height=height, frames=2), SelectConfig())
    first, second = (frame.rgb[None].float().to(device) for frame in source)
    return first, second


# --- fast -------------------------------------------------------------------------------------------------------------


def times(findings: Findings, settings: Settings) -> None:
    """Pairs a second of ``flowreel.compile`` on frames that are on the card, random ones, different each time."""
    effort = Effort(least=2, most=2, cap_s=0.1) if settings.dry else Effort(least=5, most=30, cap_s=1.5)
    net: nn.Module | None = None
    for number, one in enumerate(DRY if settings.dry else TIMED):
        if net is None or type(net).__name__ != one.model:
            net = filled(one.model, settings.device, 0.05 if settings.dry else 1.0)
        cells = _timed(net, one, effort, settings)
        findings.row(**one._asdict(), **cells)
        if number == 0:
            rate = cells["pairs/s"]["median"]
            findings.add(
                headline=f"{one.model} {one.precision} {one.size}: {rate:.0f} pairs/s, {one.aim:.0f} asked for"
            )


def _timed(net: nn.Module, one: Timed, effort: Effort, settings: Settings) -> dict[str, Any]:
    height, width = SIZES[one.size]
    on_gpu = settings.device == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
    frames = [
        torch.randint(0, 256, (one.batch, 3, height, width), device=settings.device).float() for _ in range(INPUTS)
    ]
    turns = itertools.cycle(itertools.pairwise([*frames, frames[0]]))
    fast = flowreel.compile(net, (one.batch, height, width), one.precision)
    sync = device_sync(settings.device)
    sample = Sample.of(alternated({"": lambda: fast(*next(turns))}, effort, sync)[""])
    rate = sample.rate(one.batch)
    cells: dict[str, Any] = {"pairs/s": rate.cell(), "ms/pair": sample.times(1e3 / one.batch).cell()}
    if one.aim is not None:
        cells["of the aim"] = rate.median / one.aim
    if on_gpu:
        taken = torch.cuda.max_memory_reserved() - before
        cells |= {"GPU MB": taken / 1e6, "bytes/pixel": taken / (one.batch * height * width)}
    return cells


# --- where the time goes ----------------------------------------------------------------------------------------------

KINDS = (  # what a kernel's name holds, in the order in which it is asked
    ("ours", ("correlation_", "warp_", "channel_norm_", "bias_leaky_relu_", "yuv_to_rgb_")),
    ("layout", ("nchwtonhwc", "nhwctonchw", "transpose", "permute", "reorder")),
    ("convolution", ("conv", "xmma", "cutlass", "gemm", "wgrad", "dgrad", "fprop", "winograd", "cudnn", "implicit")),
    ("copy", ("memcpy", "memset", "copy")),
    ("elementwise", ("elementwise", "reduce", "cat", "upsample", "index", "gather", "mul", "add", "fill")),
)
CALLS = 5


def profile(findings: Findings, settings: Settings) -> None:
    """The network whose speed is asked for, under torch's profiler; the whole table goes to a file of its own."""
    one = DRY[-1] if settings.dry else TIMED[0]
    height, width = SIZES[one.size]
    fast = flowreel.compile(
        filled(one.model, settings.device, 0.05 if settings.dry else 1.0), (one.batch, height, width), one.precision
    )
    frames = [torch.randint(0, 256, (one.batch, 3, height, width), device=settings.device).float() for _ in range(2)]
    sync = device_sync(settings.device)
    fast(*frames)
    sync()
    wall_s = Sample.of(alternated({"": lambda: fast(*frames)}, Effort(least=3, most=5, cap_s=1.0), sync)[""]).median
    on_gpu = settings.device == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if on_gpu else [])]) as profiler:
        for _ in range(CALLS):
            fast(*frames)
        sync()
    averages = profiler.key_averages()
    spent = {event.key: (us, event.count) for event in averages if (us := _own_us(event, on_gpu)) > 0}
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    path = Path(settings.out) / "gpu-profile.txt"
    path.write_text(averages.table(sort_by=key, row_limit=60, max_name_column_width=90))
    findings.note(f"{one.model} {one.precision} {one.size}, batch {one.batch}: the whole profile is {path.name}")
    total_us = sum(us for us, _ in spent.values())
    shares = by_kind({name: us for name, (us, _) in spent.items()})
    for kind, share in shares.items():
        findings.row(kind=kind, **{"ms/pair": share * total_us / 1e3 / CALLS / one.batch}, share=share)
    for name, (us, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:25]:
        findings.row(kernel=name[:120], us_a_call=us / CALLS, calls=count / CALLS, share=us / total_us)
    findings.add(headline=bound(shares, total_us / CALLS, wall_s * 1e6))


def _own_us(event: Any, on_gpu: bool) -> float:
    """On a GPU that of the kernels alone: what called them is told their time once more."""
    if not on_gpu:
        return float(event.self_cpu_time_total)
    return float(event.self_device_time_total) if event.device_type == torch.autograd.DeviceType.CUDA else 0.0


def by_kind(spent: Mapping[str, float]) -> dict[str, float]:
    """Shares of the time, largest first: kernels by what their names say they do."""
    totals: Counter[str] = Counter()
    for name, us in spent.items():
        low = name.lower()
        totals[next((kind for kind, words in KINDS if any(word in low for word in words)), "other")] += us
    whole = sum(totals.values())
    return {kind: us / whole for kind, us in totals.most_common()}


def bound(shares: Mapping[str, float], busy_us: float, wall_us: float) -> str:
    """In words."""
    told = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share >= 0.01)
    return f"busy {min(busy_us / wall_us, 1):.0%} of {wall_us / 1e3:.2f} ms a call: {told}"
