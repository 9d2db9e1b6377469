"""Settings: flat names to their parts, auto to None, and every impossible value named."""

from __future__ import annotations

from typing import Any

import pytest

from flowreel.engine.config import RunConfig
from flowreel.engine.errors import UsageError


def test_flat_names_reach_their_parts() -> None:
    config = RunConfig.of(
        stop=12, max_error=0, batch=4, queue_mb=2, model="FlowNet2C", overwrite=True, tolerate_truncation=True
    )
    assert (config.select.stop, config.sink.max_error, config.model.batch) == (12, 0, 4)
    assert config.queues.total_bytes == 2 << 20
    assert config.model.model == "FlowNet2C"
    assert config.sink.overwrite
    assert config.tolerate_truncation


def test_auto_is_the_default() -> None:
    assert RunConfig.of(batch="auto", precision="auto", max_flow="auto", device="auto", decoder="auto") == RunConfig()


@pytest.mark.parametrize(
    "options",
    [
        {"step": 0},
        {"start": -1},
        {"start": 5, "stop": 5},
        {"stream": -1},
        {"batch": 0},
        {"precision": "fp8"},
        {"fit": "stretch"},
        {"direction": "sideways"},
        {"max_error": -1},
        {"max_error": float("nan")},
        {"codec": "rar"},
        {"max_flow": 0},
        {"queue_mb": 0},
        {"queue_mb": "lots"},
        {"decoder": "guess"},
        {"colour": "red"},
    ],
)
def test_impossible_values_are_named(options: dict[str, Any]) -> None:
    (name,) = options if len(options) == 1 else ("stop",)
    with pytest.raises(UsageError, match=name.replace("_", "[-_]")):
        RunConfig.of(**options)
