"""Scenes of few small textures: those of a real training take seconds in each process that paints."""

from __future__ import annotations

import pytest

from flowreel.engine.training import batches
from flowreel.engine.training.drawing import SceneConfig


@pytest.fixture(autouse=True)
def _small_textures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SCENES", SceneConfig(bank=(0, 16, 128)))
