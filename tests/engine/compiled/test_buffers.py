"""Memory for large tensors, which is used again once nothing refers to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowreel.engine.compiled import buffers
from flowreel.engine.compiled.buffers import Buffers, apart


def test_memory_comes_back_when_its_last_view_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SMALLEST", 0)
    sizes, empty = [], np.empty
    monkeypatch.setattr(np, "empty", lambda size, dtype: (sizes.append(size), empty(size, dtype))[1])
    kept = Buffers()
    first = kept.empty(1, 2, 4, 4, torch.float32)
    view, place = first[:, 1:], first.data_ptr()
    del first
    other = kept.empty(1, 2, 4, 4, torch.float32)
    assert other.data_ptr() != place  # a view still refers to the first
    del view
    assert kept.empty(1, 4, 4, 4, torch.bfloat16).data_ptr() == place  # the same bytes, with another shape and type
    assert sizes == [128, 128]  # none is from the system, which may give the same place again
    assert other.shape == (1, 2, 4, 4)
    assert other.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 3), (300, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_its_own(shape: tuple[int, int], dtype: torch.dtype) -> None:
    first, second = apart(shape, dtype), apart(shape, dtype)
    assert (first.shape, first.dtype, first.is_contiguous()) == (shape, dtype, True)
    assert (first == 0).all()
    first.fill_(1)
    assert (second == 0).all()
    view = first[1:]
    del first
    assert (view == 1).all()
