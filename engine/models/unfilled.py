"""Networks without values, for those whose values come from a file: no memory, no initialisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FILLING = {"kaiming_uniform_", "kaiming_normal_", "uniform_", "normal_", "zeros_", "zero_"}  # names in torch.nn.init


@contextmanager
def without_values() -> Iterator[None]:
    """What is built inside lies on torch's meta device: shapes alone."""
    with _NoFilling(), torch.device("meta"):
        yield


class _NoFilling(TorchFunctionMode):
    """There is nothing to fill; torch would load its compiler to find that out, which takes a second."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(function, "__name__", "") in _FILLING:
            return args[0] if args else given["tensor"]
        return function(*args, **given)
