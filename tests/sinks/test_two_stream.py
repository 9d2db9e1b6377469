"""Two-stream pairs: the levels of the convention, always both pictures or none, and notes about what was lost."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import (
    FlowFileError,
    OutputError,
    OutputExistsError,
    SourceNotFoundError,
    UnknownOutputError,
    UsageError,
)
from flowreel.engine.protocols import Sink
from flowreel.sinks import open_sink
from flowreel.sinks.two_stream import read_two_stream


def written(path: Path, flows: np.ndarray, **options: float) -> Sink:
    """A committed sink, after writing flow (N, H, W, 2)."""
    sink = open_sink(path, SinkConfig(**options))
    sink.open(FlowInfo(*flows.shape[1:3], frame_rate=None, frame_count=None, source=SourceId("test")))
    frames = np.arange(len(flows))
    tensor = torch.from_numpy(flows.astype(np.float32)).permute(0, 3, 1, 2)
    sink.write(FlowBatch(tensor, 0, frames, frames + 1, frames / 25, frames / 25))
    sink.commit()
    return sink


def levels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == "L"
        return np.array(picture)


def smooth_flow(height: int = 48, width: int = 64) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([12 * np.sin(x / 19), 9 * np.cos(y / 23)], axis=-1)


@pytest.mark.parametrize(
    ("value", "level"),
    [
        (-20, 0), (-19.95, 0), (-10, 64), (0, 128), (0.05, 128), (0.1, 128), (0.2, 129), (20, 255), (19.9, 254),
        (-21, 0), (1e8, 255), (-1e8, 0), (1e10, 128), (np.nan, 128), (np.inf, 128),
    ],
)  # fmt: skip
def test_levels_of_the_convention(tmp_path: Path, value: float, level: int) -> None:
    flow = np.zeros((1, 3, 4, 2))
    flow[0, 1, 2, 0] = value
    written(tmp_path / "flow_x_%05d.png", flow)
    x, y = levels(tmp_path / "flow_x_00000.png"), levels(tmp_path / "flow_y_00000.png")
    assert x[1, 2] == level
    assert (np.delete(x.ravel(), 6) == 128).all()
    assert (y == 128).all()


@pytest.mark.parametrize("bound", [1e-300, 0.1, 7.0, 20.0, 300.0])
def test_levels_follow_the_bound(tmp_path: Path, bound: float) -> None:
    flow = np.random.default_rng(0).normal(0, 9, (1, 20, 30, 2)).astype(np.float32)
    flow[0, 0, 0] = 0
    written(tmp_path / "flow_x_%05d.png", flow, bound=bound)
    expected = np.clip(np.rint(127.5 * (flow[0].astype(np.longdouble) / bound + 1)), 0, 255)
    for axis, name in enumerate("xy"):
        off = np.abs(levels(tmp_path / f"flow_{name}_00000.png") - expected[..., axis])
        assert off.max() <= 1  # float32 may round a tie the other way
        assert off.sum() <= 2
        assert levels(tmp_path / f"flow_{name}_00000.png")[0, 0] == 128


@pytest.mark.parametrize("bound", [1e12, 1e300])
def test_a_bound_beyond_all_motion_is_grey(tmp_path: Path, bound: float) -> None:
    sink = written(tmp_path / "flow_x_%05d.png", smooth_flow()[None], bound=bound)
    assert (levels(tmp_path / "flow_x_00000.png") == 128).all()
    assert sink.notes == []


def test_png_reads_back_within_half_a_step(tmp_path: Path) -> None:
    flow = np.random.default_rng(1).uniform(-15, 15, (2, 11, 13, 2)).astype(np.float32)
    sink = written(tmp_path / "flow_x_%05d.png", flow, bound=15)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"flow_{name}_0000{number}.png" for name in "xy" for number in (0, 1)
    ]
    assert sink.notes == []
    for number in (0, 1):
        back = read_two_stream(tmp_path / f"flow_x_0000{number}.png", 15)
        assert back.dtype == np.float32
        assert np.abs(back - flow[number]).max() <= 15 / 255 * 1.0001


def test_jpeg_reads_back_nearly(tmp_path: Path) -> None:
    flow = smooth_flow()
    written(tmp_path / "flow_x_%05d.jpg", flow[None])
    with Image.open(tmp_path / "flow_y_00000.jpg") as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "L", (64, 48))
    meant = np.rint(127.5 + 127.5 / 20 * flow)
    off = [np.abs(levels(tmp_path / f"flow_{name}_00000.jpg") - meant[..., axis]) for axis, name in enumerate("xy")]
    assert np.max(off) <= 1
    assert np.mean(off) < 0.1  # at quality 90 it is 0.14, at 75 0.41
    assert np.abs(read_two_stream(str(tmp_path / "flow_x_00000.jpg")) - flow).max() < 4 * 40 / 255
    assert np.abs(read_two_stream(tmp_path / "flow_x_00000.jpg", bound=40) - 2 * flow).max() < 8 * 40 / 255


def test_what_was_lost_is_told(tmp_path: Path) -> None:
    flow = np.zeros((2, 10, 10, 2))
    flow[0, 0, :2, 0] = np.nan
    flow[1, :3, :, 1] = -20.5
    flow[1, 9, 0] = (20, -20)  # exactly the bound, so not clipped
    flow[1, 0, 0] = (np.inf, 30)  # unknown, so not clipped
    unknown, clipped = written(tmp_path / "flow_x_%05d.jpg", flow).notes
    assert "3 of 200 vectors (1.5 %) are unknown" in unknown
    assert "stored as no motion, first in frame 0" in unknown
    assert "29 of 200 vectors (14 %) are beyond the bound of 20 px and clipped, first in frame 1" in clipped


@pytest.mark.parametrize("name", ["%05d.jpg", "flow_y_%05d.jpg", "x.jpg", "flow_x_/%05d.jpg"])
def test_other_names_say_what_to_write(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnknownOutputError, match=r"flows/flow_x_%05d\.jpg .*colors/%06d\.png"):
        open_sink(tmp_path / name, SinkConfig())


def test_one_picture_of_the_pair_is_enough_to_be_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "flow_y_00003.jpg").touch()
    with pytest.raises(OutputExistsError, match=r"1 file such as flow_y_00003\.jpg"):
        written(tmp_path / "flow_x_%05d.jpg", smooth_flow()[None])
    written(tmp_path / "flow_x_%05d.jpg", smooth_flow()[None], overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["flow_x_00000.jpg", "flow_y_00000.jpg"]


def test_where_the_x_picture_is_the_other_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An x picture never exists without its y picture, and one picture alone does not count as finished."""
    real = os.replace

    def naming(source: Path, path: Path) -> None:
        real(source, path)
        assert (tmp_path / path.name.replace("_x_", "_y_")).exists()

    monkeypatch.setattr(os, "replace", naming)
    sink = written(tmp_path / "flow_x_%05d.png", np.stack([smooth_flow()] * 3))
    assert sink.holds(3)
    (tmp_path / "flow_y_00002.png").unlink()
    assert not sink.holds(3)


