"""The kernels at the sizes they have in the networks: right, and how fast beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernels as cases
from benchmarks.ceilings import Ceilings, best, rows_of
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.original import OriginalCorrelation
from benchmarks.measure import Effort, Sample, alternated, device_sync, ratio
from flowreel.kernels import channel_norm, correlation, flow_to_color, quantise, warp, yuv_to_rgb
from flowreel.kernels.bias_leaky_relu import bias_leaky_relu_, bias_leaky_relu_in_place_definition
from flowreel.kernels.channel_norm import channel_norm_definition
from flowreel.kernels.correlation import correlation_definition
from flowreel.kernels.quantise import quantise_definition
from flowreel.kernels.warp import warp_definition
from flowreel.kernels.yuv_to_rgb import yuv_to_rgb_definition

TOLERANCE = {"fp32": 1e-5, "fp16": 2**-10, "bf16": 2**-7}  # relative; half types: one rounding of the result
ORIGINAL = "flownet2-pytorch's kernel, its maps already zero"


def check(findings: Findings, settings: Settings) -> None:
    """Against the definition in float64, on the device, in every type; then the two that give bytes."""
    _make_small(settings)
    torch.manual_seed(0)
    for name, precision, ours, wanted in _compared(settings.device):
        apart = relative(ours, wanted)
        findings.check(f"{name} {precision}", apart <= TOLERANCE[precision], apart=apart, allowed=TOLERANCE[precision])
    rgb, wanted = _decoded(settings.device)
    _check_levels(findings, "yuv_to_rgb", rgb, wanted)
    flow = torch.randn(1, 2, *cases.PIXELS, device=settings.device) * 8
    steps, exact = quantise(flow, 1 / 64), quantise_definition(flow, 1 / 64, 32767.0, torch.int16)
    findings.check("quantise", all(torch.equal(ours, wanted) for ours, wanted in zip(steps, exact, strict=True)))
    _check_levels(findings, "flow_to_color", flow_to_color(flow, 20.0).cpu(), flow_to_color(flow.cpu(), 20.0))
    pairs = zip(quantise(flow, 1 / 64), quantise(flow.cpu(), 1 / 64), strict=True)
    findings.check("quantise", all(torch.equal(ours.cpu(), wanted) for ours, wanted in pairs))


def _make_small(settings: Settings) -> None:
    if settings.dry:
        cases.PIXELS, cases.FEATURES, cases.BEYOND_CACHES = (24, 32), (1, 8, 6, 8), 1 << 12


def relative(ours: Tensor, wanted: Tensor) -> float:
    """The largest difference, over the value itself plus the root mean square of all. NaN where either has one."""
    scale = wanted.square().mean().sqrt()
    return float(((ours.double() - wanted).abs() / (wanted.abs() + scale)).max())


def _compared(device: str) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    for precision, dtype in cases.DTYPES.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            named = " channels last" if layout == torch.channels_last else ""

            def made(*shape: int, dtype: torch.dtype = dtype, layout: torch.memory_format = layout) -> Tensor:
                return torch.randn(*shape, device=device).to(dtype).contiguous(memory_format=layout)

            a, b = made(*cases.FEATURES), made(*cases.FEATURES)
            yield f"correlation{named}", precision, correlation(a, b), correlation_definition(a.double(), b.double())
            image, flow = made(1, 3, *cases.PIXELS), torch.randn(1, 2, *cases.PIXELS, device=device) * 8
            yield f"warp{named}", precision, warp(image, flow), warp_definition(image.double(), flow.double())
            x = made(1, 2, *cases.PIXELS)
            yield f"channel_norm{named}", precision, channel_norm(x), channel_norm_definition(x.double())
            x, bias = made(1, 64, *cases.PIXELS), torch.randn(64, device=device)
            wanted = x.double()
            bias_leaky_relu_in_place_definition(wanted, bias, 0.1, None)
            yield f"bias_leaky_relu{named}", precision, bias_leaky_relu_(x, bias, 0.1), wanted
            yield from _gradients(made, named, precision, device)


def _gradients(
    made: Callable[..., Tensor], named: str, precision: str, device: str
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Of the three layers that are trained: by the kernels in their type, by the definitions in float64."""
    flow = torch.randn(1, 2, *cases.PIXELS, device=device) * 8
    layers: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "correlation": (correlation, (made(*cases.FEATURES), made(*cases.FEATURES))),
        "warp": (warp, (made(1, 3, *cases.PIXELS), flow)),
        "channel_norm": (channel_norm, (made(1, 2, *cases.PIXELS),)),
    }
    for name, (layer, inputs) in layers.items():
        came, exact = ([f(x).requires_grad_() for x in inputs] for f in (Tensor.clone, Tensor.double))
        out = layer(*came)
        arrived = torch.randn_like(out)
        out.backward(arrived)
        layer(*exact).backward(arrived.double())  # float64 always takes the definition
        for number, (ours, wanted) in enumerate(zip(came, exact, strict=True)):
            assert ours.grad is not None
            assert wanted.grad is not None
            yield f"{name}, gradient {number}{named}", precision, ours.grad, wanted.grad


