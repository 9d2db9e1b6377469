"""The command line as a user sees it: exit codes, one-line errors, help, and what each command prints."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import re
import resource
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import av
import numpy as np
import PIL.Image
import pytest
import torch

from flowreel.engine import api, cli
from flowreel.engine.cli import call
from flowreel.engine.cli.options import write_stats
from flowreel.engine.config import RunConfig, SelectConfig
from flowreel.engine.errors import OutputWriteError, PrecisionWarning
from flowreel.engine.inference import Inference
from flowreel.engine.sources.synthetic import SyntheticConfig, SyntheticSource
from flowreel.engine.training.config import TrainConfig
from flowreel.engine.training.train import Progress
from flowreel.kernels.flow_color import flow_to_color
from flowreel.sinks import known_outputs, open_store, write_flo
from tests.engine.cli.conftest import interrupt
from tests.fakes.fresh import Fresh

SOURCE = "synthetic:objects?size=96x64&frames=6"
NETWORK_SIZE = (384, 640)  # what frames of 640x360 are padded to
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tiny(tiny_flownetc: str) -> str:
    return tiny_flownetc


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_run_says_what_it_did(tiny: str, capsys: Capture) -> None:
    code = call(["run", SOURCE, "-o", "[/a]:on:.zarr", "-o", "b.mp4", "--weights", tiny, "--stats", "new/stats.json"])
    out, err = capsys.readouterr()
    assert (code, out) == (0, "")
    said = " ".join(plain(err).split())
    for words in ("5 flows of 96x64", "FlowNet2C", "fp32", "on cpu", "decoded by synthetic", "smaller than .flo"):
        assert words in said
    assert " [/a]:on:.zarr " in said  # neither markup nor the name of an emoji
    stats = json.loads(Path("new/stats.json").read_text())
    assert stats["pairs"] == 5
    for name in ("seconds", "startup_s", "pairs_per_s", "bytes_written", "flo_bytes", "decoder", "device", "batch"):
        assert name in stats
    for name in ("items", "busy_s", "wait_in_s", "wait_out_s", "peak_queue"):
        assert name in stats["stages"][0]


def test_stats_to_stdout(tiny: str, capsys: Capture) -> None:
    Path("-").mkdir()
    assert call(["run", SOURCE, "-o", "a.zarr", "--weights", tiny, "--stats", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 5
    assert call(["export", "a.zarr", "-o", "b.zarr", "--stats", "-", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["flows"] == 5
    run = ["run", SOURCE, "-o", "c/{stem}.zarr", "--weights", tiny, "-q", "--stats", "-", "--manifest"]
    assert call([*run, "-"]) == 2
    assert "needs a file" in one_line(capsys)
    assert call([*run, "list.json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"][0]["status"] == "done"
    assert sorted(path.name for path in Path().iterdir()) == ["-", "a.zarr", "b.zarr", "c", "list.json"]


def test_stats_that_do_not_fit_on_the_disk_leave_the_former_ones() -> None:
    write_stats(Path("stats.json"), {"seconds": 1.0, "outputs": []})
    former, limit = Path("stats.json").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        with pytest.raises(OutputWriteError, match=r"stats\.json: .*; the outputs are done"):
            write_stats(Path("stats.json"), {"seconds": 2.0, "outputs": ["x" * 200]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert Path("stats.json").read_bytes() == former
    assert os.listdir() == ["stats.json"]


@pytest.mark.parametrize("why", [errno.EACCES, errno.EPERM, errno.EBUSY])
def test_stats_replace_former_ones_that_only_take_writing_in_place(monkeypatch: pytest.MonkeyPatch, why: int) -> None:
    """In a folder that takes no other files, or mounted by themselves, as by docker run -v FILE:FILE."""
    Path("stats.json").write_text('{"seconds": 1.0, "outputs": [], "notes": []}')

    def refused(*_: object) -> NoReturn:
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(os, "replace", refused)
    write_stats(Path("stats.json"), {"seconds": 2.0})
    assert json.loads(Path("stats.json").read_bytes()) == {"seconds": 2.0}
    assert os.listdir() == ["stats.json"]


def test_stats_go_where_a_link_leads() -> None:
    Path("link.json").symlink_to("stats.json")
    write_stats(Path("link.json"), {"seconds": 2.0})
    assert Path("link.json").is_symlink()
    assert json.loads(Path("stats.json").read_bytes()) == {"seconds": 2.0}


def test_stats_to_a_pipe() -> None:
    reader, writer = os.pipe()
    write_stats(Path(f"/dev/fd/{writer}"), {"pairs": 5})
    assert json.loads(os.read(reader, 100)) == {"pairs": 5}
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("option", ["--stats", "--manifest"])
@pytest.mark.parametrize("path", ["{stem}.flow.zarr", "{stem}.flow.zarr/report.json"])
def test_no_report_goes_to_the_output_that_is_made_unnamed(tiny: str, capsys: Capture, option: str, path: str) -> None:
    stem = SOURCE.removeprefix("synthetic:").partition("?")[0]
    assert call(["run", SOURCE, "--weights", tiny, option, path.format(stem=stem)]) == 2
    assert f"{stem}.flow.zarr" in one_line(capsys)
    assert list(Path().iterdir()) == []


def test_stats_to_a_closed_stdout_are_not_lost_in_silence(
    tiny: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert call(["run", SOURCE, "-o", "a.zarr", "--weights", tiny, "--stats", "-", "-q"]) == 1
    assert one_line(capsys) == "flowreel: stdout is closed, so the report is lost; the outputs are done\n"
    assert Path("a.zarr").exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError("std::bad_alloc"), "this machine has too little free memory: end what else runs there"),
        (RuntimeError("can't start new thread"), "the system allows no more threads: end what else runs there"),
        (OSError(errno.EIO, "Input/output error", "a.mp4"), "Input/output error: a.mp4\n"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error\n"),
        (RuntimeError("in two\n lines"), "unexpected RuntimeError: in two lines (--debug shows where)\n"),
        (EOFError("cut"), "unexpected EOFError: cut (--debug shows where)\n"),  # no Ctrl-D at a prompt
    ],
)
def test_what_was_not_foreseen_is_told_in_one_line(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr("flowreel.engine.models.weights.known_weights", fails)
    assert call(["weights", "list"]) == 1
    assert one_line(capsys).startswith(f"flowreel: {told}")
    assert call(["weights", "list", "--debug"]) == 1
    said = capsys.readouterr().err
    assert f"\n{type(error).__name__}: " in said
    assert "PastTyper" not in said


def test_an_error_does_not_go_to_stdout_if_stderr_is_closed(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert call(["info", "nothing.mp4", "--debug"]) == 1
    assert capsys.readouterr().out == ""


FULL_DISK = "stderr = os.open('/dev/full', os.O_WRONLY)"
NO_READER = "reader, stderr = os.pipe(); os.close(reader)"


@pytest.mark.parametrize("opened", [FULL_DISK, NO_READER], ids=["full disk", "pipe without a reader"])
def test_a_run_goes_on_if_nothing_can_be_written_to_stderr(tiny: str, opened: str, fresh: Fresh) -> None:
    code = f"import os; {opened}; os.dup2(stderr, 2); from flowreel.engine import cli; cli.main()"
    assert fresh.code(code, "run", SOURCE, "-o", "a.zarr", "--weights", tiny) == (0, "")
    assert open_store("a.zarr").complete


@pytest.mark.parametrize("columns", ["0", "", "100"])
def test_a_terminal_of_no_width_is_shown_to_nevertheless(columns: str) -> None:
    with spawn("--help", stdout=subprocess.PIPE, env={**os.environ, "COLUMNS": columns}) as process:
        assert process.stdout is not None
        assert b"verify" in process.stdout.read()


def test_a_name_that_stdout_cannot_show_is_written_out() -> None:
    Path("\u65e5.flo").write_bytes(b"PIEH" + struct.pack("<ii2f", 1, 1, 0, 0))
    latin = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    with spawn("info", "\u65e5.flo", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=latin) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"\\u65e5.flo: ")


def test_without_a_working_folder(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Path("gone").absolute()
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert call(["doctor"]) == 1
    assert "working folder cannot be used (No such file or directory)" in one_line(capsys)


def test_quiet_is_quiet(tiny: str, capsys: Capture) -> None:
    assert call(["run", SOURCE, "-o", "a.zarr", "--weights", tiny, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def one_line(capsys: Capture) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "nowhere.mp4"], 1, "nowhere.mp4"),
        (["run", "empty.mp4"], 1, "empty.mp4 is empty"),
        (["run", "text.mp4"], 1, "text.mp4"),
        (["run", "frames/*.png"], 1, "png"),
        (["run", SOURCE, "--weights", "nowhere.pth"], 1, "nowhere.pth"),
        (["run", SOURCE, "--weights", "text.mp4"], 1, "text.mp4"),
        (["run", SOURCE, "--weights", "text.pth.tar"], 1, "it begins with b'This is no video."),
        (["run", SOURCE, "-o", "x.gif"], 2, ".zarr"),
        (["run", SOURCE, "-o", ""], 2, "empty"),
        (["run", "", "-o", "x.zarr"], 2, "empty"),
        (["run", SOURCE, "-o", "x.flo"], 2, "%06d"),
        (["run", SOURCE, "-o", "x/%s.flo"], 2, "%06d"),
        (["run", SOURCE, "-o", "x_%d.jpg"], 2, "flow_x_"),
        (["run", SOURCE, "-o", "text.mp4/x.zarr"], 1, "text.mp4/x.zarr: Not a directory"),
        (["run", SOURCE, "-o", "text.mp4/x.mp4"], 1, "text.mp4/x.mp4: Not a directory"),
        (["run", SOURCE, "-o", "text.mp4/%d.flo"], 1, "text.mp4: Not a directory"),
        (["run", SOURCE, "-o", "text.mp4"], 1, "--overwrite"),
        (["run", SOURCE, "--stop", "1"], 1, "two"),
        (["run", SOURCE, "--step", "0"], 2, "step"),
        (["run", SOURCE, "--start", "4", "--stop", "2"], 2, "stop"),
        (["run", SOURCE, "--start", "soon"], 2, "soon"),
        (["run", SOURCE, "--batch", "many"], 2, "batch"),
        (["run", SOURCE, "--max-error", "-1"], 2, "max-error"),
        (["run", SOURCE, "--max-flow", "0"], 2, "max-flow"),
        (["run", SOURCE, "--bound", "0"], 2, "bound"),
        (["run", SOURCE, "--direction", "sideways"], 2, "direction"),
        (["run", SOURCE, "--start", "9"], 1, "two"),
        (["run", SOURCE, "--precision", "fp16", "--device", "cpu"], 2, "fp16"),
        (["run", SOURCE, "--fit", "stretch"], 2, "fit"),
        (["run", SOURCE, "--device", "gpu"], 2, "device"),
        (["run", SOURCE, "--codec", "rar"], 2, "codec"),
        (["run", SOURCE, "--nonsense"], 2, "nonsense"),
        (["run", "synthetic:nothing"], 2, "objects"),
        (["run", "synthetic:objects?speed=3"], 2, "speed"),
        (["jump"], 2, "jump"),
        (["info", "nowhere"], 1, "nowhere"),
        (["info", "-"], 1, "nothing is at -"),
        (["info", "text.mp4"], 1, "text.mp4"),
        (["train", "out", "--width", "0"], 2, "width"),
        (["train", "out", "--height", "100"], 2, "64"),
        (["train", "out", "--device", "cuda:99"], 1, "cuda:99"),
    ],
)
def test_wrong_input_is_one_line_and_a_code(
    arguments: list[str], code: int, words: str, tiny: str, capsys: Capture
) -> None:
    for name in ("text.mp4", "text.pth.tar"):
        Path(name).write_text("This is no video.\n" * 20)
    Path("empty.mp4").touch()
    before = sorted(Path().rglob("*"))
    if arguments[0] == "run" and "--weights" not in arguments:
        arguments = [*arguments, "--weights", tiny]
    assert call(arguments) == code
    assert words in one_line(capsys)
    assert sorted(Path().rglob("*")) == before


def test_a_cut_video_fails_in_one_line_and_stays_unfinished(tiny: str, capsys: Capture) -> None:
    call(["run", SOURCE, "-o", "whole.mkv", "--weights", tiny, "-q"])
    whole = Path("whole.mkv").read_bytes()
    Path("cut.mkv").write_bytes(whole[: len(whole) * 4 // 5])
    assert call(["run", "cut.mkv", "-o", "a.zarr", "--weights", tiny, "-q"]) == 1
    assert "--tolerate-truncation" in one_line(capsys)
    assert not Path("a.zarr").exists()
    assert call(["run", "cut.mkv", "-o", "b.zarr", "--weights", tiny, "-q", "--tolerate-truncation"]) == 0
    assert Path("b.zarr").exists()


@pytest.fixture(scope="module")
def tiniest(tiniest_weights: str) -> str:
    return tiniest_weights


@pytest.mark.parametrize(
    ("name", "frames", "width", "height", "first_s"),
    [
        ("av1_640x360.mkv", 125, 640, 360, 0),
        ("bbb_vfr_640x360.mp4", 72, 640, 360, 0),
        ("hevc_main10_320x240.mp4", 60, 320, 240, 0),
        ("nasa_rotated90_480x270.mp4", 17, 270, 480, 0),
        ("non_zero_start_200x112.mp4", 12, 200, 112, 127995 / 15360),
        ("odd_321x241_vp9.mp4", 25, 321, 241, 0),
    ],
)
def test_every_strange_clip_gives_one_flow_less_than_frames(
    name: str,
    frames: int,
    width: int,
    height: int,
    first_s: float,
    data_dir: Path,
    tiniest: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if frames > 60:  # the network is not tested here, and would take longer than all the rest
        monkeypatch.setattr(Inference, "of_fitted", lambda _, first, __: torch.zeros(len(first), 2, *NETWORK_SIZE))
    clip = str(data_dir / "videos_corner" / name)
    assert call(["run", clip, "-o", "a.zarr", "--weights", tiniest, "--max-error", "0.5", "-q"]) == 0
    store = open_store("a.zarr")
    assert store.complete
    assert store.shape == (frames - 1, 2, height, width)
    np.testing.assert_array_equal(store.frame, np.arange(frames - 1))
    np.testing.assert_array_equal(store.frame_to, np.arange(1, frames))
    assert store.timestamps_s[0] == pytest.approx(first_s, abs=1e-4)
    assert (np.diff(store.timestamps_s) > 0).all()
    assert np.isfinite(store[frames // 2]).all()


@pytest.mark.parametrize(
    ("options", "frames", "frames_to"),
    [
        (["--start", "9"], [9, 10], [10, 11]),
        (["--stop", "3"], [0, 1], [1, 2]),
        (["--start", "2", "--stop", "9", "--step", "3"], [2, 5], [5, 8]),
        (["--start", "0.1s", "--stop", "0:00.2"], [3, 4], [4, 5]),
        (["--stop", "3", "--direction", "backward"], [1, 2], [0, 1]),
        (["--stop", "3", "--stream", "0", "--decoder", "pyav"], [0, 1], [1, 2]),
    ],
)
def test_which_frames_of_a_real_clip(
    options: list[str], frames: list[int], frames_to: list[int], data_dir: Path, tiniest: str
) -> None:
    clip = str(data_dir / "videos_corner" / "non_zero_start_200x112.mp4")
    assert call(["run", clip, "-o", "a.zarr", "--weights", tiniest, "-q", *options]) == 0
    store = open_store("a.zarr")
    assert store.frame.tolist() == frames
    assert store.frame_to.tolist() == frames_to


def test_backward_flow_differs_from_forward_flow(data_dir: Path, tiniest: str) -> None:
    clip = str(data_dir / "videos_corner" / "non_zero_start_200x112.mp4")
    for direction in ("forward", "backward"):
        options = ["--direction", direction, "--stop", "2", "--max-error", "0", "-q"]
        assert call(["run", clip, "-o", f"{direction}.zarr", "--weights", tiniest, *options]) == 0
    forward, backward = open_store("forward.zarr"), open_store("backward.zarr")
    assert backward.attrs["direction"] == "backward"
    assert not np.array_equal(forward[0], backward[0])


def test_one_of_several_video_streams(tiniest: str, capsys: Capture) -> None:
    with av.open("two.mkv", "w") as container:
        for width in (96, 64):
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p"
        for stream in container.streams.video:
            for value in (0, 100, 200):
                picture = np.full((64, stream.width, 3), value, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    for number, width in ((0, 96), (1, 64)):
        command = ["run", "two.mkv", "-o", f"{number}.zarr", "--weights", tiniest, "--stream", str(number), "-q"]
        assert call(command) == 0
        assert open_store(f"{number}.zarr").shape == (2, 2, 64, width)
    assert call(["run", "two.mkv", "-o", "2.zarr", "--weights", tiniest, "--stream", "2"]) == 2
    assert "2 video streams" in one_line(capsys)


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_a_cut_clip_gives_what_decodes_and_stays_unfinished(
    name: str, data_dir: Path, tiniest: str, capsys: Capture
) -> None:
    """A real clip without its last third; the MP4 has its index in front, as it must for a cut download to be read."""
    with av.open(str(data_dir / "videos_corner" / "odd_321x241_vp9.mp4")) as given:
        options = {"movflags": "faststart"} if name.endswith("mp4") else {}
        with av.open("whole" + name[3:], "w", options=options) as whole:
            stream = whole.add_stream_from_template(given.streams.video[0])
            for packet in given.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    whole.mux(packet)
    data = Path("whole" + name[3:]).read_bytes()
    Path(name).write_bytes(data[: 2 * len(data) // 3])
    command = ["run", name, "-o", "a.zarr", "--weights", tiniest, "-q"]
    assert call(command) == 1
    said = one_line(capsys)
    assert "cut short" in said
    assert "--tolerate-truncation" in said
    assert not Path("a.zarr").exists()
    unfinished = open_store("a.zarr")
    assert not unfinished.complete
    available = unfinished.available
    assert 5 < available < 24
    assert call([*command, "--tolerate-truncation", "--overwrite"]) == 0
    assert open_store("a.zarr").complete
    assert len(open_store("a.zarr")) == available


def test_a_damaged_clip_tells_how_many_frames_are_lost(data_dir: Path, tiniest: str, capsys: Capture) -> None:
    data = bytearray((data_dir / "videos_corner" / "odd_321x241_vp9.mp4").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    Path("damaged.mp4").write_bytes(data)
    assert call(["run", "damaged.mp4", "-o", "a.zarr", "--weights", tiniest, "-q"]) == 1
    assert "of 25 frames could not be decoded" in one_line(capsys)
    assert not Path("a.zarr").exists()
    assert 0 < open_store("a.zarr").available < 24


@pytest.mark.parametrize(
    ("arguments", "error", "code"),
    [
        (["run", "nowhere.mp4"], "SourceNotFoundError", 1),
        (["run", "nowhere.mp4", "--precision", "fp8"], "UsageError", 2),
        (["run", "nowhere.mp4", "--stpo", "3"], "NoSuchOption", 2),
    ],
)
def test_debug_shows_the_traceback_too(arguments: list[str], error: str, code: int, capsys: Capture) -> None:
    assert call(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert call([*arguments, "--debug"]) == code
    *traceback, last = capsys.readouterr().err.splitlines()
    assert last == line
    assert traceback[0] == "Traceback (most recent call last):"
    assert error in traceback[-1]


def test_usage_errors_name_the_commands_own_help(capsys: Capture) -> None:
    for command in ("run", "color", "train"):
        assert call([command, "--stpo"]) == 2
        assert f"(flowreel {command} --help shows" in capsys.readouterr().err
    assert call(["--stpo"]) == 2
    assert "(flowreel --help shows" in capsys.readouterr().err


def test_help_has_examples_and_every_command(capsys: Capture) -> None:
    assert call(["--help"]) == 0
    said = plain(capsys.readouterr().out)
    for command in ("run", "demo", "info", "train"):
        assert command in said
        assert call([command, "--help"]) == 0
        assert "Usage" in capsys.readouterr().out
    assert call(["run", "--help"]) == 0
    said = plain(capsys.readouterr().out)
    for words in ("flowreel run dance.mp4", "| flowreel run -", "'frames/*.png'", "synthetic:", "{stem}", "--bound"):
        assert words in said
    for form, _ in known_outputs():
        assert form in said


def imported_by(arguments: list[str], modules: set[str]) -> str:
    """Which of the modules a command has imported, as Python writes a set."""
    code = f"import sys; from flowreel.engine.cli import call; call({arguments}); print({modules} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_help_costs_no_heavy_import() -> None:
    assert imported_by(["run", "--help"], {"torch", "numpy", "av", "zarr", "PIL"}) == "set()"


def test_what_videos_and_images_are_is_told_without_torch(clip: Callable[..., Path]) -> None:
    os.mkdir("images")
    for number in range(2):
        PIL.Image.new("RGB", (64, 64)).save(f"images/{number}.png")
    assert imported_by(["info", str(clip("told.mp4")), "images"], {"torch", "zarr", "av"}) == "{'av'}"


def test_a_command_loads_torch_without_collecting_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    with cli.loading():  # torch is there already: the objects of whoever calls are left alone
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with cli.loading():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "nowhere.mp4"],
        ["run", "nowhere.mp4", "nothing.mp4"],
        ["demo", "--device", "tpu"],
        ["color", "nowhere.flo", "-o", "x"],
        ["export", "nowhere.zarr", "-o", "x.mp4"],
        ["repair", "nowhere.zarr", "nowhere.mp4"],
        ["doctor"],
        ["weights", "list"],
        ["weights", "info", "nowhere.pth"],
        ["weights", "convert", "nowhere.pth", "x.pth.tar"],
        ["weights", "download", "nothing"],
    ],
    ids=" ".join,
)
def test_each_command_that_needs_torch_does(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def noted() -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"flowreel.engine.cli.{arguments[0]}"), "loading", noted)
    assert call(arguments) == 130


def test_options_reach_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def note(source: str, outputs: object, *, progress: object, **options: object) -> None:
        given.update(options, source=source, outputs=outputs)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "run", note)
    options = ["--bound", "12.5", "--direction", "backward", "--start", "1:02.5", "--stop", "70s", "--step", "2"]
    options += ["--stream", "1", "--batch", "3", "--max-flow", "auto", "--queue-mb", "64", "--tolerate-truncation"]
    assert call(["run", "a.mp4", "-o", "x.zarr", "-o", "y.mp4", *options]) == 130
    expected = {
        "source": "a.mp4",
        "outputs": ["x.zarr", "y.mp4"],
        "bound": 12.5,
        "direction": "backward",
        "start": "1:02.5",
        "stop": "70s",
        "step": 2,
        "stream": 1,
        "batch": 3,
        "max_flow": "auto",
        "queue_mb": 64,
        "tolerate_truncation": True,
    }
    assert {name: given[name] for name in expected} == expected
    RunConfig.of(**{name: value for name, value in given.items() if name not in ("source", "outputs")})


def test_info_of_everything(tiny: str, capsys: Capture) -> None:
    call(["run", SOURCE, "-o", "a.zarr", "-o", "b.mp4", "--weights", tiny, "--quiet"])
    flow = np.zeros((3, 4, 2), np.float32)
    flow[0, 0], flow[2, 3] = (1.5, -2), (2e9, 0)
    write_flo("x.flo", flow)
    facts = {}
    for path in ("a.zarr", "b.mp4", "x.flo", tiny):
        assert call(["info", path]) == 0
        assert capsys.readouterr().out
        assert call(["info", path, "--json"]) == 0
        facts[path] = json.loads(capsys.readouterr().out)
    assert [facts[path]["kind"] for path in facts] == ["store", "video", "flo", "weights"]
    assert (facts["a.zarr"]["flows"], facts["a.zarr"]["complete"]) == (5, True)
    assert (facts["b.mp4"]["width"], facts["b.mp4"]["height"], facts["b.mp4"]["frames"]) == (96, 64, 5)
    assert facts["x.flo"]["first_vector"] == [1.5, -2]
    assert (facts["x.flo"]["unknown"], facts["x.flo"]["min"]) == (1, [0, -2])
    assert facts[tiny]["model"] == "FlowNet2C"


def test_info_of_an_unfinished_store(tiny: str, capsys: Capture) -> None:
    call(["run", SOURCE, "-o", "a.zarr", "--weights", tiny, "--quiet"])
    Path("a.zarr").rename("a.zarr.partial")
    for name in ("a.zarr", "a.zarr.partial"):
        assert call(["info", name, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["complete"], facts["available"]) == (False, 5)


def test_a_demo_that_cannot_render_its_clip_leaves_nothing_that_looks_finished(
    tiny: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full_disk:
        full_disk.setattr("flowreel.sinks.VideoWriter.encode", fails)
        assert call(["demo", "shown", "-q"]) == 1
    assert "cannot write shown/scene.mp4: No space left on device; free some space" in one_line(capsys)
    assert list(Path("shown").iterdir()) == []


def test_demo(tiny: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowreel.engine import demo

    scene = SyntheticConfig("objects", width=128, height=64, frames=5)
    monkeypatch.setattr(demo, "SCENE", scene)
    folder = "sho\x1b[1mwn"
    assert call(["demo", folder, "--weights", tiny]) == 0
    said, told = capsys.readouterr()
    assert "error against the truth" in said
    assert ".flo" in said
    assert r"open sho\x1b[1mwn/scene.zarr with" in said
    assert "\x1b" not in said + told
    assert r"rendering 5 frames into sho\x1b[1mwn/scene.mp4" in told
    assert "comparing it with the truth" in told
    for name in ("scene.mp4", "flow.mp4"):
        assert Path(folder, name).exists()
    store = open_store(f"{folder}/scene.zarr")
    assert len(store) == 4
    with PIL.Image.open(f"{folder}/comparison.png") as picture:
        frame, truth, computed = np.split(np.asarray(picture), 3, axis=1)
    with closing(SyntheticSource(scene, SelectConfig())) as source:
        np.testing.assert_array_equal(frame, list(source)[2].rgb.permute(1, 2, 0))
        flow = source.flow(2, 3)[0].permute(1, 2, 0).numpy()
    longest = float(np.hypot(flow[..., 0], flow[..., 1]).max())
    np.testing.assert_array_equal(truth, flow_to_color(flow, longest))
    np.testing.assert_array_equal(computed, flow_to_color(store[2].transpose(1, 2, 0), longest))
    assert call(["demo", folder, "--weights", tiny, "--quiet", "--overwrite"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["scene.mp4", "scene.zarr", "flow.mp4", "comparison.png"])
def test_demo_replaces_nothing_unasked(name: str, capsys: Capture) -> None:
    Path("demo").mkdir()
    Path("demo", name).write_text("the user's own")
    assert call(["demo"]) == 1
    assert "--overwrite" in one_line(capsys)
    assert [(path.name, path.read_text()) for path in Path("demo").iterdir()] == [(name, "the user's own")]


def test_demo_leaves_nothing_where_its_network_does_not_load(capsys: Capture) -> None:
    assert call(["demo", "--weights", "gone.safetensors"]) == 1
    assert "no weights file at gone.safetensors" in one_line(capsys)
    assert not Path("demo").exists()


def test_demo_leaves_nothing_where_its_outputs_may_not_be(tiny: str, capsys: Capture) -> None:
    Path("X.zarr").mkdir()
    Path("X.zarr/zarr.json").write_text("{}")
    assert call(["demo", "X.zarr/demo", "--weights", tiny]) == 2
    assert "lies inside the store" in one_line(capsys)
    assert not Path("X.zarr/demo").exists()


def test_options_reach_the_training_which_tells_how_far_it_is(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def note(config: TrainConfig, out: Path, *, report: Callable[[Progress], None], **options: object) -> Path:
        given.update(options, config=config, out=out)
        report(Progress(50, 20.0, 1.5, 2.0, 4.0, 1e-4))
        return out / "weights.safetensors"

    monkeypatch.setattr("flowreel.engine.training.train.train", note)
    assert call(["train", "a", "--device", "cpu"]) == 0
    assert given["config"] == TrainConfig()
    config = TrainConfig("FlowNet2CS", 0.5, 200, 1.0, 2, 128, 64, 7, 1e-3, last_only=True, seed=3, init="x.pth")
    options = "--model FlowNet2CS --width 0.5 --steps 200 --minutes 1 --batch 2 --height 128 --width-px 64 --reuse 7"
    options += " --learning-rate 1e-3 --last-only --seed 3 --init x.pth --precision fp32 --workers 4 --report-every 5"
    assert call(["train", "a", "--resume", "--device", "cpu", *options.split()]) == 0
    assert given == {
        "config": replace(config, batch_norm=False, precision="fp32"),
        "out": Path("a"),
        "resume": True,
        "workers": 4,
        "report_every": 5,
        "device": "cpu",
    }
    said = capsys.readouterr().err.splitlines()
    how = "loss 1.500  held-out error 2.00 px (no motion: 4.00)  20 s"
    assert said[0] == f"step 50 of 20000 on cpu  {how}, 7980 s to go"
    assert said[2] == f"step 50 on cpu  {how}, 40 s to go"
    assert call(["train", "a", "--no-batch-norm", "-q"]) == 0
    assert given["config"].batch_norm is False
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("small_textures")
def test_train_and_use(capsys: Capture) -> None:
    tiny = ["--width", "0.05", "--batch", "2", "--height", "64", "--width-px", "64", "--workers", "0"]
    folder = "[/w]:on:"  # neither markup nor the name of an emoji
    assert call(["train", folder, "--steps", "2", "--report-every", "1", "--device", "cpu", *tiny]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("step 2 of 2 on cpu")
    assert lines[2:] == [f"weights: {folder}/weights.safetensors"]
    assert call(["train", folder, "--steps", "2", *tiny]) == 1
    assert "--resume" in one_line(capsys)
    assert call(["run", SOURCE, "-o", "a.zarr", "--weights", f"{folder}/weights.safetensors", "-q"]) == 0


def spawn(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flowreel", *arguments]
    return subprocess.Popen(command, cwd=Path.cwd(), **options)  # type: ignore[call-overload, no-any-return]


def test_ctrl_c_ends_with_130_and_nothing_finished(tiny: str, fresh: Fresh) -> None:
    endless = "synthetic:still?size=64x64&frames=1000000"
    fresh.start("flowreel", ["run", endless, "-o", "a.zarr", "--weights", tiny], Path.cwd())
    interrupt(fresh, "a.zarr")


@pytest.mark.parametrize("loaded", ["flowreel.engine.cli.app", "importlib.metadata"])  # the second within typer
def test_ctrl_c_while_the_commands_load(loaded: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    class CtrlC:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == loaded:
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, loaded, raising=False)
    monkeypatch.setattr(sys, "meta_path", [CtrlC, *sys.meta_path])
    assert call(["--version"]) == 130
    assert one_line(capsys) == "flowreel: interrupted\n"


def test_a_terminal_shows_the_live_table(tiny: str, terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.file)
    assert call(["run", SOURCE, "-o", "a.zarr", "--weights", tiny]) == 0
    seen = terminal.said()
    said = plain(seen)
    assert "waits for input" in said
    assert "decode" in said
    assert "5 flows" in said
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")  # the cursor, hidden beside the table, is shown again


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    cli.shorten_warnings()
    shown = warnings.formatwarning("mind the gap", PrecisionWarning, "code.py", 3, "its line")
    assert shown == "PrecisionWarning: mind the gap\n"


def test_torch_waits_as_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "call", lambda arguments: 0)
    # They change the whole process, here that of the tests.
    for lasting in ("take_interrupts", "ignore_interrupts", "silence_pillow", "shorten_warnings", "outlive_stderr"):
        monkeypatch.setattr(cli, lasting, list)
    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": "active"})
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ == cli.patience() | {"OMP_WAIT_POLICY": "active"}
