"""Pinned buffers: none is filled again while somebody holds its contents, and no more are allocated than needed."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowreel.engine import pinned
from flowreel.engine.pinned import PinnedRing, pin
from flowreel.sinks.shared_memory import SharedMemory, SharedView

HOLDS: dict[str, Callable[[torch.Tensor], object]] = {
    "itself": lambda tensor: tensor,
    "a view": lambda tensor: tensor[1, 0, 2:],
    "an array": lambda tensor: tensor.numpy()[0],
    "a view of an array's tensor": lambda tensor: torch.from_numpy(tensor.numpy()[:1])[0],
}


@pytest.fixture
def ring() -> PinnedRing:
    """A ring of ordinary memory, since none can be pinned without a GPU."""
    return PinnedRing(lambda size: torch.empty(size, dtype=torch.uint8))


@pytest.mark.parametrize("how", HOLDS)
def test_nothing_is_filled_again_while_it_is_held(ring: PinnedRing, how: str) -> None:
    like = torch.zeros(2, 2, 4, 6)
    held = HOLDS[how](ring.take(like).fill_(7))
    for _ in range(3):
        ring.take(like).fill_(8)
    assert ring.buffers == 2
    assert np.all(np.asarray(held) == 7)
    del held
    taken = [ring.take(like) for _ in range(2)]
    assert ring.buffers == len(taken) == 2


def test_short_batches_and_small_ones_find_room(ring: PinnedRing) -> None:
    full, short, small = torch.zeros(4, 2, 8, 8), torch.zeros(1, 2, 8, 8), torch.zeros(4, 2, 2, 2)
    for _ in range(3):
        little, large = ring.take(small), ring.take(full)
        assert (large.shape, little.shape) == (full.shape, small.shape)
        del large, little
    assert ring.take(short).shape == short.shape
    assert ring.buffers == 2


@pytest.mark.parametrize(
    "like",
    [
        torch.zeros(3, 5, dtype=torch.float16),
        torch.zeros(4, 6, 3, dtype=torch.uint8).permute(2, 0, 1),
        torch.zeros(4, 6, 3, dtype=torch.uint8)[:, ::2].permute(2, 0, 1),
        torch.zeros(3, 1, 5, 1, dtype=torch.bfloat16),
        torch.zeros(2, 3, 4, 6).to(memory_format=torch.channels_last),
    ],
)
def test_type_and_order_of_dimensions_are_kept(ring: PinnedRing, like: torch.Tensor) -> None:
    taken, packed = ring.take(like), torch.empty_like(like)
    assert (taken.dtype, taken.shape, taken.stride()) == (packed.dtype, packed.shape, packed.stride())


class Runtime:
    """Stands for CuPy's runtime, of which two functions are used."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, *, refuses: bool) -> None:
        self.pinned: dict[int, int] = {}
        self._refuses = refuses

    def hostRegister(self, address: int, nbytes: int, flags: int) -> None:
        if self._refuses:
            raise self.CUDARuntimeError("cudaErrorMemoryAllocation")
        assert flags == 0
        self.pinned[address] = nbytes

    def hostUnregister(self, address: int) -> None:
        if address not in self.pinned:
            raise self.CUDARuntimeError("cudaErrorHostMemoryNotRegistered")
        del self.pinned[address]


@pytest.mark.parametrize("refuses", [False, True])
def test_memory_is_pinned_where_it_is_as_far_as_that_goes(refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, entered = Runtime(refuses=refuses), []
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(pinned, "kernels_on", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(entered.append(device)))
    memory, device = np.zeros(4096, np.uint8), torch.device("cuda", 1)
    undo, kept = pin(memory, device), weakref.ref(memory)
    assert runtime.pinned == ({} if refuses else {memory.ctypes.data: 4096})
    del memory
    assert (kept() is None) == refuses
    undo()
    assert runtime.pinned == {}
    undo()  # the driver's error is ignored: it may be gone at exit
    assert set(entered) == {device}


def test_a_torch_that_has_no_gpu_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("it has one")
    runtime = Runtime(refuses=False)
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(pinned, "kernels_on", lambda device: "cuda")
    undo = pin(np.zeros(4096, np.uint8), torch.device("cuda", 0))
    assert runtime.pinned == {}
    undo()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has memory without a name")
def test_a_card_writes_to_memory_that_processes_share(gpu: torch.device) -> None:
    if pinned.kernels_on(gpu) != "cuda":
        pytest.skip("no CuPy")
    memory, size = SharedMemory(), (1 << 24) + 77
    memory.reserve(2 * size)  # done in the background meanwhile
    memory.take(size)
    buffer = memory.take(size)
    place = torch.from_numpy(buffer.bytes)
    assert not place.is_pinned()
    undo = pin(buffer.bytes, gpu)
    assert place.is_pinned()
    seen = SharedView(memory.descriptor).at(buffer.place, size)  # a second mapping, as in another process
    for _ in range(2):
        values = torch.randint(0, 256, (size,), dtype=torch.uint8, device=gpu)
        place.copy_(values, non_blocking=True)
        torch.cuda.current_stream(gpu).synchronize()
        assert np.array_equal(seen, values.cpu().numpy())
    undo()
    assert not place.is_pinned()
    memory.close()


def test_without_cupy_nothing_is_pinned() -> None:
    pin(np.zeros(4096, np.uint8), torch.device("cpu"))()


@pytest.mark.parametrize("shape", [(), (3, 5), (0, 2)])
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64],
)
def test_numbers_of_each_type_are_kept(ring: PinnedRing, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given = (torch.arange(torch.Size(shape).numel()) - 7).to(dtype).view(shape)
    taken = ring.take(given).copy_(given)
    assert (taken.dtype, taken.shape) == (dtype, given.shape)
    assert torch.equal(taken, given)


def test_gaps_are_not_kept(ring: PinnedRing) -> None:
    taken = ring.take(torch.zeros(2, 2, 8, 8)[..., 1:5, 2:6])
    assert (taken.shape, taken.is_contiguous()) == ((2, 2, 4, 4), True)