def _decoded(device: str) -> tuple[Tensor, Tensor]:
    height, width = cases.PIXELS
    luma = torch.randint(0, 256, (height, width), dtype=torch.uint8, device=device)
    chroma = torch.randint(0, 256, (height // 2, width // 2, 2), dtype=torch.uint8, device=device)
    wanted = torch.empty(3, height, width, dtype=torch.uint8, device=device)
    yuv_to_rgb_definition(wanted, luma, chroma, "bt709", False, 8)
    return yuv_to_rgb(luma, chroma), wanted


def _check_levels(findings: Findings, name: str, ours: Tensor, wanted: Tensor) -> None:
    """Bytes may differ by one where a rounding just tips over, which is rare."""
    apart = (ours.int() - wanted.int()).abs()
    most, mean = int(apart.max()), float(apart.float().mean())
    findings.check(name, most <= 1 and mean <= 0.01, most_levels=most, mean_levels=mean)


# --- times ------------------------------------------------------------------------------------------------------------


def times(findings: Findings, settings: Settings) -> None:
    """Every operation in all its ways in turn. How near ours is to what the card can do is measured beside it."""
    _make_small(settings)
    effort = Effort(least=2, most=2, cap_s=0.1) if settings.dry else Effort(least=5, most=40, cap_s=1.2)
    limits = {} if settings.dry else _limits()
    sync = device_sync(settings.device)
    for kernel in cases.kernels(settings.device):
        ways = dict(kernel.ways)
        if settings.original is not None and kernel.name == "correlation":
            try:
                _add_original(findings, settings, kernel, ways)
            except Exception as error:  # of any kind: the file is not ours
                findings.skip(ORIGINAL, error)
        found = alternated(ways, effort, sync)
        for way, seconds in found.items():
            sample = Sample.of(seconds)
            findings.row(
                op=kernel.name,
                shape=kernel.shape,
                precision=kernel.precision,
                by=way,
                **{
                    "us": sample.times(1e6).cell(),
                    "GB/s": sample.rate(kernel.moved_bytes / 1e9).cell(),
                    "of the limit": cases.share_of_limit(
                        sample.median, kernel.flops, kernel.moved_bytes, limits, settings.device, kernel.precision
                    ),
                    "its time / ours": None if way == cases.OURS else ratio(seconds, found[cases.OURS]),
                },
            )
        if kernel.name == "correlation":
            slowest = max(found, key=lambda way: Sample.of(found[way]).median)
            times_ours = Sample.of(found[slowest]).median / Sample.of(found[cases.OURS]).median
            findings.add(headline=f"correlation {kernel.precision}: {slowest} takes {times_ours:.1f} times ours")
    if settings.original is None:
        findings.skip("flownet2-pytorch's correlation kernel", "give its file with --original")


def _limits() -> Ceilings:
    """What matrix products, convolutions and copies reach on this card."""
    return best(rows_of("cuda", Effort(least=3, most=8, cap_s=0.5)))


def _add_original(findings: Findings, settings: Settings, kernel: cases.Kernel, ways: dict[str, Any]) -> None:
    assert settings.original is not None
    if settings.device == "cpu":
        return
    dtype = cases.DTYPES[kernel.precision]
    a, b = (torch.randn(cases.FEATURES, device=settings.device).to(dtype) for _ in range(2))
    original = OriginalCorrelation(Path(settings.original), a)
    apart = relative(original(a, b), correlation_definition(a.double(), b.double()))
    findings.row(op=kernel.name, precision=kernel.precision, by=ORIGINAL, apart_from_the_definition=apart)
    ways[ORIGINAL] = lambda: original(a, b)
