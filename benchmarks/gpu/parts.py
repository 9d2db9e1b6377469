"""The parts, in the order in which they run: checks, then times, then the profile."""

from __future__ import annotations

from dataclasses import dataclass

HERE = "benchmarks.gpu"


@dataclass(frozen=True)
class Part:
    """One function that takes ``Findings`` and ``Settings``."""

    name: str
    module: str
    function: str
    limit_s: float  # after which it is stopped; what it had found by then is kept
    what: str


PARTS = (
    Part("machine", f"{HERE}.machine", "describe", 40, "card, driver, versions; whether our kernels compile there"),
    Part("tests", f"{HERE}.tests", "run", 120, "every test that takes a GPU, with pytest"),
    Part("kernels", f"{HERE}.kernels", "check", 30, "each kernel against its definition in float64, at 1024x448"),
    Part("precision", f"{HERE}.network", "check", 70, "every precision against the plain module in float32, in pixels"),
    Part("nvdec", f"{HERE}.video", "nvdec", 40, "frames and flow by NVDEC against those by PyAV"),
    Part(
        "memory", f"{HERE}.video", "memory", 50, "memory of host and card over more than 1000 frames: it must not grow"
    ),
    Part("memcheck", f"{HERE}.sanitizer", "memcheck", 60, "every kernel under compute-sanitizer's memcheck"),
    Part("racecheck", f"{HERE}.sanitizer", "racecheck", 60, "every kernel under its racecheck"),
    Part("model times", f"{HERE}.network", "times", 90, "pairs a second by network, precision, size and batch"),
    Part("end to end", f"{HERE}.video", "end_to_end", 75, "video file to store, beside the network alone"),
    Part("kernel times", f"{HERE}.kernels", "times", 40, "each kernel beside plain torch, and flownet2-pytorch's own"),
    Part("profile", f"{HERE}.network", "profile", 30, "which kernels the time goes into, and what bounds the run"),
)
