"""A device of tensors without numbers, which like a GPU takes none of a CPU's: for code that is to keep to one."""

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
    """Within it an operation on tensors here and there is an error; torch itself lets many pass on ``NOWHERE``.

    Indices of a CPU too, which a GPU would take, but wait for. Copies may cross, as may single numbers.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        if func not in _COPIES and len({tensor.device.type for tensor in tensors}) > 1:
            raise RuntimeError(f"{func} is given tensors of several devices: {[str(t.device) for t in tensors]}")
        return func(*args, **(kwargs or {}))
