"""Checks of what a run on a GPU needs, with fakes that work, are missing or are broken. They need no GPU."""

from __future__ import annotations

import enum
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowreel.engine.doctor import Finding, gpu
from flowreel.engine.errors import DeviceError, MissingDependencyError
from flowreel.kernels import compiling
from flowreel.sinks import video_writer
from tests.engine.doctor.looking import found, raising

Fake = Callable[..., types.ModuleType]


class Driver:
    """Stands for libcuda, the driver's library."""

    def __init__(self, init: int = 0, cuda: int = 13010, gpus: int = 2) -> None:
        self.cuInit = lambda flags: init
        self.cuDriverGetVersion = lambda into: self._set(into, cuda)
        self.cuDeviceGetCount = lambda into: self._set(into, gpus)

    def _set(self, into: Any, value: int) -> int:
        into._obj.value = value
        return 0


class TestDriver:
    @pytest.mark.parametrize(
        ("library", "status", "says"),
        [
            (Driver(), "ok", "2 GPUs"),
            (Driver(init=100), "missing", "sees no GPU"),
            (Driver(init=999), "broken", "error 999"),
            (OSError("libcuda.so.1: invalid ELF header"), "broken", "ELF"),
            (OSError("libnvrm.so: cannot open shared object file: No such file or directory"), "broken", "libnvrm"),
        ],
    )
    def test_driver(self, libraries: dict[str, Any], library: object, status: str, says: str) -> None:
        assert found("NVIDIA driver").status == "missing"
        libraries["libcuda.so.1"] = library
        finding = found("NVIDIA driver")
        assert finding.status == status
        assert says in finding.detail
        assert finding.version == ("CUDA 13.1" if status == "ok" else "")

    def test_names_its_kernel_module(self, libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        libraries["libcuda.so.1"] = Driver()
        said = (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12"
        )
        monkeypatch.setattr(Path, "read_text", lambda path: said)
        assert found("NVIDIA driver").detail == "2 GPUs, driver 535.104.05"


class TestTorchCuda:
    def test_built_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        says = "this torch is built without CUDA"
        assert found("torch CUDA") == Finding("missing", torch.__version__, says, gpu.TORCH)

    def test_says_why_it_sees_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def is_available() -> bool:
            warnings.warn("The NVIDIA driver on your system is too old\nmore", stacklevel=1)
            return False

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        finding = found("torch CUDA")
        assert (finding.status, finding.version) == ("missing", "13.0")
        assert finding.detail == "torch finds no GPU: The NVIDIA driver on your system is too old"

    @pytest.mark.parametrize(
        ("driver", "says"),
        [
            (Driver(cuda=12090), "update NVIDIA's driver, or install"),
            (Driver(cuda=13000), "--gpus"),
            (OSError("libcuda.so.1: invalid ELF header"), "--gpus"),
        ],
    )
    def test_a_driver_that_is_older_than_torch(
        self, libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch, driver: object, says: str
    ) -> None:
        libraries["libcuda.so.1"] = driver
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert says in found("torch CUDA").advice

    def test_names_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        about = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150e9)
        ones = torch.ones
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)
        monkeypatch.setattr(torch, "ones", lambda *size, device=None: ones(*size))
        finding = found("torch CUDA")
        assert finding.status == "ok"
        assert finding.detail == "cuda:0 NVIDIA H200, compute capability 9.0, 150 GB"
        monkeypatch.setattr(torch, "ones", lambda *size, device=None: 2 * ones(*size))
        assert "a sum on the GPU is wrong" in found("torch CUDA").detail


class NoGpuError(Exception):
    pass


