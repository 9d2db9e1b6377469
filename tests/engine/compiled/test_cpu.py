"""The form for CPUs: layers in strips, pairs in groups, and the plain module where oneDNN is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from weakref import ref

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import flowreel
from flowreel.engine.compiled import buffers, convolution, cpu, onednn, pack, plain
from flowreel.engine.errors import PrecisionWarning
from flowreel.engine.models import MODELS, build_model

Filled = Callable[..., nn.Module]


def frames(count: int, height: int = 128, width: int = 64) -> tuple[Tensor, Tensor]:
    """Smooth frames: on noise, small differences of the flow that a stack warps by would become large ones."""
    coarse = torch.rand(2 * count, 3, 4, 3, generator=torch.Generator().manual_seed(0)) * 255
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return fine[:count], fine[count:]


@pytest.mark.parametrize("name", MODELS)
def test_every_network_in_strips_and_in_kept_memory(name: str, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for large frames. The second call uses memory that the first one has written to."""
    monkeypatch.setattr(convolution, "WHOLE", 0)
    monkeypatch.setattr(convolution, "STRIP", 16 << 10)
    monkeypatch.setattr(buffers, "SMALLEST", 0)
    model = filled(name, width=0.15, batch_norm=True)
    fast = flowreel.compile(model, (2, 128, 64))
    with torch.no_grad():
        expected = model(*frames(2))
    for _ in range(2):
        torch.testing.assert_close(fast(*frames(2)), expected, rtol=0, atol=1e-4)


def test_a_pair_does_not_depend_on_its_batch(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "GROUP_PIXELS", 128 * 64)
    model = filled("FlowNet2", width=0.1)
    first, second = frames(3)
    together = flowreel.compile(model, (3, 128, 64))(first, second)
    alone = flowreel.compile(model, (1, 128, 64))
    for number in range(3):
        assert torch.equal(alone(first[number, None], second[number, None])[0], together[number])


@pytest.mark.parametrize("name", MODELS)
def test_results_of_several_groups_are_contiguous(name: str, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "GROUP_PIXELS", 128 * 64)
    fast = flowreel.compile(filled(name, width=0.1), (3, 128, 64))
    assert fast(*frames(3)).is_contiguous()
    assert name == "FlowNet2" or fast.quarter(*frames(3)).is_contiguous()


@pytest.mark.skipif(not onednn.available(torch.float32), reason="this torch has no oneDNN for this CPU")
def test_without_onednn_the_module_runs(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled("FlowNet2S", width=0.1)
    monkeypatch.setattr(onednn._ops, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.warns(PrecisionWarning, match="no instructions for bf16: fp32 is many times faster"):
        assert isinstance(pack(model, "bf16"), plain.PlainNetwork)
    assert isinstance(pack(model, "fp32"), cpu.CpuNetwork)
    monkeypatch.setattr(onednn, "_NEEDED", ("an_operator_that_no_torch_has",))
    assert isinstance(pack(model, "fp32"), plain.PlainNetwork)


def test_batches_of_one_size_share_memory_and_sizes_that_went_leave_none(filled: Filled) -> None:
    network = pack(filled("FlowNet2S", width=0.1), "fp32")
    assert isinstance(network, cpu.CpuNetwork)
    program = network.program((4, 128, 64))
    assert network.program((1, 128, 64)) is program
    assert network.program((4, 64, 64)) is not program
    program.flow(*frames(4))
    assert program.layers.buffers.layouts
    gone = ref(program), ref(program.layers.buffers)
    del program
    assert [which() for which in gone] == [None, None]


@pytest.mark.skipif(not onednn.available(torch.bfloat16), reason="this torch has no oneDNN for this CPU")
def test_first_layers_and_heads_stay_float32() -> None:
    """What a first layer is given is exact."""
    layers = cpu.Layers.of(build_model("FlowNet2", width=0.05), torch.bfloat16).convolutions
    exact = {name for name, layer in layers.items() if layer.dtype == torch.float32}
    heads = {name for name in layers if "predict_flow" in name}
    firsts = {"flownetc.conv1", "flownets_1.conv1", "flownets_2.conv1", "flownets_d.conv0", "flownetfusion.conv0"}
    assert exact == firsts | heads
    assert {name for name, layer in layers.items() if layer.gives == torch.float32} == heads


def test_bfloat16_on_real_pictures_with_trained_weights(data_dir: Path) -> None:
    first, second = (_picture(data_dir / "pairs" / "chairs_1" / f"img{number}.ppm") for number in (1, 2))
    model = flowreel.load_model("FlowNet2CSS", weights="baseline")
    whole, half = (flowreel.compile(model, (1, *first.shape[2:]), name)(first, second) for name in ("fp32", "bf16"))
    assert 0 < (half - whole).norm(dim=1).mean() <= 0.05  # px, where the motion is about 5 px


def _picture(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
