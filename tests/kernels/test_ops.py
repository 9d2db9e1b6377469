"""The contract of every operation: correct registration with torch, gradients, fake tensors, compilation.

One line in ``OPERATIONS`` adds an operation that has gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flowreel.kernels
import flowreel.kernels.flow_color  # registers its operation; the package itself imports it only on first use
from flowreel.kernels.operation import recording
from tests.fakes.fresh import Fresh

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


class Case(NamedTuple):
    function: Callable[..., Tensor]  # the public function
    op: str  # its name under torch.ops.flowreel
    shapes: tuple[tuple[int, int, int, int], ...]  # of the input tensors
    settings: tuple[float, ...] = ()  # further arguments of the op
    public_settings: tuple[int, ...] = ()  # further arguments of the function
    options: Mapping[str, float] = {}  # its keyword arguments

    def call(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, *self.public_settings, **self.options)


MAP = (2, 3, 6, 7)
OPERATIONS = {
    "correlation": Case(flowreel.kernels.correlation, "correlation", (MAP, MAP), (2, 2), (4, 1, 4, 1, 2)),
    "correlation, windows": Case(
        flowreel.kernels.correlation, "correlation", ((1, 2, 5, 6),) * 2, (2, 1), (3, 3, 2, 2, 1)
    ),
    "correlation, activated": Case(
        flowreel.kernels.correlation,
        "correlation",
        (MAP, MAP),
        (2, 2, 0.5, 0.1),
        (4, 1, 4, 1, 2),
        {"scale": 0.5, "negative_slope": 0.1},
    ),
    "warp": Case(flowreel.kernels.warp, "warp", (MAP, (2, 2, 6, 7))),
    "channel_norm": Case(flowreel.kernels.channel_norm, "channel_norm", (MAP,)),
}
BACKWARD_OPERATIONS = {
    "correlation_backward": Case(
        flowreel.kernels.correlation, "correlation_backward", ((2, 25, 6, 7), MAP, MAP), (2, 2)
    ),
    "channel_norm_backward": Case(
        flowreel.kernels.channel_norm, "channel_norm_backward", ((2, 1, 6, 7), MAP, (2, 1, 6, 7))
    ),
    "warp_image_gradient": Case(flowreel.kernels.warp, "warp_image_gradient", (MAP, (2, 2, 6, 7))),
    "warp_flow_gradient": Case(flowreel.kernels.warp, "warp_flow_gradient", (MAP, MAP, (2, 2, 6, 7))),
}


@pytest.fixture(params=OPERATIONS.values(), ids=OPERATIONS.keys())
def case(request: pytest.FixtureRequest) -> Case:
    operation: Case = request.param
    return operation


def tensors(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in case.shapes]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch 2.14's check, which filters it from what is logged
def test_op_is_registered_correctly(case: Case) -> None:
    inputs = [x.requires_grad_() for x in tensors(case)]
    torch.library.opcheck(getattr(torch.ops.flowreel, case.op).default, (*inputs, *case.settings))


@pytest.mark.parametrize("operation", BACKWARD_OPERATIONS.values(), ids=BACKWARD_OPERATIONS.keys())
def test_backward_op_is_registered_correctly(operation: Case) -> None:
    op = getattr(torch.ops.flowreel, operation.op).default
    checks = ("test_schema", "test_faketensor")  # there is no gradient of the gradient
    for memory_format in (torch.contiguous_format, torch.channels_last):
        inputs = [x.to(memory_format=memory_format) for x in tensors(operation)]
        torch.library.opcheck(op, (*inputs, *operation.settings), test_utils=checks)


def test_ops_without_gradients_are_registered_correctly() -> None:
    a, b, out = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 6), torch.zeros(2, 9, 5, 6)
    checks = ("test_schema", "test_faketensor")
    into, paint = (getattr(torch.ops.flowreel, name).default for name in ("correlation_into", "flow_to_color"))
    torch.library.opcheck(into, (out, a, b, 1, 1, None, 0.1), test_utils=checks)
    for max_flow in (None, 3.0):
        torch.library.opcheck(paint, (torch.randn(2, 2, 5, 6), max_flow), test_utils=checks)


def test_correlation_into_a_part_compiles_whole() -> None:
    torch._dynamo.reset()
    a, b = (torch.randn(2, 3, 5, 6) for _ in range(2))

    def work(whole: Tensor) -> Tensor:
        flowreel.kernels.correlation(a, b, 1, 1, 1, 1, 1, negative_slope=0.1, out=whole[:, 2:11])
        return whole * 2

    out = torch.compile(work, fullgraph=True, backend="aot_eager")(torch.ones(2, 12, 5, 6))
    torch.testing.assert_close(out, work(torch.ones(2, 12, 5, 6)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_foretell_shape_dtype_and_strides(
    case: Case, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    inputs = [x.to(memory_format=memory_format) for x in tensors(case, dtype)]
    with FakeTensorMode() as mode, recording(ran := {}):
        foretold = case.call(*(mode.from_tensor(x) for x in inputs))
    assert not ran  # nothing was traced: correlation's definition would take minutes
    out = case.call(*inputs)
    assert (foretold.shape, foretold.dtype, foretold.stride()) == (out.shape, out.dtype, out.stride())


def test_gradients_are_the_slopes(case: Case) -> None:
    inputs = tuple(x.requires_grad_() for x in tensors(case, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: case.call(*x), inputs, fast_mode=True)


def test_a_graph_of_the_gradients_gives_them_but_none_beyond(case: Case) -> None:
    inputs, wanted = (tuple(x.requires_grad_() for x in tensors(case, torch.float64)) for _ in range(2))
    case.call(*wanted).square().sum().backward()
    slopes = torch.autograd.grad(case.call(*inputs).square().sum(), inputs, create_graph=True)
    for slope, x in zip(slopes, wanted, strict=True):
        assert torch.equal(slope, x.grad)
    constant = torch.autograd.grad(case.call(*inputs).sum(), inputs, create_graph=True)  # the gradient that comes in
    for beyond in (*slopes, *constant):
        with pytest.raises(RuntimeError, match="differentiated only once"):
            (beyond.sum() + inputs[0].sum()).backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_whole_and_gives_the_same(case: Case, backend: str) -> None:
    torch._dynamo.reset()

    def work(*inputs: Tensor) -> Tensor:
        return case.call(*inputs).mul(2).sin()

    plain, compiled = ([x.requires_grad_() for x in tensors(case)] for _ in range(2))
    wanted = work(*plain)
    out = torch.compile(work, fullgraph=True, backend=backend)(*compiled)
    torch.testing.assert_close(out, wanted)
    wanted.sum().backward()
    out.sum().backward()
    for x, y in zip(compiled, plain, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_result_can_take_part_in_training_or_not(case: Case) -> None:
    assert not case.call(*tensors(case)).requires_grad
    with torch.inference_mode():
        assert case.call(*tensors(case)).is_inference()


def test_names_are_functions_whatever_was_imported_first(fresh: Fresh) -> None:
    """A module and its function share a name; the package must hand out the function."""
    code = (
        "import flowreel.kernels.warp, flowreel.kernels.correlation, flowreel.kernels.channel_norm\n"
        "import flowreel.kernels.quantise, flowreel.kernels.bitshuffle, flowreel.kernels.yuv_to_rgb\n"
        "from flowreel.kernels import warp, correlation, channel_norm, quantise, bitshuffle, yuv_to_rgb\n"
        "functions = (warp, correlation, channel_norm, quantise, bitshuffle, yuv_to_rgb)\n"
        "assert all(f.__class__.__name__ == 'function' for f in functions)\n"
    )
    assert fresh.code(code) == (0, "")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="sharpen"):
        flowreel.kernels.sharpen  # noqa: B018


def test_flow_to_color_comes_from_its_own_file() -> None:
    from flowreel.kernels.flow_color import flow_to_color

    assert flowreel.kernels.flow_to_color is flow_to_color
