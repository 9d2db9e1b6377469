"""Every check meets a world where its subject is there, is not there, and is broken."""

from __future__ import annotations

import ctypes
import json
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowreel.engine import doctor
from flowreel.engine.doctor import CHECKS, Check, Diagnosis, Finding, examine

Fake = Callable[..., types.ModuleType]


def check(name: str) -> Check:
    return next(check for check in CHECKS if check.name == name)


def found(name: str) -> Finding:
    """What a full examination would say of one check."""
    ((_, finding),) = examine([check(name)]).found
    return finding


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """``module("cupy", arange=...)`` makes ``import cupy`` find that."""

    def fake(name: str, **names: object) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return fake


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Shared libraries by name: an object of functions, or the error that loading raises. Others are not there."""
    there: dict[str, Any] = {}

    def load(name: str) -> Any:
        library = there.get(name, OSError(f"{name}: cannot open shared object file: No such file or directory"))
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    return there


def test_this_machine_can_run_on_its_cpu() -> None:
    diagnosis = examine()
    assert diagnosis.wanting("cpu") == []
    facts = diagnosis.as_json()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["cpu_ok"] is True
    for checked, finding in diagnosis.found:
        assert finding.status == "ok" or finding.advice or checked.demand == "extra", checked.name
        assert "\n" not in finding.detail + finding.advice
    assert len({checked.name for checked in CHECKS}) == len(CHECKS)


class TestExamining:
    def one(self, look: Callable[[], Finding], capsys: pytest.CaptureFixture[str]) -> Finding:
        ((_, finding),) = examine([Check("it", "cpu", "a test", look, "mend it")]).found
        assert capsys.readouterr() == ("", "")
        return finding

    @pytest.mark.parametrize(
        ("error", "status", "detail"),
        [
            (ModuleNotFoundError("No module named 'cupy'", name="cupy"), "missing", "cupy is not installed"),
            (ImportError("undefined symbol: x\nand more"), "broken", "ImportError: undefined symbol: x"),
            (ValueError(), "broken", "ValueError"),
        ],
    )
    def test_what_a_check_raises_is_its_finding(
        self, error: Exception, status: str, detail: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.one(raising(error), capsys) == Finding(status, "", detail, "mend it")  # type: ignore[arg-type]

    def test_what_a_check_prints_and_warns_of_stays_inside(self, capsys: pytest.CaptureFixture[str]) -> None:
        def loud() -> Finding:
            print("=== TROUBLESHOOTING ===")
            print("Error!", file=sys.stderr)
            warnings.warn("old", UserWarning, stacklevel=1)
            return Finding("ok", "1.0")

        assert self.one(loud, capsys) == Finding("ok", "1.0")

    def test_own_advice_wins(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.one(lambda: Finding("missing", advice="do this"), capsys).advice == "do this"

    def test_ctrl_c_gets_through(self) -> None:
        with pytest.raises(KeyboardInterrupt):
            examine([Check("it", "cpu", "a test", raising(KeyboardInterrupt()), "")])  # type: ignore[arg-type]

    def test_what_is_wanting(self) -> None:
        def of(demand: Any, status: Any) -> tuple[Check, Finding]:
            return Check(f"{demand} {status}", demand, "", lambda: Finding(status), ""), Finding(status)

        diagnosis = Diagnosis((of("cpu", "ok"), of("gpu", "missing"), of("gpu", "ok"), of("extra", "missing")))
        assert diagnosis.wanting("cpu") == []
        assert diagnosis.wanting("cpu", "gpu") == ["gpu missing"]
        facts = diagnosis.as_json()
        assert (facts["cpu_ok"], facts["gpu_ok"]) == (True, False)


class TestMachine:
    def test_old_python(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "OLDEST_PYTHON", (9, 0))
        assert found("Python").status == "broken"

    @pytest.mark.parametrize(
        ("flags", "status", "says"),
        [
            ("fpu avx512f avx512_bf16 amx_bf16", "ok", "AVX512_BF16, AMX"),
            ("fp asimd bf16", "ok", "Arm BF16"),
            ("fpu avx2", "missing", "no bf16"),
        ],
    )
    def test_bf16(self, monkeypatch: pytest.MonkeyPatch, flags: str, status: str, says: str) -> None:
        monkeypatch.setattr(doctor, "_cpu_flags", lambda: flags)
        finding = found("CPU bf16")
        assert finding.status == status
        assert says in finding.detail

    def test_folder_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert found("working folder").status == "ok"
        assert list(tmp_path.iterdir()) == []
        full = OSError(28, "No space left on device")
        monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", raising(full))
        assert "No space left" in found("working folder").detail
        assert found("working folder").status == "broken"


class TestPackages:
    @pytest.mark.parametrize(
        ("name", "package"),
        [
            ("torch", "torch"),
            ("baseline weights", "torch"),
            ("PyAV", "av"),
            ("decoders", "av"),
            ("encoders", "av"),
            ("Pillow", "PIL"),
            ("zarr", "zarr"),
            ("blosc zstd", "numcodecs"),
            ("pcodec", "pcodec"),
            ("crc32c", "google_crc32c"),
            ("torch CUDA", "torch"),
            ("CuPy", "cupy"),
            ("PyNvVideoCodec", "PyNvVideoCodec"),
        ],
    )
    def test_absent(self, name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        finding = found(name)
        assert (finding.status, finding.detail) == ("missing", f"{package} is not installed")
        assert finding.advice

    def test_a_codec_that_loses_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from numcodecs.pcodec import PCodec

        monkeypatch.setattr(PCodec, "decode", lambda self, data: bytes(8192))
        assert "does not come back" in found("pcodec").detail

    def test_a_wrong_checksum(self, module: Fake) -> None:
        module("google_crc32c", value=lambda data: 1, implementation="c")
        assert found("crc32c").status == "broken"

    @pytest.mark.parametrize(
        ("absent", "status", "says"),
        [({"h264"}, "missing", "cannot decode h264"), ({"libdav1d", "libaom-av1"}, "ok", "cannot decode av1")],
    )
    def test_decoders(self, absent: set[str], status: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_has_codec", lambda names, mode: bool(set(names) - absent))
        finding = found("decoders")
        assert finding.status == status
        assert says in finding.detail

    def test_codecs_are_really_asked_for(self) -> None:
        assert doctor._has_codec(["h264"], "r")
        assert not doctor._has_codec(["h265000"], "r")

    @pytest.mark.parametrize(
        ("there", "status", "says"),
        [({"mpeg4"}, "ok", "no H.264"), (set(), "missing", ""), ({"libx264", "mpeg4"}, "ok", "libx264")],
    )
    def test_encoders(self, there: set[str], status: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_has_codec", lambda names, mode: bool(there & set(names)))
        finding = found("encoders")
        assert finding.status == status
        assert says in finding.detail

    def test_weights_that_give_no_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from flowreel.engine.models import weights

        net = torch.nn.Module()
        net.forward = lambda first, second: torch.full((1, 2, 64, 64), torch.nan)  # type: ignore[method-assign]
        monkeypatch.setattr(weights, "instantiate", lambda held: net)
        assert "not finite" in found("baseline weights").detail

    def test_weights_that_are_damaged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from flowreel.engine.models import weights

        monkeypatch.setattr(weights, "read_weights", raising(weights.UnreadableWeightsError("cut in half")))
        finding = found("baseline weights")
        assert (finding.status, finding.detail) == ("broken", "UnreadableWeightsError: cut in half")


class Driver:
    """Stands for libcuda."""

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


class TestTorchCuda:
    def test_says_why_it_sees_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def is_available() -> bool:
            warnings.warn("The NVIDIA driver on your system is too old\nmore", stacklevel=1)
            return False

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        finding = found("torch CUDA")
        assert (finding.status, finding.version) == ("missing", "13.0")
        assert finding.detail == "torch finds no GPU: The NVIDIA driver on your system is too old"

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


class TestNvrtc:
    def through_cupy(self, module: Fake, **functions: Any) -> None:
        made: dict[str, Any] = {
            "getVersion": lambda: (13, 0),
            "createProgram": lambda source, name, headers, names: source,
            "compileProgram": lambda program, options: None,
            "getPTX": lambda program: b"// ptx",
            "destroyProgram": lambda program: None,
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

    @pytest.mark.parametrize(("compiled", "status"), [(0, "ok"), (6, "broken")])
    def test_without_cupy(
        self, libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch, compiled: int, status: str
    ) -> None:
        for name in ("cupy", "cupy.cuda"):  # the latter is found without the former once it has been imported
            monkeypatch.setitem(sys.modules, name, None)
        assert found("NVRTC").status == "missing"

        def version(major: Any, minor: Any) -> None:
            major._obj.value, minor._obj.value = 12, 9

        libraries["libnvrtc.so.12"] = types.SimpleNamespace(
            nvrtcCreateProgram=lambda *_: 0,
            nvrtcCompileProgram=lambda *_: compiled,
            nvrtcDestroyProgram=lambda *_: 0,
            nvrtcVersion=version,
        )
        finding = found("NVRTC")
        assert finding.status == status
        assert finding.version == ("12.9" if status == "ok" else "")


class TestGpuDecoding:
    def test_installed_but_it_cannot_load(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "PyNvVideoCodec.py").write_text(
            "print('Error importing')\nraise RuntimeError('Failed to load NVENC library: x\\n\\n=== STEPS ===')"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "PyNvVideoCodec", raising=False)
        finding = found("PyNvVideoCodec")
        assert finding.status == "broken"
        assert finding.detail.endswith("RuntimeError: Failed to load NVENC library: x")
        assert "NVIDIA_DRIVER_CAPABILITIES" in finding.advice

    def test_nvdec(self, libraries: dict[str, Any], module: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
        assert found("NVDEC").status == "missing"
        libraries["libnvcuvid.so.1"] = types.SimpleNamespace()
        assert found("NVDEC").detail == "the driver's libnvidia-encode.so.1 cannot be found"
        libraries["libnvidia-encode.so.1"] = types.SimpleNamespace()
        monkeypatch.setitem(sys.modules, "PyNvVideoCodec", None)
        assert found("NVDEC").status == "ok"

        def capabilities(gpuid: int, codec: str, bitdepth: int) -> dict[str, int]:
            if codec == "av1":
                raise NoGpuError("unsupported")
            return {} if codec == "vp9" else {"num_decoder_engines": 7}

        codecs = types.SimpleNamespace(H264="h264", HEVC="hevc", AV1="av1", VP9="vp9")
        module("PyNvVideoCodec", cudaVideoCodec=codecs, GetDecoderCaps=capabilities)
        assert found("NVDEC") == Finding("ok", "", "H264 8 bit, HEVC 8 bit, HEVC 10 bit")
        module("PyNvVideoCodec", cudaVideoCodec=codecs, GetDecoderCaps=raising(NoGpuError("no context")))
        finding = found("NVDEC")
        assert finding.status == "broken"
        assert "no context" in finding.detail
