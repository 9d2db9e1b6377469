"""The parts in the order they run: checks, then timings, then the two slowest checks, which can wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HERE = "benchmarks.gpu"
BLAMED = {"CUDA_LAUNCH_BLOCKING": "1"}  # an error surfaces at the launch that caused it, not at a later one
ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # pytest without plug-ins that happen to be installed


@dataclass(frozen=True)
class Part:
    """One function that takes ``Findings`` and ``Settings``, run in its own process."""

    name: str
    module: str
    function: str
    limit_s: float  # then it is stopped; its findings until then are kept
    what: str
    times: bool = False  # it makes rows and no checks, so being stopped is no failure
    least_s: float = 10.0  # with less time left it is not started: it would be stopped before its first result
    env: Mapping[str, str] = field(default_factory=dict)


PARTS = (
    Part("machine", f"{HERE}.machine", "describe", 120, "GPU, driver, versions; whether our kernels load", least_s=0),
    Part("kernels", f"{HERE}.kernels", "check", 60, "each kernel against its definition in float64", env=BLAMED),
    # Without BLAMED: waiting for each of 250,000 small operations took longer than a slow machine has time for.
    Part("tests kernels", f"{HERE}.tests", "kernels", 75, "the tests of the kernels that take a GPU", env=ALONE),
    Part("precision", f"{HERE}.precision", "check", 120, "every precision against the plain module in float32, in px"),
    Part("tests engine", f"{HERE}.tests", "engine", 90, "the tests of the engine that take a GPU", env=ALONE),
    Part("tests others", f"{HERE}.tests", "others", 45, "all other tests that take one", env=ALONE),
    Part("store", f"{HERE}.store", "check", 60, "what a store holds against what the network gives"),
    Part("nvdec", f"{HERE}.nvdec", "check", 60, "frames and flow by NVDEC against those by PyAV, of several codecs"),
    Part("memory", f"{HERE}.memory", "check", 75, "memory over a long video must not grow; and too little of it"),
    Part("training", f"{HERE}.training", "check", 60, "scenes, loss and gradients against a CPU's; whether it learns"),
    Part("memcheck", f"{HERE}.sanitizer", "memcheck", 90, "every kernel under compute-sanitizer's memcheck"),
    Part("model times", f"{HERE}.network", "times", 150, "pairs a second by network, precision, size and batch", True),
    Part("end to end", f"{HERE}.end_to_end", "run", 170, "file to stores, to video; both ends alone", True, least_s=40),
    Part("run profile", f"{HERE}.run_profile", "run", 80, "what bounds a whole run: its ends and threads", True),
    Part("kernel times", f"{HERE}.kernel_times", "run", 75, "each kernel beside torch's and flownet2-pytorch's", True),
    Part("peers", f"{HERE}.peers", "run", 45, "torchvision's RAFT-small beside FlowNet2C", True),
    Part("profile", f"{HERE}.profile", "run", 60, "which kernels the time goes into, and what bounds the run", True),
    Part("training times", f"{HERE}.training_times", "run", 90, "scenes painted, steps with them", True, least_s=25),
    Part("tests graphs", f"{HERE}.tests", "graphs", 120, "each kernel captured and compiled", least_s=45, env=ALONE),
    Part("racecheck", f"{HERE}.sanitizer", "racecheck", 90, "every kernel under the same tool's racecheck", least_s=15),
)
