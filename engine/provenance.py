"""What an output would record of how it was made, known before a network is loaded or a frame decoded.

Comparing it with what an existing output records tells whether that is the output asked for. Settings left to choose
(a batch of ``auto``) are not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from flowreel.engine.config import RunConfig
from flowreel.engine.data import JSON, SourceId
from flowreel.engine.models import model_name
from flowreel.engine.models.weights import Weights
from flowreel.sinks import options_read

OF_STORES = ("max_error", "codec", "resolution")  # settings that concern stores alone


def selection(config: RunConfig) -> dict[str, JSON]:
    """Which frames, and which of each pair comes first."""
    select = config.select
    return {
        "direction": config.model.direction,
        "start": select.start,
        "stop": select.stop,
        "step": select.step,
        "stream": select.stream,
    }


def settings(config: RunConfig, source: SourceId, weights: Weights) -> dict[str, JSON]:
    """The settings that a store records, by the names of its attributes. Raises UsageError for an unknown model."""
    model, sink = config.model, config.sink
    chosen: dict[str, JSON] = {"batch": model.batch, "precision": model.precision}
    return {name: value for name, value in chosen.items() if value is not None} | {
        "model": weights.model if model.model is None else model_name(model.model),
        "weights": weights.name,
        "weights_sha256": weights.sha256,
        "fit": model.fit,
        **selection(config),
        "max_error": sink.max_error,
        "codec": sink.codec,
        "resolution": sink.resolution,
        "source": asdict(source),
    }


def settings_of_others(stored: Mapping[str, JSON], config: RunConfig, path: str) -> dict[str, JSON]:
    """The settings that a manifest records for an output that is no store. ``stored``: those of ``settings``."""
    drawn: dict[str, JSON] = {"max_flow": config.sink.max_flow, "bound": config.sink.bound}
    read = options_read(path)
    return {name: value for name, value in stored.items() if name not in OF_STORES} | {
        name: value for name, value in drawn.items() if name in read
    }
