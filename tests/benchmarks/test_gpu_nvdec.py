"""The part ``nvdec`` of ``python -m benchmarks gpu`` with a fake PyNvVideoCodec: what passes, fails or is skipped."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import made_clips, nvdec
from benchmarks.gpu.findings import Settings
from benchmarks.gpu.made_clips import Encoding
from benchmarks.measure import Skipped
from flowreel.engine.sources import nvsession
from flowreel.engine.sources.nvdec import NvdecDecoder
from flowreel.engine.sources.video import VideoSource
from tests.fakes.gpu_parts import Found
from tests.fakes.pynvvideocodec import installed

KINDS = {kind.name: kind for kind in nvdec.KINDS}


@pytest.fixture
def nvc(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return installed(monkeypatch)


@pytest.fixture
def on_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings as on a GPU, but without comparing flow, which needs a real GPU."""
    monkeypatch.setattr(nvdec, "_compare_flow", lambda *_: None)
    return Settings("cuda", False, str(tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["H.264, B-frames and open GOPs", "H.264 in a transport stream", "HEVC 10 bits", "HEVC 4:4:4", "AV1 10 bits"],
)
def test_frames_that_are_the_same_pass_wherever_they_begin(
    name: str, nvc: ModuleType, findings: Found, on_card: Settings
) -> None:
    nvdec._compare_kind(findings, on_card, KINDS[name])
    assert set(findings.verdicts.values()) == {True}
    starts = [check.rpartition("frame ")[2] for check in findings.verdicts if "from frame" in check]
    assert starts == ["10 on", "22 on", "24 on", "25 on", "34 on"]  # 12 and 24 are key frames
    assert nvc.behaviour.sessions  # the fake really was used


@pytest.mark.parametrize("noticed", [True, False])
def test_frames_without_time_stamps_must_not_be_lost(
    noticed: bool, nvc: ModuleType, findings: Found, on_card: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not noticed:  # as though the real package had another sign for a missing time stamp
        monkeypatch.setattr(nvsession, "NO_STAMP", None)
    nvdec._read_unstamped(findings, on_card)
    (check,) = findings["checks"]
    assert check["passed"] is noticed
    assert check["decoder"] == f"NVDEC (mpeg2video){', then PyAV (mpeg2video)' if noticed else ''}"


@pytest.mark.parametrize("fault", [{"packets": 20}, {"fail_at": 20}])
def test_a_damaged_file_that_the_cpu_reads_on_passes(
    fault: dict[str, Any], nvc: ModuleType, findings: Found, on_card: Settings
) -> None:
    """Whether the demuxer takes the damage for the end of the file, or the hardware decoder fails."""
    vars(nvc.behaviour).update(fault)
    nvdec._read_damaged(findings, on_card)
    assert list(findings.verdicts.values()) == [True] * 3
    assert findings["checks"][0]["decoder"] == "NVDEC (h264), then PyAV (h264)"


def test_damage_that_spoils_what_is_before_it_or_is_not_told_fails(
    nvc: ModuleType, findings: Found, on_card: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = made_clips.written_clip(on_card.folder, 330, 190, 36)
    nvc.behaviour.dropped = frozenset({decoder_stamps(clip)[3]})
    monkeypatch.setattr(VideoSource, "_account", lambda *_: None)
    nvdec._read_damaged(findings, on_card)
    assert list(findings.verdicts.values()) == [True, False, False]


@pytest.mark.parametrize("lost_bits", [1, 2])
def test_ten_bits_cut_to_fewer_on_the_way_fail(
    lost_bits: int, nvc: ModuleType, findings: Found, on_card: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    planes = NvdecDecoder._planes

    def cut(self: NvdecDecoder, surface: Tensor) -> tuple[Tensor, Tensor]:
        luma, chroma = planes(self, surface)
        drop = 6 + lost_bits
        return (luma.int() >> drop << drop).to(torch.uint16), chroma

    monkeypatch.setattr(NvdecDecoder, "_planes", cut)
    nvdec._compare_kind(findings, on_card, KINDS["HEVC 10 bits"])
    assert not findings.verdicts["HEVC 10 bits: colours within rounding"]
    assert findings.verdicts["HEVC 10 bits: the same numbers and times"]


def test_frames_that_do_not_come_or_come_late_fail(nvc: ModuleType, findings: Found, on_card: Settings) -> None:
    kind = KINDS["HEVC"]
    clip = made_clips.written_clip(on_card.folder, 330, 190, 36, kind)
    stamps = decoder_stamps(clip)
    nvc.behaviour.dropped = frozenset({stamps[30]})
    nvdec._compare_kind(findings, on_card, kind)
    verdicts = findings.verdicts
    assert not verdicts["HEVC: as many frames"]
    assert not verdicts["HEVC: the same from frame 22 on"]
    assert verdicts["HEVC: the same from frame 34 on"]


def decoder_stamps(clip: Path) -> list[int]:
    from flowreel.engine.sources.probe import probe_video

    stamps = probe_video(str(clip)).timeline.stamps
    assert stamps is not None
    return [int(stamp) for stamp in stamps]


def test_what_the_chip_does_not_decode_comes_from_the_cpu_and_is_left_out(
    nvc: ModuleType, findings: Found, on_card: Settings
) -> None:
    nvc.behaviour.engines_for = set()
    with pytest.raises(Skipped, match="this GPU decodes no h264 with 444 chroma and 8 bits"):
        nvdec._compare_kind(findings, on_card, KINDS["H.264 4:4:4"])
    assert findings.verdicts == {"H.264 4:4:4: the CPU decodes instead, and says so": True}


@pytest.mark.parametrize(("encoder", "pix_fmt"), [("nothing_like_it", "yuv420p"), ("libx264", "monow")])
def test_a_clip_that_cannot_be_made_here_is_left_out(
    encoder: str, pix_fmt: str, findings: Found, settings: Settings
) -> None:
    with pytest.raises(Skipped, match=rf"no encoder {encoder}|{encoder} makes no {pix_fmt}"):
        nvdec._compare_kind(findings, settings, Encoding("x", (encoder,), pix_fmt))
    assert not list(Path(settings.folder).glob("*-x.mp4"))