class TestCupy:
    def fake(self, module: Fake, count: Callable[[], int], total: float) -> None:
        runtime = types.SimpleNamespace(getDeviceCount=count, CUDARuntimeError=NoGpuError)
        zeros = types.SimpleNamespace(sum=lambda: total)
        cuda = module("cupy.cuda", runtime=runtime)
        module("cupy", cuda=cuda, __version__="14.0.1", arange=lambda stop: zeros)

    def test_cupy(self, module: Fake) -> None:
        self.fake(module, lambda: 1, 6)
        assert found("CuPy") == Finding("ok", "14.0.1", "1 GPU")
        self.fake(module, lambda: 1, 5)
        assert found("CuPy").status == "broken"
        self.fake(module, raising(NoGpuError("no CUDA-capable device")), 6)
        finding = found("CuPy")
        assert (finding.status, finding.version) == ("missing", "14.0.1")
        assert "no CUDA-capable device" in finding.detail
        assert "driver" in finding.advice

    def test_installed_twice(self, module: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fake(module, lambda: 1, 6)
        monkeypatch.setattr(gpu, "_installed", lambda name: "14" if name in ("cupy-cuda12x", "cupy-cuda13x") else "")
        finding = found("CuPy")
        assert finding.status == "broken"
        assert finding.detail.startswith("cupy-cuda13x and cupy-cuda12x are one package")
        assert finding.advice.startswith("pip uninstall cupy-cuda13x cupy-cuda12x, then pip install")

    @pytest.mark.parametrize(
        ("installed", "newest", "says"),
        [
            ("cupy-cuda13x", 12090, "flowreel[cuda12]"),
            ("cupy-cuda13x", 13000, "--gpus"),
            ("cupy-cuda12x", 12090, "--gpus"),
        ],
    )
    def test_a_driver_that_is_older(
        self,
        module: Fake,
        libraries: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        installed: str,
        newest: int,
        says: str,
    ) -> None:
        libraries["libcuda.so.1"] = Driver(cuda=newest)
        monkeypatch.setattr(gpu, "_installed", lambda name: "14" if name == installed else "")
        self.fake(module, raising(NoGpuError("cudaErrorInsufficientDriver")), 6)
        assert says in found("CuPy").advice


class TestNvrtc:
    def through_cupy(self, module: Fake, **functions: Any) -> None:
        made: dict[str, Any] = {
            "getVersion": lambda: (13, 0),
            "createProgram": lambda source, name, headers, names: source,
            "compileProgram": lambda program, options: None,
            "getPTX": lambda program: b"// ptx",
        }
        module("cupy").__path__ = []
        module("cupy.cuda", nvrtc=types.SimpleNamespace(**(made | functions)))

    def test_through_cupy(self, module: Fake) -> None:
        self.through_cupy(module)
        assert found("NVRTC") == Finding("ok", "13.0", "compiled a kernel through CuPy")
        self.through_cupy(module, getVersion=raising(RuntimeError("no libnvrtc")))
        assert found("NVRTC").status == "missing"
        self.through_cupy(module, compileProgram=raising(ValueError("NVRTC_ERROR_COMPILATION")))
        assert found("NVRTC").status == "broken"
        self.through_cupy(module, getPTX=lambda program: b"")
        assert "compiles to nothing" in found("NVRTC").detail

    def test_without_cupy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("cupy", "cupy.cuda"):  # another test may have imported them
            monkeypatch.setitem(sys.modules, name, None)
        finding = found("NVRTC")
        assert (finding.status, finding.advice) == ("missing", "mend that first")


class TestKernels:
    def test_compile_here(self) -> None:
        """With the NVRTC and the headers that the extra for tests installs."""
        finding = found("CUDA kernels")
        assert finding.status == "ok"
        assert finding.detail.startswith("compiled")

    @pytest.mark.parametrize(
        ("error", "status"),
        [(MissingDependencyError("no headers"), "missing"), (DeviceError("does not compile\nlog"), "broken")],
    )
    def test_what_does_not_compile(self, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str) -> None:
        monkeypatch.setattr(compiling, "compile_source", raising(error))
        finding = found("CUDA kernels")
        assert finding.status == status
        assert finding.detail.endswith(str(error).splitlines()[0])
        assert "flowreel[cuda]" in finding.advice

    @pytest.mark.parametrize(
        ("wrong", "capability", "status", "says"),
        [
            (None, (9, 0), "ok", "on its tensor cores too"),
            (None, (7, 5), "ok", "without tensor-core kernels: its compute capability is 7.5, they need 8.0"),
            (torch.float32, (9, 0), "broken", "a kernel computes something else"),
            (torch.float16, (9, 0), "broken", "a tensor-core kernel computes something else"),
            (torch.float16, (7, 5), "ok", "they need 8.0"),  # that kernel is not run
        ],
    )
    def test_run_on_a_gpu(
        self,
        monkeypatch: pytest.MonkeyPatch,
        wrong: torch.dtype | None,
        capability: tuple[int, int],
        status: str,
        says: str,
    ) -> None:
        """A fake GPU, on which maps of type ``wrong`` arrive changed, so that a kernel computes something else."""
        to = torch.Tensor.to

        def moved(x: torch.Tensor, *to_what: Any, **how: Any) -> torch.Tensor:
            on_gpu = to_what == ("cuda",) and x.ndim == 4
            return 1.5 * x if on_gpu and x.dtype == wrong else x if to_what == ("cuda",) else to(x, *to_what, **how)

        monkeypatch.setattr(compiling, "compile_source", lambda *_: (b"", ""))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.Tensor, "to", moved)
        finding = found("CUDA kernels")
        assert finding.status == status
        assert finding.detail.endswith(says)


LIBRARIES = {"libnvcuvid": "libnvcuvid.so.1", "libnvidia-encode": "libnvidia-encode.so.1"}


