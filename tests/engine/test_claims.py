"""A claim on a file or folder has one holder at a time, and ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flowreel.engine import claims
from flowreel.engine.claims import Claim
from flowreel.engine.errors import OutputBusyError, OutputWriteError

Take = Callable[[Path, str], Claim]


@pytest.fixture(params=[Claim.of_file, Claim.of_folder], ids=["file", "folder"])
def take(request: pytest.FixtureRequest) -> Take:
    found: Take = request.param
    return found


def test_one_at_a_time(tmp_path: Path, take: Take) -> None:
    first = take(tmp_path / "x.partial", "x")
    assert (first.made, first.held) == (True, True)
    for _ in range(2):
        with pytest.raises(OutputBusyError, match=r"^x is being written by another run"):
            take(tmp_path / "x.partial", "x")
    assert issubclass(OutputBusyError, OutputWriteError)
    first.release()
    second = take(tmp_path / "x.partial", "x")
    first.release()  # the system may have given its descriptor to the second
    with pytest.raises(OutputBusyError):
        take(tmp_path / "x.partial", "x")
    assert not second.made
    assert not first.held
    second.release()


def test_it_goes_along_when_it_is_renamed(tmp_path: Path, take: Take) -> None:
    first = take(tmp_path / "x.partial", "x")
    os.rename(tmp_path / "x.partial", tmp_path / "x")
    second = take(tmp_path / "x.partial", "x")  # the name is free
    assert second.made
    with pytest.raises(OutputBusyError):
        take(tmp_path / "x", "x")
    first.withdraw()  # another claim has its old name now: nothing may be deleted
    assert sorted(os.listdir(tmp_path)) == ["x", "x.partial"]
    take(tmp_path / "x", "x").release()
    second.release()


def test_to_withdraw_leaves_nothing_that_was_made_for_it(tmp_path: Path, take: Take) -> None:
    take(tmp_path / "new", "x").withdraw()
    assert os.listdir(tmp_path) == []
    take(tmp_path / "old", "x").release()
    take(tmp_path / "old", "x").withdraw()
    assert os.listdir(tmp_path) == ["old"]
    used = take(tmp_path / "used", "x")
    (tmp_path / "used" / "in").mkdir() if (tmp_path / "used").is_dir() else (tmp_path / "used").write_text("in")
    used.withdraw()
    assert sorted(os.listdir(tmp_path)) == ["old", "used"]


def test_nobody_has_it_any_more(tmp_path: Path, take: Take) -> None:
    """A claim that no variable refers to any more is released."""
    take(tmp_path / "x", "x")
    take(tmp_path / "x", "x").release()


def test_published_between_opening_and_locking(tmp_path: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lock is then on something that has got another name. It is given up, and a second try succeeds."""
    real, tries = claims.locked, []

    def slow(descriptor: int) -> bool:
        if not tries:
            os.rename(tmp_path / "x.partial", tmp_path / "x")
        tries.append(descriptor)
        return real(descriptor)

    take(tmp_path / "x.partial", "x").release()
    monkeypatch.setattr(claims, "locked", slow)
    claim = take(tmp_path / "x.partial", "x")
    assert len(tries) == 2
    assert claim.made
    claim.release()


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path, take: Take) -> None:
    kind = take.__name__  # type: ignore[attr-defined]
    code = (
        "import sys, pathlib; from flowreel.engine.claims import Claim\n"
        f"claim = Claim.{kind}(pathlib.Path(sys.argv[1]), 'x'); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputBusyError):
            take(tmp_path / "x", "x")
        other.send_signal(signal.SIGKILL)
        other.wait()
    claim = take(tmp_path / "x", "x")
    assert not claim.made
    claim.release()


def test_a_child_process_does_not_keep_it(tmp_path: Path, take: Take) -> None:
    claim = take(tmp_path / "x", "x")
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        os.close(theirs)
        os.read(ours, 1)  # until the other end is closed
        os._exit(0)
    claim.release()
    take(tmp_path / "x", "x").release()
    os.close(theirs)
    os.waitpid(child, 0)
    os.close(ours)


def test_without_locks_runs_go_on(tmp_path: Path, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", refused)
    first, second = take(tmp_path / "x", "x"), take(tmp_path / "x", "x")
    assert (first.made, second.made) == (True, False)
    second.release()
    first.withdraw()
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_held(tmp_path: Path, take: Take) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        take(tmp_path / "link", "x")
    with pytest.raises(FileNotFoundError):
        take(tmp_path / "no" / "folder", "x")
