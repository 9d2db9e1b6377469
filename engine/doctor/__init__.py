"""What flowreel depends on, checked piece by piece: is it installed, does it work, and how to fix what does not.

One check = one small function and one line in ``CHECKS``. A check returns a Finding, and an exception becomes one, so
that a broken package never keeps the others from being checked. Nothing heavy is imported before its own check.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowreel.engine.doctor import gpu, machine, packages
from flowreel.engine.doctor.checking import Check, Diagnosis, Finding, look_at

__all__ = ["CHECKS", "Check", "Diagnosis", "Finding", "examine"]

REINSTALL = "pip install --force-reinstall "
WHEELS = f"{REINSTALL}av (its wheels bring FFmpeg with these)"

CHECKS = (
    Check("Python", "cpu", "everything", machine.python, "use Python 3.11 or newer"),
    Check("processor", "cpu", "everything", machine.processor, ""),
    Check("working folder", "cpu", "outputs", machine.working_folder, "work where you may write, with space left"),
    Check("torch", "cpu", "the networks", packages.torch, REINSTALL + "torch"),
    Check("baseline weights", "cpu", "runs without --weights", packages.baseline, REINSTALL + "flowreel"),
    Check("PyAV", "cpu", "videos", packages.pyav, REINSTALL + "av"),
    Check("decoders", "cpu", "videos", packages.decoders, WHEELS),
    Check("encoders", "cpu", "colour videos", packages.encoders, WHEELS),
    Check("Pillow", "cpu", "image folders", packages.pillow, REINSTALL + "pillow"),
    Check("zarr", "cpu", "flow stores", packages.zarr, REINSTALL + "'zarr>=3.1'"),
    Check("blosc zstd", "cpu", "flow stores", packages.blosc, REINSTALL + "'numcodecs>=0.16.1'"),
    Check("pcodec", "cpu", "--codec pcodec", packages.pcodec, REINSTALL + "pcodec 'numcodecs>=0.16.1'"),
    Check("zstandard", "cpu", "flow stores", packages.zstandard, REINSTALL + "zstandard"),
    Check("crc32c", "cpu", "flow stores", packages.crc32c, REINSTALL + "google-crc32c"),
    Check("CPU bf16", "extra", "a fast --precision bf16", machine.bf16, "nothing to do: stay with fp32 here"),
    Check("NVIDIA driver", "gpu", "--device cuda", gpu.driver, gpu.DRIVER),
    Check("torch CUDA", "gpu", "--device cuda", gpu.torch_cuda, gpu.TORCH),
    Check("CuPy", "gpu", "our CUDA kernels", gpu.cupy, gpu.GPU_EXTRA),
    Check("NVRTC", "gpu", "our CUDA kernels", gpu.nvrtc, gpu.GPU_EXTRA),
    Check("CUDA kernels", "gpu", "--device cuda at full speed", gpu.kernels, gpu.GPU_EXTRA),
    Check("libnvcuvid", "gpu", "--decoder nvdec", partial(gpu.video_library, "libnvcuvid.so.1"), gpu.VIDEO_DRIVER),
    Check(
        "libnvidia-encode",
        "gpu",
        "PyNvVideoCodec, to load",
        partial(gpu.video_library, "libnvidia-encode.so.1"),
        gpu.VIDEO_DRIVER,
    ),
    Check("PyNvVideoCodec", "gpu", "--decoder nvdec", gpu.pynvvideocodec, gpu.GPU_EXTRA),
    Check("NVDEC", "gpu", "--decoder nvdec", gpu.nvdec, "let it decode on the CPU: --decoder pyav"),
    Check("NVENC", "extra", "--encoder nvenc", gpu.nvenc, "nothing to do: colour video is encoded on the CPU then"),
)


def examine(checks: Sequence[Check] | None = None) -> Diagnosis:
    """Runs the checks, all of them by default. An exception in one becomes its finding."""
    return Diagnosis(tuple((check, look_at(check)) for check in (CHECKS if checks is None else checks)))
