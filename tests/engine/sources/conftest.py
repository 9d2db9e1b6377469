"""PyNvVideoCodec's stand-in, and every video test's two decoders."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from flowreel.engine.sources import nvdec, nvsession, video
from tests.fakes.pynvvideocodec import fake_module

STREAM = 0x5EED  # handle of the decoder's stream


@pytest.fixture
def nvc(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stand-in for PyNvVideoCodec, with streams that only write down what is asked of them in ``behaviour.log``."""
    module = fake_module()

    class Stream:
        handle = STREAM

        def __init__(self, device: torch.device) -> None:
            self.device = device

        def run(self, work: Callable[[], Tensor]) -> Tensor:
            return work()

        def finish(self) -> None:
            module.behaviour.log.append("finished")

    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", module)
    monkeypatch.setattr(nvdec, "WorkStream", Stream)
    monkeypatch.setattr(nvsession, "free_bytes", lambda device: 80 << 30)
    return module


@pytest.fixture(params=["PyAV", "NVDEC"])
def each_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every video source that a test opens is decoded by this one, and by nobody instead of it; gives its name."""
    if request.param == "NVDEC":
        request.getfixturevalue("nvc")
        no_one = None
        monkeypatch.setattr(video, "PyAVDecoder", lambda probe: nvdec.NvdecDecoder(probe, "cuda:0", no_one, print))
    name: str = request.param
    return name
