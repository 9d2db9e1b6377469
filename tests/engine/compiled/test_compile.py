"""Compiled networks compared with the networks they are made from, and what cannot be compiled."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import flowreel
from flowreel.engine.compiled import plain
from flowreel.engine.compiled.unchanged import Unchanged
from flowreel.engine.config import Precision
from flowreel.engine.errors import StaleModelError, UsageError
from flowreel.engine.models import MODELS, build_model
from flowreel.engine.models.flownets import FlowNetS
from flowreel.engine.models.layers import FlowHead

Filled = Callable[..., nn.Module]
TOLERANCE_PX = 2e-4  # from the goldens
HALF = 0.02  # largest mean error of half precision, relative to the flow, which is 10 to 30 px with random weights
NATIVE = [name for name in MODELS if name != "FlowNet2"]


def smooth_frames(seed: int, count: int, height: int = 64, width: int = 128) -> tuple[Tensor, Tensor]:
    """Smooth frames: on noise, small differences of the flow that a stack warps by would become large ones."""
    coarse = torch.rand(2 * count, 3, 3, 4, generator=torch.Generator().manual_seed(seed)) * 255
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return fine[:count], fine[count:]


def apart(flow: Tensor, expected: Tensor) -> float:
    """Mean difference over mean length."""
    return float((flow - expected).norm(dim=1).mean() / expected.norm(dim=1).mean())


def test_the_golden_flow(filled: Filled, golden_dir: Path) -> None:
    """Of the network that contains the others at full width, where some layers have other forms than in narrow ones."""
    images = np.load(golden_dir / "inputs.npz")["images_128x192"]  # (B, T, H, W, 3)
    frames = torch.from_numpy(images).permute(1, 0, 4, 2, 3).float()
    fast = flowreel.compile(filled("FlowNet2"), (2, 128, 192))
    expected = np.load(golden_dir / "FlowNet2.npz")["flow_128x192"]
    np.testing.assert_allclose(fast(*frames).numpy(), expected, rtol=0, atol=TOLERANCE_PX)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_network_an_odd_batch_and_both_forms(name: str, batch_norm: bool, filled: Filled) -> None:
    model = filled(name, width=0.15, batch_norm=batch_norm)
    frames = smooth_frames(1, 3)
    fast = flowreel.compile(model, (3, 64, 128))
    with torch.no_grad():
        expected = model(*frames)
    flow = fast(*frames)
    assert (flow.dtype, flow.shape, flow.is_contiguous()) == (torch.float32, (3, 2, 64, 128), True)
    torch.testing.assert_close(flow, expected, rtol=0, atol=1e-4)
    if name in NATIVE:
        with torch.no_grad():
            expected = model.quarter(*frames)  # type: ignore[operator]
        torch.testing.assert_close(fast.quarter(*frames), expected, rtol=0, atol=1e-4)
    else:
        with pytest.raises(UsageError, match="full resolution"):
            fast.quarter(*frames)


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_stays_close(name: str, filled: Filled) -> None:
    model = filled(name, width=0.25)
    frames = smooth_frames(2, 2)
    whole, half = (flowreel.compile(model, (2, 64, 128), precision)(*frames) for precision in ("fp32", "bf16"))
    assert half.dtype == torch.float32
    assert 0 < apart(half, whole) < HALF


def test_the_result_is_an_ordinary_tensor_that_later_calls_leave_alone() -> None:
    fast = flowreel.compile(build_model("FlowNet2", width=0.05), (1, 64, 64))
    frames, others = smooth_frames(3, 1, 64, 64), smooth_frames(4, 1, 64, 64)
    flow = fast(*frames)
    kept = flow.clone()
    assert not flow.requires_grad
    assert not flow.is_inference()
    assert not torch.equal(fast(*others), kept)
    assert torch.equal(flow, kept)
    (flow * torch.ones(1, requires_grad=True)).sum().backward()  # it can take part in training


def test_modes_of_the_caller_stay_and_do_not_matter(filled: Filled) -> None:
    model = filled("FlowNet2CS", width=0.1, batch_norm=True)
    frames = smooth_frames(5, 1)
    fast = flowreel.compile(model.train(), (1, 64, 128), "bf16")
    expected = fast(*frames)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        assert torch.equal(fast(*frames), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(*frames), expected)
    assert all(module.training for module in model.modules())
    with torch.inference_mode():
        made_there = build_model("FlowNet2S", width=0.05)
    flowreel.compile(made_there, (1, 64, 128))(*frames)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_of_the_caller_changes_nothing(half: torch.dtype, filled: Filled) -> None:
    model = filled("FlowNet2C", width=0.1)
    frames = smooth_frames(6, 1)
    fast = flowreel.compile(model, (1, 64, 128), "fp32")
    expected = fast(*frames)
    with torch.autocast("cpu", half):
        assert torch.equal(fast(*frames), expected)
        assert torch.equal(flowreel.compile(model, (1, 64, 128), "fp32")(*frames), expected)


def test_several_threads_at_once(filled: Filled) -> None:
    fast = flowreel.compile(filled("FlowNet2CS", width=0.1), (1, 64, 128))
    inputs = [smooth_frames(seed, 1) for seed in range(4)]
    expected = [fast(*frames) for frames in inputs]
    found: dict[int, list[bool]] = {}

    def work(number: int) -> None:
        found[number] = [torch.equal(fast(*inputs[number]), expected[number]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [True] * 5 for number in range(4)}


@pytest.mark.parametrize("layout", ["channels_last", "flipped", "float64"])
def test_inputs_of_any_strides_and_float_type(layout: str, filled: Filled) -> None:
    fast = flowreel.compile(filled("FlowNet2S", width=0.1), (2, 64, 128))
    frames = smooth_frames(6, 2)
    expected = fast(*frames)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "channels_last": lambda x: x.to(memory_format=torch.channels_last),
        "flipped": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "float64": lambda x: x.double(),
    }
    torch.testing.assert_close(fast(*map(forms[layout], frames)), expected, rtol=0, atol=1e-4)


def test_other_inputs_are_refused() -> None:
    fast = flowreel.compile(build_model("FlowNet2S", width=0.05), (2, 64, 64))
    assert repr(fast) == "<CompiledModel FlowNetS (2, 64, 64), fp32, on cpu>"
    good = torch.zeros(2, 3, 64, 64)
    for bad in (good[:1], torch.zeros(2, 3, 64, 128), torch.zeros(3, 64, 64)):
        with pytest.raises(ValueError, match=r"\(2, 3, 64, 64\).*compile again"):
            fast(good, bad)
        with pytest.raises(ValueError, match="compile again"):
            fast.quarter(bad, good)
    with pytest.raises(TypeError, match="uint8"):
        fast(good.byte(), good)
    with pytest.raises(ValueError, match="meta"):
        fast(good.to("meta"), good)


def test_what_cannot_be_compiled() -> None:
    model = build_model("FlowNet2S", width=0.05)
    for shape in ((1, 64), (1, 60, 64), (0, 64, 64), (1, 64, 0), (1.0, 64, 64), 64):
        with pytest.raises(UsageError, match="shape"):
            flowreel.compile(model, shape)  # type: ignore[arg-type]
    for precision in ("fp16", "tf32", "fp64"):
        with pytest.raises(UsageError, match=precision):
            flowreel.compile(model, (1, 64, 64), precision)
    with pytest.raises(UsageError, match="Linear"):
        flowreel.compile(nn.Linear(2, 2), (1, 64, 64))


@pytest.mark.parametrize("shape", [[1, 64, 64], np.array([1, 64, 64]), torch.Size([1, 64, 64])], ids=type)
def test_other_kinds_of_numbers_and_lists_are_shapes_too(shape: Any) -> None:
    assert flowreel.compile(build_model("FlowNet2S", width=0.05), shape).shape == (1, 64, 64)


def trained(model: nn.Module) -> None:
    first, second = smooth_frames(7, 1, 64, 64)
    model(first, second).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def loaded(model: nn.Module) -> None:
    model.load_state_dict(model.state_dict())


def replaced(model: nn.Module) -> None:
    head = model.get_submodule("predict_flow2")
    head.weight = nn.Parameter(head.weight.detach().clone())


def rebuilt(model: nn.Module) -> None:
    model.add_module("predict_flow2", FlowHead(model.get_submodule("predict_flow2").in_channels))  # type: ignore[arg-type]


kept: list[nn.Module] = []  # keeps a replaced module alive


def rebuilt_beside(model: nn.Module) -> None:
    kept.append(model.get_submodule("conv1"))
    model.add_module("conv1", deepcopy(kept[-1]))


def lengthened(model: nn.Module) -> None:
    model.get_submodule("conv1").append(nn.ReLU())  # type: ignore[operator]


def cast(model: nn.Module) -> None:
    model.double()


@pytest.mark.parametrize("change", [trained, loaded, replaced, rebuilt, rebuilt_beside, lengthened, cast])
def test_weights_that_change_afterwards_are_noticed(change: Callable[[nn.Module], None]) -> None:
    model = build_model("FlowNet2SD", width=0.05).eval()
    frames = smooth_frames(8, 1, 64, 64)
    fast = flowreel.compile(model, (1, 64, 64))
    fast(*frames)
    change(model)
    for form in (fast, fast.quarter):
        with pytest.raises(StaleModelError, match=r"call flowreel\.compile again"):
            form(*frames)
    flowreel.compile(model, (1, 64, 64))(*frames)


def test_a_module_added_to_a_list_is_noticed() -> None:
    modules = nn.ModuleList([nn.ReLU()])
    network = nn.ModuleDict({"blocks": modules})
    unchanged = Unchanged(network)
    unchanged.require()
    modules.append(nn.ReLU())
    with pytest.raises(StaleModelError, match=r"^blocks has changed"):
        unchanged.require()
    network["more"] = nn.ReLU()
    with pytest.raises(StaleModelError, match=r"^one of its modules has changed since the network was compiled"):
        unchanged.require()


def test_statistics_of_batch_norm_are_weights_too() -> None:
    model = build_model("FlowNet2S", width=0.05, batch_norm=True)
    frames = smooth_frames(9, 1)
    fast = flowreel.compile(model, (1, 64, 128))
    fast(*frames)
    model.train()(*frames)
    with pytest.raises(StaleModelError, match=r"conv1\.1"):
        fast(*frames)


def test_batch_norm_in_a_network_with_an_attribute_that_cannot_be_copied() -> None:
    model = build_model("FlowNet2S", width=0.05, batch_norm=True).eval()
    frames = smooth_frames(9, 1)
    with torch.no_grad():
        expected = model(*frames)
    model.lock = threading.Lock()  # type: ignore[assignment]
    assert apart(flowreel.compile(model, (1, 64, 128))(*frames), expected) < 1e-5
    with torch.no_grad():
        assert torch.equal(model(*frames), expected)


def test_a_parameter_of_the_network_itself_is_named() -> None:
    model = build_model("FlowNet2S", width=0.05)
    model.gain = nn.Parameter(torch.ones(1))
    fast = flowreel.compile(model, (1, 64, 128))
    model.gain.detach().mul_(2)
    with pytest.raises(StaleModelError, match=r"^gain has changed"):
        fast(*smooth_frames(9, 1))


@pytest.mark.parametrize("copied", [pickle.dumps, deepcopy])
def test_what_a_device_is_prepared_for_is_not_copied(copied: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="compile the network anew"):
        copied(flowreel.compile(build_model("FlowNet2S", width=0.05), (1, 64, 64)))


def test_the_network_may_go() -> None:
    model = build_model("FlowNet2S", width=0.05)
    frames = smooth_frames(10, 1)
    fast = flowreel.compile(model, (1, 64, 128))
    expected = fast(*frames)
    gone = ref(model), ref(model.get_parameter("conv1.0.weight"))
    del model
    assert [one() for one in gone] == [None, None]
    assert torch.equal(fast(*frames), expected)


class Doubled(FlowNetS):
    def predict(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * flow for flow in super().predict(x))


def of_a_subclass() -> nn.Module:
    return Doubled(width=0.1)


def with_a_part_of_a_subclass() -> nn.Module:
    model = build_model("FlowNet2CS", width=0.1)
    model.flownets_1 = Doubled(width=0.1, input_channels=12)
    return model


def with_another_activation() -> nn.Module:
    model = build_model("FlowNet2S", width=0.1)
    model.get_submodule("conv1")[1] = nn.ReLU()  # type: ignore[operator]
    return model


def with_a_hook() -> nn.Module:
    model = build_model("FlowNet2S", width=0.1)
    model.get_submodule("conv3").register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return model


def with_a_hook_before() -> nn.Module:
    model = build_model("FlowNet2S", width=0.1)
    model.get_submodule("conv3").register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],))
    return model


def with_normed_weights() -> nn.Module:
    model = build_model("FlowNet2S", width=0.1)
    nn.utils.parametrizations.weight_norm(model.get_submodule("conv1.0"))
    return model


def with_pruned_weights() -> nn.Module:
    model = build_model("FlowNet2S", width=0.1)
    prune.l1_unstructured(model.get_submodule("conv1.0"), "weight", 0.5)  # type: ignore[no-untyped-call]
    return model


def with_another_slope() -> nn.Module:
    model = build_model("FlowNet2S", width=0.1)
    model.get_submodule("conv1.1").negative_slope = 0.5  # type: ignore[assignment]
    return model


def with_another_padding() -> nn.Module:
    model = build_model("FlowNet2S", width=0.1)
    model.get_submodule("conv3_1.0").padding_mode = "reflect"  # type: ignore[assignment]
    return model


def with_a_layer_more() -> nn.Module:
    model = build_model("FlowNet2S", width=0.1)
    model.get_submodule("conv3_1").append(nn.Conv2d(26, 26, 3, 1, 1))  # type: ignore[operator]
    return model


def with_a_head_without_bias() -> nn.Module:
    model = build_model("FlowNet2SD", width=0.1)
    model.get_submodule("predict_flow2").bias = None  # type: ignore[assignment]
    return model


def with_a_part_used_twice() -> nn.Module:
    model = build_model("FlowNet2CSS", width=0.1)
    model.flownets_2 = model.flownets_1
    return model


def with_norms_of_the_batch() -> nn.Module:
    model = build_model("FlowNet2S", width=0.1, batch_norm=True)
    model.get_submodule("conv3")[1] = nn.BatchNorm2d(26, track_running_stats=False)  # type: ignore[operator]
    return model


def with_a_method_replaced() -> nn.Module:
    model = build_model("FlowNet2S", width=0.1)
    written = model.predict
    model.predict = lambda x: tuple(2 * flow for flow in written(x))  # type: ignore[assignment, operator]
    return model


def with_a_layer_s_method_replaced() -> nn.Module:
    model = build_model("FlowNet2S", width=0.1)
    layer = model.get_submodule("conv3")
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)  # type: ignore[method-assign]
    return model


OWN = [
    of_a_subclass,
    with_a_part_of_a_subclass,
    with_another_activation,
    with_a_hook,
    with_a_hook_before,
    with_normed_weights,
    with_pruned_weights,
    with_another_slope,
    with_another_padding,
    with_a_layer_more,
    with_a_head_without_bias,
    with_a_part_used_twice,
    with_norms_of_the_batch,
    with_a_method_replaced,
    with_a_layer_s_method_replaced,
]


@pytest.mark.parametrize("make", OWN)
def test_networks_of_the_users_own_are_run_as_they_are(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    model = make().eval()
    frames = smooth_frames(12, 1)
    fast = flowreel.compile(model, (1, 64, 128))
    with torch.no_grad():
        assert apart(fast(*frames), model(*frames)) < 1e-5
        assert apart(fast.quarter(*frames), model.quarter(*frames)) < 1e-5  # type: ignore[operator]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["FlowNet2", "FlowNet2C"])
def test_the_form_that_runs_anywhere(name: str, precision: Precision, filled: Filled) -> None:
    model = filled(name, width=0.15, batch_norm=True)
    frames = smooth_frames(11, 1)
    program = plain.pack(model.train().double(), precision).program((1, 64, 128))
    assert next(model.parameters()).dtype == torch.float64
    model.float().eval()
    with torch.no_grad():
        assert apart(program.flow(*frames), model(*frames)) < (1e-5 if precision == "fp32" else HALF)
        assert name == "FlowNet2" or program.quarter(*frames).is_contiguous()


def cudnn_s_settings() -> tuple[bool, ...]:
    """Whether cuDNN is used, times algorithms, takes deterministic ones only, and uses TF32 in convolutions."""
    cudnn = torch.backends.cudnn
    tf32 = cudnn.conv.fp32_precision == "tf32" if hasattr(cudnn, "conv") else cudnn.allow_tf32
    return cudnn.enabled, cudnn.benchmark, cudnn.deterministic, tf32


def test_overlapping_calls_on_a_gpu_leave_cudnn_s_settings_alone() -> None:
    gpu, before = torch.device("cuda"), cudnn_s_settings()
    entered, leave = threading.Event(), threading.Event()

    def other_call() -> None:
        with plain._math(gpu, "tf32"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other_call)
    with plain._math(gpu, "fp32"):
        thread.start()
        assert not entered.wait(0.1)
        with plain._math(gpu, "tf32"):  # allowed in the same thread: a user's network may call another one
            pass
        assert cudnn_s_settings()[-1] is False
    leave.set()
    thread.join()
    assert cudnn_s_settings() == before


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_on_a_gpu_neither_benchmarks_nor_unasked_tf32_decide_the_flow(precision: Precision) -> None:
    before = cudnn_s_settings()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        callers = cudnn_s_settings()
        with plain._math(torch.device("cuda"), precision):
            assert cudnn_s_settings() == (True, False, True, precision == "tf32")
            assert torch.backends.cudnn.allow_tf32 is (precision == "tf32")  # which a network may ask
        assert cudnn_s_settings() == callers
    assert cudnn_s_settings() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch is older than 2.9")
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("callers", ["ieee", "tf32"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_fp32_precision_of_the_caller_s_neither_decides_nor_fails(precision: Precision, callers: str) -> None:
    before, convolutions = cudnn_s_settings(), torch.backends.cudnn.conv
    with torch.backends.flags(fp32_precision=callers):
        convolutions.fp32_precision = callers
        with plain._math(torch.device("cuda"), precision):
            assert (convolutions.fp32_precision == "tf32") is (precision == "tf32")
        assert convolutions.fp32_precision == callers
    torch.backends.cudnn.allow_tf32 = before[-1]


def test_flow_heads_stay_in_float32() -> None:
    net = build_model("FlowNet2", width=0.05)
    plain.cast_convolutions(net, torch.bfloat16)
    heads = [module for module in net.modules() if isinstance(module, FlowHead)]
    assert len(heads) == 5 * 4 + 3
    assert all(head.weight.dtype == torch.float32 for head in heads)
    assert net.get_submodule("flownetc.conv1.0").weight.dtype == torch.bfloat16
