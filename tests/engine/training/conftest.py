"""No test here needs the textures of a real training."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _small_textures(small_textures: None) -> None:
    pass
