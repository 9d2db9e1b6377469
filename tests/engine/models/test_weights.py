"""Weights files: NVIDIA's checkpoints and our own, networks inside a stack, and everything that can be wrong."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flowreel.engine.errors import (
    DeviceError,
    OutputExistsError,
    OutputWriteError,
    UnreadableWeightsError,
    UsageError,
    WeightsMismatchError,
    WeightsNotFoundError,
)
from flowreel.engine.models import MODELS, build_model, checkpoints
from flowreel.engine.models.identify import identify
from flowreel.engine.models.saving import convert, save_checkpoint, save_weights
from flowreel.engine.models.weights import instantiate, known_weights, load_model, read_weights

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
    assert held.summary()["parameters"] == sum(parameter.numel() for parameter in model.parameters())
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
    assert not load_model("flownet2s", path).training


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


def test_a_cut_checkpoint_is_said_to_be_that(tmp_path: Path) -> None:
    _cut(tmp_path / "part.pth.tar")
    with pytest.raises(UnreadableWeightsError, match=r"^part\.pth\.tar is cut short or damaged: its end is missing"):
        read_weights(tmp_path / "part.pth.tar")


@pytest.mark.parametrize(
    ("suffix", "reader", "error"),
    [
        (".pth.tar", "torch.load", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")),
        (".pth.tar", "torch.load", MemoryError()),
        (".safetensors", "safetensors.safe_open", MemoryError("Cannot allocate memory (os error 12)")),
        (".safetensors", "safetensors.safe_open", RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)")),
    ],
    ids=range(4),
)
def test_a_file_that_memory_does_not_suffice_for_need_not_be_damaged(
    suffix: str, reader: str, error: Exception, tmp_path: Path, filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    path = tmp_path / f"large{suffix}"
    state = filled("FlowNet2S", width=NARROW).state_dict()
    if suffix == ".safetensors":
        save_weights(path, state, licence="none", made_by={})
    else:
        torch.save(state, path)
    monkeypatch.setattr(reader, fails)
    with pytest.raises(UnreadableWeightsError, match=r"^large.* is too large for the memory that is free here, or dam"):
        read_weights(path)


def test_a_checkpoint_with_the_options_of_its_training_is_told_what_to_hold(tmp_path: Path) -> None:
    path = tmp_path / "mine.pth.tar"
    torch.save({"state_dict": {"conv1.0.weight": torch.zeros(1)}, "args": argparse.Namespace(lr=1e-4)}, path)
    with pytest.raises(UnreadableWeightsError, match=r"argparse\.Namespace\. Save it again .*\{'state_dict': model"):
        read_weights(path)


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
    for use in (
        lambda: load_model(None, path),
        lambda: convert(path, tmp_path / "y.safetensors"),
        lambda: read_weights(path).summary(),  # flowreel info: not as if a run could use them
    ):
        with pytest.raises(WeightsMismatchError, match=r"lacks conv4\.0\.bias.*conv2\.0\.weight"):
            use()
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def memory_up_to(more_bytes: int) -> Iterator[None]:
    """Inside the block, taking more than this in addition to what is already taken is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _safetensors(path: Path, header: object, body: bytes = b"") -> None:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _entry(*shape: int, end: int | None = None) -> dict[str, object]:
    count = 4 * int(np.prod(shape, dtype=object))
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [0, count if end is None else end]}