class TestVideoLibraries:
    @pytest.mark.parametrize("name", LIBRARIES)
    def test_each(self, name: str, libraries: dict[str, Any]) -> None:
        finding = found(name)
        assert (finding.status, finding.detail) == ("missing", f"the driver's {LIBRARIES[name]} cannot be found")
        libraries[LIBRARIES[name]] = types.SimpleNamespace()
        assert found(name) == Finding("ok", "", f"{LIBRARIES[name]} loads")
        libraries[LIBRARIES[name]] = OSError(f"{LIBRARIES[name]}: file too short")
        assert found(name).status == "broken"

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            (None, "in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"),
            ("compute,utility", "NVIDIA_DRIVER_CAPABILITIES is compute,utility: start the container with"),
            ("all", "else install all of NVIDIA's driver"),
            ("compute,video", "else install all of NVIDIA's driver"),
        ],
    )
    def test_what_a_container_was_given(
        self, libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch, given: str | None, says: str
    ) -> None:
        if given is None:
            monkeypatch.delenv("NVIDIA_DRIVER_CAPABILITIES", raising=False)
        else:
            monkeypatch.setenv("NVIDIA_DRIVER_CAPABILITIES", given)
        assert says in found("libnvcuvid").advice


class TestPyNvVideoCodec:
    def test_installed_but_it_cannot_load(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "PyNvVideoCodec.py").write_text(
            "print('Error importing')\nraise RuntimeError('Failed to load NVENC library: x\\n\\n=== STEPS ===')"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "PyNvVideoCodec", raising=False)
        finding = found("PyNvVideoCodec")
        assert finding.status == "broken"
        assert finding.detail == "PyNvVideoCodec is installed, but cannot load: Failed to load NVENC library: x"
        assert "NVIDIA_DRIVER_CAPABILITIES" in finding.advice

    def test_what_it_needs_is_absent(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "PyNvVideoCodec.py").write_text("import package_of_its_own")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "PyNvVideoCodec", raising=False)
        assert found("PyNvVideoCodec") == Finding("missing", "", "package_of_its_own is not installed", gpu.GPU_EXTRA)

    @pytest.mark.parametrize(("version", "status"), [("2.2.4", "ok"), ("2.0.3", "broken")])
    def test_versions(self, module: Fake, version: str, status: str) -> None:
        module("PyNvVideoCodec", __version__=version)
        finding = found("PyNvVideoCodec")
        assert finding.status == status
        assert ("2.2.4 is needed" in finding.detail) == (status == "broken")
        assert ("--upgrade" in finding.advice) == (status == "broken")


class TestNvdec:
    def fake(self, module: Fake, **functions: Any) -> None:
        codecs = enum.Enum("cudaVideoCodec", "H264 HEVC AV1 VP9")
        chroma = enum.Enum("cudaVideoChromaFormat", "420")
        module("PyNvVideoCodec", __version__="2.2.4", cudaVideoCodec=codecs, cudaVideoChromaFormat=chroma, **functions)

    def test_what_it_decodes(self, module: Fake) -> None:
        def capabilities(gpuid: int, codec: enum.Enum, chromaformat: enum.Enum, bitdepth: int) -> dict[str, int]:
            if codec.name == "AV1":
                raise NoGpuError("unsupported")
            return {"supported": int(codec.name != "VP9"), "num_decoder_engines": 7}

        self.fake(module, GetDecoderCaps=capabilities)
        says = "7 engines: H264 8 bit, HEVC 8 bit, HEVC 10 bit; not AV1 8 bit, AV1 10 bit, VP9 8 bit"
        assert found("NVDEC") == Finding("ok", "", says)
        self.fake(module, GetDecoderCaps=lambda **_: {"supported": 1, "num_decoder_engines": 1})
        assert found("NVDEC").detail.endswith("AV1 10 bit, VP9 8 bit")

    def test_what_decodes_nothing(self, module: Fake) -> None:
        self.fake(module, GetDecoderCaps=lambda **_: {"supported": 0, "num_decoder_engines": 0})
        finding = found("NVDEC")
        assert (finding.status, finding.detail) == ("broken", "the GPU decodes no video at all: it has no NVDEC")
        assert "--decoder pyav" in finding.advice

    def test_what_cannot_be_asked(self, module: Fake) -> None:
        self.fake(module, GetDecoderCaps=raising(RuntimeError("libnvcuvid.so.1: cannot open\nmore")))
        finding = found("NVDEC")
        says = "the GPU cannot be asked what it decodes: libnvcuvid.so.1: cannot open"
        assert (finding.status, finding.detail) == ("broken", says)

    def test_nobody_to_ask(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "PyNvVideoCodec", None)
        finding = found("NVDEC")
        assert (finding.status, finding.advice) == ("missing", "mend that first")


class TestNvenc:
    def test_says_why_not_in_ffmpegs_words(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("a GPU may have one")
        finding = found("NVENC")
        assert finding.status == "missing"
        assert "libcuda" in finding.detail
        assert "encoded on the CPU" in finding.advice

    def test_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(video_writer, "NVENC", "mpeg4")  # any encoder will do
        assert found("NVENC") == Finding("ok", detail="H.264")


def test_a_gpu_on_which_our_kernels_run(gpu: torch.device) -> None:
    needed = ("NVIDIA driver", "torch CUDA", "CuPy", "NVRTC", "CUDA kernels")
    assert [finding for name in needed if (finding := found(name)).status != "ok"] == []
