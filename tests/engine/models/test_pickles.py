"""Pickles are checked without being loaded: checkpoints pass, small files that would build something huge do not."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flowreel.engine.errors import UnreadableWeightsError
from flowreel.engine.models import MODELS, pickles
from flowreel.engine.models.pickles import check_checkpoint, check_pickle
from flowreel.engine.models.weights import read_weights

Filled = Callable[..., nn.Module]
DOUBLED = b")q\0" + b"h\0\x86q\0" * 60  # a tuple holding the last one twice, sixty times: 2**60 empty tuples
DOUBLED_LIST = b"]q\0" + b"h\0\x86q\0" * 60


def trained(model: nn.Module) -> dict[str, Any]:
    """A checkpoint as a training script saves it, with the optimiser."""
    optimiser = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    best = {"best_EPE": np.float64(2.5), "best_loss": np.float32(1), "epoch": np.int64(3)}
    return {"arch": "FlowNet2", "state_dict": model.state_dict(), "optimizer": optimiser.state_dict(), **best}


@pytest.mark.parametrize(("name", "zipped"), [*((name, True) for name in MODELS), ("FlowNet2", False)])
def test_checkpoints_pass_with_their_optimiser(name: str, zipped: bool, filled: Filled, tmp_path: Path) -> None:
    path = tmp_path / "x.pth.tar"
    torch.save(trained(filled(name, width=0.03, batch_norm=True)), path, _use_new_zipfile_serialization=zipped)
    check_checkpoint(path)
    assert read_weights(path).model == name


def test_ten_thousand_entries_pass() -> None:
    tensor = torch.zeros(2)
    file = io.BytesIO()
    state = OrderedDict((f"layer{number}.weight", tensor.clone()) for number in range(10_000))
    torch.save({"state_dict": state}, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    for _ in range(5):
        check_pickle(file)


def test_a_dict_as_python_2_wrote_it_passes() -> None:
    pairs = b"](]" + b"(U\7conv1.wK\1e" + b"]" + b"(U\7conv1.bK\2ee"
    check_pickle(io.BytesIO(b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R."))


def test_what_is_shared_passes() -> None:
    shared = ("cpu", [1, 2], {"a": 1})
    check_pickle(io.BytesIO(pickle.dumps([shared] * 1000, 2)))


def text(value: bytes) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value


NAMED_STORAGE = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n"
PICKLES = {
    "a key": b"}" + DOUBLED + b"K\1s.",
    "a key among keys": b"}(" + b"K\1K\1" + DOUBLED + b"K\1u.",
    "a key, not shared": b"}" + b")" * 3 + b"\x85" * 200 + b"K\1s.",
    "a key so deep that its hash overflows the stack": b"})" + b"\x85" * 900_000 + b"K\1s.",
    "the name of a storage": NAMED_STORAGE + DOUBLED + text(b"cpu") + b"K\1tQ.",
    "what is called, which is put into words": DOUBLED_LIST + b")R.",
    "what a dict is made of": b"ccollections\nOrderedDict\n](](" + DOUBLED + b"K\1ee\x85R.",
    "what a set is made of": b"c__builtin__\nset\n](" + DOUBLED + b"e\x85R.",
    "what is counted": b"ccollections\nCounter\n](" + DOUBLED + b"e\x85R.",
    "what a dict is built of": b"ccollections\nOrderedDict\n)R}" + DOUBLED + b"K\1sb.",
    "many bytes of one number": b"c__builtin__\nbytearray\n\x8a\5\0\0\0\0\x10\x85R.",
    "bytes that double": b"c_codecs\nencode\n" + text(b"a") + text(b"hex") + b"\x86R.",
    "a number of two gigabytes": b"cnumpy\ndtype\n" + text(b"V2000000000") + b"\x85R.",
    "a list that grows while others hold it": b"]q\0]q\1h\0ah\1h\0h\1aK\1a.",
    "a list that holds itself": b"]q\0h\0a.",
    "half a million keys of a thousand values": b"(" + b"K\1" * 999 + b"tq\0}(" + b"h\0K\1" * 400_000 + b"u.",
    "a name of nothing": b"cos\nsystem\n.",
}
OTHER_REASONS = {  # than the size of a value
    "a key, not shared": "nested more than 100 deep",
    "a key so deep that its hash overflows the stack": "nested more than 100 deep",
    "what a set is made of": "unsupported name __builtin__.set",
    "what is counted": "unsupported name collections.Counter",
    "many bytes of one number": "unsupported name __builtin__.bytearray",
    "bytes that double": "unsupported encoding 'hex'",
    "a number of two gigabytes": "unsupported dtype 'V2000000000'",
    "a list that grows while others hold it": "changes after another holds it",
    "a list that holds itself": "holds itself",
    "half a million keys of a thousand values": "10000000 values hashed",
    "a name of nothing": "unsupported name os.system",
}


@pytest.mark.parametrize("what", list(PICKLES))
def test_what_never_ends_is_refused(what: str) -> None:
    with pytest.raises(UnpicklingError, match=OTHER_REASONS.get(what, "unfolds to over 1000000 values")):
        check_pickle(io.BytesIO(b"\x80\x02" + PICKLES[what]))


def test_too_many_instructions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MOST_INSTRUCTIONS", 1000)
    check_pickle(io.BytesIO(b"\x80\x02" + b"N" * 998 + b"."))
    with pytest.raises(UnpicklingError, match="over 1000 instructions"):
        check_pickle(io.BytesIO(b"\x80\x02" + b"N" * 999 + b"."))


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02", b"a.", b"s.", b"(t", b"t.", b"h\0.", b".", b"\x86.", b"X\xff.", b"\xff"]
)
def test_what_is_cut_or_damaged_is_said_to_be(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"pickle|opcode|expected|not enough|exhausted"):
        check_pickle(io.BytesIO(data))


def test_every_pickle_of_a_legacy_file_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "x.pth.tar"
    sound = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])]
    for place in range(5):
        parts = [*sound[:place], b"\x80\x02}" + DOUBLED + b"K\1s.", *sound[place + 1 :]]
        path.write_bytes(b"".join(parts))
        with pytest.raises(UnreadableWeightsError, match="unfolds to over"):
            read_weights(path)
