"""The form for GPUs, run on a CPU: padded networks equal the module, types of layers, and who owns which memory.

What only a GPU can show (cuDNN, captured graphs, streams) is checked there by ``python -m benchmarks gpu``.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowreel.engine import inference
from flowreel.engine.compiled import cuda, padded, plain_modes
from flowreel.engine.compiled.heads import Head
from flowreel.engine.config import Precision
from flowreel.engine.errors import PrecisionWarning
from flowreel.engine.models import MODELS, build_model

Filled = Callable[..., nn.Module]
HALF: dict[Precision, float] = {"fp16": 0.005, "bf16": 0.02}  # largest mean error, relative to the flow


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    """As in ``flowreel.compile``, which calls this form."""
    with torch.no_grad():
        yield


def frames_of(seed: int, count: int, height: int = 64, width: int = 128) -> tuple[Tensor, Tensor]:
    """Smooth frames: on noise, small differences of the flow that a stack warps by would become large ones."""
    coarse = torch.rand(2 * count, 3, 3, 4, generator=torch.Generator().manual_seed(seed)) * 255
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return fine[:count], fine[count:]


def apart(flow: Tensor, expected: Tensor) -> float:
    """Mean difference over mean length."""
    return float((flow - expected).norm(dim=1).mean() / expected.norm(dim=1).mean())


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_padding_and_folding_change_nothing(name: str, batch_norm: bool, filled: Filled) -> None:
    """At a width where hardly any layer has a multiple of 8 channels."""
    model = filled(name, width=0.13, batch_norm=batch_norm)
    frames = frames_of(1, 3)
    program = cuda.pack(model, "fp32").program((3, 64, 128))
    flow = program.flow(*frames)
    assert (flow.dtype, flow.shape, flow.is_contiguous()) == (torch.float32, (3, 2, 64, 128), True)
    torch.testing.assert_close(flow, model(*frames), rtol=0, atol=2e-4)
    if name != "FlowNet2":
        quarter = program.quarter(*frames)
        assert (quarter.shape, quarter.is_contiguous()) == ((3, 2, 16, 32), True)
        torch.testing.assert_close(quarter, model.quarter(*frames), rtol=0, atol=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", MODELS)
def test_half_types_stay_close(name: str, precision: Precision, filled: Filled) -> None:
    model = filled(name, width=0.25)
    frames = frames_of(2, 1)
    half = cuda.pack(model, precision).program((1, 64, 128)).flow(*frames)
    assert half.dtype == torch.float32
    assert 0 < apart(half, model(*frames)) < HALF[precision]


def test_what_is_float32_and_how_layers_are_padded() -> None:
    with torch.device("meta"):
        net = cuda.pack(build_model("FlowNet2", width=1.0), "fp16")
    assert set(net.parts) == {"flownetc", "flownets_1", "flownets_2", "flownets_d", "flownetfusion"}
    enlarging = heads = 0
    for layers in net.parts.values():
        for name, layer in layers.items():
            assert layer.bias.dtype == torch.float32
            if isinstance(layer, Head):
                heads += 1
                assert layer.weight.dtype == torch.float16, name
                continue
            flows = name.startswith("upsampled_flow")
            enlarging += flows
            assert layer.weight.dtype == (torch.float32 if flows else torch.float16), name
            order = torch.contiguous_format if flows else torch.channels_last
            assert layer.weight.is_contiguous(memory_format=order), name
            assert not layer.tf32
            if not flows:
                assert all(size % 8 == 0 for size in layer.weight.shape[:2]), name
    assert (enlarging, heads) == (4 * 4 + 2, 4 * 5 + 3)
    inputs = {
        f"{part}.{name}": layer.weight.shape[1] for part, layers in net.parts.items() for name, layer in layers.items()
    }
    assert inputs["flownetc.conv3_1"] == 480  # 473
    assert inputs["flownets_1.conv1"] == 16  # 12
    assert net.parts["flownets_2"]["deconv4"].weight.shape[0] == 1040  # 1026; a deconvolution has its inputs first


def test_tf32_is_for_convolutions_alone() -> None:
    layers = cuda.pack(build_model("FlowNet2S", width=0.05), "tf32").parts[""]
    for name, layer in layers.items():
        assert isinstance(layer, padded.Convolution)
        assert layer.tf32 == (not name.startswith(("predict_flow", "upsampled_flow")))
        assert layer.weight.dtype == torch.float32


def test_every_convolution_gets_what_tensor_cores_want(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense channels-last maps with a multiple of 8 channels; cuDNN would first have to copy anything else."""
    seen: list[tuple[Tensor, padded.Convolution]] = []
    plain = padded.convolve

    def convolve(x: Tensor, by: padded.Convolution) -> Tensor:
        seen.append((x, by))
        return plain(x, by)

    monkeypatch.setattr(padded, "convolve", convolve)
    cuda.Work(cuda.pack(filled("FlowNet2", width=0.13), "bf16"), (2, 64, 128))()
    # C, both S, SD, fusion: all layers but those that enlarge flow, the heads, and what is merged into heads.
    assert len(seen) == (24 - 4 - 5) + 2 * (23 - 4 - 5) + (30 - 4 - 5 - 4) + (14 - 2 - 3 - 2)
    for x, by in seen:
        assert x.is_contiguous(memory_format=torch.channels_last), tuple(x.shape)
        assert x.dtype == by.weight.dtype
        assert x.shape[1] == by.weight.shape[0 if by.transposed else 1]


