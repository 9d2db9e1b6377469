"""Reading times, choosing frames by them, and ordering the stamps of a stream."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from flowreel.engine.config import SelectConfig
from flowreel.engine.errors import TooFewFramesError, UsageError
from flowreel.engine.sources.timecode import NO_STAMP, Timeline, parse_seconds, select_frames

TICK = Fraction(1, 100)
RATE = Fraction(25)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10s", 10),
        ("90s", 90),
        ("1:02.5", 62.5),
        ("1:00:02.5", 3602.5),
        (".5s", 0.5),
        ("0s", 0),
        (" 2.25s ", 2.25),
        ("59:59", 3599),
    ],
)
def test_times_that_can_be_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "ten", "-1s", "1:2:3:4", "1::2", "1.5:2", "10 s", "1e3", "nan", ":5", "٣s", "2.0", "90"]
)
def test_times_that_cannot(text: str) -> None:
    with pytest.raises(UsageError, match="a time is written as"):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["1:60", "1:75.5", "1:60:00", "1:59:60"])
def test_sixty_seconds_are_a_minute(text: str) -> None:
    with pytest.raises(UsageError, match="below 60"):
        parse_seconds(text)


@pytest.mark.parametrize(("given", "taken"), [("120", 120), (" 7 ", 7), ("7s", "7s"), (7, 7)])
def test_a_frame_may_be_text(given: int | str, taken: int | str) -> None:
    assert SelectConfig(stop=given).stop == taken


@pytest.mark.parametrize("text", ["9" * 400 + "s", "999999999999:0:0", "2000000000000s"])
def test_times_beyond_all_clips(text: str) -> None:
    with pytest.raises(UsageError, match="a time of more than"):
        parse_seconds(text)


@pytest.mark.parametrize("select", [{"start": 10**400}, {"stop": 10**5000}, {"step": 1 << 63}])
def test_numbers_beyond_all_frames(select: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="the last frame there can be"):
        SelectConfig(**select)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (SelectConfig(), range(10)),
        (SelectConfig(start=2, stop=5), range(2, 5)),
        (SelectConfig(start="0.1s"), range(3, 10)),  # 0.1 lies between frames 2 and 3
        (SelectConfig(start="0.12s", stop="0.2s"), range(3, 5)),  # on the frame: start takes it, stop does not
        (SelectConfig(stop="1:00"), range(10)),
        (SelectConfig(stop=99), range(10)),
    ],
)
def test_selection(select: SelectConfig, expected: range) -> None:
    times = 8.33 + np.arange(10) / 25  # times count from the first frame, whatever its stamp is
    assert select_frames(select, times, "x") == expected


def test_selection_that_makes_no_sense() -> None:
    times = np.arange(10) / 25
    with pytest.raises(UsageError, match="must be later"):
        select_frames(SelectConfig(start="2s", stop="1s"), times, "x")
    with pytest.raises(UsageError, match="must be later"):
        select_frames(SelectConfig(start="0.2s", stop="0.2s"), times, "x")
    with pytest.raises(TooFewFramesError, match="x has 10 frames, of which start, stop and step leave 1"):
        select_frames(SelectConfig(start="0.1s", stop=4), times, "x")
    with pytest.raises(TooFewFramesError, match="x has 0 frames: flow needs"):
        select_frames(SelectConfig(start="1s"), np.zeros(0), "x")


class TestTimeline:
    def test_orders_reordered_stamps(self) -> None:
        timeline = Timeline.from_packets([800, 816, 808, 804, 812], TICK, RATE)
        assert timeline.times_s == pytest.approx([8.00, 8.04, 8.08, 8.12, 8.16])
        assert [timeline.number_of(stamp) for stamp in (800, 812, 816)] == [0, 3, 4]
        assert [timeline.number_of(stamp) for stamp in (799, 801, 817, None)] == [None] * 4
        assert timeline.notes == ()

    def test_fills_the_gaps_that_miss_a_stamp(self) -> None:
        timeline = Timeline.from_packets([100, NO_STAMP, NO_STAMP, 112], TICK, RATE)
        assert timeline.times_s == pytest.approx([1.00, 1.04, 1.08, 1.12])
        assert timeline.number_of(100) is None
        assert "2 of 4 frames carry no time stamp" in timeline.notes[0]

    @pytest.mark.parametrize("missing", [[2], [3], [1, 4], [2, 3, 5], [4, 5, 6, 7, 8]])
    def test_with_b_frames_the_gap_is_not_behind_the_frame_before(self, missing: list[int]) -> None:
        stamps = np.array([100, 116, 108, 104, 112, 132, 124, 120, 128])
        stamps[missing] = NO_STAMP
        timeline = Timeline.from_packets(stamps, TICK, RATE)
        assert timeline.times_s == pytest.approx(1 + np.arange(9) / 25)

    def test_stamps_that_start_over_are_replaced(self) -> None:
        timeline = Timeline.from_packets([100 + 4 * (n % 50) for n in range(100)], TICK, RATE)
        assert timeline.times_s == pytest.approx(1 + np.arange(100) / 25)
        assert timeline.number_of(100) is None

    @pytest.mark.parametrize("back", [4, 15, 40])
    def test_a_jump_back_is_no_reordering(self, back: int) -> None:
        """Two joined recordings with B-frames, whose stamps overlap: the second begins before the first ends."""
        place = np.arange(60)
        shown = 4 * (place + 1 + 2 * (place % 3 == 0) - 1 * (place % 3 > 0))  # 3 0 1  6 3 4 ..., so I or P, B, B
        shown, decoded = shown + 1, 4 * (place - 2)
        again = 4 * (60 - back) - 2  # no stamp twice
        stamps, times = np.append(shown, shown + again), np.append(decoded, decoded + again)
        one = Timeline.from_packets(shown, TICK, RATE, decoded=decoded, keys=[0, 30])
        assert one.stamps is not None
        by_keys = Timeline.from_packets(stamps, TICK, RATE, keys=[0, 30, 60, 90])
        by_decoding = Timeline.from_packets(stamps, TICK, RATE, decoded=times)
        for both in [by_keys, *([by_decoding] if back > 4 else [])]:
            assert both.stamps is None
            assert "jump back" in both.notes[0]
            assert np.diff(both.times_s) == pytest.approx(1 / 25)

    @pytest.mark.parametrize("late", [0, 3, 16])
    def test_frames_may_be_held_back_as_long_as_codecs_do(self, late: int) -> None:
        group = late + 1  # one frame, followed in the file by those that are shown before it
        place = np.arange(5 * group)
        shown = 4 * np.where(place % group == 0, place + late, place - 1)
        decoded = 4 * (place - late)
        timeline = Timeline.from_packets(shown, TICK, RATE, decoded=decoded, keys=range(0, len(place), group))
        assert timeline.stamps is not None
        assert timeline.stamps.tolist() == list(range(0, 4 * len(place), 4))

    def test_what_comes_before_the_first_stamp_counts_back_from_it(self) -> None:
        timeline = Timeline.from_packets([NO_STAMP, NO_STAMP, 1000, 1004], TICK, RATE)
        assert timeline.times_s == pytest.approx([9.92, 9.96, 10.00, 10.04])

    def test_without_any_stamp_the_first_frame_is_shown_at_0(self) -> None:
        timeline = Timeline.from_packets([NO_STAMP] * 3, TICK, RATE)
        assert timeline.times_s == pytest.approx([0, 0.04, 0.08])

    def test_stamps_that_are_filled_in_keep_the_order(self) -> None:
        timeline = Timeline.from_packets([108, NO_STAMP, 104], TICK, RATE)
        assert timeline.times_s == pytest.approx([1.04, 1.08, 1.12])

    def test_a_time_of_decoding_that_is_missing_or_near_tells_no_jump(self) -> None:
        timeline = Timeline.from_packets([1, 5, 9, 13], TICK, RATE, decoded=[1, NO_STAMP, 15, 13], keys=[0])
        assert timeline.stamps is not None

    def test_repeated_stamps_tell_no_number(self) -> None:
        timeline = Timeline.from_packets([0, 4, 4, 8], TICK, RATE)
        assert timeline.times_s.tolist() == [0, 0.04, 0.04, 0.08]
        assert timeline.number_of(8) is None
        assert "1 frame carries the same" in timeline.notes[0]

    def test_untrusted_stamps_tell_times_only(self) -> None:
        timeline = Timeline.from_packets([0, 4], TICK, RATE, trusted=False)
        assert timeline.times_s.tolist() == [0, 0.04]
        assert timeline.number_of(4) is None

    def test_empty(self) -> None:
        assert len(Timeline.from_packets([], TICK, RATE)) == 0
