"""Each form of convolution compared with torch's own, on whole maps and in strips."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowreel.engine.compiled import buffers, convolution, onednn, taps, winograd
from flowreel.engine.compiled.buffers import Buffers
from flowreel.engine.compiled.convolution import Convolution, chained, strips
from flowreel.engine.compiled.onednn import PackedConvolution
from flowreel.engine.compiled.taps import Taps
from flowreel.engine.compiled.winograd import Winograd

pytestmark = pytest.mark.skipif(not onednn.available(torch.float32), reason="this torch has no oneDNN for this CPU")
KINDS = {  # (kernel, stride); None: the networks' transposed convolution
    "3x3": (3, 1),
    "3x3, halved": (3, 2),
    "5x5, halved": (5, 2),
    "7x7, halved": (7, 2),
    "1x1": (1, 1),
    "transposed": None,
}


FORMS = ("packed", "winograd", "taps")


@pytest.fixture(autouse=True, params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with each form, used for every layer that it can do, however small."""
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "NARROWEST", 1 if request.param == "winograd" else 1 << 30)
    monkeypatch.setattr(taps, "NARROWEST", 1 if request.param == "taps" else 1 << 30)
    monkeypatch.setattr(taps, "MOST", 100)
    return str(request.param)


def layer(kind: str, inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d | nn.ConvTranspose2d:
    found = KINDS[kind]
    if found is None:
        return nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=bias)
    kernel, stride = found
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)


def settled(
    module: nn.Conv2d | nn.ConvTranspose2d, leaky: bool = False, dtype: torch.dtype = torch.float32
) -> Convolution:
    return Convolution(module, leaky, dtype, dtype)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions run in strips of two rows, and all results use kept memory."""
    monkeypatch.setattr(convolution, "WHOLE", 0)
    monkeypatch.setattr(convolution, "STRIP", 0)
    monkeypatch.setattr(buffers, "SMALLEST", 0)


@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_layers(kind: str, bias: bool, leaky: bool) -> None:
    module = layer(kind, 5, 7, bias)
    x = torch.randn(2, 5, 12, 20)
    expected = module(x)
    same(settled(module, leaky)(x, Buffers()), F.leaky_relu(expected, 0.1) if leaky else expected)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("height", [2, 4, 6, 14])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_strips(kind: str, height: int) -> None:
    module = layer(kind, 3, 4)
    x = torch.randn(2, 3, height, 10)
    found = settled(module)(x, Buffers())
    same(found, module(x))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_any_rows_of_a_layer(kind: str) -> None:
    module = layer(kind, 3, 4)
    x = torch.randn(1, 3, 12, 10).contiguous(memory_format=torch.channels_last)
    expected = module(x)
    even = range(0, expected.shape[2] + 1, 2)
    for top, bottom in itertools.combinations(even, 2):
        same(settled(module).rows(x, top, bottom, Buffers()), expected[:, :, top:bottom])


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_written_between_other_channels(kind: str) -> None:
    module = layer(kind, 3, 4)
    x = torch.randn(2, 3, 8, 10)
    expected = module(x)
    whole = torch.full((2, 9, *expected.shape[2:]), 7.0).contiguous(memory_format=torch.channels_last)
    settled(module).into(whole[:, 2:6], x, Buffers())
    same(whole[:, 2:6], expected)
    assert (whole[:, :2] == 7).all()
    assert (whole[:, 6:] == 7).all()


@pytest.mark.parametrize("strip", [0, 1 << 20])
def test_two_layers_strip_by_strip(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "STRIP", strip)
    first, second = layer("3x3", 3, 4), layer("3x3, halved", 4, 5)
    x = torch.randn(2, 3, 16, 12)
    between = F.leaky_relu(first(x), 0.1)
    kept = torch.zeros(2, 6, 16, 12).contiguous(memory_format=torch.channels_last)
    same(chained(settled(first, leaky=True), settled(second), x, Buffers(), keep=kept[:, 1:5]), second(between))
    same(kept[:, 1:5], between)
    assert (kept[:, [0, 5]] == 0).all()


def test_a_layer_is_done_in_the_form_that_was_asked_for(form: str) -> None:
    expected = {"packed": PackedConvolution, "winograd": Winograd, "taps": Taps}[form]
    assert type(settled(layer("3x3", 5, 7))._form) is expected
    assert type(settled(layer("transposed", 5, 7))._form) is PackedConvolution


@pytest.mark.parametrize("whole", [0, 1 << 20])
def test_a_layer_may_take_and_give_another_type_than_it_computes_in(
    whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "WHOLE", whole)
    module = layer("3x3, halved", 3, 4)
    x = torch.randn(1, 3, 8, 8)
    found = Convolution(module, False, torch.float32, torch.bfloat16)(x, Buffers())
    assert torch.equal(found, module(x).bfloat16())
    same(settled(module)(x.bfloat16(), Buffers()), module(x.bfloat16().float()))


@pytest.mark.parametrize("kind", ["3x3", "transposed"])
def test_weights_are_copied(kind: str) -> None:
    module = layer(kind, 4, 4)
    x = torch.randn(1, 4, 6, 6)
    copied, expected = settled(module), module(x)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()  # type: ignore[union-attr]
    same(copied(x, Buffers()), expected)


@pytest.mark.parametrize(("height", "width"), [(2, 3), (448, 1024), (1088, 1920), (31, 5000)])
def test_strips_cover_every_row_once(height: int, width: int) -> None:
    found = list(strips(height, width, 64 * 4))
    assert [row for top, bottom in found for row in range(top, bottom)] == list(range(height))
    assert all(top % 2 == 0 for top, _ in found)
