"""Options given by name reach the right part of the configuration; errors name the option with an impossible value."""

from __future__ import annotations

from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine.config import ModelConfig, RunConfig, SelectConfig, SinkConfig
from flowreel.engine.errors import UsageError
from flowreel.engine.options import ClipOptions, ColorOptions, ExportOptions, LazyOptions, RunOptions


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
        {"bound": "auto"},
        {"codec": "auto"},
        {"colour": "red"},
    ],
)
def test_impossible_values_are_named(options: dict[str, Any]) -> None:
    (name,) = options if len(options) == 1 else ("stop",)
    with pytest.raises(UsageError, match=name.replace("_", "[-_]")):
        RunConfig.of(**options)


class Way(StrEnum):
    BACK = "backward"


def test_options_of_other_libraries_kinds() -> None:
    config = RunConfig.of(
        stop=np.int64(12),
        step=torch.tensor(2),
        batch=np.int32(4),
        max_error=np.float32(0.5),
        device=torch.device("cpu"),
        weights=Path("w.safetensors"),
        overwrite=np.bool_(True),
        codec=np.str_("zstd"),
        direction=Way.BACK,
    )
    assert (config.select.stop, config.select.step, config.model.batch) == (12, 2, 4)
    assert (config.sink.max_error, config.sink.overwrite, config.sink.codec) == (0.5, True, "zstd")
    assert (config.model.device, config.model.weights, config.model.direction) == ("cpu", "w.safetensors", "backward")
    assert {type(config.select.stop), type(config.model.batch)} == {int}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"batch": 2.0}, "batch must be a whole number, got 2.0"),
        ({"stop": 4.0}, "stop must be a whole number or text"),
        ({"step": True}, "step must be a whole number, got True"),
        ({"device": None}, "device must be text, got None"),
        ({"weights": None}, "weights must be text"),
        ({"max_error": "much"}, "max-error must be a number, got 'much'"),
        ({"max_flow": [1]}, "max-flow must be a number"),
        ({"resume": 1}, "resume must be True or False"),
        ({"tolerate_truncation": "no"}, "tolerate-truncation must be True or False"),
        ({"precision": 16}, "precision must be text"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32"),
    ],
)
def test_values_of_another_kind_are_named(option: dict[str, object], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        RunConfig.of(**option)


def test_type_checkers_know_the_options_that_there_are() -> None:
    settings = {field.name for part in (SelectConfig, ModelConfig, SinkConfig) for field in fields(part)}
    known = settings | {"tolerate_truncation", "queue_mb"}
    assert RunOptions.__optional_keys__ == known
    assert ExportOptions.__optional_keys__ < known
    assert ClipOptions.__optional_keys__ - {"frames_mb"} == LazyOptions.__optional_keys__
    assert LazyOptions.__optional_keys__ | ColorOptions.__optional_keys__ < known
