"""Comparing the metadata of two runs: which settings must be equal, and whether the source is the recorded one."""

from __future__ import annotations

from typing import Any

import pytest

from flowreel.sinks.store_metadata import differing_settings, other_source

SOURCE = {"name": "a.mp4", "size_bytes": 100, "head_sha256": "h", "sampled_sha256": "s"}


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ({}, {}, []),
        ({}, {"name": "b.mp4"}, ["source was a.mp4, is b.mp4"]),
        ({}, {"head_sha256": "x"}, ["a.mp4 is another file than it was"]),
        ({"head_sha256": None}, {}, []),
        ({}, {"head_sha256": None}, []),
        ({}, {"sampled_sha256": "x"}, ["a.mp4 holds something else than it did"]),
        ({}, {"sampled_sha256": "x", "size_bytes": 101}, []),  # the file grew, so the samples come from other places
        ({"sampled_sha256": None}, {}, []),
        ({}, {"sampled_sha256": None}, []),
        ({}, {"size_bytes": 99}, ["a.mp4 had 100 bytes, has 99"]),
        ({"size_bytes": None}, {"size_bytes": None}, []),
    ],
)
def test_which_source_is_the_one_recorded(was: dict[str, Any], now: dict[str, Any], told: list[str]) -> None:
    assert other_source(SOURCE | was, SOURCE | now) == told


def test_weights_may_go_by_another_name() -> None:
    was = {"weights": "a", "weights_licence": "x", "weights_sha256": "1", "source": SOURCE}
    now = was | {"weights": "b", "weights_licence": "y"}
    assert differing_settings(was, now) == []
    assert differing_settings(was, now | {"weights_sha256": "2"}) == [
        "weights was a, is b",
        "weights licence was x, is y",
        "weights sha256 was 1, is 2",
    ]
