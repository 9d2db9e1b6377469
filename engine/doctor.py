"""What flowreel stands on, looked at piece by piece: is it there, does it work, and how to mend what does not.

One check = one small function and one line in ``CHECKS``. A check returns a Finding; whatever it raises becomes one,
so that a broken package never stops the others from being looked at. Nothing heavy is imported before its own check.
"""

from __future__ import annotations

import ctypes
import io
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from flowreel.engine.data import JSON

Status = Literal["ok", "missing", "broken"]
Demand = Literal["cpu", "gpu", "extra"]  # any run needs it; a run on a GPU does; it only makes something better

OLDEST_PYTHON = (3, 11)
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
KERNEL = b'extern "C" __global__ void add_one(float* values) { values[threadIdx.x] += 1.0f; }'
# Codec -> FFmpeg's decoders that do it on a CPU; the one it calls av1 needs a GPU.
DECODERS = {"h264": ["h264"], "hevc": ["hevc"], "av1": ["libdav1d", "libaom-av1"], "vp9": ["vp9"], "mpeg4": ["mpeg4"]}
H264_ENCODERS = ("libx264", "libopenh264")
VIDEO_LIBRARIES = ("libnvcuvid.so.1", "libnvidia-encode.so.1")  # PyNvVideoCodec wants the encoder's even to decode
NVDEC_CODECS = (("H264", 8), ("HEVC", 8), ("HEVC", 10), ("AV1", 8), ("VP9", 8))  # name, bits

REINSTALL = "pip install --force-reinstall "
WHEELS = f"{REINSTALL}av (its wheels bring FFmpeg with these)"
GPU_EXTRA = "pip install 'flowreel[cuda]' (flowreel[cuda12] for a driver of CUDA 12)"
DRIVER = "install NVIDIA's driver; in a container, pass the GPU in (docker run --gpus all)"
VIDEO_DRIVER = "in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video; else install NVIDIA's driver"


@dataclass(frozen=True)
class Finding:
    """What one check found out."""

    status: Status
    version: str = ""
    detail: str = ""  # one line
    advice: str = ""  # one line on how to mend it; empty: the check's own, unless all is well


@dataclass(frozen=True)
class Check:
    """One thing to look at."""

    name: str
    demand: Demand
    needed_for: str
    look: Callable[[], Finding]
    advice: str


@dataclass(frozen=True)
class Diagnosis:
    """All that was found, in the order of the checks."""

    found: tuple[tuple[Check, Finding], ...]

    def wanting(self, *demands: Demand) -> list[str]:
        """Names of the checks with one of these demands that are not ok."""
        return [check.name for check, finding in self.found if check.demand in demands and finding.status != "ok"]

    def as_json(self) -> dict[str, JSON]:
        return {
            "cpu_ok": not self.wanting("cpu"),
            "gpu_ok": not self.wanting("cpu", "gpu"),
            "checks": [
                {
                    "name": check.name,
                    "demand": check.demand,
                    "needed_for": check.needed_for,
                    "status": finding.status,
                    "version": finding.version or None,
                    "detail": finding.detail or None,
                    "advice": finding.advice or None,
                }
                for check, finding in self.found
            ],
        }


def examine(checks: Sequence[Check] | None = None) -> Diagnosis:
    """Makes every check; none can fail but by saying so."""
    return Diagnosis(tuple((check, _look(check)) for check in (CHECKS if checks is None else checks)))


def _look(check: Check) -> Finding:
    try:
        # Some packages print pages about what they miss; stdout belongs to the answer.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            finding = check.look()
    except ModuleNotFoundError as error:
        finding = Finding("missing", detail=f"{error.name or error} is not installed")
    except Exception as error:
        finding = Finding("broken", detail=_first_line(error))
    if finding.status == "ok" or finding.advice:
        return finding
    return Finding(finding.status, finding.version, finding.detail, check.advice)


def _first_line(error: BaseException) -> str:
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _expect(right: object, what: str) -> None:
    if not right:
        raise RuntimeError(what)


# -- The machine -------------------------------------------------------------------------------------------------


def python() -> Finding:
    found, where = platform.python_version(), f"{platform.system()} {platform.machine()}"
    return Finding("ok" if sys.version_info >= OLDEST_PYTHON else "broken", found, where)


