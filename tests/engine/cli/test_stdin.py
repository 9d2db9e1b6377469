"""``... | flowreel run -``: a whole stream, a cut one, nothing, a terminal, and a pipe that falls silent."""

from __future__ import annotations

import io
import os
import pty
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import flowreel
from flowreel.engine.cli import call
from flowreel.engine.errors import StageError
from flowreel.sinks import open_store
from flowreel.sinks.video import ColorVideoSink
from tests.engine.cli.conftest import interrupt
from tests.fakes.fresh import Fresh

SIZE = (64, 48)
FRAME_BYTES = 64 * 48 * 3 // 2
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tiny(tiniest_weights: str) -> str:
    return tiniest_weights


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stream(frames: int) -> bytes:
    rng = np.random.default_rng(0)
    pictures = (b"FRAME\n" + rng.integers(0, 256, FRAME_BYTES, np.uint8).tobytes() for _ in range(frames))
    return b"YUV4MPEG2 W64 H48 F25:1 Ip A1:1 C420jpeg\n" + b"".join(pictures)


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``piped(data)`` replaces stdin by a pipe that gives these bytes and ends; with ``ends=False`` it stays open."""
    files: list[io.FileIO] = []
    writers: list[threading.Thread] = []

    def put(data: bytes, ends: bool = True) -> None:
        reading, writing = os.pipe()
        files.extend((io.FileIO(reading), io.FileIO(writing, "w")))
        reader, writer = files[-2:]
        monkeypatch.setattr(sys, "stdin", reader)

        def write() -> None:
            view = memoryview(data)
            try:
                while view:
                    view = view[writer.write(view) :]
            except BrokenPipeError:
                pass
            if ends:
                writer.close()

        writers.append(threading.Thread(target=write))
        writers[-1].start()

    yield put
    for file in files[::2]:
        file.close()
    for writer in writers:
        writer.join()
    for file in files:
        file.close()


Piped = Callable[..., None]


def test_a_stream_becomes_a_store(piped: Piped, tiny: str, capsys: Capture) -> None:
    piped(stream(6))
    assert call(["run", "-", "--weights", tiny]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "5 flows of 64x48" in said
    assert "decoded by YUV4MPEG2 (420jpeg)" in said
    store = open_store("stdin.flow.zarr")
    assert store.complete
    assert store.shape == (5, 2, 48, 64)
    np.testing.assert_allclose(store.timestamps_s, np.arange(5) / 25)
    assert store.attrs["source"]["name"] == "stdin"


def test_flow_is_that_of_the_same_file(piped: Piped, tiny: str) -> None:
    data = stream(9)
    Path("file.y4m").write_bytes(data)
    options = {"weights": tiny, "start": 1, "stop": "0.3s", "step": 2, "batch": 2}
    file = list(flowreel.stream("file.y4m", **options, tolerate_truncation=True))
    piped(data)
    for a, b in zip(flowreel.stream("-", **options), file, strict=True):
        assert torch.equal(a.flow, b.flow)
        np.testing.assert_array_equal(a.frame, b.frame)
        np.testing.assert_allclose(a.timestamp_s, b.timestamp_s)


def test_a_cut_stream_stays_unfinished(piped: Piped, tiny: str, capsys: Capture) -> None:
    piped(stream(6)[:-100])
    command = ["run", "-", "-o", "a.zarr", "-o", "a.mkv", "--weights", tiny, "-q"]
    assert call(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("flowreel: stdin: the stream ends inside frame 5")
    assert "--tolerate-truncation" in said
    assert not Path("a.zarr").exists()
    assert not Path("a.mkv").exists()
    assert open_store("a.zarr").available == 4
    piped(stream(6)[:-100])
    assert call([*command, "--tolerate-truncation", "--overwrite"]) == 0
    assert len(open_store("a.zarr")) == 4


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"", 1, "nothing came on stdin"),
        (b"\x00\x00\x00\x20ftypisom\x00", 1, "ffmpeg -i CLIP -f yuv4mpegpipe - | flowreel run -"),
        (b"YUV4MPEG2 W0 H48 F25:1\n", 1, "expected W"),
        (stream(1), 1, "two"),
        (stream(2) + b"no frame at all" * 9, 1, "before frame 2"),
    ],
)
def test_wrong_input_is_one_line(data: bytes, code: int, words: str, piped: Piped, tiny: str, capsys: Capture) -> None:
    piped(data)
    assert call(["run", "-", "-o", "a.zarr", "--weights", tiny, "-q"]) == code
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert words in said
    assert not Path("a.zarr").exists()


def test_a_terminal_is_wrong_usage(tiny: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pty.openpty()
    with os.fdopen(parent), os.fdopen(child) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert call(["run", "-", "--weights", tiny]) == 2
    assert "stdin is a terminal" in capsys.readouterr().err
    assert not list(Path().iterdir())


# -- A writer that writes no more but keeps the pipe open ---------------------------------------------------------


def no_thread_waits() -> bool:
    """Whether the decoding thread has ended; otherwise it would wait forever and be left behind."""
    return not any(thread.name == "decode" for thread in threading.enumerate())


def test_a_loop_over_the_flow_may_be_left(piped: Piped, tiny: str) -> None:
    piped(stream(4), ends=False)
    for batch in flowreel.stream("-", weights=tiny, batch=1):
        assert batch.flow.shape == (1, 2, 48, 64)
        break
    assert no_thread_waits()


def test_a_failing_output_ends_the_run(piped: Piped, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is on fire")

    monkeypatch.setattr(ColorVideoSink, "write", fail)
    piped(stream(4), ends=False)
    with pytest.raises(StageError, match="on fire") as caught:
        flowreel.run("-", "a.mkv", weights=tiny, batch=1)
    assert not any("left behind" in note for note in getattr(caught.value, "__notes__", ()))
    assert no_thread_waits()


PIPED = """
import os
os.dup2(os.open("pipe", os.O_RDONLY), 0)
from flowreel.engine import cli
cli.main()
"""


def test_ctrl_c_ends_with_130(tiny: str, fresh: Fresh) -> None:
    os.mkfifo("pipe")
    arguments = ["run", "-", "-o", "a.zarr", "--weights", tiny]
    fresh.start("-c", [PIPED, *arguments], Path.cwd())
    with open("pipe", "r+b", buffering=0) as pipe:  # also for reading: does not wait for a reader, which may never come
        pipe.write(stream(3))  # and nothing more, though the pipe stays open
        interrupt(fresh, "a.zarr")
