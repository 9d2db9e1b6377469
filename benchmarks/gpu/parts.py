"""The parts, in the order in which they run: checks, then times, then the profile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One function that takes ``Findings`` and ``Settings``."""

    name: str
    module: str
    function: str
    limit_s: float  # after which it is stopped; what it had found by then is kept
    what: str


PARTS = (
    Part(
        "machine",
        "benchmarks.gpu.machine",
        "describe",
        30,
        "which card, driver and versions, and whether our kernels compile there",
    ),
    Part("tests", "benchmarks.gpu.tests", "run", 120, "every test that takes a GPU, with pytest"),
    Part(
        "kernels",
        "benchmarks.gpu.kernels",
        "check",
        30,
        "each kernel against its definition in float64, at the sizes of 1024x448",
    ),
    Part(
        "precision",
        "benchmarks.gpu.network",
        "check",
        50,
        "every precision against the plain module in float32, in pixels",
    ),
    Part("nvdec", "benchmarks.gpu.video", "nvdec", 40, "frames and flow by NVDEC against those by PyAV"),
    Part(
        "memory",
        "benchmarks.gpu.video",
        "memory",
        50,
        "memory of host and card over more than 1000 frames: it must not grow",
    ),
    Part("memcheck", "benchmarks.gpu.sanitizer", "memcheck", 60, "every kernel under compute-sanitizer's memcheck"),
    Part("racecheck", "benchmarks.gpu.sanitizer", "racecheck", 60, "every kernel under its racecheck"),
    Part(
        "model times",
        "benchmarks.gpu.network",
        "times",
        90,
        "pairs a second of each network, precision, size and batch",
    ),
    Part("end to end", "benchmarks.gpu.video", "end_to_end", 75, "video file to store, beside the network alone"),
    Part(
        "kernel times",
        "benchmarks.gpu.kernels",
        "times",
        40,
        "each kernel beside plain torch, and flownet2-pytorch's own",
    ),
    Part(
        "profile", "benchmarks.gpu.network", "profile", 30, "which kernels the time goes into, and what bounds the run"
    ),
)
