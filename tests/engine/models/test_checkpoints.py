"""The table of published checkpoints, its names, and where their downloads are kept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flowreel.engine.errors import UsageError
from flowreel.engine.models import MODELS
from flowreel.engine.models.checkpoints import (
    CHECKPOINTS,
    LICENCE_TEXT,
    checkpoint,
    checkpoint_of,
    file_sha256,
    find_checkpoint,
)


def test_the_table_is_whole() -> None:
    assert len(CHECKPOINTS) == 7
    for field in ("name", "file_name", "sources"):
        assert len({getattr(one, field) for one in CHECKPOINTS}) == 7, field
    assert len({source.url for one in CHECKPOINTS for source in one.sources}) == 15
    for one in CHECKPOINTS:
        assert one.model in MODELS
        assert one.licence.startswith("research only")
        assert len(one.sources) >= 2
        assert all(source.url.startswith("https://") for source in one.sources)
        assert (one.size_bytes is None) == (one.sha256 is None)
        if one.size_bytes is not None and one.sha256 is not None:
            assert round(one.size_bytes / 2**20) == one.about_bytes >> 20  # two columns of the table agree
            assert re.fullmatch(r"[0-9a-f]{64}", one.sha256)
            assert one.most_bytes == one.size_bytes
            assert checkpoint_of(one.sha256) == one


def test_it_is_what_was_found_out(data_dir: Path) -> None:
    """Every id, size and sha256 agrees with the notes that the table was made from."""
    if not (data_dir / "WEIGHTS.md").exists():
        pytest.skip("no notes on weights among the data")
    rows = {}
    for line in (data_dir / "WEIGHTS.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 6 and cells[0].startswith("FlowNet2"):
            rows[cells[0]] = cells[1:]
    assert list(rows) == [one.name for one in CHECKPOINTS]
    for one in CHECKPOINTS:
        about, drive, drive_before, size, sha256 = rows[one.name]
        assert about == f"{one.about_bytes >> 20}MB"
        assert [source.url.rsplit("=", 1)[1] for source in one.sources[:2]] == [drive, drive_before]
        assert (size, sha256) == (str(one.size_bytes or "?"), one.sha256 or "?")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("FlowNet2", "FlowNet2"),
        ("flownet2c", "FlowNet2-C"),
        ("FlowNet2-CSS", "FlowNet2-CSS"),
        ("flownet2_css_ft_sd", "FlowNet2-CSS-ft-sd"),
        ("FLOWNET2-SD", "FlowNet2-SD"),
    ],
)
def test_names_in_any_spelling(given: str, found: str) -> None:
    assert checkpoint(given).name == found


def test_other_names() -> None:
    assert find_checkpoint("FlowNet3") is None
    assert checkpoint_of("0" * 64) is None
    with pytest.raises(UsageError, match=r"FlowNet3.*FlowNet2-CSS-ft-sd"):
        checkpoint("FlowNet3")
    with pytest.raises(UsageError, match="shipped"):
        checkpoint("baseline")


def test_models_of_the_names() -> None:
    told = {one.name: one.model for one in CHECKPOINTS}
    assert told["FlowNet2-CSS-ft-sd"] == "FlowNet2CSS"
    assert told["FlowNet2-SD"] == "FlowNet2SD"


def test_the_licence_says_what_matters() -> None:
    for words in ("research only", "consent", "Ilg", "CVPR 2017", "https://drive.google.com/file/d/1R5byo1qLKAF"):
        assert words in LICENCE_TEXT


def test_what_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWREEL_CACHE", str(tmp_path))
    sized, unsized = checkpoint("FlowNet2-C"), checkpoint("FlowNet2-SD")
    assert not sized.downloaded
    for one in (sized, unsized):
        one.path.parent.mkdir(exist_ok=True)
        one.path.write_bytes(b"something")
    assert not sized.downloaded  # of another size
    assert unsized.downloaded
    with sized.path.open("r+b") as file:
        file.truncate(sized.size_bytes)
    assert sized.downloaded


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
