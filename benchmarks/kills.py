"""``kill -9`` at random moments, then ``--resume``: is the store the same, byte for byte, each time?

One uninterrupted run gives the expected bytes, and the time from when a run first touches its unfinished store until
the store gets its final name. Each trial is a run in its own process, killed at a moment drawn uniformly from that
time; a run that has finished by then does not count, and the trial starts again. What the killed run left is resumed
until it is finished, and compared. In every third trial the resumed run is killed as well, to cover that case too.

Half of the trials read a video, where a resumed run must continue at the right frame. The others read a small scene,
which takes the network hardly any time, so that most kills happen while a file is written.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.data import found

SHARD_FLOWS = 2
SEED = 20
RUN = (
    "import sys, flowreel\n"
    "flowreel.run(sys.argv[1], sys.argv[2], model='FlowNet2C', batch=1, stop=int(sys.argv[3]), "
    "shard_bytes=int(sys.argv[4]), resume=True)"
)


@dataclass(frozen=True)
class Job:
    """One source, and the number of trials with it."""

    source: str
    height: int  # pixels
    width: int  # pixels
    frames: int
    trials: int


@dataclass(frozen=True)
class Death:
    """A run killed before it had finished, and what it left."""

    after_s: float  # since it first touched its unfinished store
    shards: int  # those whose flow was published
    temporaries: int  # files not yet renamed to their final names


@dataclass(frozen=True)
class Trial:
    """The outcome for one store."""

    same_bytes: bool  # the resumed store equals that of the uninterrupted run, and no other file is beside it
    deaths: tuple[Death, ...]


def run(short: bool = False) -> dict[str, object]:
    """One row per source: how many runs were killed before their end, and how many stores came out identical."""
    trials = 3 if short else 25
    video = found("videos", "conveyor_640x360.mp4")
    jobs = {
        video.name: Job(str(video), 360, 640, 31, trials),
        "scene 128x64": Job("synthetic:translate?size=128x64&frames=101", 64, 128, 101, trials),
    }
    chance = random.Random(SEED)
    results = {name: trials_of(job, chance) for name, job in jobs.items()}
    return {
        "seed": SEED,
        "shard_flows": SHARD_FLOWS,
        "rows": [row(name, jobs[name], tried) for name, tried in results.items()],
        "trials": {
            name: [{"same bytes": one.same_bytes, "deaths": [vars(death) for death in one.deaths]} for one in tried]
            for name, tried in results.items()
        },
    }


def row(name: str, job: Job, tried: list[Trial]) -> dict[str, Any]:
    deaths = [death for trial in tried for death in trial.deaths]
    return {
        "source": name,
        "flows": job.frames - 1,
        "stores": len(tried),
        "runs killed while running": len(deaths),
        "with shards published": sum(death.shards > 0 for death in deaths),
        "while a file was written": sum(death.temporaries > 0 for death in deaths),
        "byte-identical after --resume": sum(trial.same_bytes for trial in tried),
    }


def trials_of(job: Job, chance: random.Random) -> list[Trial]:
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole.zarr")
        seconds = undisturbed(job, whole)
        expected = contents(whole)
        tried = []
        for number in range(job.trials):
            store = Path(folder, "killed", "x.zarr")
            deaths = deaths_of(job, store, lambda: chance.uniform(0, seconds), 2 if number % 3 == 2 else 1)
            finished = process(job, store).wait() == 0
            alone = [path.name for path in store.parent.iterdir()] == [store.name]
            tried.append(Trial(finished and alone and contents(store) == expected, tuple(deaths)))
            print(f"{number + 1} of {job.trials}: {tried[-1]}", file=sys.stderr, flush=True)
            shutil.rmtree(store.parent)
    return tried


def deaths_of(job: Job, store: Path, draw_s: Callable[[], float], times: int) -> list[Death]:
    """Kills runs, each resuming what the last one left, until ``times`` in a row were killed before their end."""
    partial = Path(f"{store}.partial")
    deaths: list[Death] = []
    while len(deaths) < times:
        running, _ = begun(job, store)
        after_s = draw_s()
        time.sleep(after_s)
        running.send_signal(signal.SIGKILL)
        code = running.wait()
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a run failed by itself with exit code {code}")
        if code == 0 or store.exists():  # it finished first: start again
            shutil.rmtree(store.parent)
            deaths.clear()
            continue
        shards = len(list(partial.glob("flow/c/*/0/0/0")))
        deaths.append(Death(after_s, shards, len(list(partial.rglob("*.partial")))))
    return deaths


def undisturbed(job: Job, store: Path) -> float:
    """Seconds of a run, from when it first touches its unfinished store until that gets its final name."""
    running, began_s = begun(job, store)
    while not store.exists() and running.poll() is None:
        time.sleep(0.001)
    seconds = time.perf_counter() - began_s
    if running.wait() != 0:
        raise RuntimeError(f"the undisturbed run failed with exit code {running.returncode}")
    return seconds


def begun(job: Job, store: Path) -> tuple[subprocess.Popen[bytes], float]:
    """Starts a run and waits until it touches its unfinished store. Returns the run and the time of that."""
    before = touched(store)
    running = process(job, store)
    while touched(store) == before and running.poll() is None:
        time.sleep(0.001)
    return running, time.perf_counter()


def touched(store: Path) -> int | None:
    """When an entry of the unfinished store's folder was last created, renamed or removed; None: there is no store."""
    try:
        return Path(f"{store}.partial").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def process(job: Job, store: Path) -> subprocess.Popen[bytes]:
    arguments = [job.source, str(store), str(job.frames), str(SHARD_FLOWS * 8 * job.height * job.width)]
    return subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.DEVNULL)


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of all files in a folder, by relative path; empty if there is no folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
