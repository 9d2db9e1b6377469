"""Ctrl-C, a failure, a second run on the same outputs: users are told what is left, and nothing looks finished."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flowreel.engine.claims import Claim
from flowreel.engine.cli import call
from flowreel.engine.cli.table import Live
from flowreel.engine.data import FlowInfo
from flowreel.engine.errors import OutputWriteError, counted
from flowreel.engine.outputs import Progress
from flowreel.sinks import numbered, open_store, zarr_store
from tests.fakes.fresh import Fresh

SOURCE = "synthetic:objects?size=64x64&frames=12"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def tiny(tiny_weights: str) -> list[str]:
    return ["--weights", tiny_weights, "-q"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FlowInfo, "shard_length", lambda *_: 2)
    # What an output has taken it has then also written, however busy the machine.
    monkeypatch.setattr(zarr_store, "encode_workers", lambda *_: 0)
    monkeypatch.setattr(numbered, "file_workers", lambda *_: 0)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts a run, as Ctrl-C does, once every output has taken two flows."""

    def stop(_: Live, progress: Progress) -> None:
        if progress.flows_done >= 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Live, "show", stop)


def said(capsys: Capture) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


INTERRUPTS = """
import os, signal, sys, time
from flowreel.engine import cli
now = [0.0]
cli.time = type("", (), {"monotonic": staticmethod(lambda: now[0])})
cli.take_interrupts()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    now[0] = float(sys.argv[1])
    os.kill(os.getpid(), signal.SIGINT)
    print("went on")
    sys.exit(7)
"""