def processor() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return Finding("ok", detail=f"{cores} cores" + (f", {memory / 1e9:.1f} GB of memory" if memory else ""))


def bf16() -> Finding:
    """Whether this processor multiplies bfloat16 numbers itself, as the kernel tells."""
    flags = set(_cpu_flags().split())
    names = {"avx512_bf16": "AVX512_BF16", "amx_bf16": "AMX", "bf16": "Arm BF16"}
    found = [name for flag, name in names.items() if flag in flags]
    return Finding("ok", detail=", ".join(found)) if found else Finding("missing", detail="no bf16 instructions found")


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")


def working_folder() -> Finding:
    with tempfile.NamedTemporaryFile(dir=".", prefix=".flowreel-doctor-") as file:
        file.write(b"written")
        file.flush()
    return Finding("ok", detail=f"{Path.cwd()}, {shutil.disk_usage('.').free / 1e9:.1f} GB free")


# -- Packages that every run needs -------------------------------------------------------------------------------


def torch() -> Finding:
    import torch

    _expect(torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)) == 9, "a convolution is wrong")
    built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    onednn = "" if torch.backends.mkldnn.is_available() else ", without oneDNN: slow on a CPU"  # type: ignore[no-untyped-call]
    return Finding("ok", torch.__version__, f"{built}, {torch.get_num_threads()} threads{onednn}")


def pyav() -> Finding:
    import av

    library = ".".join(map(str, av.library_versions["libavcodec"]))
    return Finding("ok", av.__version__, f"FFmpeg {getattr(av, 'ffmpeg_version_info', '?')}, libavcodec {library}")


def decoders() -> Finding:
    absent = [codec for codec, names in DECODERS.items() if not _has_codec(names, "r")]
    there = ", ".join(codec for codec in DECODERS if codec not in absent)
    lacking = f"; cannot decode {', '.join(absent)}" if absent else ""
    return Finding("missing" if "h264" in absent else "ok", detail=there + lacking)


def encoders() -> Finding:
    found = [name for name in (*H264_ENCODERS, "mpeg4") if _has_codec((name,), "w")]
    only = "; no H.264: colour videos become MPEG-4" if found == ["mpeg4"] else ""
    return Finding("ok" if found else "missing", detail=", ".join(found) + only)


def _has_codec(names: Sequence[str], mode: Literal["r", "w"]) -> bool:
    import av

    for name in names:
        try:
            av.Codec(name, mode)
        except ValueError:
            continue
        return True
    return False


def zarr() -> Finding:
    import numpy as np
    import zarr
    from zarr.storage import MemoryStore

    array = zarr.create_array(MemoryStore(), shape=(4, 4), chunks=(1, 4), shards=(2, 4), dtype="int16", zarr_format=3)
    array[:] = np.arange(16).reshape(4, 4)
    _expect(array[3, 3] == 15, "an array in memory does not keep its values")
    return Finding("ok", zarr.__version__)


def blosc() -> Finding:
    import numcodecs
    from numcodecs.blosc import Blosc

    _round_trip(Blosc("zstd", shuffle=Blosc.BITSHUFFLE))
    return Finding("ok", numcodecs.__version__)


def pcodec() -> Finding:
    import pcodec  # noqa: F401 (numcodecs would hide which of the two is absent)
    from numcodecs.pcodec import PCodec

    _round_trip(PCodec())
    return Finding("ok", version("pcodec"))


def crc32c() -> Finding:
    import google_crc32c

    _expect(google_crc32c.value(b"123456789") == 0xE3069283, "a checksum is wrong")
    slow = "" if google_crc32c.implementation == "c" else "in plain Python: slow"
    return Finding("ok", version("google-crc32c"), slow)


def _round_trip(codec: Any) -> None:
    import numpy as np

    values = (np.arange(4096) % 97).astype(np.int16)
    back = np.frombuffer(codec.decode(codec.encode(values)), np.int16)
    _expect(np.array_equal(back, values), "what was compressed does not come back")


def pillow() -> Finding:
    import PIL
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (2, 2), (1, 2, 3)).save(picture, "png")
    _expect(Image.open(picture).getpixel((1, 1)) == (1, 2, 3), "a PNG does not come back")
    return Finding("ok", PIL.__version__)


