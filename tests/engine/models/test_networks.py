"""The networks compared with the reference's results, NVIDIA's names of weights, and what each mode returns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowreel.engine.errors import UsageError
from flowreel.engine.models import MODELS, build_model, model_name
from flowreel.engine.models.layers import folded, normalise

Filled = Callable[..., nn.Module]
TOLERANCE_PX = 2e-4  # the reference itself differs by 5e-5 px between float32 and float64


@pytest.fixture(scope="module")
def frames(golden_dir: Path) -> tuple[Tensor, Tensor]:
    images = np.load(golden_dir / "inputs.npz")["images_128x192"]  # (B, T, H, W, 3)
    first, second = torch.from_numpy(images).permute(1, 0, 4, 2, 3).float()
    return first, second


def smooth_frames(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Smooth frames: on noise, small differences of the flow that a stack warps by would become large ones."""
    coarse = torch.rand(2 * count, 3, 3, 4, generator=torch.Generator().manual_seed(seed)) * 255
    fine = torch.nn.functional.interpolate(coarse, (64, 128), mode="bicubic", align_corners=True)
    return fine[:count], fine[count:]


def predictions(model: nn.Module) -> dict[str, Tensor]:
    """Collects what every flow head gives, by its name."""
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.split(".")[-1].startswith("predict_flow"):
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    return seen


@pytest.mark.parametrize("name", ["FlowNet2C", "FlowNet2S", "FlowNet2"])
def test_output_and_every_golden_prediction(
    name: str, filled: Filled, frames: tuple[Tensor, Tensor], golden_dir: Path
) -> None:
    model = filled(name)
    seen = predictions(model)
    with torch.no_grad():
        seen["flow"] = model(*frames)
    golden = np.load(golden_dir / f"{name}.npz")
    assert len(golden.files) > 1
    for key in golden.files:
        found = seen[key.removesuffix("_128x192")].numpy()
        np.testing.assert_allclose(found, golden[key], rtol=0, atol=TOLERANCE_PX, err_msg=key)


@pytest.mark.parametrize("name", ["FlowNet2C", "FlowNet2S", "FlowNet2SD"])
def test_training_mode_gives_the_five_predictions(name: str, filled: Filled) -> None:
    """The same as in evaluation, which has goldens."""
    model, frames = filled(name, width=0.1).eval(), smooth_frames(4, 1)
    seen = predictions(model)
    with torch.no_grad():
        model(*frames)
    expected = dict(seen)
    for level, flow in zip((2, 3, 4, 5, 6), model.train()(*frames), strict=True):
        assert torch.equal(flow, expected[f"predict_flow{level}"])


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_weights_of_any_type(name: str, batch_norm: bool, filled: Filled) -> None:
    """Networks cast with ``.bfloat16()`` and the like give float32 flow, those cast with ``.double()`` float64."""
    frames = smooth_frames(3, 1)
    with torch.no_grad():
        expected = filled(name, width=0.1, batch_norm=batch_norm).eval()(*frames)
        for dtype, most, given in ((torch.float64, 1e-5, torch.float64), (torch.bfloat16, 0.05, torch.float32)):
            model = filled(name, width=0.1, batch_norm=batch_norm).eval().to(dtype)
            flow = model(*(frame.to(dtype) for frame in frames))
            assert flow.dtype == given
            assert (flow - expected).norm() < most * expected.norm(), dtype


@pytest.mark.parametrize("name", ["FlowNet2CS", "FlowNet2CSS", "FlowNet2"])
def test_stacks_give_one_full_resolution_flow_in_training_too(name: str) -> None:
    model = build_model(name, width=0.05).train()
    assert model(torch.zeros(1, 3, 64, 128), torch.zeros(1, 3, 64, 128)).shape == (1, 2, 64, 128)


def test_the_stack_contains_its_parts(filled: Filled) -> None:
    """CS and CSS are FlowNet2's first two and three networks, so they predict the same; FlowNet2 has goldens."""
    frames, whole = smooth_frames(5, 1), filled("FlowNet2", width=0.1)
    expected = predictions(whole)
    with torch.no_grad():
        whole(*frames)
    for name, last in (("FlowNet2CS", "flownets_1"), ("FlowNet2CSS", "flownets_2")):
        model = filled(name, width=0.1)
        seen = predictions(model)
        with torch.no_grad():
            flow = model(*frames)
        quarter = seen[f"{last}.predict_flow2"]
        assert torch.equal(quarter, expected[f"{last}.predict_flow2"])
        if name == "FlowNet2CSS":
            nearest = quarter.repeat_interleave(4, 2).repeat_interleave(4, 3) * 20
            assert torch.equal(flow, nearest)
        else:
            corner = torch.nn.functional.interpolate(quarter * 20, scale_factor=4, mode="bilinear")
            torch.testing.assert_close(flow, corner)