@pytest.mark.parametrize(("after_s", "code", "said"), [(0.1, 7, "went on\n"), (0.9, 7, "went on\n"), (1.1, 130, "")])
def test_a_second_ctrl_c_is_the_same_or_ends_it_at_once(after_s: float, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTS, str(after_s)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")


TERMINATED = """
import os, signal, sys
from flowreel.engine import cli
from flowreel.engine.cli.table import Live
def stop(live, progress):
    if progress.flows_done >= 2:
        os.kill(os.getpid(), signal.SIGTERM)
Live.show = stop
cli.main()
"""


def test_sigterm_is_a_stop_in_good_order(tiny: list[str], fresh: Fresh) -> None:
    """As sent by a job scheduler, or to a container that is stopped."""
    source = "synthetic:objects?size=64x64&frames=4000"
    arguments = ["run", source, "-o", "k.zarr", "-o", "k.mp4", "--batch", "1", *tiny]
    code, said = fresh.code(TERMINATED, *arguments)
    assert code == 128 + signal.SIGTERM
    assert said.startswith("flowreel: interrupted")
    assert len(said.splitlines()) == 1
    assert not Path("k.mp4.partial").exists()


DONE = """
import atexit, os, signal
from flowreel.engine import cli
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
cli.main()
"""


def test_sigterm_when_all_is_done_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", DONE, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("stopped")
def test_ctrl_c_tells_what_is_kept(tiny: list[str], capsys: Capture) -> None:
    outputs = ["-o", "k.zarr", "-o", "k.mp4", "-o", "f/%03d.flo", "--batch", "1"]
    assert call(["run", SOURCE, *outputs, *tiny]) == 130
    there, files = open_store("k.zarr").available, len(list(Path("f").iterdir()))
    assert there in range(2, 12, 2)
    assert files >= 2
    assert {path.suffix for path in Path("f").iterdir()} == {".partial"}
    assert not [path for path in Path("f").iterdir() if path.name[0] == "."]
    assert said(capsys) == (
        f"flowreel: interrupted; k.zarr.partial holds {there} of 11 flows; --resume continues it; "
        f"f keeps {counted(files, 'whole file')} such as 000.flo.partial"
    )
    assert sorted(os.listdir()) == ["f", "k.zarr.partial"]
    assert call(["export", "f", "-o", "x.zarr", "-q"]) == 1
    assert f"no flow files there; expected X.flo, X.kitti.png, X.npz, flow_x_N.jpg; {files} named" in said(capsys)


@pytest.mark.usefixtures("stopped")
def test_of_two_stores_the_first_is_continued(tiny: list[str], capsys: Capture) -> None:
    """And only that is promised: the second one is made from it, whatever was left of it."""
    run = ["run", SOURCE, "-o", "k.zarr", "-o", "l.zarr", "--batch", "1", *tiny]
    assert call(run) == 130
    kept = [f"{name} holds {open_store(name).available} of 11 flows" for name in ("k.zarr.partial", "l.zarr.partial")]
    assert said(capsys) == f"flowreel: interrupted; {kept[0]}; --resume continues it; {kept[1]}"


@pytest.mark.parametrize("complete", [False, True])
def test_with_only_the_second_of_two_stores_there(complete: bool, tiny: list[str], capsys: Capture) -> None:
    """A run killed before the first store has a whole shard may leave one of the second, which is not continued."""
    both = ["run", SOURCE, "-o", "k.zarr", "-o", "l.zarr", "--resume", *tiny]
    assert call(["run", SOURCE, "-o", "l.zarr", *tiny]) == 0
    whole = open_store("l.zarr")[:]
    if complete:
        assert call(both) == 1
        assert said(capsys).startswith("flowreel: l.zarr is already there: pass --overwrite")
        assert os.listdir() == ["l.zarr"]
        return
    Path("l.zarr").rename("l.zarr.partial")
    assert call(both) == 0
    assert sorted(os.listdir()) == ["k.zarr", "l.zarr"]
    assert np.array_equal(open_store("k.zarr")[:], whole)
    assert np.array_equal(open_store("l.zarr")[:], whole)


def test_a_failure_tells_it_too(tiny: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Live, progress: Progress) -> None:
        if progress.flows_done >= 2:
            raise OutputWriteError("cannot write at all")

    monkeypatch.setattr(Live, "show", fail)
    assert call(["run", SOURCE, "-o", "k.zarr", "-o", "f/%03d.flo", "--batch", "1", *tiny]) == 1
    files, there = len(list(Path("f").iterdir())), open_store("k.zarr").available
    assert said(capsys) == (
        f"flowreel: cannot write at all; k.zarr.partial holds {there} of 11 flows; --resume continues it; "
        f"f keeps {counted(files, 'whole file')} such as 000.flo.partial"
    )


def test_an_export_that_stopped_does_not_promise_to_resume(
    tiny: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(["run", "synthetic:still?size=64x64&frames=99", "-o", "k.zarr", *tiny]) == 0

    def stop(_: Live, progress: Progress) -> None:
        if progress.flows_done >= 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(Live, "show", stop)
    assert call(["export", "k.zarr", "-o", "c.zarr", "-q"]) == 130
    assert said(capsys) == f"flowreel: interrupted; c.zarr.partial holds {open_store('c.zarr').available} of 98 flows"
    assert call(["export", "k.zarr", "-o", "c.zarr", "-q"]) == 1  # which has no --resume
    assert said(capsys).endswith("--resume continues what flowreel run began, --overwrite starts afresh")


def test_other_outputs_that_were_cut_are_made_again(tiny: list[str], capsys: Capture) -> None:
    """The store is complete, but the files made from it are not: a folder with some of them does not count as done."""
    loud = [SOURCE, "-o", "k.zarr", "-o", "f/%03d.flo", "--resume", *tiny[:2]]
    assert call(["run", SOURCE, "-o", "k.zarr", *tiny]) == 0
    assert call(["run", *loud]) == 0
    whole = {path.name: path.read_bytes() for path in Path("f").iterdir()}
    assert len(whole) == 11
    capsys.readouterr()
    assert call(["run", *loud]) == 0
    assert "f/%03d.flo exists already" in capsys.readouterr().err
    for number in (9, 10):
        Path(f"f/{number:03}.flo").unlink()
    assert call(["run", *loud]) == 1  # whoever made or cut them, they are not this store's flow
    assert "f/%03d.flo: what is there is not the 11 flows of k.zarr" in said(capsys)
    for path in Path("f").iterdir():
        path.rename(f"{path}.partial")
    assert call(["run", *loud]) == 0
    assert {path.name: path.read_bytes() for path in Path("f").iterdir()} == whole


@pytest.mark.parametrize(
    ("output", "option"),
    [*itertools.product(("k.zarr", "k.mp4", "f/%03d.flo"), ("", "--overwrite")), ("k.zarr", "--resume")],
)
def test_a_second_run_is_refused_while_the_first_one_writes(
    output: str, option: str, tiny: list[str], capsys: Capture
) -> None:
    place = Path("f/.%03d.flo.partial" if output[0] == "f" else f"{output}.partial")
    place.parent.mkdir(exist_ok=True)
    first = Claim.of_folder(place, output) if output == "k.zarr" else Claim.of_file(place, output)
    assert call(["run", SOURCE, "-o", output, *tiny, *option.split()]) == 1
    assert said(capsys) == f"flowreel: {output} is being written by another run: wait for it to end"
    assert not list(Path().rglob("*.flo")) + list(Path().glob("k.zarr")) + list(Path().glob("k.mp4"))
    assert place.exists()
    first.release()


def test_of_two_processes_on_one_store_one_gives_up_and_nothing_is_lost(
    tiny: list[str], capsys: Capture, fresh: Fresh
) -> None:
    endless = "synthetic:still?size=64x64&frames=1000000"
    fresh.start("flowreel", ["run", endless, "-o", "k.zarr", *tiny], Path.cwd())
    fresh.until(Path("k.zarr.partial/flow/zarr.json"))
    for option in ([], ["--overwrite"], ["--resume"]):
        assert call(["run", SOURCE, "-o", "k.zarr", *tiny, *option]) == 1
        assert "is being written by another run" in said(capsys)
    assert fresh.stop(signal.SIGKILL) == (-signal.SIGKILL, "")
    assert call(["run", SOURCE, "-o", "k.zarr", *tiny, "--overwrite"]) == 0
    assert list(open_store("k.zarr").check()) == []
    assert os.listdir() == ["k.zarr"]
