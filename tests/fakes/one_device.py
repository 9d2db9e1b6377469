"""A stand-in for a GPU that refuses operations mixing its tensors with the CPU's, for code that must use one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOWHERE = torch.device("meta")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OneDevice(TorchDispatchMode):
    """While active, an operation on tensors of several devices is an error; torch itself allows many on ``NOWHERE``.

    Indices on the CPU are refused too: a GPU accepts them, but has to wait for them. Copies and tensors of a single
    number may cross devices.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        if func not in _COPIES and len({tensor.device.type for tensor in tensors}) > 1:
            raise RuntimeError(f"{func} is given tensors of several devices: {[str(t.device) for t in tensors]}")
        return func(*args, **(kwargs or {}))
