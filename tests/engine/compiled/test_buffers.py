"""The memory that large tensors are made in."""

from __future__ import annotations

import gc

import pytest
import torch

from flowreel.engine.compiled import buffers
from flowreel.engine.compiled.buffers import Buffers


def test_memory_comes_back_when_its_last_view_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALLEST", 0)
    kept = Buffers()
    first = kept.empty(1, 2, 4, 4, torch.float32)
    view, place = first[:, 1:], first.data_ptr()
    del first
    gc.collect()
    other = kept.empty(1, 2, 4, 4, torch.float32)
    assert other.data_ptr() != place  # a view is still there
    del view
    gc.collect()
    assert kept.empty(1, 4, 4, 4, torch.bfloat16).data_ptr() == place  # the same bytes in another form
    assert other.shape == (1, 2, 4, 4)
    assert other.is_contiguous(memory_format=torch.channels_last)
