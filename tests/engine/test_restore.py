"""``Fit`` brings frames to a multiple of 64 and flow back to the frame, from 1x1 to 4K, in every mode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowreel.engine.config import FitMode
from flowreel.engine.errors import UsageError
from flowreel.engine.restore import Fit

sides = st.integers(8, 300)


@given(height=sides, width=sides)
def test_padding_is_undone_exactly(height: int, width: int) -> None:
    fit = Fit("pad", height, width)
    frames = torch.arange(2 * 3 * height * width, dtype=torch.float32).reshape(2, 3, height, width)
    padded = fit.apply(frames)
    assert tuple(padded.shape[2:]) == fit.network_size
    assert all(side % 64 == 0 for side in fit.network_size)
    assert fit.flow_size == (height, width)
    assert torch.equal(fit.undo(padded[:, :2]), frames[:, :2])


@pytest.mark.parametrize("size", [(8, 8), (2160, 3840), (436, 1024), (1, 1)])
def test_flow_has_the_frames_size(size: tuple[int, int]) -> None:
    fit = Fit("pad", *size)
    assert fit.undo(fit.apply(torch.zeros(1, 3, *size))[:, :2]).shape == (1, 2, *size)


def test_the_margin_repeats_the_edge() -> None:
    frames = torch.rand(1, 3, 59, 61, generator=torch.Generator().manual_seed(0))
    padded = Fit("pad", 59, 61).apply(frames)
    assert torch.equal(padded[:, :, 2:-3, 1:-2], frames)  # of an odd margin the smaller half comes first
    assert torch.equal(padded[:, :, 0, 1:-2], frames[:, :, 0])
    assert torch.equal(padded[:, :, 2:-3, -1], frames[:, :, :, -1])


def test_crop_keeps_the_centre_as_flownet2_pytorch_does() -> None:
    fit = Fit("crop", 100, 140)
    frames = torch.arange(100.0 * 140).reshape(1, 1, 100, 140).expand(1, 3, -1, -1)
    assert fit.flow_size == (64, 128)
    assert torch.equal(fit.apply(frames), frames[:, :, 18:82, 6:134])
    assert torch.equal(fit.undo(fit.apply(frames)[:, :2]), frames[:, :2, 18:82, 6:134])


def test_crop_needs_a_whole_tile() -> None:
    with pytest.raises(UsageError, match="fit=pad"):
        Fit("crop", 63, 640)


@given(height=sides, width=sides)
def test_resizing_scales_the_vectors_too(height: int, width: int) -> None:
    fit = Fit("resize", height, width)
    rows, columns = fit.network_size
    frames = fit.apply(torch.full((1, 3, height, width), 7.0))
    assert tuple(frames.shape[2:]) == (rows, columns)
    torch.testing.assert_close(frames, torch.full_like(frames, 7.0))
    # One network pixel to the right and down is width / columns, height / rows pixels of the frame.
    flow = fit.undo(torch.ones(1, 2, rows, columns))
    assert flow.shape == (1, 2, height, width)
    torch.testing.assert_close(flow[0, 0], torch.full((height, width), width / columns))
    torch.testing.assert_close(flow[0, 1], torch.full((height, width), height / rows))


@pytest.mark.parametrize("mode", ["pad", "crop", "resize"])
def test_a_size_that_fits_is_left_alone(mode: FitMode) -> None:
    frames = torch.rand(1, 3, 64, 128)
    fit = Fit(mode, 64, 128)
    assert fit.apply(frames) is frames
    assert fit.undo(frames) is frames


def test_what_is_made_smaller_is_averaged() -> None:
    stripes = (torch.arange(88) % 2 * 100.0).expand(1, 3, 64, -1)
    assert Fit("resize", 64, 88).apply(stripes)[0, 0, 0].std() < 15  # about 30 if pixels were skipped instead
