"""YUV4MPEG2 from a file descriptor: the same pictures as FFmpeg's, and every way in which a stream can be wrong."""

from __future__ import annotations

import io
import os
import pty
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from flowreel.engine.config import SelectConfig
from flowreel.engine.data import Frame
from flowreel.engine.errors import SourceError, TooFewFramesError, UnsupportedSourceError, UsageError, frame_of
from flowreel.engine.protocols import MayWait, Source
from flowreel.engine.sources import open_source
from flowreel.engine.sources.video import open_video
from flowreel.engine.sources.y4m import LONGEST_LINE, Y4MSource

HEADER = b"YUV4MPEG2 W33 H18 F25:1 Ip A1:1 C420jpeg"
FRAME_BYTES = 33 * 18 + 2 * 17 * 9

# tag: (bytes of a 33x18 frame, bits)
KINDS = {
    "": (FRAME_BYTES, 8),
    " C420": (FRAME_BYTES, 8),
    " C420jpeg": (FRAME_BYTES, 8),
    " C420mpeg2 XYSCSS=420MPEG2": (FRAME_BYTES, 8),
    " C420paldv": (FRAME_BYTES, 8),
    " XYSCSS=422": (33 * 18 + 2 * 17 * 18, 8),
    " C411": (33 * 18 + 2 * 9 * 18, 8),
    " C422": (33 * 18 + 2 * 17 * 18, 8),
    " C444": (3 * 33 * 18, 8),
    " C444alpha": (4 * 33 * 18, 8),
    " Cmono": (33 * 18, 8),
    " C420p10 XYSCSS=420P10": (2 * FRAME_BYTES, 10),
    " C422p12": (2 * (33 * 18 + 2 * 17 * 18), 12),
    " C444p16": (2 * 3 * 33 * 18, 16),
    " Cmono10": (2 * 33 * 18, 10),
}


def frames_of(count: int, size: int = FRAME_BYTES, bits: int = 8) -> list[bytes]:
    """Pictures of noise, each after its FRAME marker."""
    rng = np.random.default_rng(0)
    if bits == 8:
        return [b"FRAME\n" + rng.integers(0, 256, size, np.uint8).tobytes() for _ in range(count)]
    return [b"FRAME\n" + rng.integers(0, 1 << bits, size // 2, "<u2").tobytes() for _ in range(count)]


def stream(count: int = 6, header: bytes = HEADER) -> bytes:
    return header + b"\n" + b"".join(frames_of(count))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Y4MSource]]:
    """``opened(data, **select)``: a source that reads these bytes."""
    descriptors: list[int] = []

    def open_bytes(data: bytes, **select: int | str) -> Y4MSource:
        path = tmp_path / f"{len(descriptors)}.y4m"
        path.write_bytes(data)
        descriptors.append(os.open(path, os.O_RDONLY))
        return Y4MSource(descriptors[-1], SelectConfig(**select))  # type: ignore[arg-type]

    yield open_bytes
    for descriptor in descriptors:
        os.close(descriptor)


Opened = Callable[..., Y4MSource]


def assert_same(got: list[Frame], expected: list[Frame]) -> None:
    assert [frame.index for frame in got] == [frame.index for frame in expected]
    assert [frame.timestamp_s for frame in got] == pytest.approx([frame.timestamp_s for frame in expected], abs=1e-9)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.rgb, b.rgb)


@pytest.mark.parametrize("value_range", ["", " XCOLORRANGE=FULL", " XCOLORRANGE=LIMITED"])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_the_same_file(kind: str, value_range: str, opened: Opened, tmp_path: Path) -> None:
    size, bits = KINDS[kind]
    header = f"YUV4MPEG2 W33 H18 F30000:1001 Ip A1:1{kind}{value_range}\n".encode()
    data = header + b"".join(frames_of(3, size, bits))
    (tmp_path / "file.y4m").write_bytes(data)
    with closing(open_video(str(tmp_path / "file.y4m"), SelectConfig())) as file:
        expected, notes = list(file), file.notes
    source = opened(data)
    assert_same(list(source), expected)
    assert source.notes == notes
    assert (source.info.width, source.info.height) == (33, 18)
    assert source.info.frame_rate == Fraction(30000, 1001)
    assert source.info.frame_count is None
    assert source.losses == []


def test_the_range_matters(opened: Opened) -> None:
    """The range changes the picture, without which the test above would prove little about it."""
    full, limited = (opened(stream(2, HEADER + b" XCOLORRANGE=" + word)) for word in (b"FULL", b"LIMITED"))
    assert not torch.equal(next(iter(full)).rgb, next(iter(limited)).rgb)


