"""Builds networks whose values will come from a file, without allocating or initialising their tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FILLING = {"kaiming_uniform_", "kaiming_normal_", "uniform_", "normal_", "zeros_", "zero_"}  # names in torch.nn.init


@contextmanager
def without_values() -> Iterator[None]:
    """Modules built inside are on torch's meta device: shapes without values."""
    with _NoFilling(), torch.device("meta"):
        yield


class _NoFilling(TorchFunctionMode):
    """Skips initialisers: they have nothing to fill, but make torch load its compiler, which takes a second."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(function, "__name__", "") in _FILLING:
            return args[0] if args else given["tensor"]
        return function(*args, **given)