@pytest.mark.parametrize(
    "header",
    [
        {"predict_flow6.weight": _entry(1 << 20, 1 << 20)},
        {"predict_flow6.weight": _entry(1 << 20, 1 << 20, end=16)},
        {"predict_flow6.weight": _entry(1 << 40, 1 << 40)},
        {"predict_flow6.weight": _entry(1 << 62, 4, end=0)},
        {"predict_flow6.weight": _entry(-1, 2, end=16)},
        {"predict_flow6.weight": _entry((1 << 64) - 1, 0), "predict_flow6.bias": _entry(4)},
        {"predict_flow6.weight": 7, "__metadata__": 5},
        {"__metadata__": {"flowreel": "[" * 100_000}},
        [1, 2],
        b"[" * 100_000,
        b"{",
        b"\xff" * 40,
    ],
    ids=range(12),
)
def test_a_header_that_lies_allocates_nothing(header: object, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    _safetensors(path, header, bytes(16))
    with memory_up_to(1 << 30), pytest.raises((UnreadableWeightsError, WeightsMismatchError), match="bad") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_header_longer_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 33) + bytes(16))
    with (
        memory_up_to(1 << 30),
        pytest.raises(UnreadableWeightsError, match=r"^bad.safetensors is not a whole .*: .*header"),
    ):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_a_file_larger_than_any_network_is_not_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"huge{suffix}"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UnreadableWeightsError, match="1099511627776 bytes; no FlowNet2"):
        read_weights(path)


def _repeated(path: Path) -> None:
    """A single half-precision value, stored as a tensor of 16 billion."""
    torch.save({"conv1.0.weight": torch.zeros(1, dtype=torch.half).expand(1 << 20, 1 << 14)}, path)


def _sparse(path: Path) -> None:
    index = torch.zeros(1, 1, dtype=torch.long)
    sparse = torch.sparse_coo_tensor(index, torch.zeros(1), (1 << 40,), check_invariants=True)
    torch.save({"conv1.0.weight": sparse}, path)


def _meta(path: Path) -> None:
    torch.save({"conv1.0.weight": torch.empty(1 << 40, device="meta")}, path)


def _packed(path: Path) -> None:
    """A compressed zip file, which expands to a thousand times its size."""
    torch.save({"conv1.0.weight": torch.zeros(1 << 22)}, path)
    with zipfile.ZipFile(path) as plain:
        records = {record.filename: plain.read(record) for record in plain.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in records.items():
            packed.writestr(name, content)


@pytest.mark.parametrize(
    ("make", "words"), [(_repeated, "claims"), (_sparse, "plain"), (_meta, "plain"), (_packed, "compressed zip")]
)
def test_tensors_that_are_not_in_the_file(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.pth.tar"
    make(path)
    with memory_up_to(1 << 30), pytest.raises(UnreadableWeightsError, match=words):
        read_weights(path)


@pytest.mark.parametrize(("name", "width"), [("FlowNet2S", 0.01), ("FlowNet2C", 0.19), ("FlowNet2", 0.0465)])
def test_any_width_is_told_from_the_tensors(name: str, width: float, filled: Filled, tmp_path: Path) -> None:
    """With each of these, a width computed from the widest layer alone would round another layer to a wrong size."""
    model = filled(name, width=width)
    save_weights(tmp_path / "x.safetensors", model.state_dict(), licence="", made_by={})
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pth.tar")
    for path in tmp_path.iterdir():
        assert same(load_model(None, path, width=width), model)


@pytest.mark.parametrize("width", [1e306, -1.0, float("nan"), 0.19])
def test_a_recorded_width_that_does_not_fit_is_ignored(width: float, filled: Filled, tmp_path: Path) -> None:
    model = filled("FlowNet2S", width=NARROW)
    save_weights(tmp_path / "x.safetensors", model.state_dict(), licence="", made_by={}, width=width)
    assert same(load_model(None, tmp_path / "x.safetensors"), model)


def test_weights_that_are_integers_are_refused(filled: Filled, tmp_path: Path) -> None:
    state = filled("FlowNet2S", width=NARROW).state_dict()
    torch.save({"state_dict": state | {"conv1.0.weight": state["conv1.0.weight"].int()}}, tmp_path / "x.pth.tar")
    with pytest.raises(WeightsMismatchError, match=r"conv1\.0\.weight is torch\.int32"):
        load_model(None, tmp_path / "x.pth.tar")


def test_a_small_file_that_poses_as_a_wide_network(tmp_path: Path) -> None:
    path = tmp_path / "posing.safetensors"
    wide = {"flownetfusion.conv0.0.weight": torch.zeros(1), "flownetc.predict_flow6.weight": torch.zeros(2, 4096, 3, 3)}
    save_weights(path, wide, licence="", made_by={})
    with memory_up_to(1 << 30), pytest.raises(WeightsMismatchError, match="does not fit FlowNet2"):
        load_model(None, path)


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {key: tensor.numpy().tobytes() for key, tensor in state.items()}


@pytest.mark.parametrize("batch_norm", [False, True])
def test_there_and_back_is_the_same_to_the_bit(batch_norm: bool, filled: Filled, tmp_path: Path) -> None:
    state = filled("FlowNet2CS", width=0.11, batch_norm=batch_norm).state_dict()
    odd = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]).view(torch.int32) + torch.tensor(
        [5, 0, 0, 0], dtype=torch.int32
    )
    state["flownetc.conv1.0.weight"].view(-1)[:4] = odd.view(torch.float32)  # a NaN with a payload, a subnormal
    theirs = {"arch": "FlowNet2CS", "epoch": 3, "state_dict": state, "best_EPE": np.float64(2.5)}
    torch.save(theirs, tmp_path / "a.pth.tar")
    ours = convert(tmp_path / "a.pth.tar", tmp_path / "new" / "b.safetensors")
    assert ours.licence == read_weights(tmp_path / "a.pth.tar").licence
    assert bits(dict(ours.state)) == bits(state)
    sha256 = hashlib.sha256((tmp_path / "a.pth.tar").read_bytes()).hexdigest()
    assert ours.made_by["converted_from"] == [{"name": "a.pth.tar", "sha256": sha256}]
    again = convert(tmp_path / "new" / "b.safetensors", tmp_path / "c.pth.tar")
    assert (again.made_by["epoch"], len(again.made_by["converted_from"])) == (3, 2)
    content = torch.load(tmp_path / "c.pth.tar", weights_only=True)
    assert bits(content["state_dict"]) == bits(state)
    assert (content["arch"], content["epoch"], content["best_EPE"]) == ("FlowNet2CS", 3, 2.5)
    assert not list(tmp_path.rglob("*.partial"))