def baseline() -> Finding:
    """Loads the shipped weights and computes the flow of one 64x64 pair."""
    import torch

    from flowreel.engine.models.weights import instantiate, read_weights

    weights = read_weights("baseline")
    with torch.no_grad():
        frames = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
        flow = instantiate(weights).eval()(*frames)
    _expect(flow.isfinite().all(), "the flow of a small pair is not finite")
    about = f"{weights.model}, width {weights.width:g}, sha256 {weights.sha256}"
    return Finding("ok", f"version {weights.made_by.get('version', '?')}", about)


# -- What a GPU run needs beside ---------------------------------------------------------------------------------


def driver() -> Finding:
    cuda = _library("libcuda.so.1")
    if cuda is None:
        return Finding("missing", detail="no NVIDIA driver library (libcuda) can be found")
    code = cuda.cuInit(0)
    if code == NO_DEVICE:
        return Finding("missing", detail="the NVIDIA driver is installed, but sees no GPU")
    _expect(code == 0, f"the NVIDIA driver does not start: cuInit gives error {code}")
    newest, count = ctypes.c_int(), ctypes.c_int()
    _expect(cuda.cuDriverGetVersion(ctypes.byref(newest)) == 0, "cuDriverGetVersion fails")
    _expect(cuda.cuDeviceGetCount(ctypes.byref(count)) == 0, "cuDeviceGetCount fails")
    gpus = "1 GPU" if count.value == 1 else f"{count.value} GPUs"
    return Finding("ok", f"CUDA {newest.value // 1000}.{newest.value % 1000 // 10}", f"{gpus}, {_kernel_module()}")


def _kernel_module() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return "driver version unknown"
    numbers = [word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()]
    return f"driver {numbers[0]}" if numbers else "driver version unknown"


def torch_cuda() -> Finding:
    import torch

    if torch.version.cuda is None:
        return Finding("missing", torch.__version__, "this torch is built without CUDA")
    with warnings.catch_warnings(record=True) as said:  # torch says in a warning why it sees no GPU
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if not there:
        why = f": {str(said[0].message).splitlines()[0]}" if said else ""
        return Finding("missing", torch.version.cuda, f"torch finds no GPU{why}", DRIVER)
    _expect(torch.ones(4, device="cuda").sum().item() == 4, "a sum on the GPU is wrong")
    devices = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        memory = f"{about.total_memory / 1e9:.0f} GB"
        devices.append(f"cuda:{number} {about.name}, compute capability {about.major}.{about.minor}, {memory}")
    return Finding("ok", torch.version.cuda, "; ".join(devices))


def cupy() -> Finding:
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        why = f"installed, but it finds no GPU: {_first_line(error)}"
        return Finding("missing", cupy.__version__, why, DRIVER)
    _expect(int(cupy.arange(4).sum()) == 6, "a sum on the GPU is wrong")
    return Finding("ok", cupy.__version__, f"{count} GPU{'' if count == 1 else 's'}")


def nvrtc() -> Finding:
    """Compiles a kernel, which needs no GPU: by way of CuPy, as the kernels are, or of the library alone."""
    try:
        from cupy.cuda import nvrtc as compiler
    except Exception:  # CuPy has a check of its own
        return _bare_nvrtc()
    try:
        found = ".".join(map(str, compiler.getVersion()))
    except Exception as error:  # CuPy looks for the library now
        return Finding("missing", detail=f"CuPy finds no NVRTC: {_first_line(error)}")
    program = compiler.createProgram(KERNEL.decode(), "add_one.cu", [], [])
    compiler.compileProgram(program, ("--gpu-architecture=compute_75",))
    _expect(compiler.getPTX(program), "a kernel compiles to nothing")
    compiler.destroyProgram(program)
    return Finding("ok", found, "compiled a kernel through CuPy")