@pytest.mark.parametrize(
    "select",
    [
        {"start": 3},
        {"stop": 4},
        {"stop": 100},
        {"start": 1, "stop": 9, "step": 3},
        {"start": "0.08s", "stop": "0.2s"},
        {"start": "0.07s", "step": 2},
    ],
)
def test_selection_is_that_of_a_file(select: dict[str, int | str], opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "file.y4m").write_bytes(stream(10))
    with closing(open_video(str(tmp_path / "file.y4m"), SelectConfig(**select))) as file:  # type: ignore[arg-type]
        source = opened(stream(10), **select)
        assert_same(list(source), list(file))
        assert source.info.frame_rate == file.info.frame_rate


def test_a_stop_time_beyond_all_frame_numbers_is_the_end(opened: Opened) -> None:
    fast = HEADER.replace(b"F25:1", b"F10000000:1")
    assert len(list(opened(stream(3, fast), stop="999999999999s"))) == 3
    with pytest.raises(TooFewFramesError, match="leave 0"):
        list(opened(stream(3, fast), start="999999999999s"))


def test_the_order_of_times_is_not_that_of_frames(opened: Opened) -> None:
    with pytest.raises(TooFewFramesError, match="leave 0 frames"):
        opened(stream(3), start="0.01s", stop="0.02s")  # both between frames 0 and 1
    with pytest.raises(UsageError, match="must be later"):
        opened(stream(3), start="2s", stop="1s")


def test_reading_ends_with_the_last_frame_that_is_wanted(opened: Opened) -> None:
    source = opened(stream(4) + b"no frame", stop=4)
    assert len(list(source)) == 4
    assert source.losses == []


def test_it_is_a_source_that_may_wait_and_is_read_once(opened: Opened) -> None:
    source = opened(stream())
    assert isinstance(source, Source)
    assert isinstance(source, MayWait)
    assert source.decoder == "YUV4MPEG2 (420jpeg)"
    assert source.info.source.name == "stdin"
    assert source.notes == opened(stream(6, HEADER.replace(b"Ip A1:1", b"I A0:0"))).notes  # no other tag adds one
    assert len(list(source)) == 6
    with pytest.raises(RuntimeError, match="once"):
        iter(source)


def test_markers_may_say_more(opened: Opened) -> None:
    said = stream().replace(b"FRAME\n", b"FRAME Ip XHELLO\n")
    assert_same(list(opened(said)), list(opened(stream())))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"YUV4MPEG2 W33 H18 C420", "25 frames per second are assumed"),
        (b"YUV4MPEG2 W33 H18 F0:0 C420", "25 frames per second are assumed"),
        (b"YUV4MPEG2 W33 H18 F0:1 C420", "25 frames per second are assumed"),
        (b"YUV4MPEG2 W33 H18 F25:1 It C420", "interlaced"),
        (b"YUV4MPEG2 W33 H18 F25:1 A16:15 C420", "not square (16:15)"),
        (b"YUV4MPEG2 W33 H18 F25:1 C420", "BT601"),
    ],
)
def test_what_is_assumed_is_said(header: bytes, words: str, opened: Opened) -> None:
    source = opened(stream(2, header))
    assert any(words in note for note in source.notes)
    assert len(list(source)) == 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "nothing came on stdin"),
        (b"\x00\x00\x00\x20ftypisom", "found b'"),
        (b"YUV4", "ends inside its YUV4MPEG2 header"),
        (b"YUV4MPEG2 W33 H18", "ends inside its YUV4MPEG2 header"),
        (b"YUV4MPEG2 " + b"X" * LONGEST_LINE + b"\n", str(LONGEST_LINE)),
        (b"YUV4MPEG2 H18 F25:1\n", "expected W"),
        (b"YUV4MPEG2 W33 H0 F25:1\n", "expected H"),
        (b"YUV4MPEG2 W33 H-18 F25:1\n", "expected H"),
        (b"YUV4MPEG2 W1000000 H18 F25:1\n", "expected W"),
        (b"YUV4MPEG2 W30000 H30000 F25:1 C444\n", "2700000000 bytes each"),
        (b"YUV4MPEG2 W33 H18 F25:1 C410\n", "C410"),
        (b"YUV4MPEG2 W\xff\n", "expected W"),
    ],
)
def test_a_bad_header_is_told_of_at_once(data: bytes, words: str, opened: Opened) -> None:
    with pytest.raises(UnsupportedSourceError) as caught:
        opened(data)
    assert words in str(caught.value)


