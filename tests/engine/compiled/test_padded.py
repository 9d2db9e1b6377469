"""Layers of the form for GPUs: which of them our own convolution computes, and that cuDNN's result is the same."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowreel.engine.compiled import cuda, padded
from flowreel.engine.compiled.heads import pack_part
from flowreel.engine.compiled.padded import pack_layer
from flowreel.engine.compiled.parts import Part
from flowreel.engine.config import Precision
from flowreel.engine.models import build_model
from flowreel.engine.models.fusion import FlowNetFusion
from flowreel.engine.models.layers import conv, deconv, folded, inter_conv
from flowreel.kernels.convolution import _reaches

OURS = {
    "flownetc.conv1",
    *(f"{part}.conv1" for part in ("flownets_1", "flownets_2")),
    "flownets_d.conv0",
    *(f"flownetfusion.{name}" for name in ("conv0", "deconv0", "deconv1")),
}


def test_our_convolution_computes_large_maps_of_few_channels_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layouts are those of a GPU run, without values: no map and no result has to be copied for our convolution."""
    monkeypatch.setattr(padded, "_runs_ours", lambda device: True)
    seen: list[tuple[Tensor, ...]] = []

    def convolution(x: Tensor, weight: Tensor, *how: Any, out: Tensor | None, also: Tensor | None) -> Tensor:
        made = padded_convolution(x, weight, *how, out=out, also=also)
        seen.append(tuple(given for given in (x, made, out, also) if given is not None))
        return made

    def convolve(x: Tensor, by: padded.Convolution) -> Tensor:
        return padded_convolve(x, by).contiguous(memory_format=torch.channels_last)  # as cuDNN does

    padded_convolution, padded_convolve = padded.convolution, padded.convolve
    monkeypatch.setattr(padded, "convolve", convolve)
    monkeypatch.setattr(padded, "convolution", convolution)
    with torch.device("meta"), torch.no_grad():
        net = cuda.pack(build_model("FlowNet2"), "fp16")
        layers = {f"{part}.{name}": layer for part, layers in net.parts.items() for name, layer in layers.items()}
        assert {name for name, layer in layers.items() if getattr(layer, "packed", None) is not None} == OURS
        cuda.Work(net, (2, 64, 128))()
    assert len(seen) == len(OURS)
    refused = [(given.shape, given.stride()) for maps in seen for given in maps if not _reaches(given, 8)]
    assert refused == []


@pytest.mark.parametrize(
    ("module", "inputs"),
    [(conv(3, 64, 7, 2), 3), (conv(11, 64, batch_norm=True), 11), (inter_conv(12, 64), 12), (deconv(20, 16), 20)],
    ids=["stride", "BatchNorm", "no activation", "deconvolution"],
)
def test_the_same_layer_by_cudnn_and_by_ours(module: nn.Module, inputs: int, filled_layer: Callable[..., None]) -> None:
    x = torch.randn(2, padded.padded(inputs), 6, 10, generator=torch.Generator().manual_seed(1))
    x = x.half().contiguous(memory_format=torch.channels_last)
    filled_layer(module)
    module = folded(module)
    ours, cudnns = pack_layer(module, "fp16"), pack_layer(module, "fp16", by_cudnn=True)
    assert ours.packed is not None
    assert cudnns.packed is None
    assert pack_layer(nn.Conv2d(inputs, 64, 3), "fp16").packed is None  # ours has another padding
    expected = cudnns(x)
    also = torch.zeros_like(expected)
    watched: list[Tensor] = []
    found = ours(x, also, watched.append)
    torch.testing.assert_close(found, expected, rtol=2**-9, atol=2**-9)
    assert torch.equal(also, found)
    assert [given.data_ptr() for given in watched] == [found.data_ptr()]
    into = torch.zeros_like(expected)
    ours.into(x, into, watched.append)
    assert torch.equal(into, found)
    assert torch.equal(watched[1], found)


def test_cudnn_neither_benchmarks_nor_chooses_what_gives_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[tuple[object, ...]] = []  # benchmark, deterministic, TF32
    for name in ("cudnn_convolution", "cudnn_convolution_transpose"):
        monkeypatch.setattr(torch.ops.aten, name, lambda *given: modes.append(given[-3:]))
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    for layer in (conv(3, 64), deconv(20, 16)):
        for precision in ("tf32", "fp16"):
            padded.convolve(on_gpu, pack_layer(layer, precision, by_cudnn=True))
    assert modes == 2 * [(False, True, True), (False, True, False)]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.002), ("bf16", 0.02)])
def test_the_fusion_network_by_cudnn_and_by_ours(precision: Precision, tolerance: float) -> None:
    """The network with the most layers that our convolution computes."""
    torch.manual_seed(0)
    net = FlowNetFusion().eval()

    def room(channels: int, level: int = 0, batch: int | None = None) -> Tensor:
        made = torch.zeros(2, padded.padded(channels), 16 >> level, 24 >> level, dtype=padded.DTYPES[precision])
        return made.to(memory_format=torch.channels_last)

    x = room(11)
    x[:, :11] = torch.randn(2, 11, 16, 24, generator=torch.Generator().manual_seed(1))
    flows = []
    for by_cudnn in (True, False):
        layers = pack_part(net, precision)
        for name, layer in net.named_children():
            if isinstance(layers.get(name), padded.Convolution):
                layers[name] = pack_layer(layer, precision, by_cudnn)
        with torch.no_grad():
            flows.append(Part(layers, room)(x))
    expected, found = flows
    assert float((found - expected).norm(dim=1).mean()) < tolerance * float(expected.norm(dim=1).mean())


@pytest.fixture
def filled_layer() -> Callable[[nn.Module], None]:
    def fill(module: nn.Module) -> None:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for value in module.parameters():
                value.copy_(torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5)

    return fill
