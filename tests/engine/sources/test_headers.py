"""The frame size stated in a packet, for every codec that states one, and VP9's headers bit by bit."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from av.bitstream import BitStreamFilterContext

from flowreel.engine.sources.headers import ENOUGH_BYTES, SecondFields, stated_size
from tests.fakes.fields import field, parameter_sets

DECODERS = {"libx264": "h264", "libx265": "hevc", "libvpx": "vp8", "libvpx-vp9": "vp9", "libsvtav1": "libdav1d"}


@pytest.mark.parametrize("encoder", DECODERS)
@pytest.mark.parametrize("size", [(98, 78), (64, 80)])
def test_stated_at_key_frames_alone(encoder: str, size: tuple[int, int]) -> None:
    if encoder not in av.codecs_available:
        pytest.skip(f"this FFmpeg is built without {encoder}")
    context: Any = av.CodecContext.create(encoder, "w")
    context.width, context.height = size
    context.pix_fmt, context.time_base, context.framerate = "yuv420p", Fraction(1, 25), 25
    context.options = {"x265-params": "log-level=none"} if encoder == "libx265" else {}
    packets = []
    for number in range(5):
        frame = av.VideoFrame(*size, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes([40 * number]) * plane.buffer_size)
        frame.pts = number
        packets += context.encode(frame)
    packets += context.encode(None)
    assert packets[0].is_keyframe
    assert not all(packet.is_keyframe for packet in packets)
    stated = [stated_size(DECODERS[encoder], bytes(packet)[:ENOUGH_BYTES]) for packet in packets]
    assert stated == [size if packet.is_keyframe else None for packet in packets]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("videos/bbb_1080p60.mp4", (1920, 1080)),  # cropped from 1920x1088
        ("videos/person_asl_walk_640x480.mkv", (640, 480)),
        ("videos_corner/hevc_main10_320x240.mp4", (320, 240)),
        ("videos_corner/av1_640x360.mkv", (640, 360)),
        ("videos_corner/odd_321x241_vp9.mp4", (321, 241)),
    ],
)
def test_real_clips(data_dir: Path, name: str, size: tuple[int, int]) -> None:
    with av.open(str(data_dir / name)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context.name
        start_codes = BitStreamFilterContext(f"{codec}_mp4toannexb", stream) if codec in ("h264", "hevc") else None
        packets = [packet for packet in container.demux(stream) if packet.size]
        if start_codes is not None:
            packets = [filtered for packet in packets for filtered in start_codes.filter(packet)]
    stated = [stated_size(codec, bytes(packet)[:ENOUGH_BYTES]) for packet in packets]
    assert stated[0] == size
    assert set(stated) <= {size, None}
    assert all(packet.is_keyframe for packet, found in zip(packets, stated, strict=True) if found is not None)


def test_behind_what_an_encoder_says_of_itself(data_dir: Path) -> None:
    with av.open(str(data_dir / "videos_corner/hevc_main10_320x240.mp4")) as container:
        stream = container.streams.video[0]
        start_codes = BitStreamFilterContext("hevc_mp4toannexb", stream)
        data = bytes(start_codes.filter(next(container.demux(stream)))[0])
    message = b"\0\0\0\1\x4e\x01\x05" + 78 * b"\xff" + b"\x0a" + 19900 * b"x" + b"\x80"  # SEI, unregistered user data
    assert stated_size("hevc", (message + data)[:ENOUGH_BYTES]) == (320, 240)


@pytest.mark.parametrize("codec", ["h264", "hevc", "libdav1d", "vp8", "vp9"])
@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0\1\x67", bytes(range(256)), b"\xff" * 300])
def test_nonsense_states_nothing(codec: str, data: bytes) -> None:
    assert stated_size(codec, data) is None


SYNC = f"{0x498342:024b}"
W, H = f"{640 - 1:016b}", f"{360 - 1:016b}"


@pytest.mark.parametrize(
    ("header", "stated"),
    [
        # Marker, profile, show existing; inter, shown, error resilient; then fields that depend on the picture.
        ("10 00 0 0 1 0" + SYNC + "010 0" + W + H, True),  # a key picture
        ("10 10 0 0 1 0" + SYNC + "010 0 110" + W + H, True),  # profile 1, with its subsampling
        ("10 01 0 0 1 0" + SYNC + "1 010 0" + W + H, True),  # profile 2, with its bit depth
        ("10 11 0 0 0 1 0" + SYNC + "1 111 0" + W + H, True),  # profile 3, RGB
        ("10 00 0 0 1 0" + SYNC[:-1] + "1 010 0" + W + H, False),  # wrong sync code
        ("11 00 0 0 1 0" + SYNC + "010 0" + W + H, False),  # wrong marker
        ("10 00 0 0 1 0" + SYNC + "010 0" + W, False),  # cut off
        ("10 00 1 011", False),  # an earlier picture is shown
        ("10 00 0 1 1 0 00 11111111 000000000000 000" + W + H, True),  # refers to others
        ("10 00 0 1 1 1 11111111 000000000000 000" + W + H, True),  # likewise, error resilient
        ("10 00 0 1 1 0 00 11111111 000000000000 001" + W + H, False),  # the size of the third reference
        ("10 00 0 1 1 0 00 11111111 000000000000 1" + W + H, False),  # the size of the first reference
        ("10 00 0 1 0 0 0 00 11111111 000000000000 000" + W + H, True),  # not shown
        ("10 00 0 1 0 0 1 00" + SYNC + "11111111" + W + H, True),  # not shown, refers to none
        ("10 01 0 1 0 0 1 00" + SYNC + "0 010 0 11111111" + W + H, True),  # likewise, profile 2
    ],
)
def test_vp9_by_its_specification(header: str, stated: bool) -> None:
    bits = header.replace(" ", "")
    bits += "0" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    assert stated_size("vp9", data) == ((640, 360) if stated else None)


def test_second_fields_follow_a_first_one() -> None:
    fields = SecondFields(parameter_sets())
    order = [(0, False), (0, True), (1, True), (1, False), (2, False), (3, False), (3, True), (4, True), (5, False)]
    packets = [field(frame, bottom, 0) for frame, bottom in order]
    second = [fields.holds(memoryview(packet)) for packet in packets]
    assert second == [False, True, False, True, False, False, True, False, False]  # 2, 4, 5 have one field
    assert not fields.holds(memoryview(b"\0\0\1\x61"))
    assert not SecondFields(None).holds(memoryview(packets[1]))
