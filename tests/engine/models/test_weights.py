"""Weights files: both kinds of checkpoint, ours, sub-networks of stacks, and everything that can be wrong with one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flowreel.engine.errors import UnreadableWeightsError, UsageError, WeightsMismatchError, WeightsNotFoundError
from flowreel.engine.models import MODELS, build_model
from flowreel.engine.models.weights import identify, instantiate, load_model, read_weights, save_weights

Filled = Callable[..., nn.Module]
NARROW = 0.05


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[key]) for key, tensor in a.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_checkpoint_says_itself_what_it_is(name: str, batch_norm: bool, filled: Filled, tmp_path: Path) -> None:
    model = filled(name, width=NARROW, batch_norm=batch_norm)
    path = tmp_path / "x.pth.tar"
    torch.save({"epoch": 0, "state_dict": model.state_dict(), "best_EPE": 1e10}, path)
    held = read_weights(path)
    assert (held.model, held.batch_norm) == (name, batch_norm)
    assert held.width == pytest.approx(NARROW, rel=0.02)
    assert len(held.sha256) == 64
    assert same(load_model(None, path), model)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_saved_while_training(legacy: bool, filled: Filled, tmp_path: Path) -> None:
    """It holds the architecture's name and a NumPy scalar, and older torch wrote no zip file."""
    model = filled("FlowNet2S", width=NARROW)
    content = {
        "arch": "FlowNet2S",
        "epoch": 3,
        "state_dict": model.state_dict(),
        "best_EPE": np.float64(2.5),
    }
    path = tmp_path / "FlowNet2S_checkpoint.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert same(load_model("flownet2s", path), model)


def test_a_scalar_under_its_old_name_is_read(filled: Filled, tmp_path: Path) -> None:
    """NumPy 1 called the module numpy.core; checkpoints of that time say so."""
    path = tmp_path / "old.pth.tar"
    state = filled("FlowNet2S", width=NARROW).state_dict()
    torch.save({"state_dict": state, "best_EPE": np.float64(2.5)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(old)
    assert b"numpy.core.multiarray" in old
    assert read_weights(path).model == "FlowNet2S"


def test_ours_keeps_what_is_known(filled: Filled, tmp_path: Path) -> None:
    model = filled("FlowNet2CS", width=0.11)
    path = tmp_path / "mine.safetensors"
    save_weights(path, model.state_dict(), licence="CC0-1.0", made_by={"steps": 12}, width=0.11)
    held = read_weights(path)
    assert (held.model, held.width, held.licence, held.made_by) == ("FlowNet2CS", 0.11, "CC0-1.0", {"steps": 12})
    assert same(instantiate(held), model)
    assert not list(tmp_path.glob("*.partial"))


def test_half_precision_files_give_float32(filled: Filled, tmp_path: Path) -> None:
    model = filled("FlowNet2S", width=NARROW)
    path = tmp_path / "half.safetensors"
    save_weights(path, model.state_dict(), licence="x", made_by={}, half=True)
    for key, tensor in read_weights(path).state.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, model.state_dict()[key], rtol=1e-3, atol=1e-4)


def test_networks_inside_a_stack(filled: Filled, tmp_path: Path) -> None:
    stack = filled("FlowNet2", width=NARROW)
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": stack.state_dict()}, path)
    held = read_weights(path)
    assert held.serves() == ("FlowNet2", "FlowNet2C", "FlowNet2CS", "FlowNet2CSS")
    assert same(instantiate(held, "flownet2c"), stack.get_submodule("flownetc"))
    css = instantiate(held, "FlowNet2CSS")
    assert same(css.get_submodule("flownets_2"), stack.get_submodule("flownets_2"))
    for name in ("FlowNet2S", "FlowNet2SD"):
        with pytest.raises(WeightsMismatchError, match="no FlowNet2S"):
            instantiate(held, name)


def test_a_small_file_serves_no_larger_model(filled: Filled, tmp_path: Path) -> None:
    path = tmp_path / "x.pth.tar"
    torch.save({"state_dict": filled("FlowNet2C", width=NARROW).state_dict()}, path)
    with pytest.raises(WeightsMismatchError, match="FlowNet2C"):
        load_model("FlowNet2", path)
    with pytest.raises(WeightsMismatchError, match="BatchNorm"):
        load_model(None, path, batch_norm=True)
    with pytest.raises(WeightsMismatchError, match="width"):
        load_model(None, path, width=1.0)


def test_without_weights_a_model_must_be_named() -> None:
    with pytest.raises(UsageError, match="name a model"):
        load_model()
    assert not load_model("FlowNet2S", width=NARROW).training


def test_the_shipped_weights() -> None:
    held = read_weights("baseline")
    assert held.licence == "Apache-2.0"
    assert held.made_by["trained_on"]
    assert held.width < 1
    assert (Path(str(files("flowreel.engine.weights"))) / "baseline.safetensors").stat().st_size < 30 << 20
    instantiate(held)


class _Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def _pickled_attack(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": _Attack()}))


def _saved_attack(path: Path) -> None:
    torch.save({"state_dict": {"conv1.0.weight": torch.zeros(1)}, "arch": _Attack()}, path)


def _random(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(10_000))


def _cut(path: Path) -> None:
    torch.save({"state_dict": build_model("FlowNet2S", width=NARROW).state_dict()}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 650102505\n")


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
@pytest.mark.parametrize(
    "make", [_pickled_attack, _saved_attack, _random, _cut, _pointer, Path.touch], ids=lambda f: f.__name__.strip("_")
)
def test_bad_files_are_refused_in_one_line(
    make: Callable[[Path], None], suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"bad{suffix}"
    make(path)
    with pytest.raises(UnreadableWeightsError, match="bad") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_what_is_no_network_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    for content in ({"layer1.weight": torch.zeros(3)}, {"state_dict": {"a": 1}}, {"state_dict": {}}, [1, 2]):
        torch.save(content, path)
        with pytest.raises(WeightsMismatchError, match="resnet"):
            read_weights(path)
    with pytest.raises(WeightsMismatchError, match="alone"):
        identify(build_model("FlowNet2CS", width=NARROW).get_submodule("flownets_1").state_dict(), "part")
    with pytest.raises(WeightsNotFoundError, match="nowhere"):
        read_weights(tmp_path / "nowhere.pth")
    with pytest.raises(UnreadableWeightsError):
        read_weights(tmp_path)


def test_tensors_of_another_shape_are_named(filled: Filled, tmp_path: Path) -> None:
    state = filled("FlowNet2S", width=NARROW).state_dict()
    state["conv2.0.weight"] = state["conv2.0.weight"][:1]
    del state["conv4.0.bias"]
    path = tmp_path / "x.pth"
    torch.save(state, path)
    with pytest.raises(WeightsMismatchError, match=r"lacks conv4\.0\.bias.*conv2\.0\.weight"):
        load_model(None, path)