def test_programs_share_weights_and_shapes_do_not_share_memory(filled: Filled) -> None:
    model = filled("FlowNet2CS", width=0.1)
    packed = cuda.pack(model, "fp32")
    wide, tall, small = (packed.program(shape) for shape in ((1, 64, 128), (2, 128, 64), (1, 64, 64)))
    given = (wide, frames_of(3, 1)), (tall, frames_of(4, 2, 128, 64)), (small, frames_of(15, 1, 64, 64))
    for program, frames in (*given, (wide, frames_of(5, 1))):
        torch.testing.assert_close(program.flow(*frames), model(*frames), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["FlowNet2", "FlowNet2C"])
def test_results_own_their_memory(name: str, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    program = cuda.pack(filled(name, width=0.1), "fp32").program((1, 64, 128))
    taken = program._works.taken

    @contextmanager
    def spoilt_afterwards() -> Iterator[cuda.Captured]:
        with taken() as captured_work:
            yield captured_work
            captured_work.work.flow.fill_(torch.nan)  # as another thread may overwrite it once this call's turn is over

    monkeypatch.setattr(program._works, "taken", spoilt_afterwards)
    forms = [program.flow] if name == "FlowNet2" else [program.flow, program.quarter]
    for form in forms:
        flow = form(*frames_of(6, 1))
        kept = flow.clone()
        assert kept.isfinite().all()
        assert not torch.equal(form(*frames_of(7, 1)), kept)
        assert torch.equal(flow, kept)
        assert torch.equal(form(*frames_of(6, 1)), kept)  # the frames in between left nothing behind


def test_frames_are_not_changed(filled: Filled) -> None:
    first, second = frames_of(8, 1)
    kept = first.clone(), second.clone()
    cuda.pack(filled("FlowNet2SD", width=0.1), "fp32").program((1, 64, 128)).flow(first, second)
    assert torch.equal(first, kept[0])
    assert torch.equal(second, kept[1])


def test_a_call_waits_for_one_that_is_held_up_in_the_same_memory(filled: Filled) -> None:
    entered, go_on = threading.Event(), threading.Event()
    calls: list[str] = []

    def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        def repeat() -> None:
            if threading.current_thread().name == "slow":
                entered.set()
                assert go_on.wait(60)
            work()
            calls.append(threading.current_thread().name)

        return repeat

    model = filled("FlowNet2S", width=0.1)
    frames = {"slow": frames_of(9, 1), "quick": frames_of(10, 1)}
    program = cuda.pack(model, "fp32", capture).program((1, 64, 128))
    found: dict[str, Tensor] = {}

    def run() -> None:
        name = threading.current_thread().name
        with torch.no_grad():
            found[name] = program.flow(*frames[name])

    slow, quick = (threading.Thread(target=run, name=name) for name in ("slow", "quick"))
    slow.start()
    assert entered.wait(60)
    quick.start()
    go_on.set()
    slow.join(60)
    quick.join(60)
    assert calls == ["slow", "quick"]
    for name, pair in frames.items():
        torch.testing.assert_close(found[name], model(*pair), rtol=0, atol=1e-4)


def later(work: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Runs the work of the second stream as late as possible: when its result is asked for."""
    return work


def in_a_thread(work: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Runs the work of the second stream at the same time as the rest."""
    done: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            done.append(work())

    thread = threading.Thread(target=run)
    thread.start()

    def awaited() -> Tensor:
        thread.join(60)
        return done[0]

    return awaited


@pytest.mark.parametrize("beside", [later, in_a_thread])
def test_flownet2s_second_stream_may_run_at_any_time_and_for_several_threads(
    beside: Callable[..., Any], filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two programs of one network, each run by two threads, give the same bits as without threads and on one stream."""
    network = cuda.pack(filled("FlowNet2", width=0.1), "fp32")
    cases = [(count, frames_of(20 + seed, count)) for count in (1, 2) for seed in (0, 1)]
    expected = [network.program((count, 64, 128)).flow(*frames) for count, frames in cases]
    asked: list[object] = []
    monkeypatch.setattr(cuda, "beside", lambda *given: (asked.append(given), beside(*given))[1])
    programs = {count: network.program((count, 64, 128)) for count in (1, 2)}
    made = len(asked)
    found: dict[int, list[Tensor]] = {}

    def run(number: int) -> None:
        count, frames = cases[number]
        with torch.no_grad():
            found[number] = [programs[count].flow(*frames) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(asked) == made + 3 * len(cases)
    for number, flow in enumerate(expected):
        assert all(torch.equal(one, flow) for one in found[number])


@pytest.mark.parametrize("loud", ["flownetc.conv3", "flownets_1.deconv2", "flownets_1.predict_flow2"])
def test_fp16_near_its_end_is_said_once(loud: str, filled: Filled) -> None:
    model = filled("FlowNet2CS", width=0.1)
    frames = frames_of(11, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.pack(model, "fp16").program((1, 64, 128)).flow(*frames)
    layer = model.get_submodule(loud)
    if isinstance(layer, nn.Sequential):
        layer[0].weight *= 1e6  # type: ignore[operator]
    else:  # half of what fp16 holds, below zero
        layer.bias.fill_(torch.finfo(torch.float16).min / 2)  # type: ignore[operator, union-attr]
    network = cuda.pack(model, "fp16")
    program = network.program((1, 64, 128))
    with pytest.warns(PrecisionWarning, match="bf16"):
        program.flow(*frames)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program.flow(*frames)
        network.program((2, 64, 128)).flow(*frames_of(12, 2))
        for precision in ("fp32", "bf16"):
            cuda.pack(model, precision).program((1, 64, 128)).flow(*frames)  # type: ignore[arg-type]


def test_the_look_at_the_first_batch_leaves_its_flow_as_it_is(filled: Filled) -> None:
    model = filled("FlowNet2C", width=0.1)
    program = cuda.pack(model, "fp16").program((1, 64, 128))
    first, second = (program.flow(*frames_of(13, 1)) for _ in range(2))
    assert torch.equal(first, second)
    seen: list[Tensor] = []
    with program._works.taken() as captured_work:
        assert all(part.watch is None for part in captured_work.work.parts.values())
        captured_work.work.watched_by(seen.append)
    assert len(seen) == 24 - 4  # all layers but those that enlarge flow


def test_the_network_may_go_and_stays_as_it_was(filled: Filled) -> None:
    model = filled("FlowNet2SD", width=0.1, batch_norm=True).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    program = cuda.pack(model, "bf16").program((1, 64, 128))
    expected = program.flow(*frames_of(14, 1))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    gone = weakref.ref(model), weakref.ref(model.get_parameter("conv0.0.weight"))
    del model
    assert [one() for one in gone] == [None, None]
    assert torch.equal(program.flow(*frames_of(14, 1)), expected)


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that live at once; on the meta device they take none."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(id(storage))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        return result

    def _gone(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.now -= size


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_the_automatic_batch_counts_on_the_memory_that_a_program_takes(precision: Precision) -> None:
    shape = (2, 448, 1024)
    with torch.device("meta"):
        packed = cuda.pack(build_model("FlowNet2"), precision)
    with Held() as held:
        cuda.Work(packed, shape)()
    needed = held.most / (shape[0] * shape[1] * shape[2])
    assert 1.2 * needed < inference._BYTES_A_PIXEL[precision] < 4 * needed


@pytest.mark.parametrize("name", ["FlowNet2", "FlowNet2C"])
def test_what_is_made_in_inference_mode_serves_outside_it(name: str) -> None:
    """In fp16 the first run also looks for overflow, and so uses the buffers outside of inference mode."""
    model = build_model(name, width=0.1).eval()
    frames = frames_of(9, 1)
    expected = cuda.pack(model, "fp16").program((1, 64, 128)).flow(*frames)
    with torch.inference_mode(), plain_modes(torch.device("cpu")):
        program = cuda.pack(model, "fp16").program((1, 64, 128))
    assert torch.equal(program.flow(*frames), expected)