def test_conversion_keeps_what_is_known(filled: Filled, tmp_path: Path) -> None:
    """Ours to NVIDIA's layout and back: width, licence and history survive, and NVIDIA's keys are there."""
    save_weights(
        tmp_path / "a.safetensors",
        filled("FlowNet2C", width=0.11).state_dict(),
        licence="CC0-1.0",
        made_by={"steps": 12},
        width=0.11,
    )
    theirs = convert(tmp_path / "a.safetensors", tmp_path / "b.pth.tar")
    content = torch.load(tmp_path / "b.pth.tar", weights_only=True)
    assert (content["epoch"], content["best_EPE"]) == (0, 1e10)
    filled("FlowNet2C", width=0.11).load_state_dict(content["state_dict"])
    back = convert(tmp_path / "b.pth.tar", tmp_path / "c.safetensors")
    for held in (theirs, back):
        assert (held.width, held.licence, held.made_by["steps"]) == (0.11, "CC0-1.0", 12)


def test_half_files(filled: Filled, tmp_path: Path) -> None:
    state = filled("FlowNet2S", width=0.2, batch_norm=True).state_dict()
    state["conv1.1.num_batches_tracked"] += 70_001  # an integer, which float16 cannot hold
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    convert(tmp_path / "a.pth.tar", tmp_path / "full.safetensors")
    half = convert(tmp_path / "a.pth.tar", tmp_path / "half.safetensors", half=True)
    sizes = [(tmp_path / name).stat().st_size for name in ("half.safetensors", "full.safetensors")]
    assert sizes[0] < 0.51 * sizes[1]
    torch.testing.assert_close(dict(half.state), dict(state), rtol=1e-3, atol=1e-4)
    state["conv2.1.bias"][3] = 70_000
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    with pytest.raises(WeightsMismatchError, match=r"conv2\.1\.bias reaches 7e\+04"):
        convert(tmp_path / "a.pth.tar", tmp_path / "new.safetensors", half=True)
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize("half", [False, True])
def test_tensors_that_share_memory(half: bool, filled: Filled, tmp_path: Path) -> None:
    state = filled("FlowNet2S", width=NARROW).state_dict()
    state["conv4.0.bias"] = state["conv4_1.0.bias"] = state["conv5.0.bias"].half().float()
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    convert(tmp_path / "a.pth.tar", tmp_path / "b.safetensors", half=half)
    theirs = convert(tmp_path / "a.pth.tar", tmp_path / "c.pth.tar")
    assert bits(dict(theirs.state)) == bits(state)
    state = {key: tensor.half() if half else tensor for key, tensor in state.items()}
    state["conv4.0.bias"] = state["conv4_1.0.bias"]
    save_weights(tmp_path / "d.safetensors", state, licence="", made_by={}, half=half)
    for name in ("b.safetensors", "d.safetensors"):
        held = read_weights(tmp_path / name).state
        assert torch.equal(held["conv4.0.bias"], state["conv4_1.0.bias"].float())


