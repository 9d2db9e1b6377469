"""How kernels are loaded, kept and launched."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine.compiled import padded
from flowreel.kernels import compiling, correlation_products, flow_head, launch


class NotingCupy:
    """In place of CuPy: records on which device kernels are loaded and fetched."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.device = 0
        self.contexts: set[int] = set()
        said, cupy = self.said, self

        class Device:
            def __init__(self, number: int) -> None:
                self.number = number

            def __enter__(self) -> Device:
                self.before = cupy.device
                return self.use()

            def __exit__(self, *_: object) -> None:
                Device(self.before).use()

            def use(self) -> Device:
                cupy.device = self.number
                cupy.contexts.add(self.number)
                said.append(f"device {self.number} has its context")
                return self

        class RawModule:
            def __init__(self, path: str) -> None:
                self.path = Path(path)

            def compile(self) -> None:
                if self.path.read_bytes() != b"program":
                    raise RuntimeError("CUDA_ERROR_INVALID_IMAGE")  # CuPy's CUDADriverError is one
                said.append(f"loaded on {cupy.device}")

            def get_function(self, name: str) -> str:
                said.append(f"{name} on {cupy.device}")
                return name

        nvrtc = SimpleNamespace(getSupportedArchs=lambda: [90], getVersion=lambda: (13, 0))
        self.cuda = SimpleNamespace(Device=Device, nvrtc=nvrtc)
        self.RawModule = RawModule

    def entered(self, device: torch.device) -> ExitStack:
        """``torch.cuda.device``, which creates no context where it goes back to."""
        left = ExitStack()
        left.callback(setattr, self, "device", self.device)
        self.device = device.index or 0
        return left


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> NotingCupy:
    """A fake CuPy, in a thread that has not used a GPU yet."""
    cupy = NotingCupy()
    monkeypatch.setattr(compiling, "load_cupy", lambda: cupy)
    monkeypatch.setattr(launch, "_modules", {})
    monkeypatch.setattr(launch, "_kernels", {})
    monkeypatch.setattr(compiling, "_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(compiling, "compile_source", lambda name, architecture: (b"program", ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: cupy.device)
    monkeypatch.setattr(torch.cuda, "device", cupy.entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0x5EED + device))
    return cupy


def test_a_kernel_is_loaded_and_fetched_on_its_device_in_a_thread_that_has_none(noting: NotingCupy) -> None:
    gpu = torch.device("cuda", 1)
    assert launch._module("warp", gpu) is not None
    assert noting.said == ["device 1 has its context", "loaded on 1"]  # loaded now, not at the first launch
    noting.said.clear()
    assert launch._kernel("warp", "warp_float", gpu) == "warp_float"  # type: ignore[comparison-overlap]
    assert noting.said == ["device 1 has its context", "warp_float on 1"]
    assert noting.device == 0
    assert noting.contexts == {1}
    noting.said.clear()
    launch._kernel("warp", "warp_float", torch.device("cuda", 0))
    assert [said for said in noting.said if "context" not in said] == ["loaded on 0", "warp_float on 0"]


