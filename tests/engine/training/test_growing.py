"""A network that starts from a smaller one, wider or with a refining network added, at first computes the same flow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional

from flowreel.engine.errors import UsageError
from flowreel.engine.models import build_model
from flowreel.engine.models.flownets import FlowNetS
from flowreel.engine.models.weights import read_weights
from flowreel.engine.training.config import TrainConfig
from flowreel.engine.training.identity import start_as_identity
from flowreel.engine.training.train import train
from flowreel.engine.training.widen import widen

TINY = TrainConfig(width=0.0625, steps=1, batch=2, height=64, width_px=64, warm_up=1, precision="fp32")


def loud(model: torch.nn.Module) -> torch.nn.Module:
    """Makes flow heads and biases large: they start near zero, where a wrong copy would not show."""
    for name, parameter in model.named_parameters():
        if "predict_flow" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("times", [2, 3])
def test_a_widened_network_computes_the_same(times: int) -> None:
    torch.manual_seed(0)
    narrow = loud(build_model("FlowNet2C", width=0.0625))
    wide = build_model("FlowNet2C", width=0.0625 * times).eval()
    wide.load_state_dict(widen(narrow.state_dict(), times, unlike=0))
    frames = torch.rand(2, 1, 3, 64, 128) * 255
    with torch.no_grad():
        flow = narrow(*frames)
        assert flow.abs().max() > 1
        torch.testing.assert_close(wide(*frames), flow, atol=1e-4, rtol=1e-4)


def test_copies_are_read_differently_so_that_training_tells_them_apart() -> None:
    wide = widen(build_model("FlowNet2C", width=0.0625).state_dict(), 2, unlike=0)
    first, second = wide["conv4.0.weight"].chunk(2, 1)
    assert not torch.allclose(first, second)


def test_a_refining_network_starts_by_passing_the_flow_on() -> None:
    torch.manual_seed(0)
    net = FlowNetS(width=0.25, input_channels=12)
    start_as_identity(net)
    coarse = torch.randn(1, 2, 4, 6)
    flow = functional.interpolate(coarse, size=(128, 192), mode="bilinear")
    x = torch.randn(1, 12, 128, 192)
    x[:, 9:11] = flow
    with torch.no_grad():
        for level, predicted in zip(range(2, 7), net.predict(x), strict=True):
            torch.testing.assert_close(predicted, functional.avg_pool2d(flow, 2**level), atol=0.15, rtol=0)


def test_a_stack_grows_from_its_first_network(tmp_path: Path) -> None:
    first = train(TINY, tmp_path / "c", workers=0)
    config = replace(TINY, model="FlowNet2CS", width=0.125, init=str(first), batch_norm=False, last_only=True)
    grown = read_weights(train(config, tmp_path / "cs", workers=0))
    assert (grown.model, grown.width) == ("FlowNet2CS", 0.125)
    expected = widen({key: value.float() for key, value in read_weights(first).state.items()}, 2, config.seed)
    for key, tensor in expected.items():  # C was held fixed; the file keeps half precision
        torch.testing.assert_close(grown.state[f"flownetc.{key}"].float(), tensor, atol=1e-3, rtol=1e-3)
    whole = train(replace(config, last_only=False), tmp_path / "whole", workers=0)
    assert any(
        not torch.equal(tensor, grown.state[key])
        for key, tensor in read_weights(whole).state.items()
        if key.startswith("flownetc.")
    )


def test_who_refines_once_refines_twice(tmp_path: Path) -> None:
    first = train(TINY, tmp_path / "c", workers=0)
    config = replace(TINY, model="FlowNet2CS", init=str(first), batch_norm=False, last_only=True)
    second = train(config, tmp_path / "cs", workers=0)
    third = replace(config, model="flownet2css", init=str(second), learning_rate=0.0)
    grown = read_weights(train(third, tmp_path / "css", workers=0))
    assert grown.model == "FlowNet2CSS"
    for key, tensor in read_weights(second).state.items():
        assert torch.equal(grown.state[key], tensor)
        assert torch.equal(grown.state[key.replace("flownets_1.", "flownets_2.")], tensor)
    trained = read_weights(train(replace(third, learning_rate=1e-3), tmp_path / "trained", workers=0))
    changed = {key.split(".")[0] for key, tensor in trained.state.items() if not torch.equal(tensor, grown.state[key])}
    assert changed == {"flownets_2"}


def test_what_cannot_grow_says_so(tmp_path: Path) -> None:
    config = replace(TINY, init=str(train(TINY, tmp_path / "c", workers=0)), batch_norm=False)
    for changed, words in (
        (replace(config, width=0.09), r"at width 0\.0625 or a multiple of it"),
        (replace(config, model="FlowNet2S"), "cannot grow into FlowNet2S"),
        (replace(config, batch_norm=True), "continues without BatchNorm"),
    ):
        with pytest.raises(UsageError, match=words):
            train(changed, tmp_path / "next", workers=0)


def test_widths_that_round_otherwise_in_some_layer_are_refused(tmp_path: Path) -> None:
    narrow = replace(TINY, width=0.126)
    config = replace(narrow, width=0.252, init=str(train(narrow, tmp_path / "c", workers=0)), batch_norm=False)
    with pytest.raises(UsageError, match=r"at width 0\.126 or a multiple"):  # 129 channels in deconv5, not twice 65
        train(config, tmp_path / "next", workers=0)


def test_too_narrow_a_network_cannot_pass_the_flow_on(tmp_path: Path) -> None:
    narrow = replace(TINY, width=0.05)
    config = replace(narrow, model="FlowNet2CS", init=str(train(narrow, tmp_path / "c", workers=0)), batch_norm=False)
    with pytest.raises(UsageError, match=r"a width of at least 0\.0625, got 0\.05"):
        train(config, tmp_path / "next", workers=0)
