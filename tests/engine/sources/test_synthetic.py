from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from flowreel.engine.config import SelectConfig
from flowreel.engine.errors import TooFewFramesError, UsageError
from flowreel.engine.protocols import Source
from flowreel.engine.scenes.named import SCENES
from flowreel.engine.sources.synthetic import SyntheticConfig, open_synthetic

SMALL = "size=64x48&frames=6"


@pytest.mark.parametrize("scene", sorted(SCENES))
def test_every_scene_keeps_the_contract_of_a_source(scene: str) -> None:
    source = open_synthetic(f"synthetic:{scene}?{SMALL}", SelectConfig())
    assert isinstance(source, Source)
    info = source.info
    assert (info.height, info.width, info.frame_count, info.frame_rate) == (48, 64, 6, Fraction(25))
    frames = list(source)
    source.close()
    assert [frame.index for frame in frames] == list(range(6))
    assert [frame.timestamp_s for frame in frames] == pytest.approx([number / 25 for number in range(6)])
    assert all(frame.rgb.shape == (3, 48, 64) and frame.rgb.dtype == torch.uint8 for frame in frames)
    assert source.losses == []
    assert source.notes == []


def test_flow_is_the_scene_s_own() -> None:
    source = open_synthetic(f"synthetic:translate?{SMALL}", SelectConfig())
    flow, visible = source.flow(1, 4)
    assert torch.allclose(flow, torch.tensor([9.0, 3.0])[:, None, None].expand(2, 48, 64))
    assert visible[:45, :55].all()
    assert not visible[45:].any()
    assert not visible[:, 55:].any()


@pytest.mark.parametrize(
    ("select", "numbers"),
    [
        (SelectConfig(start=2), [2, 3, 4, 5, 6, 7, 8, 9]),
        (SelectConfig(stop=3), [0, 1, 2]),
        (SelectConfig(start=1, stop=9, step=3), [1, 4, 7]),
        (SelectConfig(start="0.2s", stop="0.5s"), [2, 3, 4]),
        (SelectConfig(start="0.15s", stop="99s", step=2), [2, 4, 6, 8]),
        (SelectConfig(start=7, stop=1000), [7, 8, 9]),
    ],
)
def test_selects_frames_and_seconds(select: SelectConfig, numbers: list[int]) -> None:
    source = open_synthetic("synthetic:translate?size=64x48&frames=10&rate=10", select)
    assert source.info.frame_count == len(numbers)
    assert source.info.frame_rate == Fraction(10, select.step)
    frames = list(source)
    assert [frame.index for frame in frames] == numbers
    assert [frame.timestamp_s for frame in frames] == pytest.approx([number / 10 for number in numbers])


def test_the_same_name_gives_the_same_frames_and_another_seed_others() -> None:
    def first(name: str) -> torch.Tensor:
        return next(iter(open_synthetic(name, SelectConfig()))).rgb

    assert torch.equal(first(f"synthetic:objects?{SMALL}"), first(f"synthetic:objects?{SMALL}&seed=0"))
    assert not torch.equal(first(f"synthetic:objects?{SMALL}"), first(f"synthetic:objects?{SMALL}&seed=1"))


def test_closing_ends_the_iteration() -> None:
    source = open_synthetic(f"synthetic:still?{SMALL}", SelectConfig())
    frames = iter(source)
    next(frames)
    source.close()
    assert list(frames) == []


@pytest.mark.parametrize(
    "query",
    [
        "size=64",
        "size=8x64",
        "size=99999x64",
        "frames=-3",
        "frames=",
        "frames=5000001",
        "rate=0",
        "rate=1/0",
        "rate=x",
        "seed=a",
        "hue=3",
    ],
)
def test_unreadable_parameters_are_named_with_what_was_expected(query: str) -> None:
    with pytest.raises(UsageError, match="size=WIDTHxHEIGHT, frames=N, rate=FPS, seed=N") as caught:
        open_synthetic(f"synthetic:still?{query}", SelectConfig())
    assert repr(query) in str(caught.value)


def test_a_scene_has_no_streams() -> None:
    with pytest.raises(UsageError, match="no video stream 1"):
        open_synthetic("synthetic:still", SelectConfig(stream=1))
    open_synthetic("synthetic:still", SelectConfig(stream=0))


def test_an_unknown_scene_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="objects, rotate, still, translate"):
        open_synthetic("synthetic:waterfall", SelectConfig())


@pytest.mark.parametrize(
    ("name", "select"),
    [
        ("synthetic:still?size=64x48&frames=1", SelectConfig()),
        ("synthetic:still?size=64x48&frames=0", SelectConfig()),
        (f"synthetic:still?{SMALL}", SelectConfig(start=5)),
        (f"synthetic:still?{SMALL}", SelectConfig(start="10s")),
        (f"synthetic:still?{SMALL}", SelectConfig(step=6)),
    ],
)
def test_fewer_than_two_frames_is_an_error(name: str, select: SelectConfig) -> None:
    with pytest.raises(TooFewFramesError, match="at least two"):
        open_synthetic(name, select)


@pytest.mark.parametrize(
    "name", ["synthetic:objects", "synthetic:rotate?size=640x360&frames=48&rate=30000/1001&seed=3"]
)
def test_the_source_s_name_opens_the_same_source(name: str) -> None:
    assert str(SyntheticConfig.parse(name)) == name


def test_decimal_and_broken_rates_are_exact() -> None:
    assert SyntheticConfig.parse("synthetic:still?rate=12.5").rate == Fraction(25, 2)
    assert SyntheticConfig.parse("synthetic:still?rate=30000/1001").rate == Fraction(30000, 1001)