@pytest.mark.parametrize("kept", [1, 5, 6, 7, 300, FRAME_BYTES + 5])
def test_a_cut_stream_gives_what_came(kept: int, opened: Opened) -> None:
    """Cut inside the marker, after it, inside the picture, and before its last byte."""
    source = opened(stream(3) + frames_of(1)[0][:kept])
    assert [frame.index for frame in source] == [0, 1, 2]
    (loss,) = source.losses
    assert "frame 3" in loss
    if kept > 6:
        assert f"{kept - 6} of {FRAME_BYTES} bytes came" in loss


@pytest.mark.parametrize("between", [b"\n", b"FRAMES\n", b"XXXXXXXXXXX", b"F" * (2 * LONGEST_LINE), b"YUV4MPEG2 W1\n"])
def test_frames_out_of_step_are_an_error(between: bytes, opened: Opened) -> None:
    frames = iter(opened(stream(3) + between + frames_of(1)[0]))
    assert [next(frames).index for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UnsupportedSourceError, match="before frame 3") as caught:
        next(frames)
    assert frame_of(caught.value, None) == 3


@pytest.mark.parametrize(
    ("data", "select", "words"),
    [
        (stream(0), {}, "stdin gave 0 frames: "),
        (stream(1), {}, "stdin gave 1 frame: "),
        (stream(5), {"start": 4}, "5 frames, of which start, stop and step leave 1"),
        (stream(5), {"step": 9}, "5 frames, of which start, stop and step leave 1"),
        (stream(2)[:-1], {}, "bytes came"),
    ],
)
def test_fewer_than_two_frames(data: bytes, select: dict[str, int], words: str, opened: Opened) -> None:
    with pytest.raises(TooFewFramesError) as caught:
        list(opened(data, **select))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("select", "error"),
    [({"stop": 1}, TooFewFramesError), ({"start": "1s", "stop": "1s"}, UsageError), ({"start": "soon"}, UsageError)],
)
def test_an_impossible_selection_is_told_of_at_once(
    select: dict[str, int | str], error: type[SourceError], opened: Opened
) -> None:
    with pytest.raises(error):
        opened(stream(), **select)


# -- Pipes -------------------------------------------------------------------------------------------------------


Pipe = tuple[io.FileIO, io.FileIO]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    reading, writing = os.pipe()
    with io.FileIO(reading) as reader, io.FileIO(writing, "w") as writer:
        yield reader, writer


def test_bytes_may_come_in_any_pieces(pipe: Pipe, opened: Opened) -> None:
    reading, writing = pipe
    data, sizes = stream(12), np.random.default_rng(1).integers(1, 700, 10_000)

    def write() -> None:
        position = 0
        for size in sizes.tolist():
            position += writing.write(data[position : position + size])
            if position == len(data):
                break
        writing.close()

    writer = threading.Thread(target=write)
    writer.start()
    got = list(Y4MSource(reading.fileno(), SelectConfig()))
    writer.join()
    assert_same(got, list(opened(data)))


def test_a_pipe_that_does_not_block_is_waited_for(pipe: Pipe) -> None:
    reading, writing = pipe
    os.set_blocking(reading.fileno(), False)
    writing.write(stream(2))
    frames = iter(Y4MSource(reading.fileno(), SelectConfig()))
    assert next(frames).index == 0
    late = threading.Timer(0.3, lambda: (writing.write(frames_of(1)[0]), writing.close()))
    late.start()
    assert [frame.index for frame in frames] == [1, 2]
    late.join()


@pytest.mark.parametrize("how", ["interrupt", "close"])
def test_waiting_ends_when_nobody_wants_it_any_more(how: str, pipe: Pipe) -> None:
    reading, writing = pipe
    writing.write(stream(3)[:-10])  # the writer stays open and writes no more
    source = Y4MSource(reading.fileno(), SelectConfig())
    numbers: list[int] = []
    reader = threading.Thread(target=lambda: numbers.extend(frame.index for frame in source), daemon=True)
    reader.start()
    getattr(source, how)()
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert numbers in ([], [0], [0, 1])
    assert source.losses == []


# -- Stdin itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream_number", [None, 0])
def test_stdin_by_name(pipe: Pipe, monkeypatch: pytest.MonkeyPatch, stream_number: int | None) -> None:
    reading, writing = pipe
    writing.write(stream(3))
    writing.close()
    monkeypatch.setattr("sys.stdin", reading)
    assert len(list(open_source("-", SelectConfig(stop=2, stream=stream_number)))) == 2
    with pytest.raises(UsageError, match="stream 1"):
        open_source("-", SelectConfig(stream=1))


def test_a_terminal_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pty.openpty()
    with os.fdopen(parent), os.fdopen(child) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        with pytest.raises(UsageError, match="stdin is a terminal: try ffmpeg"):
            open_source("-")


def test_no_stdin_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UnsupportedSourceError, match="cannot be read"):
        open_source("-")
