"""The fake PyNvVideoCodec, and a fixture that runs a test with each of the two video decoders."""

from __future__ import annotations

from types import ModuleType

import pytest

from flowreel.engine.sources import nvdec, video
from tests.fakes.pynvvideocodec import installed


@pytest.fixture
def nvc(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The fake PyNvVideoCodec. Its streams only record what is asked of them, in ``behaviour.log``."""
    return installed(monkeypatch)


@pytest.fixture(params=["PyAV", "NVDEC"])
def each_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every video source of the test is decoded by this decoder, never by the other one. Gives its name."""
    if request.param == "NVDEC":
        request.getfixturevalue("nvc")
        no_one = None
        monkeypatch.setattr(video, "PyAVDecoder", lambda probe, **_: nvdec.NvdecDecoder(probe, "cuda:0", no_one, print))
    name: str = request.param
    return name