def test_a_thread_stays_on_its_device_where_no_kernel_can_be_loaded(
    noting: NotingCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(noting, "cuda")
    with pytest.raises(AttributeError, match="cuda"):
        launch._kernel("warp", "warp_float", torch.device("cuda", 1))
    assert noting.device == 0


def test_a_program_is_kept_until_its_source_or_its_compiler_changes(
    noting: NotingCupy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled: list[str] = []

    def compile_source(name: str, architecture: str) -> tuple[bytes, str]:
        compiled.append(architecture)
        return b"program", ""

    monkeypatch.setattr(compiling, "compile_source", compile_source)

    def load() -> int:
        launch._modules.clear()
        launch._module("warp", torch.device("cuda", 0))
        return len(compiled)

    assert [load(), load()] == [1, 1]
    monkeypatch.setattr(compiling, "read_source", lambda name: "another source")
    assert [load(), load()] == [2, 2]
    noting.cuda.nvrtc.getVersion = lambda: (13, 1)
    assert [load(), load()] == [3, 3]
    monkeypatch.setattr(compiling, "OPTIONS", ("-std=c++20",))
    assert [load(), load()] == [4, 4]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert [load(), load()] == [5, 5]
    assert compiled[-1] == "compute_90"
    files = list(tmp_path.iterdir())
    assert [file.suffix for file in files] == [".bin"] * 5  # no temporary files are left
    assert all(file.read_bytes() == b"program" for file in files)


def test_a_damaged_program_is_compiled_again(
    noting: NotingCupy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = torch.device("cuda", 0)
    launch._module("warp", gpu)
    (kept,) = tmp_path.iterdir()
    for damaged in (b"", b"prog"):
        kept.write_bytes(damaged)
        launch._modules.clear()
        launch._module("warp", gpu)
        assert kept.read_bytes() == b"program"
    monkeypatch.setattr(compiling, "compile_source", lambda name, architecture: (b"what no driver loads", ""))
    kept.unlink()
    launch._modules.clear()
    with pytest.raises(RuntimeError, match="INVALID_IMAGE"):
        launch._module("warp", gpu)


@pytest.mark.parametrize("number", [0, 1])
def test_a_launch_goes_to_torchs_stream_and_its_device(noting: NotingCupy, number: int) -> None:
    started: list[tuple[object, ...]] = []

    def kernel(grid: launch.Size, block: launch.Size, passed: tuple[object, ...], *, stream: Any) -> None:
        started.append((noting.device, stream.ptr, grid, block, passed))

    gpu = torch.device("cuda", number)
    for _ in range(2):
        launch.start(kernel, gpu, (3,), (256,), (np.int32(5),))
    assert started == [(number, 0x5EED + number, (3,), (256,), (np.int32(5),))] * 2
    assert noting.said == [f"device {number} has its context"] * 2  # each time, as each call may be in a new thread
    assert noting.device == 0


def test_a_prepared_launch_changes_its_pointers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[object, ...]] = []
    monkeypatch.setattr(launch, "_kernel", lambda *_: lambda *given: started.append(given))
    first, second = torch.zeros(4), torch.zeros(4)
    prepared = launch.Prepared("warp", "warp_float", (2, 3), (first, np.int32(7), None, second), block=(32,))
    prepared(16, 32)
    prepared(48, 64)
    assert started == [((2, 3), (32,), (16, np.int32(7), 0, 32)), ((2, 3), (32,), (48, np.int32(7), 0, 64))]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        prepared(16)


@pytest.mark.parametrize(("capability", "tensor_cores"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_older_gpus_do_without_the_tensor_core_kernels(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], tensor_cores: bool
) -> None:
    """The other kernels run there; cuDNN and kernels without tensor cores replace the missing ones."""
    device, loaded = torch.device("cuda", 0), set()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(launch, "cupy_is_there", lambda: True)
    monkeypatch.setattr(launch, "_module", lambda name, _: loaded.add(name))
    launch.on_tensor_cores.cache_clear()
    try:
        launch.prepare(device)
        assert padded._runs_ours(device) == tensor_cores
    finally:
        launch.on_tensor_cores.cache_clear()
    assert {"warp", "correlation", "bias_leaky_relu"} <= loaded
    assert ({"convolution", "correlation_products", "flow_head"} <= loaded) == tensor_cores
    assert len(loaded) == len(list(compiling.SOURCES.glob("*.cu"))) - (0 if tensor_cores else 3)
    monkeypatch.setattr(launch, "cupy_is_there", lambda: False)
    assert launch.kernels_on(device) == "torch"


def test_the_device_tells_how_many_multiprocessors_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=10 * device.index)
    )
    launch.multiprocessors.cache_clear()
    try:
        assert [launch.multiprocessors(torch.device("cuda", index)) for index in (3, 4)] == [30, 40]
    finally:
        launch.multiprocessors.cache_clear()
    assert launch.multiprocessors(torch.device("cpu")) == 132


def test_maps_on_such_a_gpu_take_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 16, 4, 4, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    assert flow_head._fits(x)
    assert correlation_products.fits(x, 10)
    for module in (flow_head, correlation_products):
        monkeypatch.setattr(module, "on_tensor_cores", lambda device: False)
    assert not flow_head._fits(x)
    assert not correlation_products.fits(x, 10)