def test_flow_too_large_for_jpeg_is_refused_at_once(tmp_path: Path) -> None:
    sink = open_sink(tmp_path / "new" / "flow_x_%05d.jpg", SinkConfig())
    with pytest.raises(OutputError, match=r"65500 pixels.*\.png"):
        sink.open(FlowInfo(1, 65_501, frame_rate=None, frame_count=None, source=SourceId("test")))
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "flow_x_%05d.jpg", np.zeros((1, 1, 65_500, 2)))  # the longest works


def test_reading_what_is_not_a_pair(tmp_path: Path) -> None:
    x, y = tmp_path / "flow_x_00000.jpg", tmp_path / "flow_y_00000.jpg"
    with pytest.raises(SourceNotFoundError, match="flow_x_00000"):
        read_two_stream(x)
    Image.new("L", (64, 48)).save(x)
    with pytest.raises(SourceNotFoundError, match="flow_y_00000"):
        read_two_stream(x)
    Image.new("L", (64, 47)).save(y)
    with pytest.raises(FlowFileError, match=r"64x48, but flow_y_00000\.jpg is 64x47"):
        read_two_stream(x)
    Image.new("RGB", (64, 48)).save(y)
    with pytest.raises(FlowFileError, match="grey of 8 bits, found a picture of mode RGB"):
        read_two_stream(x)
    with pytest.raises(FlowFileError, match=r"such as flow_x_00000\.jpg"):
        read_two_stream(y)
    with pytest.raises(UsageError, match="bound"):
        read_two_stream(x, bound=0)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_damaged_pictures(tmp_path: Path, suffix: str) -> None:
    written(tmp_path / f"flow_x_%05d.{suffix}", smooth_flow()[None])
    x, y = tmp_path / f"flow_x_00000.{suffix}", tmp_path / f"flow_y_00000.{suffix}"
    whole = y.read_bytes()
    for data in (
        b"",
        b"GIF89a" + bytes(50),
        whole[: len(whole) // 2],
        whole[:25],
        whole[:-20] if suffix == "jpg" else b"!",
    ):
        y.write_bytes(data)
        with pytest.raises(FlowFileError, match=r"flow_y_00000.*two-stream picture"):
            read_two_stream(x)
    if suffix == "png":  # a few bytes that claim a size larger than any flow; only the last is refused by Pillow itself
        for width, height in ((12_000, 12_000), (100_000, 1), (30_000, 30_000)):
            header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + whole[24:29]
            y.write_bytes(whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:])
            with pytest.raises(FlowFileError, match=f"found {width}x{height}" if height < 30_000 else "exceeds limit"):
                read_two_stream(x)
