"""Detects that a network's weights have changed since its compiled form was made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
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
class _Children:
    """The modules inside another one, in the order in which a sequence applies them."""

    name: str
    module: ReferenceType[nn.Module]
    children: tuple[ReferenceType[nn.Module], ...]

    def same(self) -> bool:
        module = self.module()
        now = [] if module is None else _children_of(module)
        return len(now) == len(self.children) and all(map(is_, now, (child() for child in self.children)))


def _children_of(module: nn.Module) -> list[nn.Module]:
    """Unlike ``children()``, with those that occur twice."""
    return [child for child in module._modules.values() if child is not None]


class Unchanged:
    """Remembers a network's modules, parameters and buffers without keeping them alive."""

    def __init__(self, net: nn.Module) -> None:
        self._net = ref(net)
        self._children = [
            _Children(path, ref(module), tuple(map(ref, _children_of(module))))
            for path, module in net.named_modules()
            if module._modules
        ]
        self._places = [
            _Place(f"{path}.{key}".lstrip("."), ref(module), key, ref(tensor), tensor.data_ptr(), _version(tensor))
            for path, module in net.named_modules()
            for key, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]

    def require(self) -> None:
        """Checks that nothing has changed; about 0.1 ms. A network that no longer exists counts as unchanged.

        Writes that torch does not count go unnoticed: through ``tensor.data``, and those of fused optimisers.

        Raises:
            StaleModelError: a parameter or buffer was written to, or one of them or a module replaced, or a module
                added to others.
        """
        if self._net() is None:
            return
        parts: Sequence[_Children | _Place] = (*self._children, *self._places)
        for part in parts:
            if not part.same():
                what = part.name or "one of its modules"
                raise StaleModelError(f"{what} has changed since the network was compiled: call flowreel.compile again")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors keep no count