def test_a_part_of_a_larger_tensor_is_saved_alone(filled: Filled, tmp_path: Path) -> None:
    state = filled("FlowNet2S", width=NARROW).state_dict()
    save_weights(tmp_path / "a.safetensors", state, licence="", made_by={})
    held = read_weights(tmp_path / "a.safetensors")
    bias = held.state["conv5.0.bias"]
    larger = bias.repeat(1 << 16)
    save_checkpoint(tmp_path / "b.pth.tar", replace(held, state={**held.state, "conv5.0.bias": larger[: len(bias)]}))
    assert (tmp_path / "b.pth.tar").stat().st_size < larger.nbytes


def test_conversions_that_are_refused(filled: Filled, tmp_path: Path) -> None:
    here, there = tmp_path / "a.pth.tar", tmp_path / "b.safetensors"
    torch.save({"state_dict": filled("FlowNet2S", width=NARROW).state_dict()}, here)
    for output, half in ((tmp_path / "x.onnx", False), (tmp_path / "x.pth.tar", True)):
        with pytest.raises(UsageError):
            convert(here, output, half=half)
    there.write_text("mine")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        convert(here, there)
    with pytest.raises(UnreadableWeightsError):
        convert(there, tmp_path / "x.pth.tar", overwrite=True)
    assert there.read_text() == "mine"
    convert(here, there, overwrite=True)
    convert(there, there, half=True, overwrite=True)  # onto itself
    assert read_weights(there).model == "FlowNet2S"
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth.tar", "b.safetensors"}


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth.tar"])
def test_a_disk_that_is_full(name: str, tmp_path: Path, files_up_to: Callable[[int], object]) -> None:
    (tmp_path / name).write_text("mine")
    with files_up_to(200_000), pytest.raises(OutputWriteError, match=name):  # type: ignore[attr-defined]
        convert("baseline", tmp_path / name, overwrite=True)
    assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OutputWriteError, match="cannot write"):
        convert("baseline", tmp_path / name / "x.pth.tar")


@pytest.fixture
def published(filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> checkpoints.Checkpoint:
    """A table whose only checkpoint is a narrow FlowNet2, and a cache folder without it."""
    path = tmp_path / "made.pth.tar"
    torch.save({"epoch": 0, "state_dict": filled("FlowNet2", width=NARROW).state_dict(), "best_EPE": 1e10}, path)
    first = checkpoints.CHECKPOINTS[0]
    table = (replace(first, size_bytes=path.stat().st_size, sha256=checkpoints.file_sha256(path)),)
    monkeypatch.setenv("FLOWREEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", table)
    monkeypatch.chdir(tmp_path)
    return table[0]


def test_a_checkpoint_by_its_name(published: checkpoints.Checkpoint) -> None:
    with pytest.raises(WeightsNotFoundError, match="flowreel weights download FlowNet2'"):
        read_weights("flownet2")
    published.path.parent.mkdir(parents=True)
    Path("made.pth.tar").rename(published.path)
    held = read_weights("flownet2")
    assert (held.name, held.known_as, held.licence) == ("FlowNet2", "FlowNet2", published.licence)
    assert held.summary()["also_runs"] == ["FlowNet2C", "FlowNet2CS", "FlowNet2CSS"]
    Path("FlowNet2").mkdir()  # a folder of that name makes no difference
    assert load_model("FlowNet2C", "FlowNet2")
    Path("FlowNet2").rmdir()
    Path("FlowNet2").write_text("a file by that name comes first")
    with pytest.raises(UnreadableWeightsError):
        read_weights("FlowNet2")
    Path("FlowNet2").unlink()
    with published.path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UnreadableWeightsError):
        read_weights("FlowNet2")


