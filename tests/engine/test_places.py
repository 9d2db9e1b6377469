"""Where nothing may be written."""

from __future__ import annotations

import pytest

import flowreel
from flowreel.engine.errors import UsageError


@pytest.mark.parametrize("outputs", [None, "x.zarr", "/elsewhere/x.mp4"])
def test_a_source_without_a_name_is_said_to_be_that(outputs: str | None) -> None:
    with pytest.raises(UsageError, match="source's name is empty"):
        flowreel.run("", outputs)
