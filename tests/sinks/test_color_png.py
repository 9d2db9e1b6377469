"""Colour pictures: the published colours, a fixed scale or one per picture, and PNGs that other readers can open."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import OutputWriteError, frame_of
from flowreel.kernels.flow_color import flow_to_color
from flowreel.sinks import open_sink, read_flo
from flowreel.sinks.color_png import ColorPictures, ColorPngSink, png_pieces


def picture_of(folder: Path, flow: np.ndarray, **options: float) -> np.ndarray:
    """The (H, W, 3) colours that the sink writes for one (H, W, 2) flow."""
    sink = open_sink(folder / "%03d.png", SinkConfig(overwrite=True, **options))
    sink.open(FlowInfo(*flow.shape[:2], frame_rate=None, frame_count=None, source=SourceId("test")))
    one, times = np.array([0]), np.array([0.0])
    sink.write(FlowBatch(torch.from_numpy(flow).permute(2, 0, 1)[None], 0, one, one + 1, times, times + 1))
    sink.commit()
    with Image.open(folder / "000.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.array(picture)


def test_colours_are_those_of_the_published_program(tmp_path: Path, data_dir: Path) -> None:
    flow = read_flo(data_dir / "flo" / "flownet2_caffe_result_960x540.flo")
    with Image.open(data_dir / "flo" / "flownet2_caffe_result_960x540.middlebury_color_flow.png") as golden:
        expected = np.array(golden.convert("RGB")).astype(int)
    assert np.abs(picture_of(tmp_path, flow).astype(int) - expected).max() <= 1


def test_each_picture_has_its_own_scale_unless_one_is_given(tmp_path: Path) -> None:
    flow = np.random.default_rng(0).normal(0, 3, (7, 9, 2)).astype(np.float32)
    assert np.array_equal(picture_of(tmp_path, flow), picture_of(tmp_path, 10 * flow))
    fixed = picture_of(tmp_path, flow, max_flow=30.0)
    assert np.array_equal(fixed, flow_to_color(flow, 30.0))
    assert not np.array_equal(fixed, picture_of(tmp_path, flow))


def test_unknown_is_black_and_never_the_longest(tmp_path: Path) -> None:
    flow = np.ones((4, 4, 2), np.float32)
    flow[0, 0], flow[1, 1, 1] = (np.nan, 0), 1.6666668e9
    picture = picture_of(tmp_path, flow)
    assert picture[0, 0].tolist() == picture[1, 1].tolist() == [0, 0, 0]
    assert np.array_equal(picture[2, 2], flow_to_color(flow[2:, 2:])[0, 0])


def test_what_a_device_has_painted_is_told_of_by_its_frame(tmp_path: Path) -> None:
    sink = ColorPngSink(str(tmp_path / "%03d.png"), SinkConfig())
    sink.open(FlowInfo(4, 5, frame_rate=None, frame_count=None, source=SourceId("test")))
    flow, frame, times = torch.ones(3, 2, 4, 5), np.array([4, 6, 8]), np.zeros(3)
    flow[1, 0, 2, 3] = torch.nan
    for prepared in sink.prepare(iter([FlowBatch(flow, 0, frame, frame + 2, times, times)])):
        sink.take(prepared)
    sink.commit()
    (note,) = sink.notes
    assert note.endswith(
        "1 of 60 vectors (1.7 %) are unknown (NaN, infinite or beyond 1e9 px) and black, first in frame 6"
    )


def test_a_picture_that_cannot_be_written_concerns_its_frame(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    pictures = ColorPictures([tmp_path / "a.png", tmp_path / "file" / "b.png", tmp_path / "c.png"], None)
    flow, frame, times = torch.ones(3, 2, 4, 5), np.array([4, 6, 8]), np.zeros(3)

    def write_all() -> None:  # either call may raise: whichever first knows
        pictures.write(FlowBatch(flow, 0, frame, frame + 2, times, times))
        pictures.finish()

    with pytest.raises(OutputWriteError, match=r"b\.png") as caught:
        write_all()
    assert frame_of(caught.value, None) == 6
    assert (pictures.count, pictures.bytes_written) == (1, (tmp_path / "a.png").stat().st_size)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (1, 1, 3), (13, 6, 3), (40, 1, 3)])
def test_every_sample_survives_in_another_reader(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    samples = np.random.default_rng(1).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
    (tmp_path / "x.png").write_bytes(b"".join(png_pieces(samples)))
    back = cv2.imread(str(tmp_path / "x.png"), cv2.IMREAD_UNCHANGED)
    assert back is not None
    assert back.dtype == dtype
    assert np.array_equal(back if back.ndim == 2 else back[..., ::-1], samples)


def test_strides_do_not_matter() -> None:
    samples = np.random.default_rng(2).integers(0, 65536, (6, 8, 3)).astype(np.uint16)
    assert png_pieces(samples[::-1, ::2]) == png_pieces(samples[::-1, ::2].copy())
