"""Resizing, cropping and mirroring a clip: flow vectors are scaled and turned with it, and pictures match the flow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flowreel.engine.clip_view import ClipView, ViewRule, random_below
from flowreel.engine.errors import UsageError


def constant(u: float, v: float, height: int = 12, width: int = 16) -> torch.Tensor:
    """(3, 2, H, W) px."""
    return torch.tensor([float(u), v])[:, None, None].expand(3, 2, height, width).clone()


def test_a_vector_is_as_much_longer_as_its_axis() -> None:
    seen = ClipView((24, 8), 0, 0, 24, 8).flow(constant(4, -3))
    torch.testing.assert_close(seen, constant(2, -6, 24, 8))


def test_a_mirror_turns_right_into_left_and_keeps_up() -> None:
    flow = torch.arange(3 * 2 * 12 * 16, dtype=torch.float32).view(3, 2, 12, 16)
    seen = ClipView((12, 16), 0, 0, 12, 16, mirrored=True).flow(flow)
    assert torch.equal(seen[:, 0], -flow[:, 0].flip(-1))
    assert torch.equal(seen[:, 1], flow[:, 1].flip(-1))


def test_a_cut_is_the_part_it_says() -> None:
    flow = torch.rand(3, 2, 12, 16)
    assert torch.equal(ClipView((12, 16), 2, 5, 7, 6).flow(flow), flow[:, :, 2:9, 5:11])
    mirrored = ClipView((12, 16), 2, 5, 7, 6, mirrored=True).flow(flow)
    assert torch.equal(mirrored[:, 1], flow[:, 1, 2:9, 5:11].flip(-1))


def test_flow_still_leads_from_frame_to_frame() -> None:
    """The transformed flow describes the motion between the transformed pictures."""
    height, width, u = 48, 64, 6
    x = torch.arange(width + u) / 9
    wave = (127 + 100 * torch.sin(x)).expand(3, height, -1)
    first, second = wave[..., u:].to(torch.uint8), wave[..., :-u].to(torch.uint8)  # moved to the right by u
    for mirrored in (False, True):
        view = ClipView((24, 32), 4, 6, 16, 20, mirrored)
        seen_first, seen_second = view.rgb(first).float(), view.rgb(second).float()
        flow = view.flow(constant(u, 0, height, width)[:1])[0]
        moved = round(float(flow[0, 0, 0]))
        assert moved == (-3 if mirrored else 3)
        assert torch.equal(flow[1], torch.zeros(16, 20))
        shifted = torch.roll(seen_first, moved, -1)[..., 3:-3]
        assert (shifted - seen_second[..., 3:-3]).abs().max() <= 2


def test_pictures_keep_their_values() -> None:
    rgb = torch.randint(256, (3, 12, 16), dtype=torch.uint8)
    assert torch.equal(ClipView((12, 16), 0, 0, 12, 16).rgb(rgb), rgb)
    assert torch.equal(ClipView((12, 16), 1, 2, 3, 4, mirrored=True).rgb(rgb), rgb[:, 1:4, 2:6].flip(-1))
    white = torch.full((3, 12, 16), 255, dtype=torch.uint8)
    assert torch.equal(ClipView((5, 7), 0, 0, 5, 7).rgb(white), white[:, :5, :7])
    striped = white * (torch.arange(16) % 4 == 3)
    assert ClipView((12, 4), 0, 0, 12, 4).rgb(striped).float().mean() == pytest.approx(64, abs=5)  # no stripe is lost


@pytest.mark.parametrize(
    ("rule", "whole", "cut"),
    [
        (ViewRule(), (360, 640), (360, 640)),
        (ViewRule(size=180), (180, 320), (180, 320)),
        (ViewRule(size=100), (100, 178), (100, 178)),
        (ViewRule(size=[100, 50]), (100, 50), (100, 50)),  # type: ignore[arg-type]
        (ViewRule(size=256, crop=224), (256, 455), (224, 224)),
        (ViewRule(crop=(360, 8)), (360, 640), (360, 8)),
    ],
)
def test_sizes(rule: ViewRule, whole: tuple[int, int], cut: tuple[int, int]) -> None:
    assert rule.sizes(360, 640) == (whole, cut)
    middle = rule.middle(360, 640)
    assert (middle.height, middle.width, middle.mirrored) == (*cut, False)
    assert abs(2 * middle.top + cut[0] - whole[0]) <= 1
    assert abs(2 * middle.left + cut[1] - whole[1]) <= 1


def test_the_shorter_side_is_the_one_that_is_given() -> None:
    assert ViewRule(size=90).sizes(640, 360)[0] == (160, 90)


def test_random_views_reach_every_place_and_no_further() -> None:
    generator = torch.Generator().manual_seed(0)
    views = [ViewRule(crop=(10, 14), mirror=True).random(12, 16, generator) for _ in range(1000)]
    assert {(view.top, view.left) for view in views} == {(top, left) for top in range(3) for left in range(3)}
    assert 430 < sum(view.mirrored for view in views) < 570
    assert not any(ViewRule(crop=10).random(12, 16, generator).mirrored for _ in range(20))


def test_random_below_without_a_generator_is_torchs_own() -> None:
    torch.manual_seed(5)
    drawn = [random_below(1000, None) for _ in range(5)]
    torch.manual_seed(5)
    assert [random_below(1000, None) for _ in range(5)] == drawn


@pytest.mark.parametrize("value", [0, -3, (4, 0), (4,), (1, 2, 3), 2.5, "big", (2.0, 3)])
@pytest.mark.parametrize("name", ["size", "crop"])
def test_what_is_no_size(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} must be"):
        ViewRule(**{name: value})


def test_a_cut_larger_than_the_frame() -> None:
    with pytest.raises(UsageError, match="224x224 cannot be cut out of 640x200"):
        ViewRule(crop=224).sizes(200, 640)
    with pytest.raises(UsageError, match="224x224 cannot be cut out of 200x640"):
        ViewRule(crop=224).sizes(640, 200)
    assert math.prod(ViewRule(size=224, crop=224).sizes(200, 640)[1]) == 224**2
