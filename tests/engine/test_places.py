"""Outputs and reports that would damage files of the user are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import flowreel
from flowreel.engine import places
from flowreel.engine.errors import OutputExistsError, UsageError


@pytest.mark.parametrize("outputs", [None, "x.zarr", "/elsewhere/x.mp4"])
def test_a_source_without_a_name_is_said_to_be_that(outputs: str | None) -> None:
    with pytest.raises(UsageError, match="source's name is empty"):
        flowreel.run("", outputs)


@pytest.mark.parametrize("held", ['{"my": "settings"}', '{"sources"', "{", "[1]", "text", "[" * 100_000])
def test_a_file_that_is_no_report_is_not_replaced_by_one(held: str, tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text(held)
    with pytest.raises(OutputExistsError, match="is not a report written by flowreel"):
        places.require_report(tmp_path / "notes.json", [], [])


def test_a_large_file_that_is_no_report_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "dance.mp4").open("wb") as file:
        file.truncate(1 << 43)
    with pytest.raises(OutputExistsError, match="is not a report written by flowreel"):
        places.require_report(tmp_path / "dance.mp4", [], [])


@pytest.mark.parametrize("held", ["", '{"pairs": 5, "seconds": 1.5, "outputs": []}', '{"sources": []}'])
def test_a_report_is_replaced_by_the_next(held: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(held)
    places.require_report(tmp_path / "report.json", [], [])


def test_a_glob_over_folders_keeps_pictures_out_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b", "other"):
        Path(folder).mkdir()
        Path(folder, "1.png").touch()
    for source in ("[ab]/*.png", "a/*.png", "a", "a/1.png"):
        with pytest.raises(UsageError, match="lies among the images"):
            places.require_harmless("a/%06d.png", source)
        places.require_harmless("other/%06d.png", source)
    with pytest.raises(UsageError, match="lies among the images"):
        places.require_harmless("b/%06d.png", "[ab]/*.png")
