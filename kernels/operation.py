"""Registers operations with torch, as ``torch.ops.flowreel.*``, and tells which version of each one ran.

An operation has a definition in plain torch, which runs on any device, one of our kernels for a GPU, and may have a
faster version for a CPU. Without CuPy, for float64, and for inputs that a kernel does not take, the definition runs on
the GPU too; ``recording`` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from flowreel.kernels import launch
from flowreel.kernels.launch import SUFFIXES

_torch_library: Any = torch.library  # its functions carry no types
_LIBRARY = _torch_library.Library("flowreel", "FRAGMENT")
_ran: ContextVar[dict[str, str] | None] = ContextVar("_ran", default=None)


def operation(
    schema: str,
    definition: Callable[..., Any],
    *,
    on_cpu: Callable[..., Any] | None = None,
    on_cuda: Callable[..., Any],
    takes: Callable[..., bool] = lambda *_: True,
    shape: Callable[..., Any] = lambda *_: None,
) -> Callable[..., Any]:
    """Registers an operation and returns it.

    Args:
        schema: its name, arguments and results, in torch's notation.
        definition: what it means, on any device.
        on_cpu: a faster version for a CPU.
        on_cuda: our kernel for a GPU.
        takes: whether our kernel takes such arguments.
        shape: gives uninitialised results of the right shapes, for tracing; not needed if there are no results.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key, version in versions(name, definition, on_cpu, on_cuda, takes).items():
        _LIBRARY.impl(name, version, key)
    _torch_library.register_fake(f"flowreel::{name}", shape, lib=_LIBRARY)
    registered: Callable[..., Any] = getattr(torch.ops.flowreel, name).default
    return registered


def versions(
    name: str,
    definition: Callable[..., Any],
    on_cpu: Callable[..., Any] | None,
    on_cuda: Callable[..., Any],
    takes: Callable[..., bool],
) -> dict[str, Callable[..., Any]]:
    """What runs, by torch's dispatch key. ``takes`` is called here and nowhere else, so the version noted is the one
    that runs.
    """
    noted_as = name.removesuffix("_into")  # the same operation, written to a given tensor

    def run(on: Callable[..., Any], how: str) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            note(noted_as, how)
            return on(*arguments)

        return noted

    plain, ours = run(definition, "torch"), run(on_cuda, "cuda")

    def chosen(*arguments: Any) -> Any:
        known = all(x.dtype in SUFFIXES for x in arguments if isinstance(x, Tensor) and x.dtype.is_floating_point)
        return (ours if known and launch.cupy_is_there() and takes(*arguments) else plain)(*arguments)

    by_key = {"CompositeExplicitAutograd": plain, "CUDA": chosen}  # the first: any device without a version of its own
    if on_cpu is not None:
        by_key["CPU"] = run(on_cpu, "torch")
    return by_key


def set_gradient(name: str, backward: Callable[..., Any], remember: Callable[..., None]) -> None:
    """Makes an operation differentiable: see ``torch.library.register_autograd``."""
    _torch_library.register_autograd(f"flowreel::{name}", backward, setup_context=remember, lib=_LIBRARY)


def refuse_gradient(name: str) -> None:
    """Makes it an error to differentiate this operation, which computes a gradient itself.

    Otherwise torch would silently leave its part out of the result, and with ``once_differentiable`` still does so
    where the incoming gradient is a constant, as after ``.sum()``.
    """

    def refused(*_: Any) -> None:
        raise RuntimeError(
            f"{name} has no derivative, since flowreel's operations can be differentiated only once: "
            "use their gradients as constants, with .detach()"
        )

    _torch_library.register_autograd(f"flowreel::{name}", refused, lib=_LIBRARY)


@contextmanager
def recording(into: dict[str, str]) -> Iterator[None]:
    """Notes which version of each of our operations runs meanwhile in this thread: ``cuda``, ``torch``, or both.

    The replay of a CUDA graph is not seen: record while it is captured.
    """
    before = _ran.set(into)
    try:
        yield
    finally:
        _ran.reset(before)


def note(name: str, how: str) -> None:
    """Notes that an operation is about to run, by our kernel (``cuda``) or by torch's operations (``torch``)."""
    ran = _ran.get()
    if ran is not None:
        ran[name] = how if ran.get(name, how) == how else "cuda and torch"


def widened(x: Tensor) -> Tensor:
    """Half-precision types as float32, in which sums are formed: a float16 square overflows from 256 on."""
    return x.float() if x.element_size() < 4 else x
