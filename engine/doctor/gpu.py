"""What else a run on a GPU needs: the driver and its video libraries, torch for CUDA, CuPy, NVRTC, PyNvVideoCodec."""

from __future__ import annotations

import ctypes
import os
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flowreel.engine.doctor.checking import Finding, expect, kind_and_line
from flowreel.engine.errors import DeviceError, MissingDependencyError, counted
from flowreel.engine.sources import nvcodec

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
SMALL_KERNEL = 'extern "C" __global__ void add_one(float* values) { values[threadIdx.x] += 1.0f; }'
CUPYS = ("cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy")  # distributions of the same package
NVDEC_CODECS = (("H264", 8), ("HEVC", 8), ("HEVC", 10), ("AV1", 8), ("AV1", 10), ("VP9", 8))  # name, bits

GPU_EXTRA = nvcodec.INSTALL
DRIVER = "install NVIDIA's driver; in a container, pass the GPU in (docker run --gpus all)"
TORCH = "install torch for CUDA: pytorch.org/get-started/locally"
VIDEO_DRIVER = (
    "in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video; else install all of NVIDIA's driver, the "
    "libraries for decoding and encoding too"
)


def driver() -> Finding:
    cuda = _library("libcuda.so.1")
    if cuda is None:
        return Finding("missing", detail="no NVIDIA driver library (libcuda) can be found")
    code = cuda.cuInit(0)
    if code == NO_DEVICE:
        return Finding("missing", detail="the NVIDIA driver is installed, but sees no GPU")
    expect(code == 0, f"the NVIDIA driver does not start: cuInit gives error {code}")
    newest, count = ctypes.c_int(), ctypes.c_int()
    expect(cuda.cuDriverGetVersion(ctypes.byref(newest)) == 0, "cuDriverGetVersion fails")
    expect(cuda.cuDeviceGetCount(ctypes.byref(count)) == 0, "cuDeviceGetCount fails")
    gpus = counted(count.value, "GPU")
    return Finding("ok", f"CUDA {newest.value // 1000}.{newest.value % 1000 // 10}", f"{gpus}, {_kernel_module()}")


def _driver_is_older_than(major: int) -> bool:
    """Whether a driver is there but too old for CUDA ``major``. It runs all minor versions of its own major one."""
    newest = ctypes.c_int()
    try:
        cuda = _library("libcuda.so.1")
    except OSError:  # the driver has a check of its own
        return False
    return cuda is not None and cuda.cuDriverGetVersion(ctypes.byref(newest)) == 0 and newest.value // 1000 < major


def _kernel_module() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return "driver version unknown"
    numbers = [word for word in words if word.replace(".", "").isdigit()]
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
        too_new = _driver_is_older_than(int(torch.version.cuda.split(".")[0]))
        advice = f"update NVIDIA's driver, or {TORCH}, for the CUDA that the driver runs"
        return Finding("missing", torch.version.cuda, f"torch finds no GPU{why}", advice if too_new else DRIVER)
    expect(torch.ones(4, device="cuda").sum().item() == 4, "a sum on the GPU is wrong")
    devices = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        memory = f"{about.total_memory / 1e9:.0f} GB"
        devices.append(f"cuda:{number} {about.name}, compute capability {about.major}.{about.minor}, {memory}")
    return Finding("ok", torch.version.cuda, "; ".join(devices))


def cupy() -> Finding:
    import cupy

    there = [name for name in CUPYS if _installed(name)]
    if len(there) > 1:
        advice = f"pip uninstall {' '.join(there)}, then {GPU_EXTRA}"
        return Finding("broken", cupy.__version__, f"{' and '.join(there)} are one package, installed twice", advice)
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        why = f"installed, but it finds no GPU: {kind_and_line(error)}"
        too_new = there == ["cupy-cuda13x"] and _driver_is_older_than(13)
        advice = "pip uninstall cupy-cuda13x, then pip install 'flowreel[cuda12]': the driver is of CUDA 12"
        return Finding("missing", cupy.__version__, why, advice if too_new else DRIVER)
    expect(int(cupy.arange(4).sum()) == 6, "a sum on the GPU is wrong")
    return Finding("ok", cupy.__version__, counted(count, "GPU"))


def nvrtc() -> Finding:
    """Compiles a kernel through CuPy, as flowreel's are. That needs no GPU."""
    try:
        from cupy.cuda import nvrtc as compiler
    except Exception:  # it has a check of its own
        return Finding("missing", detail="CuPy, to compile by, does not load", advice="mend that first")
    try:
        found = ".".join(map(str, compiler.getVersion()))
    except Exception as error:  # CuPy looks for the library only now
        return Finding("missing", detail=f"CuPy finds no NVRTC: {kind_and_line(error)}")
    program = compiler.createProgram(SMALL_KERNEL, "add_one.cu", [], [])
    compiler.compileProgram(program, ("--gpu-architecture=compute_75",))
    expect(compiler.getPTX(program), "a kernel compiles to nothing")
    return Finding("ok", found, "compiled a kernel through CuPy")