def _bare_nvrtc() -> Finding:
    library = _library("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
    if library is None:
        return Finding("missing", detail="neither CuPy nor NVRTC's library (libnvrtc) can be found")
    program, option = ctypes.c_void_p(), (ctypes.c_char_p * 1)(b"--gpu-architecture=compute_75")
    made = library.nvrtcCreateProgram(ctypes.byref(program), KERNEL, b"add_one.cu", 0, None, None)
    _expect(made == 0, f"nvrtcCreateProgram gives error {made}")
    compiled = library.nvrtcCompileProgram(program, 1, option)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    _expect(compiled == 0, f"nvrtcCompileProgram gives error {compiled}")
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return Finding("ok", f"{major.value}.{minor.value}", "compiled a kernel without CuPy")


def pynvvideocodec() -> Finding:
    try:
        import PyNvVideoCodec
    except ModuleNotFoundError:
        raise
    except (ImportError, OSError, RuntimeError) as error:  # without the driver's libraries it is a RuntimeError
        why = f"installed, but cannot load: {_first_line(error)}"
        return Finding("broken", _installed("PyNvVideoCodec"), why, VIDEO_DRIVER)
    return Finding("ok", PyNvVideoCodec.__version__)


def nvdec() -> Finding:
    """The driver's own video libraries, and what the GPU decodes where PyNvVideoCodec is there to ask."""
    absent = [name for name in VIDEO_LIBRARIES if _library(name) is None]
    if absent:
        return Finding("missing", detail=f"the driver's {' and '.join(absent)} cannot be found")
    try:
        import PyNvVideoCodec as codec
    except Exception:  # it has a check of its own
        return Finding("ok", detail="the driver's video libraries load; what the GPU decodes is not known")
    found, said = [], ""
    for name, bits in NVDEC_CODECS:
        try:
            engines = codec.GetDecoderCaps(gpuid=0, codec=getattr(codec.cudaVideoCodec, name), bitdepth=bits)
        except Exception as error:  # of kinds of its own, and for a codec the GPU does not have
            said = said or _first_line(error)
            continue
        if engines.get("num_decoder_engines"):
            found.append(f"{name} {bits} bit")
    _expect(found, f"the GPU decodes none of what was asked for: {said or 'no engines'}")
    return Finding("ok", detail=", ".join(found))


def _library(*names: str) -> Any:
    """The first of these libraries that is there; None when none is. One that is there but does not load raises."""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            if not _is_absent(error, name):
                raise
    return None


def _is_absent(error: OSError, name: str) -> bool:
    """Not so when it is a library it needs that cannot be found."""
    return name in str(error) and "no such file" in str(error).lower()


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


CHECKS = (
    Check("Python", "cpu", "everything", python, "use Python 3.11 or newer"),
    Check("processor", "cpu", "everything", processor, ""),
    Check("working folder", "cpu", "outputs", working_folder, "work in a folder where you may write, with space left"),
    Check("torch", "cpu", "the networks", torch, REINSTALL + "torch"),
    Check("baseline weights", "cpu", "runs without --weights", baseline, REINSTALL + "flowreel"),
    Check("PyAV", "cpu", "videos", pyav, REINSTALL + "av"),
    Check("decoders", "cpu", "videos", decoders, WHEELS),
    Check("encoders", "cpu", "colour videos", encoders, WHEELS),
    Check("Pillow", "cpu", "image folders", pillow, REINSTALL + "pillow"),
    Check("zarr", "cpu", "flow stores", zarr, REINSTALL + "'zarr>=3.1'"),
    Check("blosc zstd", "cpu", "flow stores", blosc, REINSTALL + "'numcodecs>=0.16.1'"),
    Check("pcodec", "cpu", "--codec pcodec", pcodec, REINSTALL + "pcodec 'numcodecs>=0.16.1'"),
    Check("crc32c", "cpu", "flow stores", crc32c, REINSTALL + "google-crc32c"),
    Check("CPU bf16", "extra", "a fast --precision bf16", bf16, "nothing to do: stay with fp32 on this processor"),
    Check("NVIDIA driver", "gpu", "--device cuda", driver, DRIVER),
    Check("torch CUDA", "gpu", "--device cuda", torch_cuda, "install torch for CUDA: pytorch.org/get-started/locally"),
    Check("CuPy", "gpu", "--device cuda", cupy, GPU_EXTRA),
    Check("NVRTC", "gpu", "--device cuda", nvrtc, GPU_EXTRA),
    Check("PyNvVideoCodec", "gpu", "--decoder nvdec", pynvvideocodec, GPU_EXTRA),
    Check("NVDEC", "gpu", "--decoder nvdec", nvdec, VIDEO_DRIVER),
)