def test_a_download_that_became_another_file(published: checkpoints.Checkpoint, filled: Filled) -> None:
    published.path.parent.mkdir(parents=True)
    torch.save({"state_dict": filled("FlowNet2S", width=NARROW).state_dict()}, published.path)
    with pytest.raises(UnreadableWeightsError, match=f"expected sha256 {published.sha256}, found .*--overwrite"):
        read_weights("FlowNet2")


def test_a_file_that_is_a_known_checkpoint(published: checkpoints.Checkpoint) -> None:
    """It is recognised by its sha256 in any place, and what is converted from it keeps its licence and origin."""
    held = read_weights("made.pth.tar")
    assert (held.known_as, held.licence) == ("FlowNet2", published.licence)
    assert held.summary()["known_as"] == "FlowNet2"
    made = convert("made.pth.tar", "mine.safetensors")
    assert (made.known_as, made.licence) == (None, published.licence)
    assert made.made_by["converted_from"] == [{"name": "FlowNet2", "sha256": published.sha256}]


def test_the_default_does_not_hang_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("baseline").write_text("no weights")
    assert read_weights("baseline").licence == "Apache-2.0"
    with pytest.raises(UnreadableWeightsError):
        read_weights("./baseline")


def test_known_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWREEL_CACHE", str(tmp_path))
    facts = {one["name"]: one for one in known_weights()}
    assert list(facts)[:2] == ["baseline", "FlowNet2"]
    assert len(facts) == 8
    assert facts["baseline"]["sha256"] == read_weights("baseline").sha256
    assert (facts["FlowNet2-SD"]["sha256"], facts["FlowNet2-SD"]["downloaded"]) == (None, False)
    path = checkpoints.checkpoint("FlowNet2-SD").path
    path.parent.mkdir()
    path.touch()
    assert next(one for one in known_weights() if one["name"] == "FlowNet2-SD")["path"] == str(path)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_network_may_share_the_weights_tensors_or_have_copies(
    batch_norm: bool, filled: Filled, tmp_path: Path
) -> None:
    model = filled("FlowNet2CS", width=NARROW, batch_norm=batch_norm)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pth.tar")
    held = read_weights(tmp_path / "x.pth.tar")
    places = {tensor.data_ptr() for tensor in held.state.values() if tensor.is_floating_point()}
    shared, copied = (instantiate(held, share=share) for share in (True, False))
    assert {tensor.data_ptr() for tensor in shared.parameters()} <= places
    assert not {tensor.data_ptr() for tensor in copied.parameters()} & places
    assert same(shared, model)
    assert same(copied, model)
    assert not any(tensor.is_meta for tensor in shared.state_dict().values())


def test_where_a_network_may_go() -> None:
    """The same device names as everywhere; ``auto`` depends on the machine."""
    for device in ("cpu", torch.device("cpu"), "auto"):
        load_model("FlowNet2S", device=device, width=0.02)
    with pytest.raises(DeviceError, match="cuda:99"):
        load_model("FlowNet2S", device="cuda:99", width=0.02)
    with pytest.raises(UsageError, match="device must be auto"):
        load_model("FlowNet2S", device="tpu", width=0.02)