PARAMETERS = {
    "FlowNet2": (162_518_834, 220),
    "FlowNet2C": (39_175_298, 48),
    "FlowNet2S": (38_676_506, 42),
    "FlowNet2SD": (45_371_666, 60),
    "FlowNet2CS": (77_870_620, 90),
    "FlowNet2CSS": (116_565_942, 132),
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_the_published_networks(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    parameters, tensors = PARAMETERS[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_names_are_nvidias() -> None:
    with torch.device("meta"):
        keys = set(build_model("FlowNet2").state_dict())
        normed = build_model("FlowNet2SD", batch_norm=True).state_dict()
    assert {
        "flownetc.conv1.0.weight",
        "flownetc.conv_redir.0.bias",
        "flownetc.upsampled_flow6_to_5.bias",
        "flownets_1.conv3_1.0.weight",
        "flownets_2.deconv5.0.bias",
        "flownets_d.inter_conv5.0.weight",
        "flownetfusion.predict_flow0.weight",
    } <= keys
    assert "flownets_1.upsampled_flow6_to_5.bias" not in keys
    assert {"conv0.1.running_mean", "inter_conv5.0.bias", "inter_conv5.1.weight"} <= set(normed)
    assert "conv0.0.bias" not in normed


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_each_runs_narrow_and_the_batch_does_not_mix(name: str, batch_norm: bool, filled: Filled) -> None:
    model = filled(name, width=0.1, batch_norm=batch_norm)
    first, second = smooth_frames(1, 2)
    with torch.no_grad():
        both = model(first, second)
        alone = model(first[1:], second[1:])
    assert both.shape == (2, 2, 64, 128)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-3 * float(alone.abs().max()))


def test_gradients_reach_every_parameter() -> None:
    model = build_model("FlowNet2", width=0.05)
    first, second = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 255
    model(first, second).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def test_the_mean_is_over_both_frames_together() -> None:
    first, second = torch.full((1, 3, 64, 64), 10.0), torch.full((1, 3, 64, 64), 30.0)
    x = normalise(first, second)
    assert torch.allclose(x[:, :3], torch.tensor(-10 / 255))
    assert torch.allclose(x[:, 3:], torch.tensor(10 / 255))


@pytest.mark.parametrize("shape", [(1, 3, 60, 64), (1, 3, 64, 100), (1, 4, 64, 64), (3, 64, 64), (1, 3, 0, 64)])
def test_impossible_frames_are_named(shape: tuple[int, ...]) -> None:
    model = build_model("FlowNet2S", width=0.05)
    with pytest.raises(ValueError, match=r"64|\(B, 3, H, W\)"):
        model(torch.zeros(shape), torch.zeros(shape))


def test_frames_that_are_not_floating_point_are_refused() -> None:
    frame = torch.zeros((1, 3, 64, 64))
    with pytest.raises(TypeError, match=r"got torch.float32 and torch.uint8: call \.float\(\) first"):
        build_model("FlowNet2S", width=0.05)(frame, frame.byte())


def test_model_names_in_any_case() -> None:
    assert model_name("flownet2css") == "FlowNet2CSS"
    with pytest.raises(UsageError, match="FlowNet2SD"):
        model_name("RAFT")
    with pytest.raises(UsageError, match="unknown model 5"):
        model_name(5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="width"):
        build_model("FlowNet2C", width=0)


@pytest.mark.parametrize("name", MODELS)
def test_folding_batch_norm_away_changes_nothing(name: str, filled: Filled) -> None:
    normed = filled(name, width=0.1, batch_norm=True)
    plain = build_model(name, width=0.1)
    plain.load_state_dict(folded(normed).state_dict())
    frames = smooth_frames(3, 1)
    with torch.no_grad():
        flow, expected = plain.eval()(*frames), normed(*frames)
    torch.testing.assert_close(flow, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
