"""Detects that a network's weights have changed since its compiled form was made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ReferenceType, ref

from torch import Tensor, nn

from flowreel.engine.errors import StaleModelError


@dataclass(frozen=True)
class _Place:
    """One parameter or buffer: the module and key that hold it, the tensor held there, and that tensor's state."""

    name: str
    module: ReferenceType[nn.Module]
    key: str
    tensor: ReferenceType[Tensor]
    address: int
    version: int  # torch's count of in-place writes

    def same(self) -> bool:
        module = self.module()
        if module is None:
            return False
        now: Tensor | None = module._parameters.get(self.key)
        now = module._buffers.get(self.key) if now is None else now
        if now is None or now is not self.tensor():
            return False
        return (now.data_ptr(), _version(now)) == (self.address, self.version)


@dataclass(frozen=True)
class _Child:
    """One module inside another."""

    name: str
    module: ReferenceType[nn.Module]
    key: str
    child: ReferenceType[nn.Module]

    def same(self) -> bool:
        module, child = self.module(), self.child()
        return module is not None and child is not None and module._modules.get(self.key) is child


@dataclass(frozen=True)
class _Sequence:
    """How many modules are applied one after another; ``_Child`` checks those that were there."""

    name: str
    module: ReferenceType[nn.Sequential | nn.ModuleList]
    count: int

    def same(self) -> bool:
        module = self.module()
        return module is not None and len(module) == self.count


class Unchanged:
    """Remembers a network's modules, parameters and buffers without keeping them alive."""

    def __init__(self, net: nn.Module) -> None:
        self._net = ref(net)
        self._children = [
            _Child(f"{path}.{key}".lstrip("."), ref(module), key, ref(child))
            for path, module in net.named_modules()
            for key, child in module._modules.items()
            if child is not None
        ]
        self._places = [
            _Place(f"{path}.{key}".lstrip("."), ref(module), key, ref(tensor), tensor.data_ptr(), _version(tensor))
            for path, module in net.named_modules()
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]
        self._sequences = [
            _Sequence(path, ref(module), len(module))
            for path, module in net.named_modules()
            if isinstance(module, nn.Sequential | nn.ModuleList)
        ]

    def require(self) -> None:
        """Checks that nothing has changed; about 0.1 ms. A network that no longer exists counts as unchanged.

        Writes that torch does not count go unnoticed: through ``tensor.data``, and those of fused optimisers.

        Raises:
            StaleModelError: a parameter or buffer was written to, one of them or a module replaced, or a module added
                to a sequence.
        """
        if self._net() is None:
            return
        parts: Sequence[_Child | _Place | _Sequence] = (*self._children, *self._places, *self._sequences)
        for place in parts:
            if not place.same():
                raise StaleModelError(
                    f"{place.name} has changed since the network was compiled: call flowreel.compile again"
                )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors keep no count
