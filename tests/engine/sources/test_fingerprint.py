"""A changed source is recognised although its name, size and beginning are the same."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from flowreel.engine.data import HEAD_BYTES
from flowreel.engine.sources import source_identity
from flowreel.engine.sources.fingerprint import source_id
from flowreel.sinks.store_metadata import other_source


def made(path: Path, size: int, seed: int = 0) -> Path:
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    return path


def change(path: Path, place: int, count: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + count] = bytes(byte ^ 255 for byte in data[place : place + count])
    path.write_bytes(data)


@pytest.mark.parametrize("place", [1.5, 2.9999, 2.0])
def test_a_part_of_a_file_that_changes_later(tmp_path: Path, place: float) -> None:
    """A change to a thirtieth of the file, about a few frames, is noticed wherever it is."""
    path = made(tmp_path / "x.y4m", 3 * HEAD_BYTES)
    before, again = (source_id("x", [path]) for _ in range(2))
    assert before == again
    start = int(place * HEAD_BYTES)
    change(path, start, HEAD_BYTES // 10)
    after = source_id("x", [path])
    assert (after.head_sha256, after.size_bytes) == (before.head_sha256, before.size_bytes)
    assert after.sampled_sha256 != before.sampled_sha256
    assert other_source(vars(before), vars(after)) == ["x holds something else than it did"]


def test_one_of_many_images_that_changes(tmp_path: Path) -> None:
    """Its last byte (any change to a compressed image reaches that), a byte in the middle, or two images swapped."""
    paths = [made(tmp_path / f"{number}.png", 5000, number) for number in range(100)]
    before = source_identity(tmp_path)
    for place in (-1, 2500):
        change(paths[70], place if place >= 0 else 4999)
        assert other_source(vars(before), vars(source_identity(tmp_path)))
        change(paths[70], place if place >= 0 else 4999)
    assert not other_source(vars(before), vars(source_identity(tmp_path)))
    paths[30].rename(tmp_path / "away")
    paths[31].rename(paths[30])
    (tmp_path / "away").rename(paths[31])
    assert other_source(vars(before), vars(source_identity(tmp_path)))


def test_what_has_grown_is_the_same_as_far_as_it_was(tmp_path: Path) -> None:
    path = made(tmp_path / "x.mkv", 2 * HEAD_BYTES)
    before = source_id("x.mkv", [path])
    path.write_bytes(path.read_bytes() + bytes(1000))
    after = source_id("x.mkv", [path])
    assert other_source(vars(before), vars(after)) == []
    assert other_source(vars(after), vars(before))
    change(path, HEAD_BYTES // 2)  # behind the heads of shorter inputs
    assert other_source(vars(before), vars(source_id("x.mkv", [path]))) == ["x.mkv is another file than it was"]


@pytest.mark.parametrize("size", [1500, 150_000, HEAD_BYTES - 1])
@pytest.mark.parametrize("grown", [1, HEAD_BYTES])
def test_what_was_short_and_has_grown_is_the_same_as_far_as_it_was(tmp_path: Path, size: int, grown: int) -> None:
    path = made(tmp_path / "x.mkv", size)
    before = json.loads(json.dumps(asdict(source_id("x.mkv", [path]))))  # as a store records it
    path.write_bytes(path.read_bytes() + bytes(grown))
    assert other_source(before, asdict(source_id("x.mkv", [path]))) == []
    change(path, 1000)
    assert other_source(before, asdict(source_id("x.mkv", [path]))) == ["x.mkv is another file than it was"]


def test_a_short_file_that_was_exchanged_for_a_longer_one(tmp_path: Path) -> None:
    path = made(tmp_path / "x.mkv", 150_000)
    before = asdict(source_id("x.mkv", [path]))
    made(path, 160_000, seed=1)
    assert other_source(before, asdict(source_id("x.mkv", [path])))
    del before["heads_sha256"]  # as older versions recorded it
    made(path, 150_000)
    assert not other_source(before, asdict(source_id("x.mkv", [path])))
    path.write_bytes(path.read_bytes() + b"more")
    assert other_source(before, asdict(source_id("x.mkv", [path])))


def test_what_was_recorded_without_samples_still_counts(tmp_path: Path) -> None:
    path = made(tmp_path / "x.mkv", 2 * HEAD_BYTES)
    was = vars(source_id("x.mkv", [path])).copy()
    del was["sampled_sha256"]
    assert other_source(was, vars(source_id("x.mkv", [path]))) == []


@pytest.mark.parametrize("size", [0, 1, 100, 1 << 14, (1 << 14) + 1])
def test_of_any_size(tmp_path: Path, size: int) -> None:
    path = made(tmp_path / "x", size)
    before = source_id("x", [path])
    assert source_id("x", [path]) == before
    if size:
        change(path, size - 1)
        assert source_id("x", [path]).sampled_sha256 != before.sampled_sha256
