"""``flowreel repair``: what it says, and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flowreel
from flowreel.engine.cli import call
from flowreel.engine.models import build_model
from flowreel.engine.models.saving import save_weights

Capture = pytest.CaptureFixture[str]
SOURCE = "synthetic:objects?size=64x64&frames=7"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``a.zarr`` with six flows in shards of two, its second shard missing."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build_model("FlowNet2S", width=0.05)
    save_weights("tiny.safetensors", model.state_dict(), licence="none", made_by={}, width=0.05)
    flowreel.run(SOURCE, "a.zarr", weights="tiny.safetensors", shard_bytes=2 * 8 * 64 * 64)
    Path("a.zarr/flow/c/1/0/0/0").unlink()


def test_a_dry_run_then_the_repair_then_nothing_to_do(capsys: Capture) -> None:
    assert call(["repair", "a.zarr", SOURCE, "--dry-run"]) == 1
    out, err = capsys.readouterr()
    assert out == "a.zarr: 1 thing wrong\n  flows 2 to 3 (frames 2 to 3): missing\n"
    assert err == "to be made again: shard 1, flows 2 to 3: 2 of 2 flows\n"
    assert call(["repair", "a.zarr", SOURCE, "--weights", "tiny.safetensors", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out == "a.zarr: sound, 6 flows of 64x64\n"
    assert "flows 2 to 3 (frames 2 to 3): missing" in err
    assert "made again: shard 1" in err
    assert "2 flows of 1 shard computed in" in err
    assert "FlowNet2S (tiny.safetensors), fp32" in err
    assert call(["verify", "a.zarr"]) == 0
    capsys.readouterr()
    assert call(["repair", "a.zarr", "nowhere"]) == 0
    assert capsys.readouterr() == ("a.zarr: sound, 6 flows of 64x64\n", "")


def test_arrays_that_need_no_source(capsys: Capture) -> None:
    """Only a dry run, and the repair of a store whose flow is sound, read no source at all."""
    flowreel.run(SOURCE, "n.zarr", weights="tiny.safetensors", resolution="native")
    Path("n.zarr/y/c/0").unlink()
    assert call(["repair", "n.zarr", "nowhere", "--dry-run"]) == 1
    assert capsys.readouterr() == ("n.zarr: chunk 0 of y is missing\n", "to be made again: y\n")
    assert call(["repair", "n.zarr", "nowhere"]) == 0
    assert "made again: y\n" in capsys.readouterr().err


def test_quiet(capsys: Capture) -> None:
    assert call(["repair", "a.zarr", SOURCE, "--weights", "tiny.safetensors", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_what_remains_is_told(capsys: Capture) -> None:
    surplus = Path("a.zarr/flow/c/9/0/0/0")
    surplus.parent.mkdir(parents=True)
    surplus.write_bytes(b"what is this")
    assert call(["repair", "a.zarr", SOURCE, "--weights", "tiny.safetensors"]) == 1
    assert "flow/c/9 lies behind the last flow" in capsys.readouterr().out
    assert call(["repair", "a.zarr", SOURCE, "--dry-run"]) == 1
    assert "nothing that can be computed again" in capsys.readouterr().err


def test_refusals_are_one_line(capsys: Capture) -> None:
    assert call(["repair", "a.zarr", SOURCE]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flowreel: cannot repair a.zarr: weights sha256 was ")
    assert err.count("\n") == 1
    Path("a.zarr").rename("a.zarr.partial")
    assert call(["repair", "a.zarr", SOURCE]) == 1
    assert "run --resume" in capsys.readouterr().err
    assert call(["repair", "b.zarr", SOURCE]) == 1
    assert "no flow store at b.zarr" in capsys.readouterr().err