def kernels() -> Finding:
    """Compiles a kernel of flowreel's with CUDA's headers; with a GPU, runs it, and a tensor-core kernel if it can."""
    import torch

    from flowreel.kernels import channel_norm
    from flowreel.kernels.compiling import compile_source
    from flowreel.kernels.flow_head import flow_head, pack_flow_head
    from flowreel.kernels.launch import TENSOR_CORES_SINCE

    try:
        compile_source("channel_norm", "compute_80")
    except MissingDependencyError as error:
        return Finding("missing", detail=kind_and_line(error))
    if not torch.cuda.is_available():
        return Finding("ok", detail="compiled; there is no GPU to run them on")
    x = torch.arange(24.0).view(1, 2, 3, 4)
    expect(torch.allclose(channel_norm(x.to("cuda")).cpu(), channel_norm(x)), "a kernel computes something else")
    capability = torch.cuda.get_device_capability()
    if capability < TENSOR_CORES_SINCE:
        has, needed = (".".join(map(str, numbers)) for numbers in (capability, TENSOR_CORES_SINCE))
        without = f"without tensor-core kernels: its compute capability is {has}, they need {needed}"
        return Finding("ok", detail=f"compiled, and run on the GPU, {without}")
    half = (torch.arange(960.0) % 7 - 3).view(1, 5, 6, 32).half().permute(0, 3, 1, 2)  # channels last
    given = half, pack_flow_head((torch.arange(576.0) % 5 - 2).view(2, 32, 3, 3), torch.float16), torch.ones(2)
    flow = flow_head(*(tensor.to("cuda") for tensor in given)).cpu()
    expect(torch.equal(flow, flow_head(*given)), "a tensor-core kernel computes something else")
    return Finding("ok", detail="compiled, and run on the GPU, on its tensor cores too")


def video_library(name: str) -> Finding:
    """One of the driver's libraries."""
    if _library(name) is not None:
        return Finding("ok", detail=f"{name} loads")
    given = os.environ.get("NVIDIA_DRIVER_CAPABILITIES")  # in a container: the parts of the driver that are passed in
    left_out = given is not None and not {"all", "video"} & set(given.split(","))
    advice = f"NVIDIA_DRIVER_CAPABILITIES is {given}: start the container with compute,utility,video"
    return Finding(
        "missing", detail=f"the driver's {name} cannot be found", advice=advice if left_out else VIDEO_DRIVER
    )


def pynvvideocodec() -> Finding:
    try:
        codec = nvcodec.load()
    except MissingDependencyError as error:
        found, cause = _installed("PyNvVideoCodec"), error.__cause__
        if isinstance(cause, ModuleNotFoundError):  # it, or a package that it needs
            raise cause from None
        if cause is None:
            return Finding("broken", found, str(error), "pip install --upgrade PyNvVideoCodec")
        return Finding("broken", found, str(error), VIDEO_DRIVER)  # it does not load without these libraries
    return Finding("ok", codec.__version__)


def nvdec() -> Finding:
    """What the first GPU decodes, queried as a run does."""
    try:
        codec = nvcodec.load()
    except MissingDependencyError:  # it has a check of its own
        return Finding("missing", detail="PyNvVideoCodec, to ask the GPU by, does not load", advice="mend that first")
    engines = 0
    found: list[str] = []
    lacking: list[str] = []
    unasked: list[str] = []  # why a codec could not be queried
    for name, bits in NVDEC_CODECS:
        try:
            caps = nvcodec.decodes(codec, 0, getattr(codec.cudaVideoCodec, name), "420", bits)
        except DeviceError as error:
            unasked.append(str(error))
            caps = {}
        count = caps.get("num_decoder_engines", 0) if caps.get("supported") else 0
        (found if count else lacking).append(f"{name} {bits} bit")
        engines = max(engines, count)
    if not found and unasked:
        return Finding("broken", detail=f"the GPU cannot be asked what it decodes: {unasked[0]}")
    if not found:
        return Finding("broken", detail="the GPU decodes no video at all: it has no NVDEC")
    without = f"; not {', '.join(lacking)}" if lacking else ""
    return Finding("ok", detail=f"{counted(engines, 'engine')}: {', '.join(found)}{without}")


def nvenc() -> Finding:
    """Whether the first GPU encodes colour video, tested as a run does. NVIDIA's data-centre cards do not."""
    from flowreel.sinks import why_no_nvenc

    why = why_no_nvenc(0, 1080, 1920)
    return Finding("ok", detail="H.264") if why is None else Finding("missing", detail=why)


def _library(name: str) -> Any:
    """The library, or None if there is none. Raises OSError if it exists but does not load."""
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        if name in str(error) and "no such file" in str(error).lower():  # else another one, that it needs, is absent
            return None
        raise


def _installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
