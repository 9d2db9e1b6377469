"""The error of each precision, in the networks as the engine runs them, and whether they run as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

import flowreel
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.networks import filled
from flowreel.engine.compiled.plain import PlainNetwork

SIZES = {"1024x448": (448, 1024), "128x64": (64, 128)}
PRECISIONS = ("fp32", "fp16", "tf32", "bf16")
AIM_PX = 0.05  # the project's limit for the mean distance from float32
# With trained weights: mean px.
ALLOWED_PX = {"fp32": 2e-3, "tf32": AIM_PX, "fp16": AIM_PX, "bf16": AIM_PX}
# With random weights: a share of the mean flow, since these let errors grow through three networks.
ALLOWED_SHARE = {"fp32": 2e-4, "tf32": 0.01, "fp16": 0.01, "bf16": 0.05}
WITHOUT_GRAPH = "without a CUDA graph"  # part of a warning in ``flowreel.engine.compiled.graphs``

Reference = Callable[[], tuple[nn.Module, Tensor]]  # the network, and its flow in float32


def check(findings: Findings, settings: Settings) -> None:
    """Uses two frames of a synthetic scene at 1024x448."""
    size = SIZES["128x64" if settings.dry else "1024x448"]
    frames, on_gpu = scene_frames(*size, settings.device), settings.device == "cuda"
    for weights in ("baseline", "filled, width 1"):
        reference = cache(partial(_reference, weights, frames, settings))
        for precision in ("fp32", "bf16") if settings.dry else PRECISIONS:
            one = partial(_check, findings, weights, precision, reference, frames, on_gpu=on_gpu)
            findings.attempt(f"{precision}, {weights}", one)


def _check(
    findings: Findings,
    weights: str,
    precision: str,
    reference: Reference,
    frames: tuple[Tensor, Tensor],
    *,
    on_gpu: bool = True,
) -> None:
    name = f"{precision}, {weights}"
    net, wanted = reference()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fast = flowreel.compile(net, (1, *frames[0].shape[2:]), precision)
        flow = fast(*frames)
    told = [f"{name}: {warning.message}" for warning in said]
    for text in told:
        findings.note(text)
    apart, length = mean_apart(flow, wanted), float(wanted.norm(dim=1).mean())
    share = apart / length
    findings.row(
        weights=weights,
        precision=precision,
        mean_px_apart=apart,
        mean_flow_px=length,
        share=share,
        within_aim=apart <= AIM_PX,
    )
    if weights == "baseline":
        findings.check(name, apart <= ALLOWED_PX[precision], mean_px=apart, allowed_px=ALLOWED_PX[precision])
    else:
        allowed = ALLOWED_SHARE[precision]
        findings.check(name, share <= allowed, mean_px=apart, share=share, allowed_share=allowed)
        if precision == "fp16":
            holds = "holds" if apart <= AIM_PX else "does not hold"
            findings.add(headline=f"{name}: {apart:.3f} px apart, {share:.2%} of the flow: {AIM_PX} px {holds}")
    findings.check(f"{name}: the same twice", torch.equal(fast(*frames), flow))
    # Taken for a network of the user's own; on a CPU also where it has no instructions for bf16.
    plain = isinstance(fast._program, PlainNetwork) and on_gpu
    findings.check(f"{name}: one CUDA graph", not plain and not any(WITHOUT_GRAPH in text for text in told))


def _reference(weights: str, frames: tuple[Tensor, Tensor], settings: Settings) -> tuple[nn.Module, Tensor]:
    if weights == "baseline":
        net = flowreel.load_model(weights=weights, device=settings.device).eval()
    else:
        net = filled("FlowNet2", settings.device, 0.05 if settings.dry else 1.0)
    return net, exact(net, *frames)


def exact(net: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """The flow of the plain module, in float32 throughout."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        flow: Tensor = net(first, second)
    return flow


def mean_apart(flow: Tensor, wanted: Tensor) -> float:
    """Mean end-point distance in px."""
    return float((flow - wanted).norm(dim=1).mean())


def scene_frames(height: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """Two neighbouring frames of moving objects, (1, 3, H, W) float32, 0..255."""
    from flowreel.engine.config import SelectConfig
    from flowreel.engine.sources.synthetic import SyntheticConfig, SyntheticSource

    source = SyntheticSource(SyntheticConfig("objects", width=width, height=height, frames=2), SelectConfig())
    first, second = (frame.rgb[None].float().to(device) for frame in source)
    return first, second
