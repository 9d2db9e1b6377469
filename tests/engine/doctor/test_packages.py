"""Checks of the packages that every run needs, when they are missing or broken."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch

from flowreel.engine.doctor import packages
from tests.engine.doctor.looking import found, raising

Fake = Callable[..., types.ModuleType]


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
        ("zstandard", "zstandard"),
        ("crc32c", "google_crc32c"),
        ("torch CUDA", "torch"),
        ("CuPy", "cupy"),
        ("PyNvVideoCodec", "PyNvVideoCodec"),
    ],
)
def test_absent(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    finding = found(name)
    assert (finding.status, finding.detail) == ("missing", f"{package} is not installed")
    assert finding.advice


@pytest.mark.parametrize(
    ("name", "part", "instead", "says"),
    [
        ("torch", "torch.nn.functional.conv2d", lambda *_: torch.zeros(1), "a convolution is wrong"),
        ("zarr", "zarr.Array.__getitem__", lambda *_: 0, "does not keep its values"),
        ("blosc zstd", "numcodecs.blosc.Blosc.decode", lambda *_: bytes(8192), "does not come back"),
        ("pcodec", "numcodecs.pcodec.PCodec.decode", lambda *_: bytes(8192), "does not come back"),
        (
            "zstandard",
            "zstandard.ZstdDecompressor",
            lambda: types.SimpleNamespace(decompress=bytes),
            "does not come back",
        ),
        ("Pillow", "PIL.Image.Image.getpixel", lambda *_: (0, 0, 0), "does not come back"),
    ],
)
def test_what_gives_something_else(
    name: str, part: str, instead: Callable[..., object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(name).status == "ok"
    monkeypatch.setattr(part, instead)
    finding = found(name)
    assert finding.status == "broken"
    assert says in finding.detail


def test_checksums(module: Fake) -> None:
    module("google_crc32c", value=lambda data: 1, implementation="c")
    assert found("crc32c").status == "broken"
    module("google_crc32c", value=lambda data: 0xE3069283, implementation="python")
    assert (found("crc32c").status, found("crc32c").detail) == ("ok", "in plain Python: slow")


@pytest.mark.parametrize(
    ("absent", "status", "says"),
    [
        ({"h264"}, "missing", "hevc, av1, vp9, mpeg4; cannot decode h264"),
        ({"libdav1d", "libaom-av1"}, "ok", "h264, hevc, vp9, mpeg4; cannot decode av1"),
    ],
)
def test_decoders(absent: set[str], status: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_has_codec", lambda names, mode: bool(set(names) - absent))
    finding = found("decoders")
    assert (finding.status, finding.detail) == (status, says)


def test_codecs_are_really_asked_for() -> None:
    assert packages._has_codec(["h265000", "h264"], "r")
    assert not packages._has_codec(["h265000"], "r")


@pytest.mark.parametrize(
    ("there", "status", "says"),
    [
        ({"mpeg4"}, "ok", "mpeg4; no H.264: colour videos become MPEG-4"),
        (set(), "missing", ""),
        ({"libx264", "mpeg4"}, "ok", "libx264, mpeg4"),
    ],
)
def test_encoders(there: set[str], status: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_has_codec", lambda names, mode: bool(there & set(names)))
    finding = found("encoders")
    assert (finding.status, finding.detail) == (status, says)


def test_weights_that_give_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowreel.engine.models import weights

    net = torch.nn.Module()
    net.forward = lambda first, second: torch.full((1, 2, 64, 64), torch.nan)  # type: ignore[method-assign]
    monkeypatch.setattr(weights, "instantiate", lambda held: net)
    assert "not finite" in found("baseline weights").detail


def test_weights_that_are_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowreel.engine.models import weights

    monkeypatch.setattr(weights, "read_weights", raising(weights.UnreadableWeightsError("cut in half")))
    finding = found("baseline weights")
    assert (finding.status, finding.detail) == ("broken", "UnreadableWeightsError: cut in half")
