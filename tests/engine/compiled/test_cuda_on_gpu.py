"""The form for GPUs on a real GPU: cuDNN, captured graphs, streams and threads, compared with the float32 module."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import flowreel
from flowreel.engine.compiled import cuda
from flowreel.engine.config import Precision
from flowreel.engine.models import MODELS
from flowreel.kernels.launch import kernels_on

Filled = Callable[..., nn.Module]
SHAPE = (2, 128, 192)
# Largest mean error, relative to the flow. TF32 and fp16 keep 10 bits. With random weights, errors grow through three
# networks; float32 has some too, since sums are taken in another order.
APART: dict[Precision, float] = {"fp32": 2e-4, "tf32": 0.01, "fp16": 0.01, "bf16": 0.05}


def frames_of(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    batch, height, width = SHAPE
    coarse = torch.rand(2 * batch, 3, 3, 4, generator=torch.Generator().manual_seed(seed)) * 255
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).to(device)
    return fine[:batch], fine[batch:]


def apart(flow: Tensor, expected: Tensor) -> float:
    return float((flow - expected).norm(dim=1).mean() / expected.norm(dim=1).mean())


def exact(model: nn.Module, frames: tuple[Tensor, Tensor]) -> Tensor:
    """The module itself on the device, in float32 throughout."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        flow: Tensor = model(*frames)
    return flow


@pytest.mark.parametrize(
    ("name", "precision"),
    [*(("FlowNet2", precision) for precision in APART), *((name, "fp16") for name in MODELS if name != "FlowNet2")],
)
def test_networks_and_precisions_through_their_graphs(
    name: str, precision: Precision, filled: Filled, gpu: torch.device
) -> None:
    model = filled(name, width=0.25).to(gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a graph that cannot be captured
        fast = flowreel.compile(model, SHAPE, precision)
        for seed in (1, 2):
            frames = frames_of(seed, gpu)
            flow = fast(*frames)
            assert (flow.dtype, flow.device) == (torch.float32, gpu)
            assert apart(flow, exact(model, frames)) < APART[precision]
            assert torch.equal(fast(*frames), flow)  # the same bits every time
        if name != "FlowNet2":
            assert fast.quarter(*frames).shape == (2, 2, 32, 48)


@pytest.mark.parametrize("precision", APART)
def test_a_network_of_the_users_own_runs_as_it_is(precision: Precision, filled: Filled, gpu: torch.device) -> None:
    """By deterministic algorithms, in TF32 only if asked. The caller keeps its own settings, which change nothing."""
    model, ran = filled("FlowNet2CS", width=0.25).to(gpu), []
    model.register_forward_hook(lambda *_: ran.append(precision))
    fast, frames, cudnn = flowreel.compile(model, SHAPE, precision), frames_of(1, gpu), torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        flow = fast(*frames)
        assert torch.equal(fast(*frames), flow)
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (True, False, True)
    assert ran == [precision] * 2
    assert (flow.dtype, flow.device) == (torch.float32, gpu)
    assert apart(flow, exact(model, frames)) < APART[precision]


def test_a_graph_is_what_runs(filled: Filled, gpu: torch.device) -> None:
    program = cuda.pack(filled("FlowNet2S", width=0.1).to(gpu), "fp16").program(SHAPE)
    with program._works.taken() as captured_work:
        repeat = captured_work._repeat
        assert isinstance(getattr(repeat, "__self__", None), torch.cuda.CUDAGraph)


@pytest.mark.parametrize("name", ["FlowNet2CS", "FlowNet2"])  # the second uses two streams
def test_streams_and_threads_at_once(name: str, filled: Filled, gpu: torch.device) -> None:
    fast = flowreel.compile(filled(name, width=0.25).to(gpu), SHAPE, "fp16")
    inputs = [frames_of(seed, gpu) for seed in range(4)]
    expected = [fast(*frames) for frames in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(number: int) -> None:
        stream = torch.cuda.Stream(gpu)
        with torch.cuda.stream(stream):
            found = [fast(*inputs[number]) for _ in range(20)]
        stream.synchronize()
        wrong.extend(number for flow in found if not torch.equal(flow, expected[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_programs_made_and_run_in_several_threads(filled: Filled, gpu: torch.device) -> None:
    """Programs of one FlowNet2: each thread captures its own, on two streams, while others capture or run theirs."""
    network = cuda.pack(filled("FlowNet2", width=0.25).to(gpu), "fp16")
    frames = frames_of(1, gpu)
    inputs = [tuple(x[:count] for x in frames) for count in (1, 2)] * 2
    with torch.no_grad():
        expected = [network.program((len(first), *SHAPE[1:])).flow(first, second) for first, second in inputs]
    torch.cuda.synchronize()
    right: list[int] = []

    def work(number: int) -> None:
        first, second = inputs[number]
        with warnings.catch_warnings(), torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(gpu)):
            warnings.simplefilter("error")  # a graph that cannot be captured
            program = network.program((len(first), *SHAPE[1:]))
            found = [program.flow(first, second) for _ in range(20)]
            torch.cuda.current_stream(gpu).synchronize()
        right.extend(number for flow in found if torch.equal(flow, expected[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(right) == sorted([*range(len(inputs))] * 20)


def test_memory_comes_back_when_a_program_goes(filled: Filled, gpu: torch.device) -> None:
    net = cuda.pack(filled("FlowNet2", width=0.25).to(gpu), "fp16")
    frames = frames_of(1, gpu)

    def used() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(gpu)

    found = []
    with torch.no_grad():
        for _ in range(4):
            program = net.program(SHAPE)
            program.flow(*frames)
            del program
            found.append(used())
    assert found[1] == found[3]


def test_our_kernels_run(gpu: torch.device) -> None:
    assert kernels_on(gpu) == "cuda"
